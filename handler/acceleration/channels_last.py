"""Puts 2-d convolutions into the channels_last memory format, which CPUs and GPUs compute faster.

Converted weights are a copy. Mapped weights are shared by all workers that map the same archive, so
large ones stay as they are; decoders of pictures then get their inputs converted instead, which is
where the format gains most. On CUDA decoders are left as they are: they take longer in it, as their
group norms copy what they get (`python -m benchmarks.gpu_forward`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["is_mapped", "put_channels_last"]

_DECODERS = ("vae", "vqvae", "movq")
_MOST_COPIED_BYTES = 64 << 20


def put_channels_last(modules: Mapping[str, torch.nn.Module]) -> None:
    """Put the convolutions of `modules`, by name, into the channels_last format. Mutates them."""
    for name, module in modules.items():
        # `Module.to` would fail at the weights of 3-d convolutions.
        if not _convolutions(module) or any(weight.ndim > 4 for weight in module.parameters()):
            continue
        if name in _DECODERS and any(weight.is_cuda for weight in module.parameters()):
            continue
        if _mapped_bytes(module) <= _MOST_COPIED_BYTES:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        elif name in _DECODERS:
            for convolution in _convolutions(module):
                convolution.register_forward_pre_hook(_reorder_input)


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether `tensor` lies in memory that torch did not allocate."""
    return not tensor.untyped_storage().resizable()


def _convolutions(module: torch.nn.Module) -> list[torch.nn.Conv2d]:
    return [part for part in module.modules() if isinstance(part, torch.nn.Conv2d)]


def _mapped_bytes(module: torch.nn.Module) -> int:
    """Bytes of mapped weights that converting would copy."""
    weights = (each for each in module.parameters() if each.ndim == 4 and is_mapped(each))
    return sum(weight.nbytes for weight in weights)


def _reorder_input(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])
