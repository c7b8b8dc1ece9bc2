"""A step cache: a denoiser's outputs that are predicted from those of the steps before.

What is remembered lies with the ticket and goes with it, so requests of any length, with a step
cache or without, share forwards::

    step       0  1  2  3  4  5  6  …  last
    computed   ●  ●  ●  ●     ●     ●  ●     its rows are in the tick's forward
    predicted              ○     ○           the request runs on with what the last ones tell

A step is computed or predicted as a whole: all calls of the denoiser, guidance's two among them,
and those of a ControlNet before it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from handler.acceleration.step_policy import ORDER, Measured, allowed_error, is_close, weights
from handler.batching.arguments import EXACT_VALUES, STEP_PARAMETERS, members
from handler.batching.merging import output_members, rebuild
from handler.engine.parking import ModuleCall
from handler.engine.ticket import Ticket
from handler.engine.wrappers import UNANSWERED, ForwardWrapper
from handler.pipelines.steps import is_one_call_a_step, num_steps_of

__all__ = ["StepCache"]

_NUM_KEPT = ORDER + 1
# Of the length of a row that is nothing but zeros.
_LEAST = 1e-12


class StepCache(ForwardWrapper):
    """Predicts the share of the steps that each request allows, where predictions are close."""

    def before(self, call: ModuleCall) -> Any:
        """The predicted output of a call, or what goes into a denoiser whose output is."""
        ticket = call.ticket
        if not ticket.shortcuts.step_cache:
            return UNANSWERED
        memory = self._memory_of(ticket)
        if memory is None or ticket.num_steps_done >= len(memory.times):
            return UNANSWERED
        memory.enter(ticket.num_steps_done, ticket.shortcuts.step_cache)
        return memory.answer(call)

    def after(self, call: ModuleCall, output: Any) -> None:
        """Remember an output that was computed, and compare it with what was expected."""
        memory = call.ticket.memory.get(self)
        if isinstance(memory, _Memory) and memory.step == call.ticket.num_steps_done:
            memory.learn(call, output)

    def _memory_of(self, ticket: Ticket) -> _Memory | None:
        """None: its steps cannot be told apart."""
        if self not in ticket.memory:
            times = _times_of(ticket)
            ticket.memory[self] = None if times is None else _Memory(times)
        memory: _Memory | None = ticket.memory[self]
        return memory


@dataclass(slots=True)
class _Outputs:
    """The last computed outputs of one call of each step."""

    kind: Hashable
    """What the calls have in common that may be predicted from each other."""
    times: list[float] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)


@dataclass(slots=True)
class _Memory:
    """What one request's steps have computed so far."""

    times: Sequence[float]
    """The scheduler's time of every step."""
    step: int = -1
    share: float = 0.0
    """Of the steps, how many may be predicted."""
    predicts: bool = False
    """Whether the present step is predicted."""
    num_predicted: int = 0
    """How many steps were."""
    measured: list[tuple[tuple[float, ...], float, torch.Tensor]] = field(default_factory=list)
    """Of each call of the last computed step, the error of its own prediction."""
    outputs: dict[Hashable, _Outputs] = field(default_factory=dict)
    num_computed: int = 0
    """Calls of denoisers in the last computed step."""
    numbers: dict[int, int] = field(default_factory=dict)
    """How many calls each module has had in the present step."""
    asked: Hashable = None
    """The call that was asked about last: its module, and its number in the step."""

    def enter(self, step: int, share: float) -> None:
        """Decide about a step when its first call comes."""
        if step == self.step:
            return
        self.step, self.share = step, share
        self.numbers.clear()
        allowed = allowed_error(step, len(self.times), share, self.num_predicted)
        self.predicts = allowed > 0 and self._is_close(allowed)
        if self.predicts:
            self.num_predicted += 1
        else:
            self.measured.clear()
            self.num_computed = 0

    def answer(self, call: ModuleCall) -> Any:
        """What a call of a predicted step returns; `UNANSWERED` where it has to be computed."""
        module = id(call.slot.module)
        number = self.numbers.get(module, 0)
        self.numbers[module] = number + 1
        self.asked = (module, number)
        outputs, kind = self.outputs.get(self.asked), _kind_of(call)
        if outputs is None or outputs.kind != kind:
            self.outputs[self.asked] = _Outputs(kind)
            if call.slot.is_companion:
                # With another picture's weight, or for other rows, the denoiser will draw anew.
                self._forget_denoisers()
            return UNANSWERED
        if not self.predicts:
            return UNANSWERED
        if call.slot.is_companion:
            return outputs.values[-1]  # only for a denoiser that is predicted itself
        if len(outputs.times) < _NUM_KEPT:
            return UNANSWERED
        return _predicted(outputs, self.times[self.step])

    def learn(self, call: ModuleCall, output: Any) -> None:
        """Keep the output of the call that was asked about last."""
        outputs = self.outputs[self.asked]
        if call.slot.is_companion:
            outputs.values = [output]
            return
        now = self.times[self.step]
        self.num_computed += 1
        try:
            kept = _mapped(torch.clone, output)
        except TypeError:  # it holds what cannot be seen, nor predicted
            return
        # Only where the next step may be predicted does anybody ask.
        is_asked = allowed_error(self.step + 1, len(self.times), self.share, self.num_predicted) > 0
        if is_asked and len(outputs.times) == _NUM_KEPT:
            error = _error_of(_predicted(outputs, now), output, call.num_rows)
            self.measured.append((tuple(outputs.times), now, error))
        outputs.times = [*outputs.times, now][-_NUM_KEPT:]
        outputs.values = [*outputs.values, kept][-_NUM_KEPT:]

    def _is_close(self, allowed: float) -> bool:
        """Whether every call of the present step would be predicted with no more error."""
        now = self.times[self.step]
        return 0 < len(self.measured) == self.num_computed and all(
            is_close(Measured(points, at, float(error)), (*points, at)[-_NUM_KEPT:], now, allowed)
            for points, at, error in self.measured
        )

    def _forget_denoisers(self) -> None:
        self.num_predicted -= self.predicts
        self.predicts = False
        self.measured.clear()
        self.num_computed = 0
        self.outputs = {
            key: each for key, each in self.outputs.items() if key == self.asked or not each.times
        }


