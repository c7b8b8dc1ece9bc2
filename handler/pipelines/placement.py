"""Where a pipeline's weights are, and why requests in flight cannot share them from there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["devices_of", "is_asynchronous", "modules_of", "placement_problem"]

# Of diffusers' own hooks, the ones that bring weights to the device for each forward.
_OFFLOADING_HOOKS = ("group_offloading", "lazy_prefetch_group_offloading")


def modules_of(pipeline: Any) -> dict[str, torch.nn.Module]:
    """The components of `pipeline` that have weights, by name."""
    parts = pipeline.components.items()
    return {name: part for name, part in parts if isinstance(part, torch.nn.Module)}


def devices_of(pipelines: Iterable[Any]) -> set[torch.device]:
    """The devices that the weights of `pipelines` are on."""
    modules = (module for pipeline in pipelines for module in modules_of(pipeline).values())
    return {weight.device for module in modules for weight in module.parameters()}


def placement_problem(pipeline: Any) -> str | None:
    """Why the weights of `pipeline` cannot be shared by requests in flight; None if they can.

    They are all on one device and stay there. Whatever moves them, by call or by layer, would move
    them for all requests in every tick.
    """
    if getattr(pipeline, "_all_hooks", None):
        return (
            "this pipeline offloads its modules to the CPU between calls, which requests in "
            "flight cannot share; load it without enable_model_cpu_offload"
        )
    modules = modules_of(pipeline)
    for name, module in modules.items():
        if any(_is_offloaded(part) for part in module.modules()):
            return (
                f"{name} offloads its weights layer by layer, which every forward would wait for; "
                "load the pipeline without enable_sequential_cpu_offload, enable_group_offload "
                "and device_map"
            )
        if any(weight.is_meta for weight in module.parameters()):
            return f"{name} has no weights in memory; load the pipeline without device_map"
    places = {
        name: {str(weight.device) for weight in module.parameters()}
        for name, module in modules.items()
    }
    if len(set[str]().union(*places.values())) > 1:
        told = ", ".join(f"{name}: {' and '.join(sorted(at))}" for name, at in places.items() if at)
        return (
            f"the pipeline's modules are on several devices ({told}); requests in flight need "
            "all of them on one: load it without device_map, then pipeline.to(device)"
        )
    return None


def is_asynchronous(pipelines: Iterable[Any]) -> bool:
    """Whether weights of `pipelines` are on a device that works while the host goes on."""
    return any(device.type not in ("cpu", "meta") for device in devices_of(pipelines))


def _is_offloaded(module: Any) -> bool:
    accelerated = getattr(module, "_hf_hook", None)
    hooks = [accelerated, *(getattr(accelerated, "hooks", None) or ())]
    if any(getattr(hook, "offload", False) for hook in hooks):
        return True
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and any(registry.get_hook(name) for name in _OFFLOADING_HOOKS)
