"""Which errors mean that this process can do no more work on its device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from handler.engine.device_faults import is_device_lost

ASSERTED = (
    "CUDA error: device-side assert triggered\n"
    "CUDA kernel errors might be asynchronously reported at some other API call\n"
)


def fine() -> None:
    pass


def broken() -> None:
    raise RuntimeError("CUDA error: unknown error")


def full() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.mark.parametrize(
    ("error", "probe", "is_lost"),
    [
        (torch.AcceleratorError(ASSERTED), fine, True),
        (RuntimeError(ASSERTED), fine, True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), fine, True),
        (RuntimeError("CUDA error: unspecified launch failure"), fine, True),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), fine, True),
        # Reported by a library, which does not say what the device has left.
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling"), broken, True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling"), fine, False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), full, False),
        (RuntimeError("CUDA error: invalid argument"), fine, False),
        # Memory comes back, and nothing else has anything to do with the device.
        (torch.OutOfMemoryError("CUDA out of memory."), broken, False),
        (RuntimeError("CUDA error: out of memory"), broken, False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), broken, False),
        (ValueError(ASSERTED), broken, False),
    ],
)
def test_lost_devices_are_told_from_errors_that_pass(
    error: Exception, probe: Callable[[], None], is_lost: bool
) -> None:
    assert is_device_lost(error, probe) is is_lost


def test_the_usual_probe_finds_a_device_that_works() -> None:
    assert not is_device_lost(RuntimeError("CUDA error: invalid argument"))
