"""Follow every call from its row to its reply: read, submit, wait, encode, answer exactly once.

    open ─▶ wire.read_call ─▶ engine.submit ─▶ … ticks … ─▶ replies (thread pool) ─▶ take_replies

It knows neither TorchServe nor HTTP's framing; the handler maps ids and replies to its context.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from handler.api.call import Call, CancelCall, read_call
from handler.api.replies import Reply, cancel_reply, error_reply, success_reply
from handler.api.request import GenerationRequest
from handler.api.result import Result
from handler.api.traits import PipelineTraits
from handler.config import HandlerConfig
from handler.engine import InFlightEngine
from handler.engine.ticket import State, StepEnd, Ticket
from handler.errors import (
    Cancelled,
    Conflict,
    EngineFault,
    NotFound,
    QueueFull,
    RequestError,
)
from handler.pipelines.arguments import pipeline_arguments
from handler.pipelines.preview import Previewer
from handler.service.event_stream import EventStream
from handler.service.metrics import Meter
from handler.service.results import as_request_error, pipeline_fault, result_of

__all__ = ["GenerationService", "draw_seed"]

logger = logging.getLogger(__name__)

# Drawn seeds are short enough to be typed again.
_MAX_DRAWN_SEED = 2**32


def draw_seed() -> int:
    """A seed that nobody can foresee."""
    return secrets.randbelow(_MAX_DRAWN_SEED)


@dataclass(eq=False)
class _LiveCall:
    """A call that was accepted and not yet answered."""

    call_id: str
    call: Call
    opened_s: float
    tickets: list[Ticket] = field(default_factory=list)
    stream: EventStream | None = None
    encoding: Future[Reply] | None = None


class GenerationService:
    """Serves calls on `engine`, all but the encoding of pictures in the caller's thread.

    `model_name` and `config` go into the replies; `clock` is the engine's.
    """

    def __init__(
        self,
        engine: InFlightEngine,
        config: HandlerConfig,
        traits: PipelineTraits,
        *,
        model_name: str,
        draw_seed: Callable[[], int] = draw_seed,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.meter = Meter()
        self._engine = engine
        self._config = config
        self._traits = traits
        self._model_name = model_name
        self._draw_seed = draw_seed
        self._clock = clock
        self._live: dict[str, _LiveCall] = {}
        self._by_ticket: dict[Ticket, _LiveCall] = {}
        self._replies: dict[str, Reply] = {}
        self._previewer = Previewer(engine.pipeline)
        self._encoders = ThreadPoolExecutor(config.encode_threads, thread_name_prefix="encode")

    @property
    def live_ids(self) -> frozenset[str]:
        """Calls that were opened and whose last word was not taken yet."""
        return frozenset(self._live) | frozenset(self._replies)

    def open(self, call_id: str, row: Mapping[str, object], headers: Mapping[str, str]) -> None:
        """Take in one call; whatever is wrong with it becomes its reply, never an exception."""
        try:
            call = read_call(row, headers, self._config, self._traits, draw_seed=self._draw_seed)
            if isinstance(call, CancelCall):
                self._replies[call_id] = self._cancel_for(call_id, call.request_id)
                return
            self._check_id(call)
            live = _LiveCall(call_id, call, self._clock())
            self._submit(live)
        except RequestError as error:
            self._answer_error(call_id, error)
        except Exception as error:
            # An exception here would be TorchServe's answer to every live call.
            logger.error("a request could not be taken in", exc_info=error)
            fault = EngineFault("the request could not be taken in; the server's log says why")
            if call_id in self._live:
                self._release(self._live[call_id], fault)
            self._answer_error(call_id, fault)

    def advance(self, budget_s: float | None = None) -> None:
        """Tick until a call can be answered or `budget_s` is used; None: until all can be."""
        ends_s = None if budget_s is None else self._clock() + budget_s
        # Also when nothing is live: the engine is still to report what was cancelled since.
        while self._live or self._engine.has_work:
            if self._engine.has_work:
                for ticket in self._engine.step():
                    self._on_ended(ticket)
            else:
                self._await_encoders(ends_s)
            self._collect_encoded()
            if ends_s is not None and (self._replies or self._clock() >= ends_s):
                return

    def take_replies(self) -> dict[str, Reply]:
        """The calls that are finished, each handed out once."""
        replies, self._replies = self._replies, {}
        return replies

    def draw(self, requests: Sequence[GenerationRequest]) -> list[Result]:
        """The pictures of `requests`, drawn beside whatever else is in flight.

        Raises:
            RequestError: the first that failed.
        """
        tickets = self._submit_all(requests)
        while not all(ticket.ended for ticket in tickets):
            for ended in self._engine.step():
                self._on_ended(ended)
        for ticket in tickets:
            if ticket.error is not None:
                raise as_request_error(ticket.error, ticket.num_steps_done)
        pipeline = self._engine.pipeline
        return [result_of(t, r, pipeline) for t, r in zip(tickets, requests, strict=True)]

    def stream_of(self, call_id: str) -> EventStream | None:
        """The events of a call that wants them; None for a plain call."""
        live = self._live.get(call_id)
        return None if live is None else live.stream

    def drop(self, call_id: str) -> None:
        """The client went away: end the call, nobody hears of it."""
        self._replies.pop(call_id, None)
        live = self._live.get(call_id)
        if live is not None:
            self.meter.call_ended("disconnected")
            self._release(live, Cancelled("the client closed the connection"))

    def close(self) -> None:
        """End every call and give the pipeline back."""
        for call_id in list(self._live):
            self.drop(call_id)
        self._encoders.shutdown()
        self._engine.close()

    def _check_id(self, call: Call) -> None:
        if call.request_id is not None and self._find(call.request_id) is not None:
            raise Conflict(
                f"the id {call.request_id!r} belongs to a request that is still running; "
                "choose another or wait for its reply",
                {"request_id": "is taken"},
            )

    def _submit(self, live: _LiveCall) -> None:
        call, was_idle, num_before = live.call, not self._live, self._engine.num_held_up
        if call.stream:
            live.stream = EventStream(self._previewer, call.preview_every, self._clock)
        on_step = None if live.stream is None else live.stream.on_step
        live.tickets = self._submit_all(call.requests, deadline_s=call.deadline_s, on_step=on_step)
        self._live[live.call_id] = live
        self._by_ticket.update(dict.fromkeys(live.tickets, live))
        # Alone it is taken in however long a line it forms by itself: it would never get in.
        if was_idle or not num_before < self._engine.num_held_up:
            return
        if num_before >= self._config.max_waiting:
            full = QueueFull(
                f"{num_before} requests are waiting already, {self._config.max_waiting} may; "
                "try again a little later"
            )
            self._release(live, full)
            raise full

    def _submit_all(
        self,
        requests: Sequence[GenerationRequest],
        *,
        deadline_s: float | None = None,
        on_step: Callable[[StepEnd], None] | None = None,
    ) -> list[Ticket]:
        """All of them or, when one is refused, none."""
        tickets: list[Ticket] = []
        try:
            for request in requests:
                tickets.append(self._submit_one(request, deadline_s=deadline_s, on_step=on_step))
        except RequestError:
            for ticket in tickets:
                self._engine.cancel(ticket)
            raise
        return tickets

    def _submit_one(
        self,
        request: GenerationRequest,
        *,
        deadline_s: float | None,
        on_step: Callable[[StepEnd], None] | None,
    ) -> Ticket:
        try:
            return self._engine.submit(
                pipeline_arguments(request, self._traits.parameters),
                scheduler=request.scheduler,
                deadline_s=deadline_s,
                on_step=on_step,
            )
        except RequestError:
            raise
        except Exception as error:  # among others a scheduler's own code, made from its name
            raise as_request_error(error, 0) from error

    def _on_ended(self, ticket: Ticket) -> None:
        self.meter.steps_done(ticket.num_steps_done)
        live = self._by_ticket.pop(ticket, None)
        # Tickets that end in one tick are all done when the first of them is looked at.
        if live is None or live.encoding is not None:
            return
        if ticket.state is State.FAILED:
            assert ticket.error is not None
            self._fail(live, as_request_error(ticket.error, ticket.num_steps_done))
        elif all(t.state is State.DONE for t in live.tickets):
            try:
                self._encode(live)
            except Exception as error:  # pictures and tokenizers are the pipeline's own
                self._fail(live, pipeline_fault(error))

    def _encode(self, live: _LiveCall) -> None:
        """Hand the pictures of a call, all drawn, to the thread pool."""
        results = [
            result_of(t, r, self._engine.pipeline)
            for t, r in zip(live.tickets, live.call.requests, strict=True)
        ]
        for result in results:
            self.meter.images_drawn(result)
        live.encoding = self._encoders.submit(
            success_reply,
            live.call,
            results,
            request_id=live.call_id,
            model_name=self._model_name,
            config=self._config,
        )

    def _collect_encoded(self) -> None:
        for live in [c for c in self._live.values() if c.encoding is not None]:
            assert live.encoding is not None
            if not live.encoding.done():
                continue
            error = live.encoding.exception()
            if error is None:
                self._release(live)
                self._answer(live, live.encoding.result(), "ok")
            else:
                logger.error("encoding a picture failed", exc_info=error)
                self._fail(
                    live, EngineFault("the picture could not be encoded; the server's log says why")
                )

    def _await_encoders(self, ends_s: float | None) -> None:
        encoding = [c.encoding for c in self._live.values() if c.encoding is not None]
        timeout_s = None if ends_s is None else max(0.0, ends_s - self._clock())
        wait(encoding, timeout=timeout_s, return_when=FIRST_COMPLETED)

    def _cancel_for(self, canceller_id: str, wanted: str) -> Reply:
        live = self._find(wanted)
        if live is None:
            raise NotFound(f"no request with the id {wanted!r} is running", {"cancel": "unknown"})
        self._fail(live, Cancelled("the request was cancelled"))
        return cancel_reply(wanted, request_id=canceller_id)

    def _find(self, request_id: str) -> _LiveCall | None:
        """The live call of this id, TorchServe's or the client's own."""
        if request_id in self._live:
            return self._live[request_id]
        return next((c for c in self._live.values() if c.call.request_id == request_id), None)

    def _fail(self, live: _LiveCall, error: RequestError) -> None:
        self._release(live, error)
        self._answer(live, error_reply(error, request_id=live.call_id), error.code)

    def _answer(self, live: _LiveCall, reply: Reply, outcome: str) -> None:
        self.meter.call_ended(outcome, total_s=self._clock() - live.opened_s)
        self._replies[live.call_id] = reply if live.stream is None else live.stream.close(reply)

    def _answer_error(self, call_id: str, error: RequestError) -> None:
        self.meter.call_ended(error.code)
        self._replies[call_id] = error_reply(error, request_id=call_id)

    def _release(self, live: _LiveCall, reason: RequestError | None = None) -> None:
        """Forget the call; what still runs of it is cancelled."""
        del self._live[live.call_id]
        for ticket in live.tickets:
            self._by_ticket.pop(ticket, None)
            self._engine.cancel(ticket, reason)
