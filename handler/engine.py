"""Run many calls of one unmodified diffusers pipeline at once, a forward of the denoiser for all.

Every request runs the pipeline's own ``__call__`` in a greenlet of its own. Where that calls a
module, the greenlet parks; a tick runs one forward for all parked calls that fit together, hands
each its rows, and lets each run on to its next call::

    request A ─▶ pipeline.__call__ ─▶ unet(x_A, t=981) ┐ park
    request B ─▶ pipeline.__call__ ─▶ unet(x_B, t=401) ┤ park    merge ─▶ forward ─▶ split
    request C ─▶ pipeline.__call__ ─▶ unet(x_C, t= 21) ┘ park      │
        ▲───────────────── its rows to each ───────────────────────┘

One thread runs all of it. Whoever owns the engine calls `step` from that thread and nothing else
happens: no locks, no timers, and the same arrivals give the same ticks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent

from handler import policy
from handler.errors import Cancelled, DeadlineExceeded, TooLarge
from handler.forward import BatchedForward, Counters, Failure
from handler.parking import Parked, RequestGreenlet, find_slots
from handler.policy import Cost, Limits
from handler.schedulers import make_scheduler
from handler.ticket import State, StepEnd, Ticket
from handler.view import call_defaults, estimate_cost, make_view

__all__ = ["BUCKETS", "InFlightEngine"]

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
"""Row counts to pad to, for forwards that are compiled or captured for a few shapes."""


class InFlightEngine:
    """Serves calls of `pipeline`, any number in flight, from the thread that calls `step`.

    Args:
        pipeline: any diffusers pipeline; left as it was by `close`.
        modules: what to park (``"unet"``, ``"vae.decode"``); by default found by their names.
        max_rows, max_pixels: what may be in flight at once, as `Cost` counts it.
        exact: run every request's rows alone, bit-equal to the pipeline called directly.
        buckets: row counts to pad forwards to, such as `BUCKETS`; none: no padding.
        compile_forward: wraps each denoiser's real forward, such as `torch.compile`.
        clock: seconds; deadlines and times are read from it and nothing else.

    Raises:
        ValueError: the pipeline moves its modules between devices, or a name in `modules` is wrong.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        modules: Sequence[str] | None = None,
        max_rows: int = 16,
        max_pixels: int | None = None,
        max_overtakes: int = 16,
        exact: bool = False,
        buckets: Sequence[int] = (),
        compile_forward: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if getattr(pipeline, "_all_hooks", None):
            raise ValueError(
                "this pipeline offloads its modules to the CPU between calls, which requests in "
                "flight cannot share; load it without enable_model_cpu_offload"
            )
        self.pipeline = pipeline
        self.exact = exact
        self.clock = clock
        self.limits = Limits(max_rows, max_pixels, max_overtakes)
        self._forward = BatchedForward(clock, max_rows, buckets)
        self._adapters = _Adapters(pipeline)
        # Perturbed-attention pipelines swap the attention processors of the shared modules, and put
        # them back only where a call returns.
        self._one_at_a_time = any(k.__name__ == "PAGMixin" for k in type(pipeline).__mro__)
        self._processors = [
            (module, module.attn_processors)
            for module in pipeline.components.values()
            if self._one_at_a_time and hasattr(module, "attn_processors")
        ]
        self._waiting: list[Ticket] = []
        self._parked: dict[Ticket, Parked] = {}
        self._ended: list[Ticket] = []
        self._stepping = False
        self._slots = find_slots(pipeline, modules)
        for slot in self._slots:
            if compile_forward is not None and slot.is_denoiser:
                slot.real = compile_forward(slot.real)
            slot.install()

    @property
    def counters(self) -> Counters:
        """What was done so far: forwards, rows, retries."""
        return self._forward.counters

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to report."""
        return bool(self._waiting or self._parked or self._ended)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._parked)

    @property
    def in_flight(self) -> Cost:
        """What the running requests occupy together."""
        return sum((ticket.cost for ticket in self._parked), Cost(0, 0))

    def submit(
        self,
        kwargs: Mapping[str, Any],
        *,
        scheduler: str | Any | None = None,
        deadline_s: float | None = None,
        exact: bool | None = None,
        adapters: Mapping[str, float] | None = None,
        on_step: Callable[[StepEnd], None] | None = None,
    ) -> Ticket:
        """Queue one call of the pipeline with exactly these keyword arguments.

        `scheduler` is a diffusers class name or a short name (``"euler"``), or a scheduler object
        that nobody else uses. `deadline_s` is in seconds from now. `adapters` maps the names of
        loaded adapters to weights. Give each call its own `generator`.

        Raises:
            ValueError: an argument, the scheduler or an adapter that the pipeline does not have.
            TooLarge: it would never fit.
        """
        unknown = sorted(kwargs.keys() - call_defaults(self.pipeline).keys())
        if unknown:
            raise ValueError(f"{type(self.pipeline).__name__} takes no argument {unknown}")
        if isinstance(scheduler, str):
            scheduler = make_scheduler(self.pipeline, scheduler)
        cost = estimate_cost(self.pipeline, kwargs)
        if not self.limits.hold(cost):
            raise TooLarge(_too_large(cost, self.limits))
        now_s = self.clock()
        ticket = Ticket(
            kwargs=dict(kwargs),
            cost=cost,
            scheduler=scheduler,
            deadline=None if deadline_s is None else now_s + deadline_s,
            exact=self.exact if exact is None else exact,
            adapters=self._adapters.checked(adapters),
            on_step=on_step,
            submitted_s=now_s,
        )
        self._waiting.append(ticket)
        return ticket

    def step(self) -> list[Ticket]:
        """One tick: drop who is out of time, admit, one forward a group. Returns who ended."""
        self._stepping = True
        started_s = self.clock()
        try:
            # Grad mode belongs to the thread: off here, greenlets may enter and leave `no_grad`
            # in any order and only ever restore what is off already.
            with torch.no_grad():
                self._expire()
                self._admit()
                self._tick()
        finally:
            self._stepping = False
            self.counters.tick_s += self.clock() - started_s
        ended, self._ended = self._ended, []
        return ended

    def run(self) -> list[Ticket]:
        """Step until nothing is left; returns who ended, in that order."""
        ended = self.step()
        while self.has_work:
            ended += self.step()
        return ended

    def cancel(self, ticket: Ticket, reason: BaseException | None = None) -> bool:
        """End `ticket` with `reason` (by default `Cancelled`); False if it had ended already.

        Its rows are free at once. Called from within a step (an `on_step`), at the next.
        """
        if ticket.ended:
            return False
        ticket.cancelling = reason or Cancelled("the request was cancelled")
        if not self._stepping:
            with torch.no_grad():
                self._unwind(ticket)
        return True

    def close(self) -> None:
        """Cancel what is left and give the pipeline its methods back."""
        for ticket in [*self._waiting, *self._parked]:
            self.cancel(ticket, Cancelled("the engine was closed"))
        for slot in self._slots:
            slot.remove()
        self._adapters.restore()
        self._slots = []

    def _expire(self) -> None:
        live = [*self._waiting, *self._parked]
        for ticket in policy.expired(live, self.clock()):
            ticket.cancelling = ticket.cancelling or DeadlineExceeded(
                f"the deadline passed after {ticket.num_steps_done} steps"
            )
        for ticket in live:
            if ticket.cancelling is not None:
                self._unwind(ticket)

    def _admit(self) -> None:
        if self._one_at_a_time and self._parked:
            return
        admission = policy.admit(self._waiting, self.in_flight, self.limits)
        for place, times in admission.overtaken.items():
            self._waiting[place].overtaken += times
        joining = [self._waiting[place] for place in admission.joining]
        for ticket in joining[:1] if self._one_at_a_time else joining:
            self._waiting.remove(ticket)
            self._start(ticket)

    def _tick(self) -> None:
        """Give every parked call that may run one forward, and let its request run on."""
        self.counters.ticks += 1
        for ticket in policy.choose(list(self._parked), self.limits):
            ticket.last_tick = self.counters.ticks
        calls = [p for t, p in self._parked.items() if t.last_tick == self.counters.ticks]
        for group in self._forward.group(calls):
            self._adapters.activate(group.calls[0].ticket.adapters)
            for call, result in zip(group.calls, self._forward.run(group), strict=True):
                if call.slot.is_denoiser:
                    call.ticket.denoised_s = self.clock()
                self._resume(call.ticket, result)

    def _start(self, ticket: Ticket) -> None:
        view, kwargs = make_view(self.pipeline, ticket)
        ticket.run = RequestGreenlet(lambda: view(**kwargs))
        ticket.run.ticket = ticket
        ticket.state, ticket.admitted_s = State.RUNNING, self.clock()
        self._adapters.activate(ticket.adapters)
        self._continue(ticket, ticket.run.switch)

    def _resume(self, ticket: Ticket, result: Any) -> None:
        run = ticket.run
        assert run is not None
        if isinstance(result, Failure):
            self._continue(ticket, run.throw, result.error)
        else:
            self._continue(ticket, run.switch, result)

    def _continue(self, ticket: Ticket, switch: Callable[..., Any], *value: Any) -> None:
        """Let the request run to its next parked call or to its end."""
        assert ticket.run is not None
        ticket.run.parent = getcurrent()
        self._parked.pop(ticket, None)
        try:
            reached = switch(*value)
        except BaseException as error:
            self._end(ticket, State.FAILED, error)
            if not isinstance(error, Exception):
                raise
            return
        if ticket.run.dead:
            self._end(ticket, State.DONE, reached)
            return
        self._parked[ticket] = reached
        self._correct_cost(ticket, reached)

    def _correct_cost(self, ticket: Ticket, parked: Parked) -> None:
        """Replace the estimated rows by those that the denoiser is really called with."""
        if not parked.slot.is_denoiser:
            return
        rows = parked.num_rows
        if rows > self.limits.max_rows:
            too_large = TooLarge(_too_large(Cost(rows, ticket.cost.pixels), self.limits))
            ticket.cancelling = ticket.cancelling or too_large
            self._unwind(ticket)
        else:
            ticket.cost = Cost(rows, ticket.cost.pixels)

    def _unwind(self, ticket: Ticket) -> None:
        """End a request wherever it stands; its greenlet runs its `finally` clauses and is gone."""
        reason, run = ticket.cancelling, ticket.run
        assert reason is not None
        if run is None:
            self._waiting.remove(ticket)
        else:
            self._parked.pop(ticket, None)
            run.parent = getcurrent()
            # A pipeline that parks again on its way out is told once more.
            while not run.dead:
                run.throw(GreenletExit)
        self._end(ticket, State.FAILED, reason)

    def _end(self, ticket: Ticket, state: State, outcome: Any) -> None:
        if ticket.run is not None:
            for module, processors in self._processors:
                module.set_attn_processor(dict(processors))
        ticket.end(state, outcome, self.clock())
        self._ended.append(ticket)


class _Adapters:
    """The LoRA adapters that are active on the shared modules: one set at a time."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._asked = False
        self._before: list[str] = []
        self._active: Mapping[str, float] | None = None

    def checked(self, adapters: Mapping[str, float] | None) -> Mapping[str, float] | None:
        """`adapters`, if the pipeline has loaded them all."""
        if adapters is None:
            return None
        listed: dict[str, list[str]] = getattr(self._pipeline, "get_list_adapters", dict)()
        loaded = {name for names in listed.values() for name in names}
        missing = sorted(adapters.keys() - loaded)
        if missing:
            raise ValueError(f"adapters {missing} are not loaded; loaded are {sorted(loaded)}")
        if not self._asked:
            self._before, self._asked = self._pipeline.get_active_adapters(), True
        return dict(adapters)

    def activate(self, adapters: Mapping[str, float] | None) -> None:
        """Make `adapters` the active set; None is the set that was active at first."""
        if not self._asked or adapters == self._active:
            return
        names = self._before if adapters is None else list(adapters)
        if names:
            weights = [1.0] * len(names) if adapters is None else list(adapters.values())
            self._pipeline.enable_lora()
            self._pipeline.set_adapters(names, weights)
        else:
            self._pipeline.disable_lora()
        self._active = adapters

    def restore(self) -> None:
        self.activate(None)


def _too_large(cost: Cost, limits: Limits) -> str:
    pixels = "any number of" if limits.max_pixels is None else str(limits.max_pixels)
    return (
        f"the request needs {cost.rows} rows and {cost.pixels} pixels at once; "
        f"this server takes up to {limits.max_rows} rows and {pixels} pixels"
    )
