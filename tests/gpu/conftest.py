"""The devices that these tests run on, and the settings of torch that they compare under."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

DEVICES = [
    pytest.param("cpu"),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """With its number, as pipelines tell theirs."""
    return torch.device(request.param, 0)


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    """Without TF32, which rounds float32 to ten bits: bounds are those of float32 itself."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
