"""Parking: find the module calls of a pipeline that can share forwards, and make them wait.

A request's greenlet stands inside ``module.forward(...)`` until the engine hands it the result. The
instance attribute in front of the real method is the only thing replaced.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet

from handler.batching.arguments import num_rows
from handler.engine.ticket import Ticket
from handler.pipelines.adapters import scales_adapters
from handler.pipelines.broken_pictures import check_decoded
from handler.pipelines.placement import modules_of, placement_problem
from handler.pipelines.shared_state import is_upcast

__all__ = ["ModuleCall", "RequestGreenlet", "Slot", "denoisers_of", "find_slots"]

_log = logging.getLogger(__name__)

_MAX_EXITS = 100

# Marks the methods that an engine has put in front of the real ones.
_PARKS = "_parks_requests"

# Combined pipelines put the name of the pipeline inside in front: prior_prior, decoder_vqgan.
_DENOISERS = re.compile(r"(\w+_)?(unet|transformer|prior|decoder)(_\d+)?$")
# Their forward comes before the denoiser's in every step.
_COMPANIONS = re.compile(r"(\w+_)?controlnet(_\d+)?$")
_ENCODERS = re.compile(r"(\w+_)?(controlnet|text_encoder|image_encoder|adapter)(_\d+)?$")
_AUTOENCODERS = re.compile(r"(\w+_)?(vae|movq|vqvae|vqgan)$")


class RequestGreenlet(greenlet):
    """The greenlet in which one request runs the pipeline's ``__call__``.

    Made in the engine's own context, which every call that parks has to share.
    """

    def __init__(self, ticket: Ticket, call: Callable[[], Any]) -> None:
        super().__init__(call)
        self.ticket = ticket
        self.context = _thread_context()

    def exit(self) -> None:
        """Unwind from wherever it stands; what it raises on its way out is ignored."""
        self.parent = getcurrent()
        # A pipeline that parks again on its way out is told again, up to a limit.
        for _ in range(_MAX_EXITS):
            with suppress(Exception):
                self.throw(GreenletExit)
            if self.dead:
                return
        _log.error("request %d does not end when told to, and is abandoned", self.ticket.serial)


@dataclass(eq=False, slots=True)
class Slot:
    """A method of a module that is parked: ``unet.forward``, ``vae.decode``."""

    name: str
    module: torch.nn.Module
    method: str
    is_denoiser: bool
    real: Callable[..., Any]
    """What serves batches: the module's own method, or faster code that may round otherwise."""
    signature: inspect.Signature
    attribute: Callable[..., Any] | None
    """What the module itself had under this name; None where its class has the method."""
    is_companion: bool = False
    """Whether each of its calls is followed by one of the denoiser, as a ControlNet's is."""
    adapted: Callable[..., Any] = field(init=False)
    """What serves batches of which rows have LoRAs; `real`, unless that is code without them."""
    plain: Callable[..., Any] = field(init=False)
    """The module's own method, for calls that must not differ from the pipeline called alone."""

    _defaults: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.plain = self.adapted = self.real
        parameters = self.signature.parameters.values()
        takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        self._defaults = {} if takes_any else defaults

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
        """The arguments of a call by name, without those that are the parameter's default.

        So that a pipeline that says ``added_cond_kwargs=None`` may share a forward with one that
        leaves it out.
        """
        bound = self.signature.bind(*args, **kwargs)
        arguments = bound.arguments
        for name, default in self._defaults.items():
            if name in arguments and arguments[name] is default:
                del arguments[name]
        return bound

    def install(self) -> None:
        """Put `park` in front of the real method."""
        real = self.real

        @functools.wraps(real)
        def parked(*args: Any, **kwargs: Any) -> Any:
            return park(self, args, kwargs)

        setattr(parked, _PARKS, True)
        setattr(self.module, self.method, parked)

    def remove(self) -> None:
        """Leave the module as it was before `install`."""
        if self.attribute is None:
            self.module.__dict__.pop(self.method, None)
        else:
            setattr(self.module, self.method, self.attribute)


@dataclass(eq=False, slots=True)
class ModuleCall:
    """A parked call of a module: one request waits for its result."""

    slot: Slot
    ticket: Ticket
    bound: inspect.BoundArguments
    num_rows: int
    """Its batch size; 0 for a call whose arguments are no batch."""


