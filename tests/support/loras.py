"""Random LoRAs as trainers save them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["kohya_lora"]

_ENDS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1")
_ENCODER_ENDS = ("q_proj", "k_proj", "v_proj", "out_proj")


def kohya_lora(
    modules: Mapping[str, torch.nn.Module],
    *,
    seed: int = 0,
    rank: int = 2,
    alpha: float | None = None,
    std: float = 0.3,
    ends: tuple[str, ...] = (*_ENDS, *_ENCODER_ENDS),
) -> dict[str, torch.Tensor]:
    """A LoRA of the layers of `modules`, by kohya's prefixes, whose names end so."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for prefix, module in modules.items():
        for name, layer in module.named_modules():
            key, kernel = f"{prefix}_{name.replace('.', '_')}", getattr(layer, "kernel_size", ())
            if not name.endswith(ends) or not isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
                continue
            out, inner = layer.weight.shape[:2]
            down = torch.randn(rank, inner, *kernel, generator=generator) * std
            up = torch.randn(out, rank, *[1 for _ in kernel], generator=generator) * std
            found[f"{key}.lora_down.weight"], found[f"{key}.lora_up.weight"] = down, up
            if alpha is not None:
                found[f"{key}.alpha"] = torch.tensor(alpha)
    return found
