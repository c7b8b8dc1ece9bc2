"""Copies of small tensors to a device, without waiting for it."""

from __future__ import annotations

import torch

__all__ = ["moved"]


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`.

    From memory that may be paged out, a copy to CUDA waits until all that is queued there is done.
    """
    if tensor.device == device:
        return tensor
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
