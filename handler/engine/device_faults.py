"""Errors after which a device is lost to this process, so that only a new one can use it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from handler.engine.forward import is_out_of_memory

__all__ = ["is_device_lost"]

# CUDA's words for errors that leave the process's context unusable: every later call fails too.
_STICKY = (
    "device-side assert triggered",
    "illegal memory access",
    "misaligned address",
    "illegal instruction",
    "invalid program counter",
    "not supported on global/shared address space",
    "hardware stack error",
    "unspecified launch failure",
    "launch timed out",
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "GPU is lost",
)
# Of libraries that compute on the device: they say that something failed, not what is left.
_DEVICE_WORDS = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error", "HIP error")


def is_device_lost(error: BaseException, probe: Callable[[], object] | None = None) -> bool:
    """Whether no further work of this process can be done on the device, whoever asks for it.

    An assertion that fails in a kernel has this effect. It is reported by whatever call comes next,
    so the request whose call raises is not always the one that caused it. Where `error` alone does
    not tell, `probe` is called, which by default asks the current CUDA device for a little work.
    """
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    if any(sticky in text for sticky in _STICKY):
        return True
    if is_out_of_memory(error) or not any(word in text for word in _DEVICE_WORDS):
        return False
    try:
        (probe or _ask_device)()
    except Exception as answer:
        return not is_out_of_memory(answer)
    return False


def _ask_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
