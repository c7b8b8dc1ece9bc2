"""Halves of a batch: the rows of classifier-free guidance, where these stand together."""

from __future__ import annotations

from typing import Any

import torch

from handler.batching.arguments import (
    EXACT_VALUES,
    SHARED_PARAMETERS,
    Arguments,
    is_listed,
    members,
    parameter_of,
    part_of,
)
from handler.batching.merging import output_members, rebuild

__all__ = ["doubled", "second_half"]


def second_half(arguments: Arguments, rows: int) -> dict[str, Any] | None:
    """The arguments of a call of the second half of its `rows`; views of the same tensors.

    None where a tensor may have several rows for each of the call's, or be none of rows: a call of
    one kind alone does not tell.
    """
    if rows % 2 or is_listed(arguments):
        return None
    is_clear = True

    def half(name: str, value: Any) -> Any:
        nonlocal is_clear
        if isinstance(value, torch.Tensor):
            part = part_of((), name, value, rows, None)
            if part == "rows" or (part == "step" and value.numel() == rows):
                return value[rows // 2 :]
            may_fold = name not in SHARED_PARAMETERS and value.ndim > 1
            folds = part == "shared" and may_fold and value.shape[0] % rows == 0
            is_clear = is_clear and not folds
            return value
        if isinstance(value, EXACT_VALUES) or (parts := members(value)) is None:
            return value
        return rebuild(value, [half(parameter_of(name, key), member) for key, member in parts])

    found = {name: half(name, value) for name, value in arguments.items()}
    return found if is_clear else None


def doubled(output: Any, rows: int) -> Any:
    """An output of `rows`, both of whose halves are the second one.

    Where it has half of the rows, that is the second.

    Raises:
        TypeError: what an object in it holds cannot be seen.
    """
    if isinstance(output, torch.Tensor):
        length = output.shape[0] if output.ndim else 0
        if length not in (rows, rows // 2):
            return output
        half = output[rows // 2 :] if length == rows else output
        return torch.cat([half, half])
    parts = output_members(output)
    if parts is None:
        return output
    return rebuild(output, [doubled(member, rows) for _, member in parts])
