"""Find the calls of a pipeline that can wait for company, and make them wait.

A parked call is a request's greenlet that stands inside ``module.forward(...)`` until the engine
hands it its result. The instance attribute in front of the real method is the only thing replaced.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from handler.merging import num_rows
from handler.ticket import Ticket

__all__ = ["Parked", "RequestGreenlet", "Slot", "find_slots"]

_DENOISERS = re.compile(r"(unet|transformer|prior|decoder)(_\d+)?$")
_ENCODERS = re.compile(r"(controlnet|text_encoder|image_encoder|adapter)(_\d+)?$")
_AUTOENCODERS = ("vae", "movq", "vqvae", "vqgan")


class RequestGreenlet(greenlet):
    """The greenlet in which one request runs the pipeline's ``__call__``."""

    ticket: Ticket


@dataclass(eq=False, slots=True)
class Slot:
    """A method of a module that is parked: ``unet.forward``, ``vae.decode``."""

    name: str
    module: torch.nn.Module
    method: str
    is_denoiser: bool
    real: Callable[..., Any]
    signature: inspect.Signature
    inherited: bool

    def install(self) -> None:
        """Put `park` in front of the real method."""
        real = self.real

        @functools.wraps(real)
        def parked(*args: Any, **kwargs: Any) -> Any:
            return park(self, args, kwargs)

        setattr(self.module, self.method, parked)

    def remove(self) -> None:
        """Leave the module as it was before `install`."""
        if self.inherited:
            self.module.__dict__.pop(self.method, None)
        else:
            setattr(self.module, self.method, self.real)


@dataclass(eq=False, slots=True)
class Parked:
    """One call of one request, waiting for its result."""

    slot: Slot
    ticket: Ticket
    bound: inspect.BoundArguments

    @property
    def num_rows(self) -> int:
        """Its batch size; 0 for a call without tensors."""
        return num_rows(self.bound.arguments) or 0


def park(slot: Slot, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Wait for the engine's result of this call; calls that cannot wait are run where they stand.

    Those are: a call from outside any request; a call under a thread's context that differs from
    the engine's (gradients on, autocast), since that context would follow the thread and not the
    request; a text encoder between the scaling and unscaling of its LoRA weights.
    """
    current = getcurrent()
    if not isinstance(current, RequestGreenlet) or _has_context_of_its_own():
        return slot.real(*args, **kwargs)
    if not slot.is_denoiser and _scales_lora(current.ticket):
        return slot.real(*args, **kwargs)
    engine = current.parent
    assert engine is not None
    bound = slot.signature.bind(*args, **kwargs)
    return engine.switch(Parked(slot, current.ticket, bound))


def find_slots(pipeline: Any, names: Iterable[str] | None = None) -> list[Slot]:
    """The methods of `pipeline` to park, found by diffusers' component names or given by `names`.

    A name is a component (``"unet"``, meaning its forward) or a component's method
    (``"vae.decode"``).

    Raises:
        ValueError: a given name is no module of the pipeline.
    """
    modules = {
        name: component
        for name, component in pipeline.components.items()
        if isinstance(component, torch.nn.Module)
    }
    wanted = list(names) if names is not None else list(_default_names(modules))
    slots: dict[tuple[int, str], Slot] = {}
    for name in wanted:
        component, _, method = name.partition(".")
        if component not in modules or not hasattr(modules[component], method or "forward"):
            raise ValueError(f"cannot park {name!r}; the pipeline's modules are {sorted(modules)}")
        module, method = modules[component], method or "forward"
        real = getattr(module, method)
        slots[id(module), method] = Slot(
            name=f"{component}.{method}",
            module=module,
            method=method,
            is_denoiser=method == "forward" and _ENCODERS.match(component) is None,
            real=real,
            signature=inspect.signature(real),
            inherited=method not in module.__dict__,
        )
    return list(slots.values())


def _default_names(modules: dict[str, torch.nn.Module]) -> Iterable[str]:
    for name, module in modules.items():
        if _DENOISERS.match(name) or _ENCODERS.match(name):
            yield name
        # Pipelines cast an autoencoder that wants it to float32 around its decoding; a request
        # that parked in between would leave it in the wrong precision for the others.
        elif (
            name in _AUTOENCODERS
            and hasattr(module, "decode")
            and not getattr(getattr(module, "config", None), "force_upcast", False)
        ):
            yield f"{name}.decode"


def _has_context_of_its_own() -> bool:
    return (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
    )


def _scales_lora(ticket: Ticket) -> bool:
    return any(
        "scale" in (ticket.kwargs.get(name) or ())
        for name in ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
    )
