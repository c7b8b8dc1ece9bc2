"""Adapters that are no plain low-rank sum, each row of a batch still with its own: DoRA and LoKr.

Both are computed in PEFT's order of operations, so that a batch under one of them has PEFT's result
to the bit. Source: peft 0.21, tuners/lora/dora.py and tuners/lokr/layer.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from handler.batching.low_rank import LowRank

__all__ = ["Dora", "Kronecker"]

_MAX_RATIOS = 16


@dataclass(frozen=True, eq=False, slots=True)
class Dora:
    """A LoRA that also sets the length of each of the layer's columns: m · (W + sBA) / |W + sBA|.

    `weight` and `bias` are the layer's own, only read. `magnitude` is (out), of a convolution with
    a one for each of its other dimensions.
    """

    low_rank: LowRank
    magnitude: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    _ratios: dict[float, torch.Tensor] = field(default_factory=dict)
    """Length wanted by length there is, at each factor that was used."""

    @property
    def size_bytes(self) -> int:
        """What its own weights occupy."""
        return self.low_rank.size_bytes + self.magnitude.nbytes

    def factor(self, scale: float) -> float:
        """What its low-rank part is multiplied by at this `scale`."""
        return self.low_rank.factor(scale)

    def added(self, x: torch.Tensor, output: torch.Tensor, factor: float) -> torch.Tensor:
        """What a layer's `output` for `x` gets; neither is changed."""
        ratio = self._ratio(factor)
        if self.bias is not None:
            output = output - self.bias.view(-1, *(1,) * (self.weight.ndim - 2))
        return (ratio - 1) * output + ratio * self.low_rank(x) * factor

    def _ratio(self, factor: float) -> torch.Tensor:
        if factor not in self._ratios:
            if len(self._ratios) >= _MAX_RATIOS:
                self._ratios.clear()
            self._ratios[factor] = self._computed(factor)
        return self._ratios[factor]

    def _computed(self, factor: float) -> torch.Tensor:
        down, up, weight = self.low_rank.down, self.low_rank.up, self.weight
        if weight.ndim == 2:
            eye = torch.eye(down.shape[1], device=down.device, dtype=down.dtype)
            product = functional.linear(functional.linear(eye, down), up).T.to(weight.dtype)
            length: torch.Tensor = torch.linalg.norm(weight + factor * product, dim=1).to(
                weight.dtype
            )
            return (self.magnitude / length).view(1, -1)
        rank = down.shape[0]
        product = torch.mm(up.view(-1, rank), down.view(rank, -1)).reshape(weight.shape)
        dims = tuple(range(1, weight.ndim))
        length = (weight + factor * product).norm(p=2, dim=dims, keepdim=True).transpose(1, 0)
        return self.magnitude / length


@dataclass(frozen=True, eq=False, slots=True)
class Kronecker:
    """The Kronecker product of two small weights, as large as the one of its linear layer.

    Each of the two is given whole, or as two matrices to multiply.
    """

    left: Sequence[torch.Tensor]
    right: Sequence[torch.Tensor]
    alpha: float
    divisor: float

    @property
    def size_bytes(self) -> int:
        """What its weights occupy."""
        return sum(each.nbytes for each in (*self.left, *self.right))

    def factor(self, scale: float) -> float:
        """What the product is multiplied by at this `scale`, rounded as PEFT does."""
        return scale * self.alpha / self.divisor

    def added(self, x: torch.Tensor, output: torch.Tensor, factor: float) -> torch.Tensor:
        """What a layer's `output` for `x` gets; neither is changed."""
        left, right = _product(self.left), _product(self.right)
        weight = torch.kron(left, right.contiguous()) * factor
        return functional.linear(x.to(weight.dtype), weight)


def _product(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    return matrices[0] if len(matrices) == 1 else matrices[0] @ matrices[1]
