"""The live requests: those that were accepted and not yet answered, and how they are found."""

from __future__ import annotations

from dataclasses import dataclass, field

from handler.api.call import Call
from handler.engine.ticket import Ticket
from handler.service.event_stream import EventStream
from handler.service.records import Record

__all__ = ["LiveRequest", "LiveRequests"]


@dataclass(eq=False)
class LiveRequest:
    """A request that was accepted and not yet answered.

    `request_id` is TorchServe's; the client may have chosen another one, in `sent`. There is one
    ticket for each prompt that was sent, once its pictures are decoded.
    """

    request_id: str
    sent: Call
    opened_s: float
    stream: EventStream | None = None
    tickets: list[Ticket] = field(default_factory=list)
    record: Record | None = None
    """What is told of it at its end; None: nobody wants to be told."""

    @property
    def deadline(self) -> float | None:
        """When the request is given up, by the service's clock."""
        return None if self.sent.deadline_s is None else self.opened_s + self.sent.deadline_s


class LiveRequests:
    """Live requests by their ids and by their tickets."""

    def __init__(self) -> None:
        self._by_id: dict[str, LiveRequest] = {}
        self._by_ticket: dict[Ticket, LiveRequest] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    @property
    def ids(self) -> frozenset[str]:
        """TorchServe's ids of all of them."""
        return frozenset(self._by_id)

    def add(self, live: LiveRequest) -> None:
        """Keep `live` until it is removed."""
        self._by_id[live.request_id] = live

    def add_tickets(self, live: LiveRequest, tickets: list[Ticket]) -> None:
        """Give `live` its tickets. Mutates `live`."""
        live.tickets = tickets
        self._by_ticket.update(dict.fromkeys(tickets, live))

    def remove(self, live: LiveRequest) -> None:
        """Forget `live` and its tickets."""
        del self._by_id[live.request_id]
        for ticket in live.tickets:
            self._by_ticket.pop(ticket, None)

    def get(self, request_id: str) -> LiveRequest | None:
        """Return the request with TorchServe's id `request_id`, if it is live."""
        return self._by_id.get(request_id)

    def find(self, any_id: str) -> LiveRequest | None:
        """Return the live request with this id, TorchServe's or the client's own."""
        if any_id in self._by_id:
            return self._by_id[any_id]
        return next((r for r in self._by_id.values() if r.sent.request_id == any_id), None)

    def take_ticket(self, ticket: Ticket) -> LiveRequest | None:
        """Return the request that an ended ticket belongs to, and forget the ticket."""
        return self._by_ticket.pop(ticket, None)
