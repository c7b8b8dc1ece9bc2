"""Low-rank additions to a layer's output, each row of a batch with its own: y + s · B(A(x)).

Pure tensor code. What PEFT calls a LoRA is here two small weights and a scale; a merged forward has
rows with several of them, with one at another scale, and with none. `other_adapters` has what is
added otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional

__all__ = [
    "Adapter",
    "Convolution",
    "LowRank",
    "Part",
    "Scaled",
    "UnevenRowsError",
    "add_low_rank",
]

_CONVOLVE = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}


class UnevenRowsError(ValueError):
    """A layer's input is not so many values for each row, so that it cannot be told whose is whose.

    What raises it shared a forward that has to be run row by row.
    """


class Convolution(NamedTuple):
    """How the first of two weights is convolved; the second one is always pointwise."""

    stride: Any
    padding: Any
    dilation: Any
    groups: int = 1
    up_groups: int = 1


@dataclass(frozen=True, eq=False, slots=True)
class LowRank:
    """One adapter at one layer; its weights are only read.

    ``down`` is (rank, in) and ``up`` (out, rank), of a convolution with the kernel behind. Of an
    embedding, ``down`` is (rank, tokens).
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    divisor: float
    """The rank, or its square root for a rank-stabilised LoRA."""
    bias: torch.Tensor | None = None
    convolution: Convolution | None = None
    embedding_scale: Any = None
    is_embedding: bool = False

    @property
    def size_bytes(self) -> int:
        """What its weights occupy."""
        return self.down.nbytes + self.up.nbytes + (0 if self.bias is None else self.bias.nbytes)

    @property
    def is_matrix(self) -> bool:
        """Whether it is a product of two matrices, and nothing else."""
        return self.convolution is None and not self.is_embedding and self.bias is None

    def factor(self, scale: float) -> float:
        """What its output is multiplied by at this `scale`, rounded as PEFT does."""
        return scale * self.alpha / self.divisor

    def added(self, x: torch.Tensor, output: torch.Tensor, factor: float) -> torch.Tensor:
        """What a layer's `output` for `x` gets, in PEFT's order of operations."""
        added = self(x) * factor
        if self.embedding_scale is not None:
            added = added * self.embedding_scale.to(added.dtype)
        return added

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """B(A(x)), not yet scaled."""
        if self.is_embedding:
            return functional.embedding(x, self.down.T) @ self.up.T
        x = x.to(self.down.dtype)
        if self.convolution is None:
            return functional.linear(functional.linear(x, self.down), self.up, self.bias)
        of, convolve = self.convolution, _CONVOLVE[self.down.ndim]
        inner = convolve(x, self.down, None, of.stride, of.padding, of.dilation, of.groups)
        return convolve(inner, self.up, self.bias, groups=of.up_groups)


class Adapter(Protocol):
    """What adds to the output of one layer."""

    @property
    def size_bytes(self) -> int:
        """What its weights occupy."""
        ...

    def factor(self, scale: float) -> float:
        """What it is multiplied by at this `scale`."""
        ...

    def added(self, x: torch.Tensor, output: torch.Tensor, factor: float) -> torch.Tensor:
        """What a layer's `output` for `x` gets; neither is changed."""
        ...


Scaled = tuple[Adapter, float]
"""An adapter at a layer, and what its output is multiplied by."""


class Part(NamedTuple):
    """Neighbouring rows of a batch that have the same adapters, in the order they are added in."""

    start: int
    stop: int
    adapters: tuple[Scaled, ...]


def add_low_rank(
    x: torch.Tensor, output: torch.Tensor, num_rows: int, parts: Sequence[Part]
) -> torch.Tensor:
    """The `output` that a layer gave for `x`, and what the adapters of each row add to it.

    The batch has `num_rows` rows; those in no part have no adapters. Where all rows are one part,
    the result is that of PEFT's own layers to the bit. Else `output` is changed in place, and each
    row must be as many of the first dimension's entries, one after the other.

    Raises:
        UnevenRowsError: the first dimension is no multiple of the rows.
    """
    if len(parts) == 1 and parts[0].stop - parts[0].start == num_rows:
        return _add_to_all(x, output, parts[0].adapters)
    if not parts:
        return output
    if not x.ndim or not output.ndim or len(x) % num_rows or len(output) % num_rows:
        raise UnevenRowsError(f"a batch of {num_rows} rows reaches a layer as {tuple(x.shape)}")
    inner, outer = len(x) // num_rows, len(output) // num_rows
    for start, stop, adapters in parts:
        rows = x[start * inner : stop * inner]
        target = output[start * outer : stop * outer]
        for adapter, factor in adapters:
            _add_to_rows(rows, target, adapter, factor)
    return output


def _add_to_all(x: torch.Tensor, output: torch.Tensor, adapters: Sequence[Scaled]) -> torch.Tensor:
    dtype = output.dtype
    for adapter, factor in adapters:
        output = output + adapter.added(x, output, factor)
    return output.to(dtype)


def _add_to_rows(x: torch.Tensor, target: torch.Tensor, adapter: Adapter, factor: float) -> None:
    if (
        isinstance(adapter, LowRank)
        and adapter.is_matrix
        and target.is_contiguous()
        and target.dtype == adapter.up.dtype
    ):
        inner = functional.linear(x.to(adapter.down.dtype), adapter.down)
        rows = math.prod(target.shape[:-1])
        target.view(rows, -1).addmm_(inner.reshape(rows, -1), adapter.up.T, alpha=factor)
    else:
        target.add_(adapter.added(x, target, factor))
