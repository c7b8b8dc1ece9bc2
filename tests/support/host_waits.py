"""What makes the host wait for its device, recorded with who asked for it.

On the CPU nothing waits, but the calls that would are the same: values of tensors that become
Python's, and copies between devices. Where there is CUDA, what its own mode says is recorded too,
as `SYNCHRONIZES`.

    with host_waits() as waits:
        engine.step()
    assert ours(waits) == []
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["SYNCHRONIZES", "Wait", "host_waits", "ours"]

SYNCHRONIZES = "synchronizes"

_READS = frozenset(
    {
        *("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"),
        *("equal", "allclose", "is_nonzero", "nonzero", "argwhere", "unique", "masked_select"),
    }
)
# Whoever of these is nearest in the stack has asked.
_ROOMS = ("handler", "diffusers", "transformers", "tests")


@dataclass(frozen=True, slots=True)
class Wait:
    """One call that waits, and the nearest module of a known package that made it."""

    call: str
    module: str
    line: int


class _Recorder(TorchFunctionMode):
    def __init__(self, waits: list[Wait]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        result = func(*args, **(kwargs or {}))
        if name in _READS or (name in ("to", "copy_") and _changes_device(args, result)):
            self._waits.append(Wait(name, *_asking()))
        return result


def _changes_device(args: Sequence[Any], result: Any) -> bool:
    places = {a.device.type for a in args if isinstance(a, torch.Tensor)}
    return isinstance(result, torch.Tensor) and places != {result.device.type}


def _asking() -> tuple[str, int]:
    frame = sys._getframe(2)
    while frame.f_back is not None:
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] in _ROOMS and module != __name__:
            return module, frame.f_lineno
        frame = frame.f_back
    return "", 0


@contextmanager
def host_waits() -> Iterator[list[Wait]]:
    """Record all waits of this thread."""
    waits: list[Wait] = []
    with _cuda_told(waits), _Recorder(waits):
        yield waits


@contextmanager
def _cuda_told(waits: list[Wait]) -> Iterator[None]:
    """Let torch warn wherever CUDA makes the host wait, and note who asked."""
    if not torch.cuda.is_available():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("always")

        def note(message: Warning | str, *args: Any, **kwargs: Any) -> None:
            if "synchronizing CUDA operation" in str(message):
                waits.append(Wait(SYNCHRONIZES, *_asking()))

        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def ours(waits: Sequence[Wait]) -> list[Wait]:
    """Those that the engine asked for, not the pipelines or their models."""
    return [wait for wait in waits if wait.module.startswith("handler.")]
