"""Run the calls that wait for one module as few forwards, and find the guilty when one fails."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from handler.merging import Fingerprints, is_listed, merge, merge_key, split
from handler.parking import Parked

__all__ = ["BatchedForward", "Counters", "Failure", "Group", "is_out_of_memory"]

# Largest difference between a row computed in a batch and alone, relative to the largest value of
# the output. Kernels round differently at other batch sizes; a module that mixes rows is far off.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-6}
_ROUNDING_HALF = 5e-2


@dataclass(slots=True)
class Counters:
    """What the engine has done so far."""

    ticks: int = 0
    tick_s: float = 0.0
    """Seconds in `step`, everything included."""
    forwards: int = 0
    rows: int = 0
    """Rows of all forwards, padding not counted."""
    merged_forwards: int = 0
    """Forwards that served more than one request."""
    out_of_memory_retries: int = 0
    forward_s: float = 0.0
    """Seconds in the real forwards, as the host sees them."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A call's forward raised this."""

    error: Exception


@dataclass(eq=False, slots=True)
class Group:
    """Calls that may share a forward; `key` is equal for all of them."""

    key: Hashable
    calls: list[Parked] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class BatchedForward:
    """Groups parked calls and runs them, one forward a group where that is right.

    `buckets` are the row counts that forwards are padded to, ascending; none: no padding.
    """

    clock: Callable[[], float]
    max_rows: int
    buckets: Sequence[int] = ()
    counters: Counters = field(default_factory=Counters)
    _fingerprints: Fingerprints = field(default_factory=Fingerprints)
    _proven: set[Hashable] = field(default_factory=set)
    _unmergeable: set[Hashable] = field(default_factory=set)

    def group(self, calls: Sequence[Parked]) -> list[Group]:
        """Sort `calls` into groups, in the order of each group's first call."""
        groups: dict[Hashable, Group] = {}
        for call in calls:
            rows = call.num_rows
            key = self._key(call, rows)
            group = groups.get(key)
            if group is None or sum(group.rows) + rows > self.max_rows:
                # A full group keeps its place in the order under a key nobody asks for again.
                if group is not None:
                    groups[object()] = group
                groups[key] = group = Group(key)
            group.calls.append(call)
            group.rows.append(rows)
        return list(groups.values())

    def run(self, group: Group) -> list[Any]:
        """The result of each call of `group`, a `Failure` where its forward raised.

        An error of a shared forward is retried in parts, so that only the guilty one sees it:
        in halves when memory ran out, else one by one.
        """
        if len(group.calls) > 1 and group.key not in self._proven:
            return self._prove(group)
        return self._run(group)

    def _run(self, group: Group) -> list[Any]:
        failure = None
        try:
            return self._forward(group)
        except Exception as error:
            failure = Failure(error)
        # Past the except clause, so that the traceback keeps no tensor of the failed attempt.
        if len(group.calls) == 1:
            return [failure]
        out_of_memory = is_out_of_memory(failure.error)
        failure = None
        self.counters.out_of_memory_retries += out_of_memory
        size = (len(group.calls) + 1) // 2 if out_of_memory else 1
        parts = [
            Group(group.key, group.calls[i : i + size], group.rows[i : i + size])
            for i in range(0, len(group.calls), size)
        ]
        results = [result for part in parts for result in self._run(part)]
        if not out_of_memory and not any(isinstance(r, Failure) for r in results):
            self._unmergeable.add(group.key)
        return results

    def _forward(self, group: Group) -> list[Any]:
        calls, rows = group.calls, group.rows
        slot, total = calls[0].slot, sum(rows)
        padded = total if calls[0].ticket.exact else self._padded(total)
        started = self.clock()
        if len(calls) == 1 and padded == total:
            bound = calls[0].bound
            results = [slot.real(*bound.args, **bound.kwargs)]
        else:
            merged = merge([c.bound.arguments for c in calls], rows, pad_to=padded)
            bound = type(calls[0].bound)(slot.signature, merged)
            output = slot.real(*bound.args, **bound.kwargs)
            results = split(output, rows, total=padded, listed=is_listed(merged))
        self.counters.forward_s += self.clock() - started
        self.counters.forwards += 1
        self.counters.rows += total
        self.counters.merged_forwards += len(calls) > 1
        return results

    def _prove(self, group: Group) -> list[Any]:
        """Run a kind of group for the first time: together, and its first call alone to compare.

        No table of modules says which of them keep rows apart, so each is asked once.
        """
        together = self._run(group)
        if group.key in self._unmergeable or any(isinstance(r, Failure) for r in together):
            return together
        alone = self._run(Group(group.key, group.calls[:1], group.rows[:1]))[0]
        if isinstance(alone, Failure) or _agree(together[0], alone):
            self._proven.add(group.key)
            return together
        self._unmergeable.add(group.key)
        rest = [
            self._run(Group(group.key, [call], [rows]))[0]
            for call, rows in zip(group.calls[1:], group.rows[1:], strict=True)
        ]
        return [alone, *rest]

    def _key(self, call: Parked, rows: int) -> Hashable:
        alone = ("alone", id(call))
        if call.ticket.exact or rows == 0:
            return alone
        adapters = call.ticket.adapters
        key = (
            id(call.slot),
            None if adapters is None else tuple(sorted(adapters.items())),
            merge_key(call.bound.arguments, rows, self._fingerprints),
        )
        return alone if key in self._unmergeable else key

    def _padded(self, rows: int) -> int:
        return next((bucket for bucket in self.buckets if bucket >= rows), rows)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on a device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("out of memory", "can't allocate memory")
    )


def _agree(together: Any, alone: Any) -> bool:
    """Whether two outputs of a module are equal up to rounding, wherever they hold tensors."""
    if isinstance(alone, torch.Tensor):
        if not isinstance(together, torch.Tensor) or together.shape != alone.shape:
            return False
        if not alone.is_floating_point():
            return bool(torch.equal(together, alone))
        bound = _ROUNDING.get(alone.dtype, _ROUNDING_HALF)
        scale = alone.abs().amax().float() if alone.numel() else torch.zeros(())
        difference = (together.float() - alone.float()).abs()
        off = difference.amax() if difference.numel() else torch.zeros(())
        return bool(torch.isnan(alone).any() or off <= bound * scale + 1e-6)
    if isinstance(alone, dict):
        return all(_agree(together[k], v) for k, v in alone.items())
    if isinstance(alone, (list, tuple)):
        return all(_agree(t, a) for t, a in zip(together, alone, strict=True))
    return True
