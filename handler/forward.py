"""Run the calls that wait for one module as few forwards, and find the guilty when one fails."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from handler.merging import (
    Fingerprints,
    is_listed,
    merge,
    merge_key,
    output_members,
    split,
)
from handler.parking import Parked

__all__ = ["BatchedForward", "Counters", "Failure", "Group", "agree", "is_out_of_memory"]

# Largest difference between a row computed in a batch and alone, relative to the largest value of
# the output. Kernels round differently at other batch sizes; a module that mixes rows is far off.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-6}
_ROUNDING_HALF = 5e-2

_MAX_KEYS = 4096


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
    """Calls that may share a forward, and the key that they have in common.

    Without a key it is a single call that runs as it is, with no company and no padding.
    """

    key: Hashable | None
    calls: list[Parked]

    @property
    def rows(self) -> list[int]:
        return [call.num_rows for call in self.calls]


@dataclass(eq=False, slots=True)
class BatchedForward:
    """Groups parked calls and runs them, one forward a group where that is right.

    `buckets` are the row counts that forwards are padded to, ascending; none: no padding.
    `prepare` is called with the calls of every forward before it; its errors are theirs.
    """

    clock: Callable[[], float]
    max_rows: int
    buckets: Sequence[int] = ()
    prepare: Callable[[Sequence[Parked]], None] = lambda calls: None
    counters: Counters = field(default_factory=Counters)
    _fingerprints: Fingerprints = field(default_factory=Fingerprints)
    _proven: set[Hashable] = field(default_factory=set)
    _unmergeable: set[Hashable] = field(default_factory=set)

    def group(self, calls: Sequence[Parked]) -> list[Group]:
        """Sort `calls` into groups, in the order of each group's first call."""
        groups: list[Group] = []
        filling: dict[Hashable, Group] = {}
        for call in calls:
            key = self._key(call)
            group = filling.get(key) if key is not None else None
            if group is not None and sum(group.rows) + call.num_rows <= self.max_rows:
                group.calls.append(call)
                continue
            group = Group(key, [call])
            groups.append(group)
            if key is not None:
                filling[key] = group
        return groups

    def run(self, group: Group) -> list[Any]:
        """The result of each call of `group`, a `Failure` where its forward raised.

        An error of a shared forward is retried in parts, so that only the guilty one sees it:
        in halves when memory ran out, else one by one.
        """
        is_plain = len(group.calls) == 1 and self._padded(group) == sum(group.rows)
        if is_plain or group.key is None or group.key in self._proven:
            return self._run(group)
        return self._prove(group)

    def _run(self, group: Group) -> list[Any]:
        failure = None
        try:
            return self._forward(group)
        except Exception as error:
            failure = Failure(error)
        # Past the except clause, so that the traceback keeps no tensor of the failed attempt.
        out_of_memory = is_out_of_memory(failure.error)
        parts = self._parts(group, out_of_memory)
        if not parts:
            return [failure]
        failure = None
        self.counters.out_of_memory_retries += out_of_memory
        results = [result for part in parts for result in self._run(part)]
        if not out_of_memory and not any(isinstance(r, Failure) for r in results):
            _remember(self._unmergeable, group.key)
        return results

    def _parts(self, group: Group, out_of_memory: bool) -> list[Group]:
        """What to try after `group` failed; nothing where it was one call as it is."""
        size = len(group.calls)
        if out_of_memory and size > 1:
            half = (size + 1) // 2
            return [Group(group.key, group.calls[:half]), Group(group.key, group.calls[half:])]
        if size > 1 or self._padded(group) > sum(group.rows):
            return [Group(None, [call]) for call in group.calls]
        return []

    def _forward(self, group: Group) -> list[Any]:
        calls, rows = group.calls, group.rows
        slot, total, padded = calls[0].slot, sum(rows), self._padded(group)
        self.prepare(calls)
        started = self.clock()
        if len(calls) == 1 and padded == total:
            bound = calls[0].bound
            # Faster code is for batches: what runs alone is exact, or there to compare with.
            run = slot.plain if group.key is None else slot.real
            results = [run(*bound.args, **bound.kwargs)]
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
        """Run a kind of group for the first time: together, and its last call alone to compare.

        No table of modules says which of them keep rows apart, so each is asked once. The last,
        because a module that looks at one row for all of them looks at the first.
        """
        together = self._run(group)
        if group.key in self._unmergeable or any(isinstance(r, Failure) for r in together):
            return together
        alone = self._run(Group(None, group.calls[-1:]))[0]
        if isinstance(alone, Failure) or not _is_finite(alone):
            return together
        if agree(together[-1], alone, getattr(group.calls[-1].slot.module, "dtype", None)):
            _remember(self._proven, group.key)
            return together
        _remember(self._unmergeable, group.key)
        rest = [self._run(Group(None, [call]))[0] for call in group.calls[:-1]]
        return [*rest, alone]

    def _key(self, call: Parked) -> Hashable | None:
        """What a call has in common with those that may share its forward; None: with none."""
        if call.ticket.exact or call.num_rows == 0:
            return None
        adapters = call.ticket.adapters
        key = (
            id(call.slot),
            None if adapters is None else tuple(sorted(adapters.items())),
            merge_key(call.bound.arguments, call.num_rows, self._fingerprints),
        )
        return None if key in self._unmergeable else key

    def _padded(self, group: Group) -> int:
        """The rows that the group's forward runs."""
        rows = sum(group.rows)
        # Only denoisers are compiled or captured; to pad the others would be work for nothing.
        if group.key is None or not group.calls[0].slot.is_denoiser:
            return rows
        return next((bucket for bucket in self.buckets if bucket >= rows), rows)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on a device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("out of memory", "can't allocate memory")
    )


def _remember(keys: set[Hashable], key: Hashable) -> None:
    """Add `key`, and forget all others when they are too many: keys hold what requests choose."""
    if len(keys) >= _MAX_KEYS:
        keys.clear()
    keys.add(key)


def _is_finite(output: Any) -> bool:
    if isinstance(output, torch.Tensor):
        return not output.is_floating_point() or bool(output.isfinite().all())
    return all(_is_finite(member) for _, member in output_members(output) or ())


def agree(together: Any, alone: Any, precision: torch.dtype | None = None) -> bool:
    """Whether two outputs of a module are equal up to rounding, wherever they hold tensors.

    `precision` is what the module computes in; its outputs may have a finer dtype.
    """
    if isinstance(alone, torch.Tensor):
        if not isinstance(together, torch.Tensor) or together.shape != alone.shape:
            return False
        if not alone.is_floating_point():
            return bool(torch.equal(together, alone))
        if not alone.numel():
            return True
        bound = max(_ROUNDING.get(d, _ROUNDING_HALF) for d in (alone.dtype, precision) if d)
        difference = (together.float() - alone.float()).abs().amax()
        return bool(difference <= bound * alone.abs().amax().float() + 1e-6)
    if type(together) is not type(alone):
        return False
    ours, theirs = output_members(together), output_members(alone)
    if ours is None or theirs is None:
        return True
    return [name for name, _ in ours] == [name for name, _ in theirs] and all(
        agree(mine, other, precision) for (_, mine), (_, other) in zip(ours, theirs, strict=True)
    )
