"""What every test runs under."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors: more threads only wait for each other, on a busy machine for seconds."""
    torch.set_num_threads(1)
