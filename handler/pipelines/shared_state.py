"""Pipelines whose calls change the modules that all requests share: these run one at a time."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["SharedState"]

# They put their own attention processors into the denoiser, and the old ones back only where a call
# returns.
_SWAP_PROCESSORS = frozenset(
    {
        "PAGMixin",
        "LEditsPPPipelineStableDiffusion",
        "LEditsPPPipelineStableDiffusionXL",
        "StableDiffusionAttendAndExcitePipeline",
        "StableDiffusionPix2PixZeroPipeline",
        "StableDiffusionSAGPipeline",
    }
)


class SharedState:
    """What a call of `pipeline` may leave behind on its modules."""

    def __init__(self, pipeline: Any) -> None:
        modules: list[Any] = [
            part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)
        ]
        swaps = any(kind.__name__ in _SWAP_PROCESSORS for kind in type(pipeline).__mro__)
        self._processors = [
            (module, module.attn_processors)
            for module in modules
            if swaps and hasattr(module, "attn_processors")
        ]
        # Such a cache remembers the last forwards of one call, and skips some of the next.
        self._caching = [m for m in modules if getattr(m, "is_cache_enabled", False)]
        self.is_exclusive = swaps or bool(self._caching)

    def restore(self) -> None:
        """Undo what a call did, however it ended."""
        for module, processors in self._processors:
            module.set_attn_processor(dict(processors))
        for module in self._caching:
            module._reset_stateful_cache()
