"""Module calls under the LoRAs of their tickets: who may share a forward, and what it adds."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from handler.engine.parking import ModuleCall
from handler.engine.ticket import Ticket
from handler.pipelines.adapters import AdapterRows, AdapterSets, scales_adapters

__all__ = ["RowAdapters"]


class RowAdapters:
    """Asks `sets` what the tickets of module calls have to do with each other."""

    def __init__(self, sets: AdapterSets) -> None:
        self.sets = sets

    def key_of(self, call: ModuleCall, *, apart: bool) -> Hashable:
        """Equal for calls that may share a forward; `apart`: only where their sets are equal.

        Those that scale LoRAs for themselves are always apart: PEFT's layers are switched for them.
        """
        is_apart = apart or scales_adapters(call.ticket.kwargs)
        return self.sets.key_of(call.ticket.adapter_set, apart=is_apart)

    def marks_of(self, call: ModuleCall) -> frozenset[Hashable]:
        """The layers that the set of the call adds to; one object for each set."""
        return self.sets.marks_of(call.ticket.adapter_set, call.slot.module)

    def applied(self, calls: Sequence[ModuleCall], padded: int) -> AbstractContextManager[bool]:
        """Run the forward of `calls` within this; yields whether it needs the module's own code."""
        rows = [_rows(call.ticket, call.num_rows) for call in calls]
        return self.sets.applied(rows, padded, calls[0].slot.module)

    def applied_to(self, ticket: Ticket) -> AbstractContextManager[Any]:
        """Run within this what is the ticket's alone."""
        return self.sets.applied([_rows(ticket, 1)], 1, None)

    def check_present(self, ticket: Ticket) -> None:
        """Raise ValueError if a LoRA that the ticket names was deleted meanwhile."""
        self.sets.check_present(ticket.adapter_set)


def _rows(ticket: Ticket, num_rows: int) -> AdapterRows:
    return AdapterRows(ticket.pipeline, ticket.kwargs, ticket.adapter_set, num_rows)
