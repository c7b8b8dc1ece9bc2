"""The tensors among a module call's arguments: where they are, and which are rows of the batch.

==========  ==================================================  ===============================
part        a tensor that                                       when merged
==========  ==================================================  ===============================
rows        has the call's rows as its first dimension          concatenated
folded      has several rows for each of the call's (frames)    concatenated
step        is one number of a per-step parameter               expanded to rows, concatenated
shared      is anything else (Flux's position ids)              must be equal, passed once
==========  ==================================================  ===============================

Shapes and names decide, and where these are ambiguous a `Layout` says what was found out: a call of
one row alone does not tell whether a tensor of sixteen rows is sixteen frames or a table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from enum import Enum
from typing import Any, Literal, NamedTuple

import torch

__all__ = [
    "EXACT_VALUES",
    "SHARED_PARAMETERS",
    "STEP_PARAMETERS",
    "Arguments",
    "Layout",
    "Leaf",
    "Part",
    "Path",
    "edges",
    "is_batch",
    "is_list_of_tensors",
    "is_listed",
    "leading",
    "leaves",
    "members",
    "num_rows",
    "parameter_of",
    "part_of",
    "row_at",
]

Arguments = Mapping[str, Any]

Path = tuple[Hashable, ...]
"""Where a value stands: the parameter's name, then the keys of the containers around it."""


Part = Literal["rows", "folded", "step", "shared"]
"""What becomes of a tensor when calls are merged. Not an Enum: it is hashed in every key."""


Layout = Mapping[Path, Part]
"""What was found out about tensors whose shapes do not tell their part."""

# What denoisers call the parameter that tells one row's place on the noise schedule. Models turn
# it into an embedding in float32, so integer and float schedules (DDIM, Euler) may share a batch.
STEP_PARAMETERS = frozenset({"timestep", "timesteps", "t", "sigma", "noise_level"})

# Tensors without a batch dimension whose first dimension may by accident equal the rows.
SHARED_PARAMETERS = frozenset(
    {"img_ids", "txt_ids", "image_rotary_emb", "freqs_cis", "rope_temporal_scale", "position_ids"}
)

_SELDOM_ROWS = STEP_PARAMETERS | SHARED_PARAMETERS

EXACT_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)


class Leaf(NamedTuple):
    """One tensor among a call's arguments, or one list of tensors that are rows."""

    path: Path
    value: Any
    part: Part


def num_rows(arguments: Arguments) -> int | None:
    """The batch size of a call; None for a call without tensors."""
    first = leading(arguments)
    return None if first is None else len(first)


def is_batch(arguments: Arguments, rows: int) -> bool:
    """Whether the tensor that `num_rows` counted is a batch, and not the tokens of one picture.

    It is where another tensor has the same first dimension, or where there is no other tensor.
    """
    first = leading(arguments)
    others = [
        tensor
        for name, value in arguments.items()
        for tensor in _tensors(value)
        if tensor.ndim and tensor is not first and name not in SHARED_PARAMETERS
    ]
    others = [tensor for tensor in others if tensor.ndim > 1 or tensor.shape[0] > 1]
    return isinstance(first, list) or not others or any(t.shape[0] == rows for t in others)


def is_listed(arguments: Arguments) -> bool:
    """Whether the call's rows are lists of tensors."""
    return isinstance(leading(arguments), list)


def part_of(path: Path, name: str, tensor: torch.Tensor, rows: int, layout: Layout | None) -> Part:
    """The part of the tensor at `path`, which belongs to the parameter `name`.

    Without a `layout`, tensors of several rows a row are shared.
    """
    if name in STEP_PARAMETERS and tensor.numel() in (1, rows) and tensor.ndim <= 1:
        return "step"
    if not tensor.ndim or name in SHARED_PARAMETERS:
        return "shared"
    length = tensor.shape[0]
    if length == rows:
        return layout.get(path, "rows") if layout else "rows"
    # One dimension alone is a list of numbers (packed token ids), not rows.
    can_fold = layout is not None and rows and tensor.ndim > 1 and length % rows == 0 < length
    return layout.get(path, "folded") if layout is not None and can_fold else "shared"


