"""Follow every request from its body to its reply: read, submit, wait, encode, answer exactly once.

    open ─▶ read_call ─▶ Decoding ─▶ EngineQueue ─▶ … ticks … ─▶ Encoding ─▶ take_replies
            api          decoding    queueing       engine       encoding

It knows neither TorchServe nor HTTP's framing; the handler maps ids and replies to its context.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from handler.api.call import Call, CancelCall, DescribeCall, read_call
from handler.api.decoding import Pictures, decode_all
from handler.api.replies import (
    FLAGGED,
    Reply,
    cancel_reply,
    describe_reply,
    error_reply,
    success_reply,
)
from handler.api.request import GenerationRequest
from handler.api.result import Result
from handler.api.traits import PipelineTraits
from handler.config import HandlerConfig
from handler.engine import InFlightEngine
from handler.engine.device_faults import is_device_lost
from handler.engine.ticket import State, StepEnd, Ticket
from handler.errors import (
    Cancelled,
    Conflict,
    DeviceLost,
    Draining,
    EngineFault,
    NotFound,
    RequestError,
)
from handler.pipelines.preview import Previewer
from handler.pipelines.safety import SafetyChecker
from handler.service.decoding import Decoding
from handler.service.draining import Drain, num_live_reply
from handler.service.encoding import Encoding
from handler.service.event_stream import EventStream
from handler.service.live_requests import LiveRequest, LiveRequests
from handler.service.lora_shelf import LoraShelf, named_by
from handler.service.metrics import Load, Meter, Sample
from handler.service.queueing import EngineQueue
from handler.service.reading import draw_seed, read_requests
from handler.service.records import Record, Watcher
from handler.service.results import (
    as_request_error,
    device_lost,
    fault_of,
    pipeline_fault,
    result_of,
)
from handler.service.side_work import wait_for_any

__all__ = ["GenerationService"]

logger = logging.getLogger(__name__)

# A server that stops may be back after that: a worker takes 5 s to be READY, or a minute.
_BACK_AFTER_S = 10


class GenerationService:
    """Serves requests on `engine`, all but coding of pictures in the caller's thread.

    `pipeline` is what the engine serves. `checker` looks at its pictures in the threads that encode
    them, and is given back by `close`. `shelf` has the LoRAs of a folder. `model_name` and `config`
    go into the replies, which `encode` makes; `decode` makes the pictures that requests begin with;
    `watchers` are told of every request that has ended; `clock` is the engine's.
    """

    def __init__(
        self,
        engine: InFlightEngine,
        pipeline: Any,
        config: HandlerConfig,
        traits: PipelineTraits,
        *,
        model_name: str,
        draw_seed: Callable[[], int] = draw_seed,
        encode: Callable[..., Reply] = success_reply,
        decode: Callable[..., list[Pictures]] = decode_all,
        checker: SafetyChecker | None = None,
        shelf: LoraShelf | None = None,
        watchers: Sequence[Watcher] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.traits = traits
        self._engine = engine
        self._pipeline = pipeline
        self._draw_seed = draw_seed
        self._clock = clock
        self._queue = EngineQueue(engine, traits.tasks, config.max_waiting)
        self._live = LiveRequests()
        self._replies: dict[str, Reply] = {}
        self._previewer = Previewer(pipeline)
        self._shelf = shelf
        self._decoding = Decoding(config, clock, decode, shelf)
        self._encoding = Encoding(config, model_name, encode, checker)
        self._meter = Meter()
        self._watchers = tuple(watchers)
        self._drain: Drain | None = None
        self.is_device_lost = False
        """Whether the device failed for good: this process can only tell so, and end."""

    @property
    def live_ids(self) -> frozenset[str]:
        """Requests that were opened and whose reply was not taken yet."""
        return self._live.ids | frozenset(self._replies)

    @property
    def load(self) -> Load:
        """What the engine holds now, and what waits for it."""
        engine = self._engine
        num_waiting = engine.num_waiting + len(self._decoding.work.requests)
        return Load(engine.num_running, num_waiting, engine.in_flight.rows)

    def samples(self) -> list[Sample]:
        """Return the metrics: what was counted since the last time, and the load."""
        return self._meter.samples(self._engine.counters, self.load)

    def drain(self, drain: Drain | None) -> None:
        """Refuse new requests, and end at the drain's time those that are live; None: serve on."""
        if (drain is None) != (self._drain is None):
            what = "draining" if drain is not None else "no longer draining"
            logger.info("%s, %d requests are live", what, len(self._live))
        self._drain = drain

    def open(self, request_id: str, body: Mapping[str, object], headers: Mapping[str, str]) -> None:
        """Take in one request; what is wrong with it becomes its reply, never an exception."""
        try:
            sent = read_call(body, headers, self.config, self.traits, draw_seed=self._draw_seed)
            if self.is_device_lost:
                raise device_lost()
            if isinstance(sent, CancelCall):
                self._replies[request_id] = self._cancel(request_id, sent.request_id)
            elif isinstance(sent, DescribeCall):
                self._replies[request_id] = describe_reply(self.traits, request_id=request_id)
            elif self._drain is not None:
                seconds_left = max(0, math.ceil(self._drain.until_s - self._clock()))
                raise Draining(
                    "the server is about to stop and takes no new requests; try again later",
                    seconds_left + _BACK_AFTER_S,
                )
            else:
                self._accept(request_id, sent, headers.get("traceparent", ""))
        except Exception as error:
            # An exception here would be TorchServe's answer to every live request.
            told = fault_of(error, "the request could not be taken in; the server's log says why")
            self._note(told)
            self._refuse(request_id, told, headers)

    def advance(self, budget_s: float | None = None, *, hold_s: float = 0.0) -> None:
        """Tick until a request can be answered or `budget_s` is used; None: until all can be.

        What can be answered before `hold_s` is used waits for that.
        """
        begun_s = self._clock()
        ends_s = None if budget_s is None else begun_s + budget_s
        # Also when nothing is live: the engine is still to report what was cancelled since.
        while self._live or self._has_work:
            self._end_drained()
            if self._has_work:
                self._step()
            else:
                timeout_s = None if ends_s is None else max(0.0, ends_s - self._clock())
                wait_for_any([self._decoding.work, self._encoding.work], timeout_s)
            self._collect_decoded()
            self._collect_encoded()
            if ends_s is None:
                continue
            now_s = self._clock()
            if now_s >= ends_s or (self._replies and now_s >= begun_s + hold_s):
                return

    def take_replies(self) -> dict[str, Reply]:
        """Return the replies of finished requests by their ids, each once."""
        replies, self._replies = self._replies, {}
        return replies

    def stream_of(self, request_id: str) -> EventStream | None:
        """Return the events of a live request that wants them; None for any other.

        Those of a request whose pictures are still decoded begin later: its status is not known.
        """
        live = self._live.get(request_id)
        return None if live is None or live in self._decoding.work else live.stream

    def drop(self, request_id: str) -> None:
        """End a request whose client went away; nobody is told."""
        self._replies.pop(request_id, None)
        live = self._live.get(request_id)
        if live is not None:
            self._meter.request_ended("disconnected")
            self._tell(live.record, "disconnected")
            self._release(live, Cancelled("the client closed the connection"))

    def read(self, bodies: Sequence[Mapping[str, object]]) -> list[GenerationRequest]:
        """Return the checked requests of `bodies`, for `draw`.

        Raises:
            RequestError: a body is not a valid request.
        """
        return read_requests(bodies, self.config, self.traits, draw_seed=self._draw_seed)

    def draw(self, requests: Sequence[GenerationRequest]) -> list[Result]:
        """Return the pictures of `requests`, drawn beside whatever else is in flight.

        Raises:
            RequestError: the first that failed.
        """
        pictures = decode_all(requests, self.config, [""] * len(requests))
        if self._shelf is not None:
            read = self._shelf.read(self._shelf.missing(requests))
            self._shelf.attach(read, requests, wanted=self._wanted_loras())
        tickets = self._queue.submit(requests, pictures)
        while not all(ticket.ended for ticket in tickets):
            if self.is_device_lost:
                raise device_lost()
            self._step()
        for ticket in tickets:
            if ticket.error is not None:
                raise as_request_error(ticket.error, ticket.num_steps_done)
        return [self._encoding.checked(result) for result in self._results(tickets, requests)]

    def close(self) -> None:
        """End every request and give the pipeline back."""
        for request_id in self._live.ids:
            self.drop(request_id)
        self._decoding.work.close()
        self._encoding.work.close()
        self._engine.close()
        self._encoding.give_checker_back()

    def _accept(self, request_id: str, sent: Call, traceparent: str) -> None:
        if sent.request_id is not None and self._live.find(sent.request_id) is not None:
            raise Conflict(
                f"the id {sent.request_id!r} belongs to a request that is still running; "
                "choose another or wait for its reply",
                {"request_id": "is taken"},
            )
        stream = None
        if sent.stream:
            stream = EventStream(self._previewer, sent.preview_every, self._clock)
        live = LiveRequest(request_id, sent, self._clock(), stream)
        if self._watchers:
            live.record = Record(
                request_id, live.opened_s, sent.request_id, traceparent, sent.requests
            )
        missing = [] if self._shelf is None else self._shelf.missing(sent.requests)
        if missing or any(request.pictures for request in sent.requests):
            if self._live:
                self._queue.check_room()
            self._decoding.start(live, missing)
            if live.record is not None:
                live.record.is_read = True
        else:
            self._submit(live, [{} for _ in sent.requests], is_limited=bool(self._live))
        self._live.add(live)

    def _submit(self, live: LiveRequest, pictures: Sequence[Pictures], *, is_limited: bool) -> None:
        """Queue a request; alone it is taken in however long a line it forms by itself."""
        on_step: Callable[[StepEnd], None] | None = None
        if live.stream is not None:
            on_step = live.stream.on_step
        if live.record is not None:
            on_step = live.record.marking(self._clock, on_step)
        tickets = self._queue.submit(
            live.sent.requests,
            pictures,
            deadline_s=None if live.deadline is None else live.deadline - self._clock(),
            on_step=on_step,
            is_limited=is_limited,
        )
        self._live.add_tickets(live, tickets)
        if live.record is not None:
            live.record.tickets = tickets

    def _end_drained(self) -> None:
        """End what still runs when the time of a drain is up; what is drawn is delivered."""
        if self._drain is None or self._clock() < self._drain.until_s:
            return
        for request_id in self._live.ids:
            live = self._live.get(request_id)
            if live is not None and live not in self._encoding.work:
                self._fail(
                    live,
                    Draining("the server stops and could not finish the request; send it again"),
                )

    def _cancel(self, canceller_id: str, wanted: str) -> Reply:
        if self._drain is not None and wanted == self._drain.inquiry:
            return num_live_reply(len(self.live_ids))
        live = self._live.find(wanted)
        if live is None:
            raise NotFound(f"no request with the id {wanted!r} is running", {"cancel": "unknown"})
        self._fail(live, Cancelled("the request was cancelled"))
        return cancel_reply(wanted, request_id=canceller_id)

    @property
    def _has_work(self) -> bool:
        return self._engine.has_work and not self.is_device_lost

    def _step(self) -> None:
        try:
            ended = self._engine.step()
        except Exception as error:
            if not is_device_lost(error):
                raise
            self._lose_device(error)
            return
        for ticket in ended:
            self._meter.steps_done(ticket.num_steps_done)
            live = self._live.take_ticket(ticket)
            # Tickets that end in one tick are all done when the first of them is looked at.
            if live is not None and live not in self._encoding.work:
                self._on_ended(live, ticket)

    def _on_ended(self, live: LiveRequest, ticket: Ticket) -> None:
        if ticket.state is State.FAILED:
            assert ticket.error is not None
            self._end(live, as_request_error(ticket.error, ticket.num_steps_done))
        elif all(t.state is State.DONE for t in live.tickets):
            try:
                results = self._results(live.tickets, live.sent.requests)
            except Exception as error:  # pictures and tokenizers are the pipeline's own
                self._end(live, pipeline_fault(error))
                return
            for result in results:
                self._meter.images_drawn(result)
            self._encoding.start(live, results)
            if live.record is not None:
                live.record.encoding_s = self._clock()

    def _results(
        self, tickets: Sequence[Ticket], requests: Sequence[GenerationRequest]
    ) -> list[Result]:
        return [result_of(t, r, self._pipeline) for t, r in zip(tickets, requests, strict=True)]

    def _collect_decoded(self) -> None:
        ended = self._decoding.take_ended()
        if not ended:
            return
        wanted = self._wanted_loras(live for live, _ in ended)
        for live, decoded in ended:
            if self._live.get(live.request_id) is not live:
                continue  # the device was lost with one before it
            if isinstance(decoded, RequestError):
                self._end(live, decoded)
                continue
            try:
                live.sent = replace(live.sent, requests=decoded.requests)
                if live.record is not None:  # which would keep the files that were sent
                    live.record.requests = decoded.requests
                if self._shelf is not None:
                    self._shelf.attach(decoded.loras, decoded.requests, wanted=wanted)
                self._submit(live, decoded.pictures, is_limited=len(self._live) > 1)
            except Exception as error:
                problem = "the request could not be queued; the server's log says why"
                self._end(live, fault_of(error, problem))

    def _wanted_loras(self, others: Iterable[LiveRequest] = ()) -> set[str]:
        """The LoRAs that `others` name, and those whose files or pictures are still read."""
        coming = [*others, *self._decoding.work.requests]
        return named_by(request for live in coming for request in live.sent.requests)

    def _collect_encoded(self) -> None:
        for live, encoded in self._encoding.take_ended():
            if isinstance(encoded, RequestError):
                self._end(live, encoded)
            else:
                self._release(live)
                self._answer(live, encoded, "flagged" if FLAGGED in encoded.headers else "ok")

    def _lose_device(self, error: BaseException) -> None:
        """Tell all whose pictures are not drawn; the engine's requests stay where they stand."""
        logger.critical("the device is lost to this worker, which ends: %s", error, exc_info=error)
        self.is_device_lost = True
        for request_id in self._live.ids:
            live = self._live.get(request_id)
            if live is not None and live not in self._encoding.work:
                self._live.remove(live)
                self._decoding.work.discard(live)
                self._answer(live, _error_reply(device_lost(), request_id), DeviceLost.code)

    def _end(self, live: LiveRequest, error: RequestError) -> None:
        """End a request by what went wrong with it, and everybody's where that was the device."""
        self._note(error)
        if self._live.get(live.request_id) is live:
            self._fail(live, error)

    def _note(self, error: RequestError) -> None:
        """Where `error` says that the device is lost, tell all that wait for it."""
        if isinstance(error, DeviceLost) and not self.is_device_lost:
            self._lose_device(error.__cause__ or error)

    def _fail(self, live: LiveRequest, error: RequestError) -> None:
        self._release(live, error)
        self._answer(live, _error_reply(error, live.request_id), error.code)

    def _answer(self, live: LiveRequest, reply: Reply, outcome: str) -> None:
        self._meter.request_ended(outcome, total_s=self._clock() - live.opened_s)
        self._tell(live.record, outcome)
        self._replies[live.request_id] = reply if live.stream is None else live.stream.close(reply)

    def _refuse(self, request_id: str, error: RequestError, headers: Mapping[str, str]) -> None:
        """Answer a request that was not accepted."""
        self._meter.request_ended(error.code)
        if self._watchers:
            client_id, traceparent = headers.get("x-request-id"), headers.get("traceparent", "")
            self._tell(Record(request_id, self._clock(), client_id, traceparent), error.code)
        self._replies[request_id] = _error_reply(error, request_id)

    def _tell(self, record: Record | None, outcome: str) -> None:
        if record is None:
            return
        record.ended_s, record.outcome = self._clock(), outcome
        for watcher in self._watchers:
            watcher(record)

    def _release(self, live: LiveRequest, reason: RequestError | None = None) -> None:
        """Forget the request; what still runs of it is cancelled."""
        self._live.remove(live)
        self._decoding.work.discard(live)
        self._encoding.work.discard(live)
        for ticket in live.tickets:
            self._engine.cancel(ticket, reason)


def _error_reply(error: RequestError, request_id: str) -> Reply:
    if isinstance(error, EngineFault):
        logger.error("request %s: %s", request_id, error.message, exc_info=error.__cause__)
    return error_reply(error, request_id=request_id)
