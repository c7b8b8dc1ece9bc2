"""The running requests: each runs in its own greenlet, from one module call to the next."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent

from handler.batching.arguments import is_batch
from handler.engine.forward import Counters, Failure
from handler.engine.global_random import GlobalRandom
from handler.engine.parking import ModuleCall, RequestGreenlet
from handler.engine.policy import Limits
from handler.engine.row_adapters import RowAdapters
from handler.engine.ticket import State, Ticket, release_frames
from handler.engine.view import make_view
from handler.errors import Cancelled, TooLarge
from handler.pipelines.shared_state import SharedState

__all__ = ["Runs"]

logger = logging.getLogger(__name__)


class Runs:
    """Starts requests, lets them run on, and ends them, each exactly once.

    `shared_states` says of each task what its calls may leave behind on the modules.
    """

    def __init__(
        self,
        shared_states: Mapping[str, SharedState],
        limits: Limits,
        adapters: RowAdapters,
        clock: Callable[[], float],
        counters: Counters,
        random: GlobalRandom,
    ) -> None:
        self.parked: dict[Ticket, ModuleCall] = {}
        self.ended: list[Ticket] = []
        """Tickets that have ended and that `step` has not returned yet."""
        self._shared_states = shared_states
        self._limits = limits
        self._adapters = adapters
        self._clock = clock
        self._counters = counters
        self._random = random

    def start(self, ticket: Ticket) -> None:
        """Run the pipeline's ``__call__`` until it parks for the first time."""

        def call() -> Any:
            self._adapters.check_present(ticket)
            view, kwargs = make_view(ticket.pipeline, ticket)
            return view(**kwargs)

        ticket.run = RequestGreenlet(ticket, call)
        ticket.state, ticket.admitted_s = State.RUNNING, self._clock()
        self._continue(ticket, ticket.run.switch)

    def resume(self, ticket: Ticket, result: Any) -> None:
        """Hand a module call its result or the error of its forward; the request runs on."""
        run = ticket.run
        assert run is not None
        if ticket.cancelling is not None:
            self.unwind(ticket)
        elif isinstance(result, Failure):
            self._continue(ticket, run.throw, result.error)
        else:
            self._continue(ticket, run.switch, result)

    def unwind(self, ticket: Ticket) -> None:
        """End a request wherever it stands; its greenlet runs its `finally` clauses and is gone."""
        reason, run = ticket.cancelling, ticket.run
        assert reason is not None
        try:
            if isinstance(run, RequestGreenlet):
                self.parked.pop(ticket, None)
                run.exit()
        finally:
            self._end(ticket, State.FAILED, reason)

    def _continue(self, ticket: Ticket, switch: Callable[..., Any], *value: Any) -> None:
        """Let the request run to its next module call or to its end."""
        assert ticket.run is not None
        ticket.run.parent = getcurrent()
        self.parked.pop(ticket, None)
        self._random.enter(ticket)
        started_s = self._clock()
        try:
            # What it runs of its modules without parking is under its own set of LoRAs too.
            with self._adapters.applied_to(ticket):
                reached = switch(*value)
        except BaseException as error:
            release_frames(error)
            self._end(ticket, State.FAILED, ticket.cancelling or error)
            if not isinstance(error, Exception):
                raise
        else:
            if not ticket.run.dead:
                self.parked[ticket] = reached
                self._correct_cost(ticket, reached)
            elif ticket.cancelling is not None:
                self._end(ticket, State.FAILED, ticket.cancelling)
            elif isinstance(reached, GreenletExit):  # which greenlet returns where it is raised
                self._end(ticket, State.FAILED, Cancelled("the request ended itself"))
            else:
                self._end(ticket, State.DONE, reached)
        finally:
            self._counters.pipeline_s += self._clock() - started_s
            # What a request leaves switched on would follow the thread to the others.
            torch.set_grad_enabled(False)

    def _correct_cost(self, ticket: Ticket, parked: ModuleCall) -> None:
        """Replace the estimated rows by those that the denoiser is really called with."""
        if not parked.slot.is_denoiser:
            return
        if ticket.denoising_s is None:
            ticket.denoising_s = self._clock()
        rows = parked.num_rows
        if rows > self._limits.max_rows and not is_batch(parked.bound.arguments, rows):
            parked.num_rows = 0  # the tokens of one picture: it runs alone, as it is
        elif rows > self._limits.max_rows:
            too_large = TooLarge(self._limits.refusal(replace(ticket.cost, rows=rows)))
            ticket.cancelling = ticket.cancelling or too_large
            self.unwind(ticket)
        else:
            ticket.cost = replace(ticket.cost, rows=rows)

    def _end(self, ticket: Ticket, state: State, outcome: Any) -> None:
        if ticket.run is not None:
            try:
                self._shared_states[ticket.task].restore()
            except Exception:
                # To give a module its precision back takes memory. The next end tries again.
                logger.exception("what a request changed cannot be put back yet")
        ticket.end(state, outcome, self._clock())
        self.ended.append(ticket)
