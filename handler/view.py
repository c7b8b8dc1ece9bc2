"""What one request gets of a pipeline: a private view of it, its own scheduler, and its cost."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from PIL import Image

from handler.policy import Cost
from handler.ticket import StepEnd, Ticket

__all__ = ["call_defaults", "estimate_cost", "least_forwards", "make_view", "unknown_arguments"]

# Arguments that leave steps out, or say in another way how many there are.
_SHORTENING = ("denoising_end", "denoising_start", "sigmas", "strength", "timesteps")
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def call_defaults(pipeline: Any) -> dict[str, Any]:
    """The parameters of the pipeline's ``__call__`` and their defaults."""
    kind: type = type(pipeline)
    return _call_parameters(kind)[0]


def unknown_arguments(pipeline: Any, kwargs: Mapping[str, Any]) -> list[str]:
    """The names in `kwargs` that the pipeline's ``__call__`` does not have."""
    kind: type = type(pipeline)
    defaults, takes_any = _call_parameters(kind)
    return [] if takes_any else sorted(kwargs.keys() - defaults.keys())


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


def estimate_cost(pipeline: Any, kwargs: Mapping[str, Any]) -> Cost:
    """What a call with `kwargs` will occupy, as far as its arguments tell.

    Read from the names that diffusers uses throughout; the engine corrects the rows when the
    denoiser is first called. Guidance above 1 counts double, also where a model takes it embedded.

    Raises:
        ValueError: a size or a number of pictures is below one.
    """
    given = {**call_defaults(pipeline), **{k: v for k, v in kwargs.items() if v is not None}}

    def number(name: str, default: float) -> float:
        value = given.get(name)
        if not isinstance(value, (int, float)):
            return default
        if value < 1 and name != "guidance_scale":
            raise ValueError(f"{name} is {value}; it is at least 1")
        return value

    prompts = max(
        (_batch_size(given.get(name)) for name in ("prompt", "prompt_embeds", "image_embeds")),
        default=1,
    )
    images = max(1, prompts) * int(number("num_images_per_prompt", 1))
    native = _native_size_px(pipeline)
    drawn_on = _image_size_px(given.get("image")) or (native, native)
    height, width = number("height", drawn_on[0]), number("width", drawn_on[1])
    guided = 2 if number("guidance_scale", 1.0) > 1.0 else 1
    image_pixels = int(height * width)
    return Cost(images * guided, images * image_pixels, image_pixels)


def least_forwards(pipeline: Any, kwargs: Mapping[str, Any]) -> int:
    """How often a call with `kwargs` calls the denoiser at the least; 0: there is no telling."""
    given = {**call_defaults(pipeline), **{k: v for k, v in kwargs.items() if v is not None}}
    num_steps = given.get("num_inference_steps")
    is_shortened = any(given.get(name) is not None for name in _SHORTENING)
    return num_steps if isinstance(num_steps, int) and not is_shortened else 0


@functools.cache
def _call_parameters(kind: type) -> tuple[dict[str, Any], bool]:
    """The parameters of ``kind.__call__`` with their defaults, and whether it takes any other.

    Where it takes ``**kwargs``, those of the class above, to which such wrappers pass them on.
    """
    defaults: dict[str, Any] = {}
    for owner in kind.__mro__:
        if "__call__" not in vars(owner):
            continue
        parameters = inspect.signature(vars(owner)["__call__"]).parameters.values()
        for parameter in parameters:
            if parameter.name != "self" and parameter.kind not in _VARIADIC:
                defaults.setdefault(parameter.name, parameter.default)
        # In diffusers' own pipelines it only takes arguments of long ago.
        is_last = owner.__module__.startswith("diffusers.")
        if is_last or not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return defaults, False
    return defaults, True


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


def _batch_size(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return int(value.shape[0]) if value.ndim else 1
    if isinstance(value, Sequence) and not isinstance(value, str):
        return len(value)
    return 1


def _image_size_px(image: Any) -> tuple[int, int] | None:
    """Height and width of a picture that a call starts from; of the first of several."""
    if isinstance(image, (list, tuple)) and image:
        return _image_size_px(image[0])
    if isinstance(image, Image.Image):
        return image.height, image.width
    if isinstance(image, torch.Tensor) and image.ndim >= 2:
        return int(image.shape[-2]), int(image.shape[-1])
    if isinstance(image, numpy.ndarray) and image.ndim >= 3:
        return int(image.shape[-3]), int(image.shape[-2])
    return None


def _native_size_px(pipeline: Any) -> int:
    """The side of the square picture that the pipeline draws when asked for no size."""
    for name in ("unet", "transformer", "prior"):
        config = getattr(getattr(pipeline, name, None), "config", None)
        sample_size = getattr(config, "sample_size", None)
        if isinstance(sample_size, int):
            return sample_size * int(getattr(pipeline, "vae_scale_factor", 8))
    default = getattr(pipeline, "default_sample_size", 64)
    return int(default) * int(getattr(pipeline, "vae_scale_factor", 8))


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
