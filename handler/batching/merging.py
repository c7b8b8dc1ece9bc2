"""Put the arguments of several calls of one module together, and take its output apart again.

Pure tensor code: it knows neither pipelines nor greenlets. A call's arguments are a mapping from
parameter name to value; a value is a tensor, a plain value, or a container of such. Every tensor
plays one of three parts, decided by its shape and the parameter it belongs to:

========  ============================================  ===============================
part      a tensor that                                 when merged
========  ============================================  ===============================
rows      has the call's rows as its first dimension    concatenated
step      is one number of a per-step parameter         expanded to rows, concatenated
shared    is anything else (Flux's position ids)        must be equal, passed once
========  ============================================  ===============================

Some models (Z-Image) take the batch as a list of tensors, one a row, each of its own length. Where
a call's first tensors come in a list, its lists of that many tensors are the rows.

Calls whose `merge_key` is equal may share a forward.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from enum import Enum
from itertools import chain, islice
from typing import Any

import torch

from handler.batching.fingerprints import Fingerprints

__all__ = [
    "SHARED_PARAMETERS",
    "STEP_PARAMETERS",
    "Arguments",
    "edges",
    "is_listed",
    "merge",
    "merge_key",
    "num_rows",
    "output_members",
    "split",
]

Arguments = Mapping[str, Any]

# What denoisers call the parameter that tells one row's place on the noise schedule. Models turn
# it into an embedding in float32, so integer and float schedules (DDIM, Euler) may share a batch.
STEP_PARAMETERS = frozenset({"timestep", "timesteps", "t", "sigma", "noise_level"})

# Tensors without a batch dimension whose first dimension may by accident equal the rows.
SHARED_PARAMETERS = frozenset(
    {"img_ids", "txt_ids", "image_rotary_emb", "freqs_cis", "rope_temporal_scale", "position_ids"}
)

_SELDOM_ROWS = STEP_PARAMETERS | SHARED_PARAMETERS

_EXACT_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)


def num_rows(arguments: Arguments) -> int | None:
    """The batch size of a call; None for a call without tensors."""
    leading = _leading(arguments)
    return None if leading is None else len(leading)


def is_listed(arguments: Arguments) -> bool:
    """Whether the call's rows are lists of tensors."""
    return isinstance(_leading(arguments), list)


def merge_key(arguments: Arguments, rows: int, fingerprints: Fingerprints) -> Hashable:
    """A value that is equal for two calls of one module if and only if they may share a forward.

    The same parameters, equal plain values, and tensors of the same part, dtype, device and shape
    past the rows; shared tensors equal in every element.
    """
    listed = is_listed(arguments)

    def key(name: str, value: Any) -> Hashable:
        if listed and _is_list_of_tensors(value) and len(value) == rows:
            # The model pads the lengths itself.
            kinds = {(v.dtype, v.device, v.layout, tuple(v.shape[1:])) for v in value}
            return ("listed", frozenset(kinds))
        if isinstance(value, torch.Tensor):
            part = _part(name, value, rows)
            if part == "step":
                return ("step", value.device)
            shape = tuple(value.shape[1:] if part == "rows" else value.shape)
            contents = fingerprints.of(value) if part == "shared" else None
            return (part, value.dtype, value.device, value.layout, shape, contents)
        if isinstance(value, _EXACT_VALUES):
            return (type(value), value)
        parts = _members(value)
        if parts is None:
            return ("the very same", type(value), id(value))
        return (type(value), tuple((k, key(_name(name, k), v)) for k, v in parts))

    return tuple((name, key(name, value)) for name, value in arguments.items())


def merge(
    calls: Sequence[Arguments], rows: Sequence[int], *, pad_to: int | None = None
) -> dict[str, Any]:
    """The arguments of one forward that serves `calls`, whose `merge_key` must be equal.

    `rows[i]` is the batch size of ``calls[i]``; their rows stand in this order. With `pad_to` the
    last row is repeated until there are that many.

    Raises:
        ValueError: `pad_to` is less than the rows there are.
    """
    padding = 0 if pad_to is None else pad_to - sum(rows)
    if padding < 0:
        raise ValueError(f"pad_to={pad_to} is less than the {sum(rows)} rows to merge")
    listed = is_listed(calls[0])

    def join(name: str, values: Sequence[Any]) -> Any:
        first = values[0]
        if listed and _is_list_of_tensors(first) and len(first) == rows[0]:
            return [*chain(*values), *values[-1][-1:] * padding]
        if isinstance(first, torch.Tensor):
            part = _part(name, first, rows[0])
            if part == "shared":
                return first
            if part == "step":
                values = _steps(values, rows)
            if padding:
                values = [*values, values[-1][-1:].expand(padding, *values[-1].shape[1:])]
            return torch.cat(list(values))
        if isinstance(first, _EXACT_VALUES) or (parts := _members(first)) is None:
            return first
        columns = [_members(value) or () for value in values]
        joined = [
            join(_name(name, k), [column[i][1] for column in columns])
            for i, (k, _) in enumerate(parts)
        ]
        return _rebuild(first, joined)

    return {name: join(name, [call[name] for call in calls]) for name in calls[0]}


