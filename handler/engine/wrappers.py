"""Forward wrappers: they make a denoiser's forwards cheaper, or answer module calls without one.

A call's way::

    call ─▶ before ─┬─▶ an answer ───────────────────────────────────┬─▶ the request runs on
                    └─▶ narrow ─▶ forward, shared ─▶ widen ─▶ after ─┘
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from handler.engine.forward import Failure
from handler.engine.parking import ModuleCall, Slot

__all__ = ["UNANSWERED", "CompiledForwards", "ForwardWrapper", "Wrappers"]

UNANSWERED: Final = object()
"""What `ForwardWrapper.before` returns for a call that needs its forward."""


class ForwardWrapper(Protocol):
    """One way to make a denoiser's forwards cheaper; a subclass overrides what it needs.

    It is shown the calls of denoisers, and those of their companions (ControlNets); only denoisers'
    forwards are wrapped. What it remembers of a request between calls belongs into
    ``call.ticket.memory`` under a key of its own, and is freed with the ticket. Requests that are
    `exact` never meet a wrapper.
    """

    takes_adapters: bool = True
    """Whether what `wrap_forward` makes runs the module's own layers, to which LoRAs are added."""

    def wrap_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """What runs batches in place of a denoiser's `forward`, such as compiled code."""
        return forward

    def before(self, call: ModuleCall) -> Any:
        """The output of a call, so that its rows leave the tick; or `UNANSWERED`."""
        return UNANSWERED

    def narrow(self, call: ModuleCall) -> ModuleCall:
        """What runs in place of a call that `before` left unanswered: fewer of its rows."""
        return call

    def widen(self, call: ModuleCall, output: Any) -> Any:
        """The output of the whole `call`, of that of the call that `narrow` made of it."""
        return output

    def after(self, call: ModuleCall, output: Any) -> None:
        """See the output of a call that `before` left unanswered.

        The pipeline may change `output` in place: copy what is to be kept.
        """
        return


class CompiledForwards(ForwardWrapper):
    """Batches run what `compiler` makes of each denoiser's forward, such as `torch.compile`.

    Rows with LoRAs run the module's own code, in forwards of their own.
    """

    takes_adapters = False

    def __init__(self, compiler: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self._compiler = compiler

    def wrap_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward`, compiled."""
        return self._compiler(forward)


class Wrappers:
    """Wrappers in their order, the first one nearest to the module.

    Each one wraps what the ones before it made; the last is asked first for an answer, and sees
    also what the ones before it answered.
    """

    def __init__(self, wrappers: Sequence[ForwardWrapper]) -> None:
        self._wrappers = wrappers

    def install(self, slot: Slot) -> None:
        """Put all wrappers around a slot's forward; where it has LoRAs, those that take them."""
        for wrapper in self._wrappers:
            is_same = slot.real is slot.adapted
            slot.real = wrapper.wrap_forward(slot.real)
            if wrapper.takes_adapters:
                slot.adapted = slot.real if is_same else wrapper.wrap_forward(slot.adapted)

    def before(self, call: ModuleCall) -> Any:
        """The answer of the first that has one, a `Failure` if it raised; else `UNANSWERED`."""
        if not self._concern(call):
            return UNANSWERED
        for place in reversed(range(len(self._wrappers))):
            try:
                answer = self._wrappers[place].before(call)
            except Exception as error:
                return Failure(error)
            if answer is not UNANSWERED:
                return self._tell(call, answer, self._wrappers[place + 1 :])
        return UNANSWERED

    def narrow(self, call: ModuleCall) -> ModuleCall | Failure:
        """What runs in place of `call`; a `Failure` if one of them raised."""
        if not self._concern(call):
            return call
        try:
            for wrapper in reversed(self._wrappers):
                call = wrapper.narrow(call)
        except Exception as error:
            return Failure(error)
        return call

    def after(self, call: ModuleCall, output: Any) -> Any:
        """What `call` returns, when all have seen it; a `Failure` if one of them raised."""
        return self._tell(call, output, self._wrappers) if self._concern(call) else output

    def _concern(self, call: ModuleCall) -> bool:
        is_shown = call.slot.is_denoiser or call.slot.is_companion
        return bool(self._wrappers) and is_shown and not call.ticket.exact

    def _tell(self, call: ModuleCall, output: Any, wrappers: Sequence[ForwardWrapper]) -> Any:
        if isinstance(output, Failure):
            return output
        try:
            for wrapper in wrappers:
                output = wrapper.widen(call, output)
                wrapper.after(call, output)
        except Exception as error:
            return Failure(error)
        return output
