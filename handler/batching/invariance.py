"""Batch invariance: which modules were shown to compute each row independently of the others.

No table of modules says which of them look at one row for all. So a group is compared with one of
its calls run alone, and that proves only what differed between them: as long as all timesteps were
equal, nothing tells whether a module read them all or the first.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from handler.batching.arguments import Arguments, Layout, Path, edges, row_at
from handler.batching.merging import output_members

__all__ = ["Places", "Proofs", "agree", "is_conclusive", "witnesses"]

# Largest difference between a row computed in a batch and alone, relative to the largest value of
# the output. Kernels round differently at other batch sizes; a module that mixes rows is far off.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-6}
_ROUNDING_HALF = 5e-2

_MAX_KEYS = 4096
_MARK = "beside the arguments"

Places = frozenset[Path]
"""Edges of arguments: `handler.batching.arguments.edges`."""


class Proofs:
    """What was proven of every kind of group, a kind being its key."""

    def __init__(self) -> None:
        self.unmergeable: set[Hashable] = set()
        self._unseen: dict[Hashable, Places] = {}
        self._seen_marks: dict[Hashable, Places] = {}

    def differences(
        self,
        key: Hashable,
        calls: Sequence[Arguments],
        rows: Sequence[int],
        layout: Layout,
        marks: Sequence[frozenset[Hashable]] = (),
    ) -> list[Places] | None:
        """Where each call differs from the first, as far as that was not proven before.

        None if nothing is left to prove. Rows are compared at their first and last: one that a
        module might read for all. `marks` are what each call has beside its arguments; two of them
        differ in all that they hold, unless they are one object.
        """
        unseen = self._unseen.get(key)
        beside = self._marked(key, marks)
        if unseen is not None and not any(beside) and (not unseen or len(calls) == 1):
            return None
        wanted = edges(calls[0], rows[0], layout) if unseen is None else unseen
        different: list[set[Path]] = [set(each) for each in beside or [frozenset()] * len(calls)]
        for place in wanted:
            differing = _differ([row_at(call, place) for call in calls])
            for found, differs in zip(different, differing, strict=True):
                if differs:
                    found.add(place)
        if unseen is not None and not any(different):
            return None
        return [frozenset(found) for found in different]

    def proven(
        self, key: Hashable, call: Arguments, rows: int, places: Places, layout: Layout
    ) -> None:
        """Remember that groups of this kind keep apart what differed in `places`."""
        unseen = self._unseen.get(key)
        if unseen is None:
            unseen = edges(call, rows, layout)
            _make_room(self._unseen)
        self._unseen[key] = unseen - places
        if marks := frozenset(place for place in places if place[0] is _MARK):
            _make_room(self._seen_marks)
            self._seen_marks[key] = self._seen_marks.get(key, frozenset()) | marks

    def unseen(self, key: Hashable) -> Places:
        """Where groups of this kind that was proven have not differed yet."""
        return self._unseen.get(key, frozenset())

    def refuted(self, key: Hashable) -> None:
        """Remember that calls of this kind have to run alone."""
        _make_room(self.unmergeable)
        self.unmergeable.add(key)

    def _marked(self, key: Hashable, marks: Sequence[frozenset[Hashable]]) -> list[Places]:
        """The marks that tell each call from the first and that were not seen to be kept apart."""
        if all(each is marks[0] for each in marks):
            return []
        seen = self._seen_marks.get(key, frozenset())
        return [
            frozenset()
            if each is marks[0]
            else frozenset((_MARK, mark) for mark in each | marks[0]) - seen
            for each in marks
        ]


def witnesses(differences: Sequence[Places]) -> list[int]:
    """The calls to run alone, so that each difference is seen in one of them; at least the last."""
    left = frozenset[Path]().union(*differences)
    chosen: list[int] = []
    while left or not chosen:
        most = max(range(len(differences)), key=lambda i: (len(differences[i] & left), i))
        chosen.append(most)
        left -= differences[most]
    return chosen


def is_conclusive(output: Any) -> bool:
    """Whether every row of `output` has numbers that can be compared.

    What a request's overflow has made all NaN agrees with anything that overflowed too.
    """
    if isinstance(output, torch.Tensor):
        if not output.is_floating_point() or not output.numel():
            return True
        return bool(output.reshape(len(output) if output.ndim else 1, -1).isfinite().any(1).all())
    try:
        members = output_members(output)
    except TypeError:  # holds what cannot be seen, nor compared
        return True
    return all(is_conclusive(member) for _, member in members or ())


def agree(together: Any, alone: Any, precision: torch.dtype | None = None) -> bool:
    """Whether two outputs of a module are equal up to rounding, wherever they hold tensors.

    A NaN equals a NaN only, and an infinity itself. `precision` is what the module computes in; its
    outputs may have a finer dtype.
    """
    if isinstance(alone, torch.Tensor):
        if not isinstance(together, torch.Tensor) or together.shape != alone.shape:
            return False
        if not alone.is_floating_point():
            return bool(torch.equal(together, alone))
        if not alone.numel():
            return True
        bound = max(_ROUNDING.get(d, _ROUNDING_HALF) for d in (alone.dtype, precision) if d)
        difference, largest = _distance(together.float(), alone.float())
        return bool(difference <= bound * largest + 1e-6)
    if type(together) is not type(alone):
        return False
    ours, theirs = output_members(together), output_members(alone)
    if ours is None or theirs is None:
        return True
    return [name for name, _ in ours] == [name for name, _ in theirs] and all(
        agree(mine, other, precision) for (_, mine), (_, other) in zip(ours, theirs, strict=True)
    )


def _distance(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How far `ours` is from `theirs` and how large that is, where it is finite.

    NaN where one of them is not finite and the other is not the same.
    """
    difference, largest = (ours - theirs).abs().amax(), theirs.abs().amax()
    if largest.isfinite():
        return difference, largest
    finite = theirs.isfinite()
    if not torch.allclose(ours[~finite], theirs[~finite], equal_nan=True):
        return torch.tensor(torch.nan), largest
    ours, theirs = torch.where(finite, ours, 0.0), torch.where(finite, theirs, 0.0)
    return (ours - theirs).abs().amax(), theirs.abs().amax()


def _differ(rows: Sequence[torch.Tensor]) -> list[bool]:
    """Which of `rows` are not equal to the first; waits for the device once."""
    first = rows[0]
    if any(row.shape != first.shape for row in rows):
        return [not torch.equal(row, first) for row in rows]
    together = torch.stack(list(rows)).reshape(len(rows), -1)
    differs: list[bool] = (together != together[:1]).any(1).tolist()
    return differs


def _make_room(keys: set[Hashable] | dict[Hashable, Places]) -> None:
    """Forget all keys when they are too many: they hold what requests choose."""
    if len(keys) >= _MAX_KEYS:
        keys.clear()