def split(
    output: Any, rows: Sequence[int], *, total: int | None = None, listed: bool = False
) -> list[Any]:
    """The output of a merged forward, one piece a call; pieces share no memory.

    `total` is the number of rows that the forward ran, padding included; `listed` is what
    `is_listed` said of its calls. A tensor whose first dimension is not `total` goes to each call
    whole, every plain value as it is; an object is copied with what it holds (a key-value cache).

    Raises:
        TypeError: there is no telling what an object in it holds.
    """
    total = sum(rows) if total is None else total

    def pieces(value: Any) -> list[Any]:
        if listed and _is_list_of_tensors(value) and len(value) == total:
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
        return [_rebuild(value, [column[i] for column in columns]) for i in range(len(rows))]

    return pieces(output)


def edges(
    arguments: Arguments, rows: int, wanted: Container[Hashable] | None = None
) -> dict[Hashable, torch.Tensor]:
    """The first and the last row of all that `merge` concatenates, by where they stand.

    With `wanted`, of those places only.
    """
    listed = is_listed(arguments)
    found: dict[Hashable, torch.Tensor] = {}

    def visit(path: tuple[Hashable, ...], name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            part = _part(name, value, rows)
            if part == "shared" or value.layout is not torch.strided:
                return
            value = value.reshape(-1) if part == "step" else value
        elif not (listed and _is_list_of_tensors(value) and len(value) == rows):
            if not isinstance(value, _EXACT_VALUES):
                for key, member in _members(value) or ():
                    visit((*path, key), _name(name, key), member)
            return
        for place in ((*path, 0), (*path, -1)):
            if wanted is None or place in wanted:
                found[place] = value[place[-1]]

    for name, value in arguments.items():
        visit((name,), name, value)
    return found


def _name(outer: str, key: Hashable) -> str:
    """The parameter that a container's member belongs to: its key, or the container's own name."""
    return key if isinstance(key, str) else outer


def _part(name: str, tensor: torch.Tensor, rows: int) -> str:
    if name in STEP_PARAMETERS and tensor.numel() in (1, rows) and tensor.ndim <= 1:
        return "step"
    if tensor.ndim and tensor.shape[0] == rows and name not in SHARED_PARAMETERS:
        return "rows"
    return "shared"


def _leading(arguments: Arguments) -> torch.Tensor | list[torch.Tensor] | None:
    """The first tensor with dimensions, or list of tensors, that a call is given.

    Steps and position ids are asked last, wherever they stand: they may have one row for all.
    """
    for _, value in sorted(arguments.items(), key=lambda item: item[0] in _SELDOM_ROWS):
        if _is_list_of_tensors(value):
            listed: list[torch.Tensor] = value
            return listed
        for tensor in _tensors(value):
            if tensor.ndim:
                return tensor
    return None


def _is_list_of_tensors(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(member, torch.Tensor) for member in value)
    )


def _steps(values: Sequence[torch.Tensor], rows: Sequence[int]) -> list[torch.Tensor]:
    """Each value as one number a row, in a dtype that holds all of them without rounding."""
    dtypes = {value.dtype for value in values}
    if len(dtypes) == 1:
        (dtype,) = dtypes
    else:
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return [v.to(dtype).reshape(-1).expand(n) for v, n in zip(values, rows, strict=True)]


def _members(container: Any) -> list[tuple[Hashable, Any]] | None:
    """The members of a container in a fixed order; None for what is no container."""
    if isinstance(container, Mapping):
        return list(container.items())
    if isinstance(container, (list, tuple)):
        return list(enumerate(container))
    if dataclasses.is_dataclass(container) and not isinstance(container, type):
        return [(f.name, getattr(container, f.name)) for f in dataclasses.fields(container)]
    return None


def output_members(value: Any) -> list[tuple[Hashable, Any]] | None:
    """Like `_members`, and the attributes of any other object.

    Raises:
        TypeError: it has none that can be seen.
    """
    parts = _members(value)
    if parts is not None:
        return parts
    if isinstance(value, (*_EXACT_VALUES, torch.Tensor, torch.nn.Module)) or callable(value):
        return None
    if not hasattr(value, "__dict__"):
        raise TypeError(f"an output of type {type(value).__name__} cannot be split")
    return list(vars(value).items())


def _rebuild(container: Any, values: Sequence[Any]) -> Any:
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


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for _, member in _members(value) or () for tensor in _tensors(member)]
