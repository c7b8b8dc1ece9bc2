"""Merge the arguments of several calls of one module, and split its output.

Pure tensor code: it knows neither pipelines nor greenlets. A call's arguments are a mapping from
parameter name to value; a value is a tensor, a plain value, or a container of such. What becomes of
a tensor says its part, which `handler.batching.arguments` tells.

Some models (Z-Image) take the batch as a list of tensors, one a row, each of its own length. Where
a call's first tensors come in a list, its lists of that many tensors are the rows.

Calls whose `merge_key` is equal may share a forward.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import torch

from handler.batching.arguments import (
    EXACT_VALUES,
    Arguments,
    Layout,
    Path,
    is_list_of_tensors,
    is_listed,
    leading,
    leaves,
    members,
    num_rows,
    parameter_of,
    part_of,
)
from handler.batching.devices import moved
from handler.batching.fingerprints import Fingerprints

__all__ = ["merge", "merge_key", "output_members", "rebuild", "split", "was_written"]


def merge_key(
    arguments: Arguments, rows: int, fingerprints: Fingerprints, layout: Layout | None = None
) -> Hashable:
    """A value that is equal for two calls of one module if and only if they may share a forward.

    The same parameters, equal plain values, and tensors of the same part, dtype, device and shape
    past the rows; shared tensors equal in every element.
    """
    listed = is_listed(arguments)

    def key(path: Path, name: str, value: Any) -> Hashable:
        if listed and is_list_of_tensors(value) and len(value) == rows:
            # The model pads the lengths itself.
            kinds = {(v.dtype, v.device, v.layout, tuple(v.shape[1:])) for v in value}
            return ("listed", frozenset(kinds))
        if isinstance(value, torch.Tensor):
            part = part_of(path, name, value, rows, layout)
            if part == "step":
                return (part, value.device)
            kind = (part, value.dtype, value.device, value.layout)
            if part == "shared":
                return (*kind, tuple(value.shape), fingerprints.of(value))
            rows_a_row = value.shape[0] // rows if part == "folded" else 1
            return (*kind, tuple(value.shape[1:]), rows_a_row)
        if isinstance(value, EXACT_VALUES):
            return (type(value), value)
        parts = members(value)
        if parts is None:
            return ("the very same", type(value), id(value))
        inner = ((k, key((*path, k), parameter_of(name, k), v)) for k, v in parts)
        return (type(value), tuple(inner))

    return tuple((name, key((name,), name, value)) for name, value in arguments.items())


def merge(
    calls: Sequence[Arguments],
    rows: Sequence[int],
    *,
    pad_to: int | None = None,
    layout: Layout | None = None,
    copies: bool = False,
) -> dict[str, Any]:
    """The arguments of one forward that serves `calls`, whose `merge_key` must be equal.

    `rows[i]` is the batch size of ``calls[i]``; their rows stand in this order. With `pad_to` the
    last row is repeated until there are that many. With `copies` no tensor is the caller's own.

    Raises:
        ValueError: `pad_to` is less than the rows there are.
    """
    padding = 0 if pad_to is None else pad_to - sum(rows)
    if padding < 0:
        raise ValueError(f"pad_to={pad_to} is less than the {sum(rows)} rows to merge")
    listed = is_listed(calls[0])
    first_rows = leading(calls[0])
    batch = first_rows[0] if isinstance(first_rows, list) else first_rows
    device = None if batch is None else batch.device

    def join(path: Path, name: str, values: Sequence[Any]) -> Any:
        first = values[0]
        if listed and is_list_of_tensors(first) and len(first) == rows[0]:
            return [*chain(*values), *values[-1][-1:] * padding]
        if isinstance(first, torch.Tensor):
            part = part_of(path, name, first, rows[0], layout)
            if part == "shared":
                return first.clone() if copies else first
            if part == "step":
                values = _steps(values, rows, device)
            return _joined(values, rows, padding)
        if isinstance(first, EXACT_VALUES) or (parts := members(first)) is None:
            return first
        columns = [members(value) or () for value in values]
        joined = [
            join((*path, k), parameter_of(name, k), [column[i][1] for column in columns])
            for i, (k, _) in enumerate(parts)
        ]
        return rebuild(first, joined)

    return {name: join((name,), name, [call[name] for call in calls]) for name in calls[0]}


def _joined(values: Sequence[torch.Tensor], rows: Sequence[int], padding: int) -> torch.Tensor:
    if padding:
        rows_a_row = values[-1].shape[0] // rows[-1]
        last = values[-1][-rows_a_row:]
        values = [*values, last.repeat(padding, *[1] * (last.ndim - 1))]
    return torch.cat(list(values))


def split(
    output: Any, rows: Sequence[int], *, total: int | None = None, listed: bool = False
) -> list[Any]:
    """The output of a merged forward, one piece a call; pieces share no memory.

    `total` is the number of rows that the forward ran, padding included; `listed` is what
    `is_listed` said of its calls. A tensor whose first dimension is not `total` goes to each call
    whole, every plain value as it is; an object is copied with what it holds (a key-value cache).

    Raises:
        TypeError: what an object in it holds cannot be seen.
    """
    total = sum(rows) if total is None else total

    def pieces(value: Any) -> list[Any]:
        if listed and is_list_of_tensors(value) and len(value) == total:
            row = iter(value)
            return [[v.clone() for v in islice(row, n)] for n in rows]
        if isinstance(value, torch.Tensor):
            if value.ndim == 0 or value.shape[0] != total:
                return [value, *(value.clone() for _ in rows[1:])]
            kept = value.narrow(0, 0, sum(rows))
            return list(torch.ops.aten.split_with_sizes_copy(kept, list(rows)))
        parts = output_members(value)
        if parts is None:
            return [value] * len(rows)
        columns = [pieces(member) for _, member in parts]
        return [rebuild(value, [column[i] for column in columns]) for i in range(len(rows))]

    return pieces(output)


def was_written(merged: Arguments) -> bool:
    """Whether anything wrote into the tensors of `merge`, made with copies."""
    return any(
        not tensor.is_inference() and tensor._version > 0
        for leaf in leaves(merged, num_rows(merged) or 0)
        for tensor in (leaf.value if isinstance(leaf.value, list) else [leaf.value])
    )


def _steps(
    values: Sequence[torch.Tensor], rows: Sequence[int], device: torch.device | None
) -> list[torch.Tensor]:
    """Each value as one number a row, in a dtype that holds all of them without rounding.

    On `device`: a module moves a number there by itself, but not a list of them.
    """
    dtypes = {value.dtype for value in values}
    if len(dtypes) == 1:
        (dtype,) = dtypes
    else:
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    converted = [value.to(dtype).reshape(-1) for value in values]
    if device is not None:
        converted = [moved(value, device) for value in converted]
    return [value.expand(n) for value, n in zip(converted, rows, strict=True)]


def output_members(value: Any) -> list[tuple[Hashable, Any]] | None:
    """Like `members`, and the attributes of any other object.

    Raises:
        TypeError: it has none that can be seen.
    """
    parts = members(value)
    if parts is not None:
        return parts
    if isinstance(value, (*EXACT_VALUES, torch.Tensor, torch.nn.Module)) or callable(value):
        return None
    if not hasattr(value, "__dict__"):
        raise TypeError(f"an output of type {type(value).__name__} cannot be split")
    return list(vars(value).items())


def rebuild(container: Any, values: Sequence[Any]) -> Any:
    """A container like `container` with other values."""
    kind: Callable[..., Any] = type(container)
    if isinstance(container, Mapping):
        items = dict(zip(container, values, strict=True))
        # Model outputs are ordered dictionaries and dataclasses at once: only keywords build them,
        # and a field that is None is missing from the dictionary.
        fields = getattr(container, "__dataclass_fields__", None)
        return kind(items) if fields is None else kind(**{**dict.fromkeys(fields), **items})
    if hasattr(container, "_fields"):
        return kind(*values)
    if isinstance(container, (list, tuple)):
        return kind(values)
    if fields := getattr(container, "__dataclass_fields__", None):
        return dataclasses.replace(container, **dict(zip(fields, values, strict=True)))
    rebuilt = copy.copy(container)
    vars(rebuilt).update(zip(vars(container), values, strict=True))
    return rebuilt
