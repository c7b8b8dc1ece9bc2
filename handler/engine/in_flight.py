"""The engine: many requests of unmodified diffusers pipelines at once, sharing their forwards.

Every request runs the pipeline's own ``__call__`` in a greenlet of its own. Where that calls a
module, the greenlet parks; a tick runs one forward for all module calls that fit together, hands
each its rows, and lets each request run on to its next module call::

    request A ─▶ pipeline.__call__ ─▶ unet(x_A, t=981) ┐ park
    request B ─▶ pipeline.__call__ ─▶ unet(x_B, t=401) ┤ park    merge ─▶ forward ─▶ split
    request C ─▶ pipeline.__call__ ─▶ unet(x_C, t= 21) ┘ park      │
        ▲───────────────── its rows to each ───────────────────────┘

One thread runs all of it: the engine's owner calls `step` from that thread, and nothing happens in
between. So there are no locks and no timers, and the same arrivals give the same ticks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch

from handler.engine import policy
from handler.engine.forward import BatchedForward, Counters
from handler.engine.global_random import GlobalRandom
from handler.engine.lead import Lead, cuda_marker
from handler.engine.parking import ModuleCall, denoisers_of, find_slots
from handler.engine.policy import Limits
from handler.engine.row_adapters import RowAdapters
from handler.engine.runs import Runs
from handler.engine.shortcuts import NONE, Shortcuts
from handler.engine.submission import Intake, Served, Submission
from handler.engine.tick_times import Pace
from handler.engine.ticket import State, StepEnd, Ticket
from handler.engine.wrappers import UNANSWERED, ForwardWrapper, Wrappers
from handler.errors import Cancelled, DeadlineExceeded
from handler.pipelines.adapted_layers import LoraLayers
from handler.pipelines.adapters import AdapterSets, PreparedLora
from handler.pipelines.cost import Cost
from handler.pipelines.placement import is_asynchronous
from handler.pipelines.prompt_embeddings import PromptReading
from handler.pipelines.shared_state import SharedState

__all__ = ["BUCKETS", "InFlightEngine"]

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
"""Row counts to pad to, for forwards that are compiled or captured for a few shapes."""

# The task of an engine's only pipeline, where it was given without a name.
_ONLY_TASK = "default"


class InFlightEngine:
    """Serves calls of pipelines, any number in flight, from the thread that calls `step`.

    Args:
        pipelines: any diffusers pipeline, or several by the name of their task; requests of
            pipelines that share modules share their forwards. Left as they were by `close`.
        modules: what to park (``"unet"``, ``"vae.decode"``); by default found by their names.
        max_rows, max_pixels: what may be in flight at once, as `Cost` counts it.
        max_overtakes: how often a request that waits for room may be overtaken.
        exact: run every request's rows alone, bit-equal to the pipeline called directly.
        buckets: row counts to pad forwards to, such as `BUCKETS`; none: no padding.
        proves_ahead: see once for each kind of group that rows are kept apart, not whenever one
            differs in a new way, which has to look in every tick; by default where looking waits
            for a device.
        wrappers: what makes the denoisers' forwards cheaper, the first nearest to the module.
        clock: seconds; deadlines and times are read from it and nothing else.

    Raises:
        ValueError: no pipeline is given, another engine serves one of them, one moves its modules
            between devices, or a name in `modules` is wrong.
    """

    def __init__(
        self,
        pipelines: Any | Mapping[str, Any],
        *,
        modules: Sequence[str] | None = None,
        max_rows: int = 16,
        max_pixels: int | None = None,
        max_overtakes: int = 16,
        exact: bool = False,
        buckets: Sequence[int] = (),
        proves_ahead: bool | None = None,
        wrappers: Sequence[ForwardWrapper] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        named = dict(pipelines) if isinstance(pipelines, Mapping) else {_ONLY_TASK: pipelines}
        if not named:
            raise ValueError("an engine needs a pipeline")
        self.pipelines: Mapping[str, Any] = MappingProxyType(named)
        self.exact = exact
        self.clock = clock
        self.limits = Limits(max_rows, max_pixels, max_overtakes)
        # Up to the rows that may be in flight: a larger bucket would not fit either.
        capped = [*sorted(b for b in buckets if b < max_rows), max_rows] if buckets else []
        if proves_ahead is None:
            proves_ahead = is_asynchronous(named.values())
        self._adapters = AdapterSets(list(named.values()))
        adapters = RowAdapters(self._adapters)
        self._forward = BatchedForward(
            clock, max_rows, adapters, capped, self._prepare, proves_ahead
        )
        shared_states = {task: SharedState(pipeline) for task, pipeline in named.items()}
        self._random = GlobalRandom(named.values())
        self._runs = Runs(shared_states, self.limits, adapters, clock, self.counters, self._random)
        self._lead = Lead(cuda_marker(named.values()))
        self._waiting: list[Ticket] = []
        self._is_at_work = False
        self._closed = False
        self._pace = Pace()
        self._intake = Intake(self._adapters, self._pace, clock)
        self._wrappers = Wrappers(wrappers)
        self._slots = find_slots(*named.values(), names=modules)
        self._served = {
            task: Served(
                task,
                pipeline,
                shared_states[task].is_exclusive,
                denoisers_of(pipeline, self._slots),
            )
            for task, pipeline in named.items()
        }
        for slot in self._slots:
            if slot.is_denoiser:
                self._wrappers.install(slot)
        for slot in self._slots:
            slot.install()

    @property
    def pipeline(self) -> Any:
        """The first pipeline, which draws what names no task."""
        return next(iter(self.pipelines.values()))

    @property
    def counters(self) -> Counters:
        """What was done so far: forwards, rows, retries."""
        return self._forward.counters

    @property
    def num_held_up(self) -> int:
        """Tickets that the next step would leave waiting."""
        return len(self._waiting) - len(self._admission().joining)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to report."""
        return bool(self._waiting or self._runs.parked or self._runs.ended)

    @property
    def num_waiting(self) -> int:
        """Tickets that have not started."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Tickets that are in flight."""
        return len(self._runs.parked)

    @property
    def in_flight(self) -> Cost:
        """What the running tickets occupy together."""
        return sum((ticket.cost for ticket in self._runs.parked), Cost(0, 0))

    def submit(
        self,
        kwargs: Mapping[str, Any],
        *,
        task: str | None = None,
        scheduler: str | Any | None = None,
        deadline_s: float | None = None,
        exact: bool | None = None,
        adapters: Mapping[str, float] | None = None,
        on_step: Callable[[StepEnd], None] | None = None,
        prompts: PromptReading | None = None,
        shortcuts: Shortcuts = NONE,
    ) -> Ticket:
        """Queue one call of a pipeline with exactly these keyword arguments.

        `task` names the pipeline, the first by default. `scheduler` is a diffusers class name or a
        short name (``"euler"``), or a scheduler object to copy. `deadline_s` is in seconds from
        now. `adapters` maps the names of loaded adapters to weights. `prompts` says that prompts
        longer than the text encoder are read whole, and whether words have weights. `shortcuts` are
        for the wrappers that take them. Give each call its own `generator`.

        Raises:
            ValueError: an unknown task; an argument, the scheduler or an adapter that the pipeline
                does not have.
            TooLarge: it would never fit.
            DeadlineExceeded: its steps would surely last longer, at the present pace.
            RuntimeError: the engine is closed.
        """
        if self._closed:
            raise RuntimeError("the engine is closed")
        served = self._served.get(next(iter(self._served)) if task is None else task)
        if served is None:
            raise ValueError(f"no pipeline for the task {task!r}; there are {list(self._served)}")
        exact = self.exact if exact is None else exact
        asked = Submission(
            kwargs, scheduler, deadline_s, exact, adapters, on_step, prompts, shortcuts
        )
        ticket = self._intake.ticket(served, asked, self.limits)
        self._waiting.append(ticket)
        return ticket

    @property
    def loras_in_use(self) -> frozenset[str]:
        """The LoRAs that requests in flight, or waiting to be, have named."""
        tickets = [*self._waiting, *self._runs.parked]
        return frozenset[str]().union(*(ticket.lora_names for ticket in tickets))

    def prepare_lora(self, layers: LoraLayers) -> PreparedLora:
        """A LoRA that adds to these layers, by component and the layer's path, to be attached.

        All that takes its time; in any thread, also during `step`.

        Raises:
            ValueError: a layer is not there, or takes no LoRA.
        """
        return self._adapters.prepare(layers)

    def attach_lora(self, name: str, lora: PreparedLora) -> None:
        """Let requests name a LoRA.

        No module is changed, and no request that does not name it sees anything of it.

        Raises:
            ValueError: the name is taken.
        """
        self._adapters.attach(name, lora)

    def detach_lora(self, name: str) -> None:
        """Forget a LoRA that was attached; requests that have named it keep it."""
        self._adapters.detach(name)

    def step(self) -> list[Ticket]:
        """One tick: drop who is out of time, admit, one forward a group. Returns who ended."""
        started_s, served = self.clock(), list[ModuleCall]()
        try:
            with self._at_work():
                self._lead.wait()
                self.counters.forward_s += self.clock() - started_s
                self._expire()
                self._admit()
                served = self._tick()
                self._lead.note()
        finally:
            seconds = self.clock() - started_s
            self.counters.tick_s += seconds
        if served:
            denoisers = {id(call.slot.module) for call in served}
            self._pace.note(seconds, [call.ticket.cost for call in served], denoisers)
        if not self._runs.parked:
            self._pace.forget()
        ended, self._runs.ended = self._runs.ended, []
        return ended

    def run(self) -> list[Ticket]:
        """Step until nothing is left; returns who ended, in that order."""
        ended = self.step()
        while self.has_work:
            ended += self.step()
        return ended

    def cancel(self, ticket: Ticket, reason: BaseException | None = None) -> bool:
        """End `ticket` with `reason` (by default `Cancelled`); False if it had ended already.

        Its rows are free at once. Called from within a request (an `on_step`), as soon as its turn
        comes in this step or the next.
        """
        if ticket.ended:
            return False
        ticket.cancelling = ticket.cancelling or reason or Cancelled("the request was cancelled")
        if not self._is_at_work:
            with self._at_work():
                self._end(ticket)
        return True

    def close(self) -> None:
        """Cancel what is left and give the pipeline its methods back."""
        if self._is_at_work:
            raise RuntimeError("the engine cannot be closed from within a request")
        self._closed = True
        for ticket in [*self._waiting, *self._runs.parked]:
            self.cancel(ticket, Cancelled("the engine was closed"))
        for slot in self._slots:
            slot.remove()
        self._adapters.restore()
        self._slots = []

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """While requests' code may run: with grad mode off, and once at a time."""
        if self._is_at_work:
            raise RuntimeError("the engine cannot be stepped from within a request")
        self._is_at_work = True
        try:
            # Grad mode belongs to the thread: off here, greenlets may enter and leave `no_grad`
            # in any order and only ever restore what is off already.
            with torch.no_grad():
                yield
        finally:
            self._random.enter(None)
            self._is_at_work = False

    def _expire(self) -> None:
        live = [*self._waiting, *self._runs.parked]
        for ticket in policy.expired(live, self.clock()):
            ticket.cancelling = ticket.cancelling or DeadlineExceeded(
                f"the deadline passed after {ticket.num_steps_done} steps"
            )
        for ticket in live:
            if ticket.cancelling is not None:
                self._end(ticket)

    def _admission(self) -> policy.Admission:
        """Who would join now."""
        return policy.admit(self._waiting, self._runs.parked, self.limits)

    def _admit(self) -> None:
        admission = self._admission()
        for place, times in admission.overtaken.items():
            self._waiting[place].overtaken += times
        for ticket in [self._waiting[place] for place in admission.joining]:
            self._waiting.remove(ticket)
            # It joins the end of the line: served at the latest when all before it have been.
            ticket.last_tick = self.counters.ticks
            self._runs.start(ticket)

    def _tick(self) -> list[ModuleCall]:
        """Run one forward for every module call that may run, and let its request run on.

        Whose calls a wrapper answers has run on before, so that it is in the forwards all the same.
        Companions of the denoiser run first: so requests with and without a ControlNet, and those
        that are half a step apart, meet in the denoiser's forward. Returns the calls that a
        denoiser served.
        """
        self.counters.ticks += 1
        for ticket in policy.choose(list(self._runs.parked), self.limits):
            ticket.last_tick = self.counters.ticks
        asked: set[ModuleCall] = set()
        self._run_on(asked)
        self._serve([call for call in self._chosen() if call.slot.is_companion])
        self._run_on(asked)
        calls = self._chosen()
        served = [call for call in calls if call.slot.is_denoiser]
        self._serve(calls)
        return served

    def _chosen(self) -> list[ModuleCall]:
        """The calls of those that this tick serves."""
        parked = self._runs.parked.items()
        return [call for ticket, call in parked if ticket.last_tick == self.counters.ticks]

    def _run_on(self, asked: set[ModuleCall]) -> None:
        """Let requests run on for as long as wrappers answer their calls; each is asked once.

        What was asked is added to `asked`.
        """
        while calls := [call for call in self._chosen() if call not in asked]:
            asked.update(calls)
            answers = {call: self._wrappers.before(call) for call in calls}
            for call, answer in answers.items():
                if answer is not UNANSWERED:
                    self.counters.answered_calls += 1
                    self._resume(call, answer)

    def _serve(self, calls: Sequence[ModuleCall]) -> None:
        """Run the forwards of `calls`, or of what wrappers make of them."""
        of: dict[ModuleCall, ModuleCall] = {}
        for call in calls:
            narrowed = self._wrappers.narrow(call)
            if isinstance(narrowed, ModuleCall):
                of[narrowed] = call
            else:
                self._resume(call, narrowed)
        for group in self._forward.group(list(of)):
            for narrowed, result in zip(group.calls, self._forward.run(group), strict=True):
                call = of[narrowed]
                self._resume(call, self._wrappers.after(call, result))

    def _resume(self, call: ModuleCall, result: Any) -> None:
        if call.slot.is_denoiser:
            call.ticket.denoised_s = self.clock()
        self._runs.resume(call.ticket, result)

    def _end(self, ticket: Ticket) -> None:
        """End a ticket that is cancelled, wherever it is."""
        if ticket.state is State.WAITING:
            self._waiting.remove(ticket)
        self._runs.unwind(ticket)

    def _prepare(self, calls: Sequence[ModuleCall]) -> None:
        """Whose random numbers the forward of `calls` draws."""
        self._random.enter(calls[0].ticket if len(calls) == 1 else None)
