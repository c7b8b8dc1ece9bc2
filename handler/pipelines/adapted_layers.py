"""Layers whose output is added to by LoRAs, each row's own, while a forward runs that needs it.

A layer is patched only while such a forward runs: code that was compiled for the others sees the
modules as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch

from handler.batching.low_rank import Adapter, Convolution, LowRank, Part, Scaled, add_low_rank
from handler.batching.other_adapters import Dora, Kronecker

__all__ = [
    "AdaptedLayer",
    "KroneckerWeights",
    "LoraLayers",
    "LoraWeights",
    "adapter_at",
    "low_rank_of",
    "patched",
    "peft_layers",
]

_CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
_MISSING = object()


class LoraWeights(Protocol):
    """What a LoRA adds to one layer, as it was read from a file."""

    @property
    def down(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def up(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def bias(self) -> torch.Tensor | None: ...  # noqa: D102
    @property
    def magnitude(self) -> torch.Tensor | None: ...  # noqa: D102
    @property
    def alpha(self) -> float: ...  # noqa: D102
    @property
    def divisor(self) -> float: ...  # noqa: D102


@runtime_checkable
class KroneckerWeights(Protocol):
    """What a LoKr adds to one layer, as it was read from a file."""

    @property
    def left(self) -> Sequence[torch.Tensor]: ...  # noqa: D102
    @property
    def right(self) -> Sequence[torch.Tensor]: ...  # noqa: D102
    @property
    def alpha(self) -> float: ...  # noqa: D102
    @property
    def divisor(self) -> float: ...  # noqa: D102


LoraLayers = Mapping[str, Mapping[str, LoraWeights | KroneckerWeights]]
"""What a LoRA adds, by component and the layer's path."""


class AdaptedLayer:
    """One layer, plain or PEFT's, that LoRAs may add to.

    `base` is what it computes without any LoRA.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.is_peft = hasattr(module, "base_layer")
        self.base: Callable[..., Any] = module.base_layer if self.is_peft else module.forward
        self._parts: Sequence[Part] = ()
        self._num_rows = 0
        self._before: Any = _MISSING

    def install(self, parts: Sequence[Part], num_rows: int) -> None:
        """Add to the rows of each forward of the module what `parts` says, until `remove`."""
        self._parts, self._num_rows = parts, num_rows
        own = vars(self.module)  # torch's __setattr__ takes fifty times as long
        self._before = own.get("forward", _MISSING)
        own["forward"] = self._forward

    def remove(self) -> None:
        """Leave the module as it was before `install`."""
        if self._before is _MISSING:
            del vars(self.module)["forward"]
        else:
            vars(self.module)["forward"] = self._before
        self._parts, self._before = (), _MISSING

    def _forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output: torch.Tensor = self.base(x, *args, **kwargs)
        return add_low_rank(x, output, self._num_rows, self._parts)

    def as_found(self) -> tuple[Scaled, ...] | None:
        """What PEFT's layer, not merged, adds by itself; None where that is no sum of LoRAs."""
        if self.module.disable_adapters:
            return ()
        adapters = []
        for name in self.module.active_adapters:
            if name in self.module.scaling:
                adapter = low_rank_of(self.module, name)
                if adapter is None:
                    return None
                adapters.append((adapter, self.module.scaling[name]))
        return tuple(adapters)


@contextmanager
def patched(layers: Iterable[tuple[AdaptedLayer, Sequence[Part]]], num_rows: int) -> Iterator[None]:
    """While it is entered, each of `layers` adds what stands beside it."""
    installed: list[AdaptedLayer] = []
    try:
        for layer, parts in layers:
            layer.install(parts, num_rows)
            installed.append(layer)
        yield
    finally:
        for layer in installed:
            layer.remove()


def _is_adaptable(module: torch.nn.Module) -> bool:
    """Whether a low-rank addition to the output of this layer is known how to compute."""
    return isinstance(module, (torch.nn.Linear, torch.nn.Embedding, *_CONVOLUTIONS))


def peft_layers(module: torch.nn.Module) -> list[Any]:
    """The layers within `module` that PEFT has put around others."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [part for part in module.modules() if isinstance(part, BaseTunerLayer)]


def adapter_at(
    layer: AdaptedLayer, weights: LoraWeights | KroneckerWeights, dtype: torch.dtype
) -> Adapter:
    """What `weights` add to `layer`, where its own weight is and in its precision.

    In `dtype` where its own is of no floating-point numbers.

    Raises:
        ValueError: nothing of the kind can be added to a layer of its kind.
    """
    base = layer.module.base_layer if layer.is_peft else layer.module
    if not _is_adaptable(base) or getattr(base, "max_norm", None) is not None:
        raise ValueError(f"a {type(base).__name__} takes no LoRA")

    def placed(weight: torch.Tensor) -> torch.Tensor:
        own = base.weight
        weight = weight.to(own.device, own.dtype if own.is_floating_point() else dtype)
        # As PEFT has them: torch multiplies by what could be trained in another order of sums.
        return torch.nn.Parameter(weight.contiguous())

    if isinstance(weights, KroneckerWeights):
        if not isinstance(base, torch.nn.Linear):
            raise ValueError(f"a {type(base).__name__} takes no LoKr")
        left, right = ([placed(each) for each in side] for side in (weights.left, weights.right))
        return Kronecker(left, right, weights.alpha, weights.divisor)
    bias = None if weights.bias is None else placed(weights.bias)
    convolution = None
    if isinstance(base, _CONVOLUTIONS):
        convolution = Convolution(base.stride, base.padding, 1, 1, base.groups)
    is_embedding = isinstance(base, torch.nn.Embedding)
    down, up, scale = placed(weights.down), placed(weights.up), (weights.alpha, weights.divisor)
    found = LowRank(down, up, *scale, bias, convolution, None, is_embedding)
    if weights.magnitude is None:
        return found
    if is_embedding:
        raise ValueError(f"a {type(base).__name__} takes no DoRA")
    return Dora(found, placed(weights.magnitude), base.weight, base.bias)


def low_rank_of(layer: Any, name: str) -> LowRank | None:
    """The adapter `name` of PEFT's `layer`; None where it is not a plain LoRA of a plain layer."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = layer.base_layer
    if (
        not isinstance(layer, LoraLayer)
        or layer.merged
        or name in layer.lora_variant
        or isinstance(base, BaseTunerLayer)
        or not _is_adaptable(base)
        or _drops_out(layer, name)
    ):
        return None
    rank, alpha = layer.r[name], layer.lora_alpha[name]
    divisor = math.sqrt(rank) if layer.use_rslora.get(name, False) else rank
    if isinstance(base, torch.nn.Embedding):
        if base.max_norm is not None:
            return None
        down, up = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        scale = layer._get_embed_scale()
        return LowRank(down, up, alpha, divisor, embedding_scale=scale, is_embedding=True)
    first, second = layer.lora_A[name], layer.lora_B[name]
    convolution = None
    if isinstance(base, _CONVOLUTIONS):
        convolution = Convolution(
            first.stride, first.padding, first.dilation, first.groups, second.groups
        )
    return LowRank(first.weight, second.weight, alpha, divisor, second.bias, convolution)


def _drops_out(layer: Any, name: str) -> bool:
    dropout = dict(layer.lora_dropout.items()).get(name)
    return isinstance(dropout, torch.nn.Dropout) and dropout.training and dropout.p > 0
