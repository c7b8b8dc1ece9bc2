"""Weights that do not fit are told with what is needed, what is there and what would help."""

from __future__ import annotations

import pytest
import torch

from handler.loading.memory import (
    DeviceMemory,
    device_memory,
    drawing_problem,
    memory_problem,
    weights_bytes,
)
from tests.support.pipelines import build

CUDA = torch.device("cuda:0")
GIB = 2**30


@pytest.mark.parametrize(
    ("sizes", "memory", "says", "not_says"),
    [
        pytest.param(
            {torch.float32: 12 * GIB},
            DeviceMemory(free=8 * GIB, total=10 * GIB),
            ["need 12.0 GiB on cuda:0", "8.0 GiB of 10.0 GiB", "float16 (6.0 GiB", "which fits"],
            ["what else is on the card"],
            id="half precision would fit",
        ),
        pytest.param(
            {torch.float32: 30 * GIB, torch.float16: GIB},
            DeviceMemory(free=8 * GIB, total=10 * GIB),
            ["float16 (16.0 GiB of weights, which does not fit either)"],
            ["what else is on the card"],
            id="half precision would not fit",
        ),
        pytest.param(
            {torch.float16: 12 * GIB},
            DeviceMemory(free=8 * GIB, total=80 * GIB, own=GIB),
            ["ending what else is on the card (71.0 GiB)"],
            ["dtype"],
            id="another model has the card",
        ),
        pytest.param(
            {torch.float16: 12 * GIB},
            DeviceMemory(free=9 * GIB, total=10 * GIB),
            ["a card with more memory"],
            ["dtype", "what else"],
            id="nothing but a larger card",
        ),
    ],
)
def test_what_does_not_fit(
    sizes: dict[torch.dtype, int], memory: DeviceMemory, says: list[str], not_says: list[str]
) -> None:
    problem = memory_problem(sizes, memory, CUDA)
    assert problem is not None
    assert [words for words in says if words not in problem] == []
    assert [words for words in not_says if words in problem] == []


def test_what_fits_or_cannot_be_asked() -> None:
    assert memory_problem({torch.float16: GIB}, DeviceMemory(GIB, 2 * GIB), CUDA) is None
    assert memory_problem({torch.float16: GIB}, None, torch.device("cpu")) is None
    assert device_memory(torch.device("cpu")) is None


def test_weights_are_counted_once_by_their_precision() -> None:
    pipeline = build("stable_diffusion")
    unet, vae = pipeline.unet, pipeline.vae.half()
    sizes = weights_bytes([unet, unet, vae, None, pipeline.scheduler])
    tensors = [*unet.parameters(), *unet.buffers()]
    assert sizes[torch.float32] == sum(tensor.nbytes for tensor in tensors)
    assert sizes[torch.float16] == sum(weight.nbytes for weight in vae.parameters())


def test_a_card_that_others_hold_is_told_apart_from_one_that_is_too_small() -> None:
    ours = drawing_problem(DeviceMemory(GIB, 80 * GIB, own=78 * GIB), torch.float16)
    assert "of 80.0 GiB it holds 78.0 GiB itself;" in ours
    assert "dtype" not in ours
    theirs = drawing_problem(DeviceMemory(GIB, 80 * GIB, own=9 * GIB), torch.float32)
    assert "70.0 GiB are taken by others" in theirs
    assert "dtype: float16" in theirs
    assert all(key in ours for key in ("height", "max_rows", "max_pixels_in_flight"))
