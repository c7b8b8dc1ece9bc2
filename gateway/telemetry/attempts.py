"""What is told of each request to an instance: how long it waited, and what came of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gateway.telemetry.facts import current_facts
from gateway.telemetry.metrics import Metrics

__all__ = ["Attempt", "Attempts"]


@dataclass(slots=True)
class Attempt:
    """A request that an instance has; whoever sent it says what came of it."""

    outcome: str = "ok"


class Attempts:
    """Tells metrics, and the facts of the request that the attempts are made for."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    @contextmanager
    def waiting(self, model: str) -> Iterator[None]:
        """Time the block, in which a request waits for an instance."""
        asked_s = time.monotonic()
        try:
            yield
        finally:
            waited_s = time.monotonic() - asked_s
            self._metrics.waited(model, waited_s)
            if (facts := current_facts()) is not None:
                facts.model, facts.waited_s = model, max(facts.waited_s, waited_s)

    @contextmanager
    def attempt(self, model: str, instance: str, upstream_id: str) -> Iterator[Attempt]:
        """Time the block, in which `instance` has a request; an error's `outcome` is told."""
        if (facts := current_facts()) is not None:
            facts.instances.append(instance)
            facts.upstream_ids.append(upstream_id)
        attempt, begun_s = Attempt(), time.monotonic()
        try:
            yield attempt
        except asyncio.CancelledError:
            attempt.outcome = "cancelled"
            raise
        except Exception as error:
            attempt.outcome = getattr(error, "outcome", "error")
            raise
        finally:
            self._metrics.drawn(model, instance, attempt.outcome, time.monotonic() - begun_s)

    def resent(self, model: str) -> None:
        """Count a request that is sent once more."""
        self._metrics.resent(model)
        if (facts := current_facts()) is not None:
            facts.num_resent += 1
