"""Run the calls that wait for one module as few forwards, and find the guilty when one fails."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from inspect import BoundArguments
from typing import Any

import torch

from handler.batching.fingerprints import Fingerprints
from handler.batching.invariance import Places, Proofs, agree, is_finite, witnesses
from handler.batching.merging import is_listed, merge, merge_key, split
from handler.engine.parking import ModuleCall

__all__ = ["BatchedForward", "Counters", "Failure", "Group", "is_out_of_memory"]


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
    """Seconds in the modules' own forwards, as the host sees them."""
    pipeline_s: float = 0.0
    """Seconds in the pipelines' own code, what it does not park included."""


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
    calls: list[ModuleCall]

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
    prepare: Callable[[Sequence[ModuleCall]], None] = lambda calls: None
    counters: Counters = field(default_factory=Counters)
    _fingerprints: Fingerprints = field(default_factory=Fingerprints)
    _proofs: Proofs = field(default_factory=Proofs)

    def group(self, calls: Sequence[ModuleCall]) -> list[Group]:
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
        if is_plain or group.key is None:
            return self._run(group)
        arguments = [call.bound.arguments for call in group.calls]
        differences = self._proofs.differences(group.key, arguments, group.rows)
        return self._run(group) if differences is None else self._prove(group, differences)

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
        results = [result for part in parts for result in self.run(part)]
        if not out_of_memory and not any(isinstance(r, Failure) for r in results):
            self._proofs.refuted(group.key)
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
        if len(calls) == 1 and padded == total:
            # Faster code is for batches: what runs alone is exact, or there to compare with.
            run = slot.plain if group.key is None else slot.real
            results = [self._timed(run, calls[0].bound)]
        else:
            merged = merge([c.bound.arguments for c in calls], rows, pad_to=padded)
            output = self._timed(slot.real, type(calls[0].bound)(slot.signature, merged))
            results = split(output, rows, total=padded, listed=is_listed(merged))
        self.counters.forwards += 1
        self.counters.rows += total
        self.counters.merged_forwards += len(calls) > 1
        return results

    def _timed(self, forward: Callable[..., Any], bound: BoundArguments) -> Any:
        started_s = self.clock()
        output = forward(*bound.args, **bound.kwargs)
        self.counters.forward_s += self.clock() - started_s
        return output

    def _prove(self, group: Group, differences: Sequence[Places]) -> list[Any]:
        """Run a group that is of a kind, or differs in a way, not seen before.

        Together, and the calls in which the new differences show also alone, to compare.
        """
        key, calls, retries = group.key, group.calls, self.counters.out_of_memory_retries
        together = self._run(group)
        # What ran in halves was proven half by half.
        if key in self._proofs.unmergeable or self.counters.out_of_memory_retries > retries:
            return together
        if any(isinstance(result, Failure) for result in together):
            return together
        alone: dict[int, Any] = {}
        for i in witnesses(differences):
            alone[i] = self._alone(calls[i])
            if isinstance(alone[i], Failure) or not is_finite(alone[i]):
                return together
            if not agree(together[i], alone[i], getattr(calls[i].slot.module, "dtype", None)):
                self._proofs.refuted(key)
                return [alone[j] if j in alone else self._alone(c) for j, c in enumerate(calls)]
        seen = frozenset[Hashable]().union(*differences)
        self._proofs.proven(key, calls[0].bound.arguments, calls[0].num_rows, seen)
        return together

    def _alone(self, call: ModuleCall) -> Any:
        return self._run(Group(None, [call]))[0]

    def _key(self, call: ModuleCall) -> Hashable | None:
        """What a call has in common with those that may share its forward; None: with none."""
        if call.ticket.exact or call.num_rows == 0:
            return None
        adapters = call.ticket.adapters
        key = (
            id(call.slot),
            None if adapters is None else tuple(sorted(adapters.items())),
            merge_key(call.bound.arguments, call.num_rows, self._fingerprints),
        )
        return None if key in self._proofs.unmergeable else key

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
