"""Layouts: what was learned of tensors whose shapes do not tell whether they are batched.

A padding mask of one row for all, two image embeddings a row, text embeddings of sixteen frames a
row: one call's shapes fit several readings. So a group of calls is tried with the most likely one,
and where that is refuted with others; what a comparison with calls run alone confirms is learned.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from types import MappingProxyType

import torch

from handler.batching.arguments import Arguments, Layout, Leaf, Part, Path, leading, leaves
from handler.batching.fingerprints import Fingerprints

__all__ = ["Layouts"]

_NOTHING: Layout = MappingProxyType({})


class Layouts:
    """The layout of each module's calls, as far as it was learned."""

    def __init__(self, fingerprints: Fingerprints) -> None:
        self._fingerprints = fingerprints
        self._learned: dict[Hashable, Layout] = {}
        self._tried: set[tuple[Hashable, frozenset[tuple[Path, Part]]]] = set()

    def of(self, module: Hashable) -> Layout:
        """What was learned of `module`."""
        return self._learned.get(module, _NOTHING)

    def learn(self, module: Hashable, layout: Layout) -> None:
        """Read the calls of `module` by `layout` from now on."""
        self._learned[module] = MappingProxyType(dict(layout))

    def likely(self, layout: Layout, calls: Sequence[Arguments], rows: Sequence[int]) -> Layout:
        """`layout`, and what may be folded rows decided: shared if it is equal in all calls."""
        folded = [leaf for leaf in leaves(calls[0], rows[0], layout) if leaf.part == "folded"]
        open_leaves = [leaf for leaf in folded if leaf.path not in layout]
        equal = {leaf.path for leaf in self._equal(open_leaves, calls, rows)}
        decided: dict[Path, Part] = {
            leaf.path: "shared" if leaf.path in equal else "folded" for leaf in open_leaves
        }
        return {**layout, **decided} if decided else layout

    def others(
        self, module: Hashable, layout: Layout, calls: Sequence[Arguments], rows: Sequence[int]
    ) -> Iterator[Layout]:
        """Other readings of calls whose likely layout was refuted, each given once a module."""
        likely = self.likely(layout, calls, rows)
        decided = likely.keys() - layout.keys()
        first = leading(calls[0])
        candidates = [
            leaf
            for leaf in leaves(calls[0], rows[0], layout)
            if leaf.part == "rows" and leaf.value is not first
        ]
        equal = [leaf.path for leaf in self._equal(candidates, calls, rows)]
        folded: Layout = dict.fromkeys(decided, "folded")
        each_shared: list[Layout] = [{path: "shared"} for path in equal]
        all_shared: Layout = dict.fromkeys(equal, "shared")
        for each in (folded, *each_shared, all_shared):
            reading: Layout = {**likely, **each}
            change = (module, frozenset(reading.items() - layout.items()))
            if reading != likely and change not in self._tried:
                self._tried.add(change)
                yield reading

    def _equal(
        self, wanted: Sequence[Leaf], calls: Sequence[Arguments], rows: Sequence[int]
    ) -> list[Leaf]:
        """Those of `wanted`, leaves of the first call, that all calls have alike."""
        if not wanted:
            return []
        theirs = [
            {leaf.path: leaf.value for leaf in leaves(call, n)}
            for call, n in zip(calls[1:], rows[1:], strict=True)
        ]
        return [
            leaf
            for leaf in wanted
            if isinstance(leaf.value, torch.Tensor)
            and all(self._same(leaf.value, other.get(leaf.path)) for other in theirs)
        ]

    def _same(self, one: torch.Tensor, other: object) -> bool:
        if one is other:
            return True
        if not isinstance(other, torch.Tensor) or one.shape != other.shape:
            return False
        return self._fingerprints.of(one) == self._fingerprints.of(other)
