"""A private view of a pipeline for each request: shared modules, schedulers of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from handler.engine.ticket import StepEnd, Ticket
from handler.pipelines.signature import call_defaults

__all__ = ["make_view"]


def make_view(pipeline: Any, ticket: Ticket) -> tuple[Any, dict[str, Any]]:
    """A shallow copy of `pipeline` for one request, and the keyword arguments to call it with.

    Pipelines keep the state of a call on themselves and on their scheduler, so each request has
    its own of both; the modules with the weights are shared.
    """
    view = _private_copy(pipeline)
    if ticket.scheduler is not None:
        view.scheduler = ticket.scheduler
    kwargs = dict(ticket.kwargs)
    parameters = call_defaults(pipeline)
    if "callback_on_step_end" in parameters:
        theirs = kwargs.get("callback_on_step_end")
        # Callback objects declare the tensors they want; such a request reports no steps.
        if not isinstance(theirs, (PipelineCallback, MultiPipelineCallbacks)):
            kwargs["callback_on_step_end"] = _report_steps(ticket, theirs)
    elif "callback" in parameters:
        kwargs["callback"] = _report_steps_of(view, ticket, kwargs.get("callback"))
    return view, kwargs


def _private_copy(pipeline: Any) -> Any:
    """A shallow copy with schedulers of its own, those of pipelines inside it included."""
    view = copy.copy(pipeline)
    for name, part in vars(pipeline).items():
        if isinstance(part, SchedulerMixin):
            vars(view)[name] = copy.deepcopy(part)
        elif isinstance(part, DiffusionPipeline):
            vars(view)[name] = _private_copy(part)
    view.set_progress_bar_config(disable=True)
    return view


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
        timesteps = getattr(view.scheduler, "timesteps", None)
        order = getattr(view.scheduler, "order", 1)
        _end_step(ticket, step, None if timesteps is None else len(timesteps) // order, latents)

    return callback


def _end_step(
    ticket: Ticket, step: int, num_steps: int | None, latents: torch.Tensor | None
) -> None:
    ticket.num_steps_done, ticket.num_steps = step + 1, num_steps
    if ticket.on_step is not None:
        ticket.on_step(StepEnd(step + 1, num_steps, latents))
