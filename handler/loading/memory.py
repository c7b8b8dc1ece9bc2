"""Whether a pipeline's weights fit its device, told before they are copied there."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "DeviceMemory",
    "device_memory",
    "drawing_problem",
    "memory_problem",
    "weights_bytes",
]


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a device: those that are free, all that there are, and those that we hold."""

    free: int
    total: int
    own: int = 0

    @property
    def of_others(self) -> int:
        """Bytes that other processes hold, and what the driver needs."""
        return max(0, self.total - self.free - self.own)


def device_memory(device: torch.device) -> DeviceMemory | None:
    """The memory of `device`; None where it cannot be asked for, as on the CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(free, total, torch.cuda.memory_reserved(device))


def weights_bytes(modules: Collection[Any]) -> dict[torch.dtype, int]:
    """The bytes of all parameters and buffers of `modules`, each counted once, by precision."""
    tensors: dict[int, torch.Tensor] = {}
    for module in modules:
        if isinstance(module, torch.nn.Module):
            tensors |= {id(each): each for each in (*module.parameters(), *module.buffers())}
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return sizes


def memory_problem(
    sizes: dict[torch.dtype, int], memory: DeviceMemory | None, device: torch.device
) -> str | None:
    """Why weights of these `sizes` cannot be on `device`, and what would help; None if they can."""
    needed = sum(sizes.values())
    if memory is None or needed <= memory.free:
        return None
    halved = needed - sizes.get(torch.float32, 0) // 2 - sizes.get(torch.float64, 0) * 3 // 4
    helps = []
    if halved < needed:
        fits = "which fits" if halved <= memory.free else "which does not fit either"
        helps.append(f"dtype: float16 ({_gib(halved)} of weights, {fits})")
    if needed <= memory.total and memory.of_others > memory.total // 20:
        helps.append(f"ending what else is on the card ({_gib(memory.of_others)})")
    helps.append("a card with more memory, or device: cpu")
    return (
        f"the weights need {_gib(needed)} on {device}, where {_gib(memory.free)} of "
        f"{_gib(memory.total)} are free; what would help: {'; '.join(helps)}"
    )


def drawing_problem(memory: DeviceMemory | None, dtype: torch.dtype) -> str:
    """What to tell where the weights fit and not even one picture does beside them."""
    helps = [
        "a smaller default size (height, width, warm_up_sizes) with max_pixels to match",
        "fewer max_rows and a max_pixels_in_flight",
    ]
    if dtype is torch.float32:
        helps.insert(0, "dtype: float16")
    held = ""
    if memory is not None:
        held = f": of {_gib(memory.total)} it holds {_gib(memory.own)} itself"
        if memory.of_others > memory.total // 20:
            held += f", and {_gib(memory.of_others)} are taken by others"
            helps.append("ending what else is on the card")
    return (
        "there is not enough memory to draw a picture of the default size, or of one in "
        f"warm_up_sizes, even alone{held}; what would help: {'; '.join(helps)}"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
