"""Run waiting module calls as few forwards, and isolate the failing request when one fails."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from inspect import BoundArguments
from typing import Any

import torch

from handler.batching.alteration import altered
from handler.batching.arguments import Arguments, Layout, Path, is_listed
from handler.batching.fingerprints import Fingerprints
from handler.batching.invariance import Places, Proofs, agree, is_conclusive, witnesses
from handler.batching.layouts import Layouts
from handler.batching.merging import merge, merge_key, split, was_written
from handler.engine.parking import ModuleCall
from handler.engine.row_adapters import RowAdapters
from handler.engine.ticket import release_frames

__all__ = [
    "BatchedForward",
    "Counters",
    "Failure",
    "Group",
    "is_out_of_memory",
]

logger = logging.getLogger(__name__)

# What libraries say that have no class for it.
_OUT_OF_MEMORY = (
    *("out of memory", "can't allocate memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
)


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
    answered_calls: int = 0
    """Module calls that needed no forward, because a wrapper answered them."""
    out_of_memory_retries: int = 0
    forward_s: float = 0.0
    """Seconds in the modules' own forwards and waiting for them, as the host sees it."""
    pipeline_s: float = 0.0
    """Seconds in the pipelines' own code, what it does not park included."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What the forward of a module call raised."""

    error: Exception


@dataclass(eq=False, slots=True)
class Group:
    """Calls that may share a forward, and the key that they have in common.

    Without a key it is a single call that runs as it is, with no company and no padding.
    """

    key: Hashable | None
    calls: list[ModuleCall]
    layout: Layout = field(default_factory=dict)
    apart: bool = False
    """Whether the calls have one set of LoRAs, because those of several may not be mixed."""

    @property
    def arguments(self) -> list[Arguments]:
        """The arguments of each call."""
        return [call.bound.arguments for call in self.calls]

    @property
    def rows(self) -> list[int]:
        """The batch size of each call."""
        return [call.num_rows for call in self.calls]


