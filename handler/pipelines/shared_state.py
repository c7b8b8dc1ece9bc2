"""Pipelines whose calls change the modules that all requests share: these run one at a time.

They are found by what they do. Some put their own attention processors into the denoiser and the
old ones back only where a call returns; some guiders hook into the denoiser for one of a step's
forwards; a step cache of diffusers remembers the last forwards of one call, and skips some of the
next.

Pipelines with an autoencoder that overflows in float16 (SDXL's) cast it to float32 around each
decoding, which needs no such care; but what ends a call in between leaves it there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch
from diffusers.guiders.guider_utils import BaseGuidance

from handler.pipelines.placement import modules_of

__all__ = ["SharedState", "is_upcast", "swaps_processors"]

_SWAPPING = frozenset({"set_attn_processor", "set_processor"})


class SharedState:
    """What a call of `pipeline` may leave behind on its modules."""

    def __init__(self, pipeline: Any) -> None:
        modules: list[Any] = list(modules_of(pipeline).values())
        swaps = swaps_processors(type(pipeline))
        self._processors = [
            (attention, attention.processor)
            for module in modules
            for attention in (module.modules() if swaps else ())
            if hasattr(attention, "processor") and hasattr(attention, "set_processor")
        ]
        self._caching = [m for m in modules if getattr(m, "is_cache_enabled", False)]
        self._upcast = [(m, m.dtype) for m in modules if is_upcast(m, "encode")]
        hooks = any(
            isinstance(part, BaseGuidance) and _hooks_in(part)
            for part in pipeline.components.values()
        )
        self.is_exclusive = swaps or hooks or bool(self._caching)

    def restore(self) -> None:
        """Undo what a call did, however it ended."""
        for attention, processor in self._processors:
            attention.set_processor(processor)
        for module in self._caching:
            module._reset_stateful_cache()
        for module, dtype in self._upcast:
            if module.dtype != dtype:
                module.to(dtype)


def is_upcast(module: Any, method: str) -> bool:
    """Whether pipelines cast `module`, an autoencoder, to float32 around `method`, and back.

    Around its decoding from float16 only, around its encoding whatever it is in.
    """
    wants_it = getattr(getattr(module, "config", None), "force_upcast", False)
    halves = (torch.float16,) if method == "decode" else (torch.float16, torch.bfloat16)
    return bool(wants_it) and module.dtype in halves


def swaps_processors(kind: type) -> bool:
    """Whether ``kind.__call__``, with what it calls of its own, sets attention processors."""
    functions = [kind.__call__]
    for function in functions:
        code = getattr(inspect.unwrap(function), "__code__", None)
        for name in _names_in(code):
            if name in _SWAPPING:
                return True
            # Its own methods, and the functions beside it in its module.
            near = inspect.unwrap(function).__globals__.get(name)
            is_near = getattr(near, "__module__", None) == function.__module__
            for called in (getattr(kind, name, None), near if is_near else None):
                if inspect.isfunction(called) and called not in functions:
                    functions.append(called)
    return False


def _names_in(code: CodeType | None) -> Iterator[str]:
    """The names that a function's code mentions, and the functions within it."""
    if code is not None:
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _names_in(constant)


def _hooks_in(guider: BaseGuidance) -> bool:
    return type(guider).prepare_models is not BaseGuidance.prepare_models