def park(slot: Slot, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Wait for the engine's result of this call; calls that cannot wait are run where they stand.

    Those are: a call from outside any request; a call under a thread's context that differs from
    the engine's (gradients, inference mode, autocast), since that context would follow the thread
    and not the request; a text encoder between the scaling and unscaling of its LoRA weights, or
    with a hook of the pipeline's own, which would see the rows of others.
    """
    current = getcurrent()
    if not isinstance(current, RequestGreenlet) or _thread_context() != current.context:
        return slot.plain(*args, **kwargs)
    ticket = current.ticket
    if not slot.is_denoiser and (
        scales_adapters(ticket.kwargs) or _is_hooked(slot.module, ticket.pipeline)
    ):
        return slot.plain(*args, **kwargs)
    engine = current.parent
    assert engine is not None
    bound = slot.bind(args, kwargs)
    rows = num_rows(bound.arguments) or 0
    output = engine.switch(ModuleCall(slot, ticket, bound, rows))
    if slot.method == "decode":
        check_decoded(output)
    return output


def find_slots(*pipelines: Any, names: Iterable[str] | None = None) -> list[Slot]:
    """The methods of `pipelines` to park, found by diffusers' component names or given by `names`.

    A name is a component (``"unet"``, meaning its forward) or a component's method
    (``"vae.decode"``), of those pipelines that have it. What several pipelines share is one slot,
    whatever they call it.

    Raises:
        ValueError: a given name is no module of any pipeline; a module was compiled in place, is
            moved between devices or serves another engine.
    """
    given = None if names is None else list(names)
    for pipeline in pipelines:
        if problem := placement_problem(pipeline):
            raise ValueError(problem)
    components = [modules_of(pipeline) for pipeline in pipelines]
    slots: dict[tuple[int, str], Slot] = {}
    for modules in components:
        for name in _default_names(modules) if given is None else given:
            if given is None or _has(modules, name):
                slot = _make_slot(modules, name)
                slots.setdefault((id(slot.module), slot.method), slot)
    for name in given or ():
        if not any(_has(modules, name) for modules in components):
            known = sorted({component for modules in components for component in modules})
            raise ValueError(f"cannot park {name!r}; the pipeline's modules are {known}")
    return list(slots.values())


def denoisers_of(pipeline: Any, slots: Iterable[Slot]) -> frozenset[int]:
    """The identities of the modules of `pipeline` that are parked as denoisers."""
    own = {id(module) for module in modules_of(pipeline).values()}
    return frozenset(id(s.module) for s in slots if s.is_denoiser and id(s.module) in own)


def _has(modules: dict[str, torch.nn.Module], name: str) -> bool:
    component, _, method = name.partition(".")
    return component in modules and hasattr(modules[component], method or "forward")


def _make_slot(modules: dict[str, torch.nn.Module], name: str) -> Slot:
    """The slot of a component, or of a component's method, by its name."""
    component, _, method = name.partition(".")
    method = method or "forward"
    module = modules[component]
    # `torch.compile(module)` wraps a module: it has a forward of its own, that takes anything,
    # and passes the rest on.
    original = getattr(module, "_orig_mod", module)
    if method != "forward":
        module = original
    if original._compiled_call_impl is not None:
        raise ValueError(
            f"{component} was compiled in place, where the engine would be compiled with it; "
            "let the engine compile its forward (wrappers=[CompiledForwards(torch.compile)])"
        )
    real = getattr(module, method)
    if hasattr(real, _PARKS) or hasattr(getattr(original, method), _PARKS):
        raise ValueError(f"{name} serves another engine already; close() that one, or submit to it")
    return Slot(
        name=f"{component}.{method}",
        module=module,
        method=method,
        is_denoiser=method == "forward" and _ENCODERS.match(component) is None,
        is_companion=method == "forward" and _COMPANIONS.match(component) is not None,
        real=real,
        signature=inspect.signature(getattr(original, method)),
        attribute=module.__dict__.get(method),
    )


def _default_names(modules: dict[str, torch.nn.Module]) -> Iterable[str]:
    for name, module in modules.items():
        if _DENOISERS.match(name) or _ENCODERS.match(name):
            yield name
        elif _AUTOENCODERS.match(name):
            for method in ("encode", "decode"):
                # A request that parked while it is cast would leave it in the wrong precision for
                # the others.
                if hasattr(module, method) and not is_upcast(module, method):
                    yield f"{name}.{method}"


def _is_hooked(module: torch.nn.Module, pipeline: Any) -> bool:
    """Whether the code of `pipeline` has registered a forward hook within `module`."""
    own = {kind.__module__ for kind in type(pipeline).__mro__}
    return any(
        getattr(hook, "__module__", None) in own
        for part in module.modules()
        for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values())
    )


def _thread_context() -> tuple[bool, ...]:
    """What torch keeps per thread and changes how a forward runs."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )
