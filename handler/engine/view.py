"""A view of a pipeline for each request: modules are shared, all other state is its own."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.configuration_utils import FrozenDict
from diffusers.image_processor import VaeImageProcessor
from transformers import FeatureExtractionMixin, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_base import ImageProcessingMixin

from handler.engine.ticket import StepEnd, Ticket
from handler.pipelines.broken_pictures import watch_pictures
from handler.pipelines.prompt_embeddings import read_prompts
from handler.pipelines.schedulers import seed_noise, start_at_the_first
from handler.pipelines.signature import call_defaults
from handler.pipelines.steps import num_steps_of

__all__ = ["make_view"]

_log = logging.getLogger(__name__)

# What keeps nothing of a call: a copy of it would only cost time and memory.
_ATOMIC = (str, bytes, int, float, complex, type(None), type, torch.dtype, torch.device)
_STATELESS = (
    *_ATOMIC,
    torch.nn.Module,
    torch.Generator,
    FrozenDict,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    FeatureExtractionMixin,
    ImageProcessingMixin,
    VaeImageProcessor,
)


def make_view(pipeline: Any, ticket: Ticket) -> tuple[Any, dict[str, Any]]:
    """A shallow copy of `pipeline` for one request, and the keyword arguments to call it with.

    The ticket keeps the copy, which tells where the call stands.
    Pipelines keep the state of a call on themselves, on their scheduler and on other components, so
    each request has its own of all these; the modules with the weights are shared.
    """
    view = ticket.view = _private_copy(pipeline)
    if ticket.scheduler is not None:
        view.scheduler = ticket.scheduler
    if ticket.prompts is not None:
        read_prompts(view, ticket.prompts)
    kwargs = dict(ticket.kwargs)
    seed_noise(getattr(view, "scheduler", None), kwargs.get("generator"))
    start_at_the_first(getattr(view, "scheduler", None))
    parameters = call_defaults(pipeline)
    if "callback_on_step_end" in parameters:
        theirs = kwargs.get("callback_on_step_end")
        # Callback objects declare the tensors they want; such a request reports no steps.
        if not isinstance(theirs, (PipelineCallback, MultiPipelineCallbacks)):
            kwargs["callback_on_step_end"] = _report_steps(ticket, theirs)
    elif "callback" in parameters:
        kwargs["callback"] = _report_steps_of(view, ticket, kwargs.get("callback"))
    return view, kwargs


def _private_copy(pipeline: Any, memo: dict[int, Any] | None = None) -> Any:
    """A shallow copy with schedulers, guiders and whatever else keeps state of its own.

    What it shares is found by what it is, inside of other objects too: weights, tokenizers,
    processors. `memo` is `copy.deepcopy`'s.
    """
    view = copy.copy(pipeline)
    memo = {} if memo is None else memo
    memo[id(pipeline)] = view
    _remember_shared(vars(pipeline), memo)
    for name, part in vars(pipeline).items():
        if isinstance(part, DiffusionPipeline):
            vars(view)[name] = memo.get(id(part)) or _private_copy(part, memo)
        elif not isinstance(part, _STATELESS):
            vars(view)[name] = _own(part, memo)
    view.set_progress_bar_config(disable=True)
    watch_pictures(view)
    return view


def _remember_shared(value: Any, memo: dict[int, Any]) -> None:
    """Enter in `memo` all within `value` that copies have in common with it."""
    pending, seen = [value], set[int]()
    while pending:
        each = pending.pop()
        if id(each) in seen or isinstance(each, _ATOMIC):
            continue
        seen.add(id(each))
        if isinstance(each, _STATELESS):
            memo[id(each)] = each
        elif isinstance(each, Mapping):
            pending += each.values()
        elif isinstance(each, (list, tuple, set)):
            pending += each
        elif not isinstance(each, (DiffusionPipeline, SchedulerMixin)):
            pending += getattr(each, "__dict__", {}).values()


def _own(part: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(part, memo)
    except Exception:
        if isinstance(part, SchedulerMixin):
            raise
        _warn_of(type(part).__name__)
        return part


@functools.cache
def _warn_of(kind: str) -> None:
    _log.warning("requests share a %s, which cannot be copied", kind)


def _report_steps(ticket: Ticket, theirs: Callable[..., Any] | None) -> Callable[..., Any]:
    def on_step_end(view: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        returned = theirs(view, step, timestep, tensors) if theirs is not None else tensors
        _end_step(ticket, step, getattr(view, "num_timesteps", None), tensors.get("latents"))
        return returned

    return on_step_end


def _report_steps_of(view: Any, ticket: Ticket, theirs: Callable[..., Any] | None) -> Any:
    """The same for pipelines that have the older callback, which is not told whose step it is."""

    def callback(step: int, timestep: Any, latents: torch.Tensor) -> None:
        if theirs is not None:
            theirs(step, timestep, latents)
        _end_step(ticket, step, num_steps_of(view), latents)

    return callback


def _end_step(
    ticket: Ticket, step: int, num_steps: int | None, latents: torch.Tensor | None
) -> None:
    ticket.num_steps_done, ticket.num_steps = step + 1, num_steps
    if ticket.on_step is not None:
        ticket.on_step(StepEnd(step + 1, num_steps, latents))