def leaves(arguments: Arguments, rows: int, layout: Layout | None = None) -> list[Leaf]:
    """Every tensor of a call and every list of tensors that are its rows, in order."""
    listed = is_listed(arguments)
    found: list[Leaf] = []

    def visit(path: Path, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.append(Leaf(path, value, part_of(path, name, value, rows, layout)))
        elif listed and is_list_of_tensors(value) and len(value) == rows:
            found.append(Leaf(path, value, "rows"))
        elif not isinstance(value, EXACT_VALUES):
            for key, member in members(value) or ():
                visit((*path, key), parameter_of(name, key), member)

    for name, value in arguments.items():
        visit((name,), name, value)
    return found


def edges(arguments: Arguments, rows: int, layout: Layout | None = None) -> frozenset[Path]:
    """Where the first and the last row stand of all that merging concatenates, for `row_at`."""
    return frozenset(
        (*leaf.path, end)
        for leaf in leaves(arguments, rows, layout)
        if leaf.part != "shared" and getattr(leaf.value, "layout", torch.strided) is torch.strided
        for end in (0, -1)
    )


def row_at(arguments: Arguments, edge: Path) -> torch.Tensor:
    """The row of `arguments` at `edge`; the number itself where that is one step for all rows."""
    value: Any = arguments
    for key in edge[:-1]:
        keyed = isinstance(value, (Mapping, list, tuple))
        value = value[key] if keyed else getattr(value, str(key))
    row: torch.Tensor = value[edge[-1]] if isinstance(value, list) or value.ndim else value
    return row


def parameter_of(outer: str, key: Hashable) -> str:
    """The parameter that a container's member belongs to: its key, or the container's own name."""
    return key if isinstance(key, str) else outer


def is_list_of_tensors(value: Any) -> bool:
    """Whether `value` is a list of one or more tensors and of nothing else."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(member, torch.Tensor) for member in value)
    )


def members(container: Any) -> list[tuple[Hashable, Any]] | None:
    """The members of a container in a fixed order; None for what is not a container."""
    if isinstance(container, Mapping):
        return list(container.items())
    if isinstance(container, (list, tuple)):
        return list(enumerate(container))
    if dataclasses.is_dataclass(container) and not isinstance(container, type):
        return [(f.name, getattr(container, f.name)) for f in dataclasses.fields(container)]
    return None


def leading(arguments: Arguments) -> torch.Tensor | list[torch.Tensor] | None:
    """The first tensor, or list of tensors, whose first dimension may be the batch.

    Tensors of one dimension are asked after all others: they may be token ids packed together.
    Steps and position ids are asked last, wherever they stand: they may have one row for all.
    """
    seldom: list[Any] = []
    flat: list[torch.Tensor] = []
    found: torch.Tensor | list[torch.Tensor] | None
    for name, value in arguments.items():
        if name in _SELDOM_ROWS:
            seldom.append(value)
        elif isinstance(value, torch.Tensor) and value.ndim > 1:
            found = value
            return found
        elif not isinstance(value, EXACT_VALUES):
            found = _first(value, flat)
            if found is not None:
                return found
    if flat:
        return flat[0]
    for value in seldom:
        found = _first(value, flat)
        if found is not None:
            return found
    return flat[0] if flat else None


def _first(value: Any, flat: list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor] | None:
    """The first tensor of several dimensions, or list of tensors; puts others into `flat`."""
    if is_list_of_tensors(value):
        listed: list[torch.Tensor] = value
        return listed
    for tensor in _tensors(value):
        if tensor.ndim > 1:
            return tensor
        if tensor.ndim:
            flat.append(tensor)
    return None


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for _, member in members(value) or () for tensor in _tensors(member)]
