"""What is told of each request to an instance: how long it waited, and what came of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from gateway.telemetry.facts import current_facts
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.tracing import Tracing

__all__ = ["Attempt", "Attempts", "trace_headers"]


@dataclass(slots=True)
class Attempt:
    """A request that an instance has; whoever sends it says what came of it."""

    outcome: str = "ok"
    traceparent: str = ""


_CURRENT: ContextVar[Attempt | None] = ContextVar("current attempt", default=None)


def trace_headers() -> dict[str, str]:
    """The headers by which an instance continues the trace of the attempt that runs."""
    attempt = _CURRENT.get()
    return {"traceparent": attempt.traceparent} if attempt and attempt.traceparent else {}


class Attempts:
    """Tells metrics, traces, and the facts of the request that the attempts are made for."""

    def __init__(self, metrics: Metrics, tracing: Tracing | None = None) -> None:
        self._metrics = metrics
        self._tracing = tracing

    @contextmanager
    def waiting(self, model: str) -> Iterator[None]:
        """Time the block, in which a request waits for an instance."""
        asked_s, facts = time.monotonic(), current_facts()
        span: Any = nullcontext()
        if self._tracing is not None:
            span = self._tracing.span("wait", facts, model=model)
        try:
            with span:
                yield
        finally:
            waited_s = time.monotonic() - asked_s
            self._metrics.waited(model, waited_s)
            if facts is not None:
                facts.model, facts.waited_s = model, max(facts.waited_s, waited_s)

    @contextmanager
    def attempt(self, model: str, instance: str, upstream_id: str) -> Iterator[Attempt]:
        """Time the block, in which `instance` has a request; an error's `outcome` is told."""
        facts, tracing = current_facts(), self._tracing
        attempt, begun_s = Attempt(), time.monotonic()
        if facts is not None:
            facts.instances.append(instance)
            facts.upstream_ids.append(upstream_id)
            attempt.traceparent = facts.traceparent
        span: Any = nullcontext()
        if tracing is not None:
            named = {"model": model, "upstream": instance, "upstream.request_id": upstream_id}
            span = tracing.span("instance", facts, **named)
        token = _CURRENT.set(attempt)
        try:
            with span as opened:
                if tracing is not None:
                    attempt.traceparent = tracing.traceparent(opened)
                try:
                    yield attempt
                except asyncio.CancelledError:
                    attempt.outcome = "cancelled"
                    raise
                except Exception as error:
                    attempt.outcome = getattr(error, "outcome", "error")
                    raise
                finally:
                    if opened is not None:
                        opened.set_attribute("outcome", attempt.outcome)
        finally:
            _CURRENT.reset(token)
            self._metrics.drawn(model, instance, attempt.outcome, time.monotonic() - begun_s)

    def resent(self, model: str) -> None:
        """Count a request that is sent once more."""
        self._metrics.resent(model)
        if (facts := current_facts()) is not None:
            facts.num_resent += 1