@dataclass(eq=False, slots=True)
class BatchedForward:
    """Groups module calls and runs them, one forward a group where that is right.

    `buckets` are the row counts that forwards are padded to, ascending; none: no padding.
    `prepare` is called with the calls of every forward before it, and `adapters` applies theirs to
    it; the errors of both are those of the calls. With `proves_ahead`, whether a module keeps rows
    apart is seen once for each kind of group, on arguments that are made to differ; else whenever a
    group's arguments differ as none did before.
    """

    clock: Callable[[], float]
    max_rows: int
    adapters: RowAdapters
    buckets: Sequence[int] = ()
    prepare: Callable[[Sequence[ModuleCall]], None] = lambda calls: None
    proves_ahead: bool = False
    counters: Counters = field(default_factory=Counters)
    _fingerprints: Fingerprints = field(default_factory=Fingerprints)
    _proofs: Proofs = field(default_factory=Proofs)
    _layouts: Layouts = field(init=False)

    def __post_init__(self) -> None:
        self._layouts = Layouts(self._fingerprints)

    def group(self, calls: Sequence[ModuleCall]) -> list[Group]:
        """Sort `calls` into groups, in the order of each group's first call."""
        groups: list[Group] = []
        filling: dict[Hashable, Group] = {}
        for call in calls:
            layout = self._layouts.of(id(call.slot))
            key, apart = self._key(call, layout)
            group = filling.get(key) if key is not None else None
            if group is not None and sum(group.rows) + call.num_rows <= self.max_rows:
                group.calls.append(call)
                continue
            group = Group(key, [call], layout, apart)
            groups.append(group)
            if key is not None:
                filling[key] = group
        for group in groups:
            self._put_sets_together(group.calls)
        return groups

    def run(self, group: Group) -> list[Any]:
        """The result of each call of `group`, a `Failure` where its forward raised.

        An error of a shared forward is retried in parts, so that only the request that causes it
        sees it: in halves when memory ran out, else one by one.
        """
        is_plain = len(group.calls) == 1 and self._padded(group) == sum(group.rows)
        if is_plain or group.key is None:
            return self._run(group)
        try:
            return self._run(group) if self._unproven(group) is None else self._prove(group)
        except Exception as error:
            # What a module takes or gives cannot be compared: nothing that a request did wrong.
            release_frames(error)
            logger.warning("calls of %s run alone: %r", group.calls[0].slot.name, error)
            if not is_out_of_memory(error):  # which passes
                self._proofs.refuted(group.key)
            return [self._alone(call) for call in group.calls]

    def _run(self, group: Group) -> list[Any]:
        results = self._attempt(group)
        return self._recover(group, results) if isinstance(results, Failure) else results

    def _attempt(self, group: Group, *, is_trial: bool = False) -> list[Any] | Failure:
        try:
            return self._forward(group, is_trial=is_trial)
        except Exception as error:
            release_frames(error)  # of the failed attempt, whose memory the next one needs
            return Failure(error)

    def _recover(self, group: Group, failure: Failure) -> list[Any]:
        """The results of a group whose shared forward failed, from its parts."""
        out_of_memory = is_out_of_memory(failure.error)
        parts = self._parts(group, out_of_memory)
        if not parts:
            return [failure]
        self.counters.out_of_memory_retries += out_of_memory
        results = [result for part in parts for result in self.run(part)]
        if not out_of_memory and not any(isinstance(r, Failure) for r in results):
            self._refute(group, results)
        return results

    def _parts(self, group: Group, out_of_memory: bool) -> list[Group]:
        """What to try after `group` failed; nothing where it was one call as it is."""
        size = len(group.calls)
        if out_of_memory and size > 1:
            half = (size + 1) // 2
            return [
                replace(group, calls=group.calls[:half]),
                replace(group, calls=group.calls[half:]),
            ]
        if size > 1 or self._padded(group) > sum(group.rows):
            return [Group(None, [call]) for call in group.calls]
        return []

    def _forward(self, group: Group, *, is_trial: bool = False) -> list[Any]:
        calls, rows = group.calls, group.rows
        slot, total, padded = calls[0].slot, sum(rows), self._padded(group)
        self.prepare(calls)
        is_as_it_is = len(calls) == 1 and padded == total
        bound = calls[0].bound
        if not is_as_it_is:
            bound = type(bound)(
                slot.signature,
                merge(group.arguments, rows, pad_to=padded, layout=group.layout, copies=is_trial),
            )
        with self.adapters.applied(calls, padded) as is_adapted:
            forward = slot.adapted if is_adapted else slot.real
            # Faster code is for batches: what runs alone is exact, or there to compare with.
            output = self._timed(slot.plain if group.key is None else forward, bound)
        if is_as_it_is:
            results = [output]
        else:
            merged = bound.arguments
            if is_trial and was_written(merged):
                raise TypeError(
                    "the module writes into its arguments, which have to be a call's own"
                )
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

    def _prove(self, group: Group) -> list[Any]:
        """Run a group that is of a kind, or differs in a way, not seen before.

        Together, and the calls in which the new differences show also alone, to compare.
        """
        trial = self._read_as(
            group, self._layouts.likely(group.layout, group.arguments, group.rows)
        )
        together = self._attempt(trial, is_trial=True)
        if isinstance(together, Failure):
            return self._recover(group, together)
        differences = self._differences(trial)
        alone: dict[int, Any] = {}
        # The first call too, which is where a value of the last row that is read for all shows.
        first = {0} if self.proves_ahead and any(differences) else set[int]()
        for i in first.union(witnesses(differences)):
            alone[i] = self._alone(trial.calls[i])
            if isinstance(alone[i], Failure):
                return together
        is_right = all(self._agree(trial, together[i], alone[i]) for i in alone)
        if is_right and all(is_conclusive(result) for result in alone.values()):
            self._confirm(trial, differences)
            if self.proves_ahead and len(trial.calls) > 1:
                try:
                    self._prove_ahead(trial, together)
                except Exception as error:
                    # Then it is proved when such calls come.
                    release_frames(error)
                    logger.debug("not proved ahead: %r", error)
            return together
        results = [
            alone[i] if i in alone else self._alone(call) for i, call in enumerate(trial.calls)
        ]
        if not all(self._agree(trial, *pair) for pair in zip(together, results, strict=True)):
            self._refute(group, results)
        return results

    def _prove_ahead(self, group: Group, together: Sequence[Any]) -> None:
        """Make the last call differ where no call of `group` did, whose results are `together`.

        What that cannot show is left to the groups that come.
        """
        *others, last = group.calls
        arguments, places = altered(last.bound.arguments, self._proofs.unseen(group.key))
        if not places:
            return
        bound = BoundArguments(last.slot.signature, OrderedDict(arguments))
        call = replace(last, bound=bound)
        results = self._attempt(replace(group, calls=[*others, call]), is_trial=True)
        alone = self._alone(call)
        if isinstance(results, Failure) or isinstance(alone, Failure):
            return
        expected = [*together[:-1], alone]
        pairs = zip(results, expected, strict=True)
        if is_conclusive(alone) and all(self._agree(group, *pair) for pair in pairs):
            first = group.calls[0]
            self._proofs.proven(
                group.key, first.bound.arguments, first.num_rows, places, group.layout
            )

    def _refute(self, group: Group, alone: Sequence[Any]) -> None:
        """Read the group's calls in other ways; where none is right, they have to run alone.

        Nothing is concluded from a request whose numbers have overflowed: the next group will tell.
        """
        if all(is_conclusive(result) for result in alone) and not self._reread(group, alone):
            self._proofs.refuted(group.key)

    def _reread(self, group: Group, alone: Sequence[Any]) -> bool:
        """Whether another reading of the group's calls gives what they gave `alone`."""
        slot = group.calls[0].slot
        for layout in self._layouts.others(id(slot), group.layout, group.arguments, group.rows):
            trial = self._read_as(group, layout)
            together = self._attempt(trial, is_trial=True)
            if not isinstance(together, Failure) and all(
                self._agree(trial, *pair) for pair in zip(together, alone, strict=True)
            ):
                self._confirm(trial, self._differences(trial))
                return True
        return False

    def _confirm(self, trial: Group, differences: Sequence[Places]) -> None:
        """Remember that calls may be merged as in `trial`, as far as these differ."""
        first, seen = trial.calls[0], frozenset[Path]().union(*differences)
        self._layouts.learn(id(first.slot), trial.layout)
        self._proofs.proven(trial.key, first.bound.arguments, first.num_rows, seen, trial.layout)

    def _read_as(self, group: Group, layout: Layout) -> Group:
        key = self._key_as(group.calls[0], layout, apart=group.apart)
        return replace(group, key=key, layout=layout)

    def _unproven(self, group: Group) -> list[Places] | None:
        marks = [self.adapters.marks_of(call) for call in group.calls]
        return self._proofs.differences(group.key, group.arguments, group.rows, group.layout, marks)

    def _differences(self, group: Group) -> list[Places]:
        found = self._unproven(group)
        return [frozenset() for _ in group.calls] if found is None else found

    def _agree(self, group: Group, together: Any, alone: Any) -> bool:
        return agree(together, alone, getattr(group.calls[0].slot.module, "dtype", None))

    def _alone(self, call: ModuleCall) -> Any:
        return self._run(Group(None, [call]))[0]

    def _key(self, call: ModuleCall, layout: Layout) -> tuple[Hashable | None, bool]:
        """What a call has in common with those that may share its forward; None: with none.

        And whether only those of its own set of LoRAs may.
        """
        if call.ticket.exact or call.num_rows == 0:
            return None, False
        try:
            for apart in (False, True):
                key = self._key_as(call, layout, apart=apart)
                if key not in self._proofs.unmergeable:
                    return key, apart
        except Exception as error:
            # An argument that cannot be looked at, such as a tensor of several shapes.
            release_frames(error)
            logger.debug("a call of %s runs alone: %r", call.slot.name, error)
        return None, False

    def _key_as(self, call: ModuleCall, layout: Layout, *, apart: bool) -> Hashable:
        slot = call.slot
        # Where rows without LoRAs run faster code, those with them cannot.
        is_adapted = slot.real is not slot.adapted and bool(self.adapters.marks_of(call))
        return (
            id(slot),
            self.adapters.key_of(call, apart=apart),
            is_adapted,
            merge_key(call.bound.arguments, call.num_rows, self._fingerprints, layout),
        )

    def _put_sets_together(self, calls: list[ModuleCall]) -> None:
        """Let calls of the same LoRAs stand side by side, for these are then added at once."""
        if len({call.ticket.adapter_set for call in calls}) > 1:
            first: dict[Any, int] = {}
            for place, call in enumerate(calls):
                first.setdefault(call.ticket.adapter_set, place)
            calls.sort(key=lambda call: first[call.ticket.adapter_set])

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
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
