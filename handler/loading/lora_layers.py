"""What a LoRA's file adds to each layer: a low-rank sum, with lengths (DoRA), or a LoKr."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from handler.errors import ArchiveError
from handler.messages import first_lines, show

if TYPE_CHECKING:
    import torch

__all__ = ["METADATA", "WEIGHT", "Delivery", "KroneckerLayer", "Layers", "LoraLayer", "layers_in"]

METADATA = "lora_adapter_metadata"
"""Where diffusers writes PEFT's configuration of each component, in a file's header."""

WEIGHT = re.compile(
    r"(?P<layer>.+)\.(lora_(?P<embedding>embedding_)?(?P<side>[AB])"
    r"|(?P<magnitude>lora_magnitude_vector)|lokr_(?P<factor>w[12](_[ab])?))"
    r"(\.(?P<part>weight|bias))?"
)
"""The name of a weight that PEFT is given."""


@dataclass(frozen=True, eq=False, slots=True)
class LoraLayer:
    """What a LoRA adds to one layer: ``up`` times ``down`` times the input, by alpha / divisor."""

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None
    alpha: float
    divisor: float
    """The rank, or its square root for a rank-stabilised LoRA."""
    is_embedding: bool
    magnitude: torch.Tensor | None = None
    """Of a DoRA: the length of each column of the sum."""


@dataclass(frozen=True, eq=False, slots=True)
class KroneckerLayer:
    """What a LoKr adds to one layer: the Kronecker product of two weights, by alpha / divisor.

    Each is there whole, or as two matrices to multiply.
    """

    left: Sequence[torch.Tensor]
    right: Sequence[torch.Tensor]
    alpha: float
    divisor: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the product: that of the layer's own weight."""
        ends = [(side[0].shape[0], side[-1].shape[-1]) for side in (self.left, self.right)]
        return ends[0][0] * ends[1][0], ends[0][1] * ends[1][1]


Layers = Mapping[str, Mapping[str, LoraLayer | KroneckerLayer]]
"""What a LoRA adds, by component and the layer's path in it."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """What one component was given: weights by PEFT's names, and what their config says."""

    component: str
    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]

    def scales(self) -> _Scales:
        """How the layers are scaled. Raises: ArchiveError."""
        try:
            return _Scales(
                None if self.config["r"] is None else float(self.config["r"]),
                float(self.config["lora_alpha"]),
                _patterns(self.config.get("rank_pattern") or {}),
                _patterns(self.config.get("alpha_pattern") or {}),
                bool(self.config.get("use_rslora")),
            )
        except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
            raise ArchiveError(f"its {METADATA} cannot be read: {first_lines(error)}") from error


_Patterns = Sequence[tuple[re.Pattern[str], float]]
# What patterns of a file's author may have: names with dots, and twice something repeated. Others
# can take for ever to find no match, and nothing else of the process runs meanwhile.
_PATTERN = re.compile(r"\^?(?:[\w.-]|\\.)+(?:[*+](?:[\w.-]|\\.)*){0,2}\$?")


def _patterns(values: Mapping[str, Any]) -> _Patterns:
    """Of layers' names, compiled once: PEFT does so for every layer anew, which takes seconds.

    Raises: ValueError, where one might take for ever.
    """
    if wrong := next((key for key in values if not _PATTERN.fullmatch(key)), None):
        raise ValueError(f"{show(wrong)} is no name of a layer, nor one with two * or + in it")
    return [(re.compile(rf"(.*\.)?({key})$"), float(each)) for key, each in values.items()]


@dataclass(frozen=True, slots=True)
class _Scales:
    """How the layers of a component are scaled, as PEFT finds it."""

    rank: float | None
    alpha: float
    rank_patterns: _Patterns
    alpha_patterns: _Patterns
    is_rank_stabilised: bool

    def of(self, layer: str, rank: int) -> tuple[float, float]:
        """The alpha and the divisor of a layer. Raises: ArchiveError, where ranks differ."""
        configured = _first_match(self.rank_patterns, layer, self.rank)
        if configured not in (None, rank):
            raise ArchiveError(f"{layer} has the rank {rank}, and its metadata says {configured:g}")
        alpha = _first_match(self.alpha_patterns, layer, self.alpha)
        return alpha, math.sqrt(rank) if self.is_rank_stabilised else rank

    def of_kronecker(self, layer: str) -> tuple[float, float]:
        """The alpha and the divisor of a layer of a LoKr, whose rank its shapes do not tell."""
        alpha = _first_match(self.alpha_patterns, layer, self.alpha)
        return alpha, _first_match(self.rank_patterns, layer, self.rank)


def _first_match(patterns: _Patterns, layer: str, default: Any) -> Any:
    return next((value for pattern, value in patterns if pattern.match(layer)), default)


def layers_in(delivery: Delivery) -> Iterator[tuple[str, LoraLayer | KroneckerLayer]]:
    """All weights of each layer. Raises: ArchiveError, where one of them is missing."""
    weights: dict[str, dict[str, torch.Tensor]] = {}
    embeddings = set()
    for name, tensor in delivery.tensors.items():
        found = WEIGHT.fullmatch(name)
        assert found is not None, "checked before"
        part = found["magnitude"] or found["factor"]
        part = part or ("bias" if found["part"] == "bias" else found["side"])
        weights.setdefault(found["layer"], {})[part] = tensor
        if found["embedding"]:
            embeddings.add(found["layer"])
    scales = delivery.scales()
    for layer, parts in weights.items():
        if any(part.startswith("w") for part in parts):
            yield layer, _kronecker(layer, parts, scales)
            continue
        if not {"A", "B"} <= parts.keys():
            raise ArchiveError(f"it is half a LoRA: of {layer} it has one weight of two")
        yield (
            layer,
            LoraLayer(
                parts["A"],
                parts["B"],
                parts.get("bias"),
                *scales.of(layer, parts["A"].shape[0]),
                is_embedding=layer in embeddings,
                magnitude=parts.get("lora_magnitude_vector"),
            ),
        )


def _kronecker(layer: str, parts: Mapping[str, torch.Tensor], scales: _Scales) -> KroneckerLayer:
    sides = []
    for side in ("w1", "w2"):
        names = [side] if side in parts else [f"{side}_a", f"{side}_b"]
        if not parts.keys() >= {*names}:
            raise ArchiveError(f"it is half a LoKr: of {layer} it has only {', '.join(parts)}")
        sides.append([parts[name] for name in names])
    alpha, rank = scales.of_kronecker(layer)
    return KroneckerLayer(sides[0], sides[1], alpha, rank)
