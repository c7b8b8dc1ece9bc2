"""Arguments made different on purpose, to see whether a module looks at each row's own.

Requests that run in step have equal timesteps, and those without a negative prompt equal rows of
text. Until these differ by themselves, nothing tells whether a module reads all of them or one for
all; and to look whether they differ, in every tick, waits for the device each time.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from handler.batching.arguments import (
    EXACT_VALUES,
    STEP_PARAMETERS,
    Arguments,
    Path,
    members,
    parameter_of,
)
from handler.batching.invariance import Places
from handler.batching.merging import rebuild

__all__ = ["altered"]


def altered(arguments: Arguments, places: Places) -> tuple[dict[str, Any], Places]:
    """A copy of a call's `arguments` with other values at `places`, and those that it altered.

    The values are such as the module may be given: they are moved about within their row, or
    closer to zero. Where there are none, as for a row of whole zeros, a place stays as it is.
    """
    found: set[Path] = set()
    ends: dict[Path, list[Any]] = {}
    for place in places:
        ends.setdefault(place[:-1], []).append(place[-1])

    def copy(path: Path, name: str, value: Any) -> Any:
        if path in ends:
            return _with_others(path, name, value, ends[path], found)
        if isinstance(value, (torch.Tensor, *EXACT_VALUES)):
            return value
        parts = members(value)
        if not parts or not any(path == wanted[: len(path)] for wanted in ends):
            return value
        return rebuild(value, [copy((*path, k), parameter_of(name, k), v) for k, v in parts])

    copied = {name: copy((name,), name, value) for name, value in arguments.items()}
    return copied, frozenset(found)


def _with_others(path: Path, name: str, value: Any, ends: Collection[Any], found: set[Path]) -> Any:
    """`value` with another row at each of `ends`; puts those that have one into `found`."""
    if isinstance(value, torch.Tensor) and not value.ndim:  # one step for all rows
        other = _other(name, value)
        found.update((*path, end) for end in ends if other is not None)
        return value if other is None else other
    copied = list(value) if isinstance(value, list) else value.clone()
    for end in ends:
        other = _other(name, copied[end])
        if other is not None:
            copied[end] = other
            found.add((*path, end))
    return copied


def _other(name: str, row: torch.Tensor) -> torch.Tensor | None:
    """A row like `row` with other values; None if there is none that is sure to be valid."""
    if row.layout is not torch.strided or not row.numel():
        return None
    flat = row.reshape(-1)
    is_whole = not (row.is_floating_point() or row.is_complex())
    candidates = [flat.roll(1)]
    if name in STEP_PARAMETERS:
        candidates = [flat // 2 if is_whole else flat / 2, flat + 1]
    elif not is_whole:
        candidates += [flat / 2, flat + 1]
    elif "mask" in name:
        candidates += [_cut(flat), torch.ones_like(flat)]
    else:
        candidates += [_cut(flat)]
    return next((c.reshape(row.shape) for c in candidates if not torch.equal(c, flat)), None)


def _cut(flat: torch.Tensor) -> torch.Tensor:
    """`flat` with zeros in its first half: a number that every table of whole numbers has."""
    cut = flat.clone()
    cut[: (len(cut) + 1) // 2] = 0
    return cut