def _times_of(ticket: Ticket) -> Sequence[float] | None:
    """The scheduler's times of all steps of a request; None where these are not told."""
    view = ticket.view
    scheduler = getattr(view, "scheduler", None)
    times = getattr(scheduler, "timesteps", None)
    num_steps = num_steps_of(view)
    if not isinstance(times, torch.Tensor) or num_steps is None:
        return None
    if not is_one_call_a_step(scheduler):
        return None
    # A picture to begin with leaves out the first of them.
    found: list[float] = times.flatten().tolist()[-num_steps:]
    return found if len(found) == num_steps else None


def _kind_of(call: ModuleCall) -> Hashable:
    """What calls of one module have in common whose outputs lie on one curve."""
    ticket = call.ticket
    shortcuts, num_steps = ticket.shortcuts, num_steps_of(ticket.view) or 1
    is_guided = shortcuts.is_guided(ticket.num_steps_done, num_steps)
    arguments = call.bound.arguments.items()
    forms = _forms({name: value for name, value in arguments if name not in STEP_PARAMETERS})
    return (call.num_rows, is_guided, tuple(forms))


def _forms(value: Any) -> Iterator[Hashable]:
    """Shapes of tensors and plain values, wherever they stand."""
    if isinstance(value, torch.Tensor):
        yield (value.dtype, tuple(value.shape))
    elif isinstance(value, EXACT_VALUES):
        yield value
    else:
        for key, member in members(value) or ():
            yield key
            yield from _forms(member)


def _predicted(outputs: _Outputs, at: float) -> Any:
    """The output at a time, by the polynomial through those that are known."""
    factors = weights(outputs.times, at)

    def mix(*values: torch.Tensor) -> torch.Tensor:
        # In half precision the differences of what is alike would be lost.
        summed = sum(w * v.float() for w, v in zip(factors, values, strict=True))
        return torch.as_tensor(summed).to(values[-1].dtype)

    return _mapped(mix, *outputs.values)


def _error_of(predicted: Any, output: Any, rows: int) -> torch.Tensor:
    """The largest error of a row, relative to its length; a number on the outputs' device."""
    found: list[torch.Tensor] = []

    def compare(expected: torch.Tensor, computed: torch.Tensor) -> torch.Tensor:
        each = computed.float().reshape(rows if len(computed) == rows else 1, -1)
        off = (expected.float().reshape(each.shape) - each).norm(dim=1)
        found.append((off / each.norm(dim=1).clamp_min(_LEAST)).amax())
        return computed

    _mapped(compare, predicted, output)
    return torch.stack(found).amax()


def _mapped(function: Callable[..., torch.Tensor], *outputs: Any) -> Any:
    """`function` of what is real numbers in outputs of one form; all else as in the last.

    Raises:
        TypeError: what an object in them holds cannot be seen.
    """
    last = outputs[-1]
    if isinstance(last, torch.Tensor):
        return function(*outputs) if last.is_floating_point() else last
    columns = [output_members(output) for output in outputs]
    if columns[-1] is None:
        return last
    rows = zip(*(column or () for column in columns), strict=True)
    return rebuild(last, [_mapped(function, *(value for _, value in row)) for row in rows])
