"""What is told of a request when it has ended: when it was where, and how it ended; no prompts.

Nothing is kept where nobody wants to be told.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from handler.api.request import GenerationRequest
from handler.engine.ticket import StepEnd, Ticket

__all__ = ["MARK_EVERY", "Record", "Watcher", "log_record"]

logger = logging.getLogger("handler.requests")

MARK_EVERY = 10
"""Steps between two times that are kept."""


@dataclass(eq=False, slots=True)
class Record:
    """One request; times are of the service's clock."""

    request_id: str
    """TorchServe's, which is in the reply."""
    opened_s: float
    client_id: str | None = None
    """What the client itself calls it."""
    traceparent: str = ""
    requests: Sequence[GenerationRequest] = ()
    """One for each drawing, whose `tickets` are in the same order."""
    tickets: list[Ticket] = field(default_factory=list)
    is_read: bool = False
    """Whether pictures, or LoRAs of the folder, are read before it can be drawn."""
    steps: list[tuple[int, float]] = field(default_factory=list)
    """Steps of the only drawing, and when they were done."""
    encoding_s: float | None = None
    ended_s: float | None = None
    outcome: str = ""

    def marking(
        self, clock: Callable[[], float], others: Callable[[StepEnd], None] | None
    ) -> Callable[[StepEnd], None]:
        """Return what is to be called after every step: it keeps some times, and calls `others`."""

        def on_step(end: StepEnd) -> None:
            if len(self.requests) == 1 and (
                end.step % MARK_EVERY == 0 or end.step == end.num_steps
            ):
                self.steps.append((end.step, clock()))
            if others is not None:
                others(end)

        return on_step


Watcher = Callable[[Record], None]
"""Is told of every request that has ended."""


def log_record(record: Record) -> None:
    """Log a request as one JSON object."""
    logger.info("%s", json.dumps(_fields(record)))


def _fields(record: Record) -> Mapping[str, Any]:
    assert record.ended_s is not None
    fields: dict[str, Any] = {"request_id": record.request_id}
    if record.client_id is not None:
        fields["client_id"] = record.client_id
    fields |= {"outcome": record.outcome, "ms": _ms(record.ended_s - record.opened_s)}
    if record.requests:
        first = record.requests[0]
        fields |= {
            "task": first.engine_task,
            "images": sum(each.num_images for each in record.requests),
            "size": f"{first.width}x{first.height}",
            "steps": sum(ticket.num_steps_done for ticket in record.tickets),
        }
    for ticket in record.tickets[:1]:
        if ticket.admitted_s is not None:
            fields["queue_ms"] = _ms(ticket.admitted_s - ticket.submitted_s)
    return fields


def _ms(seconds: float) -> int:
    return round(1000 * seconds)
