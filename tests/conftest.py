"""What every test runs under."""

from __future__ import annotations

import signal

import pytest
import torch
from hypothesis import settings

# An example's time says how busy the machine is; pytest-timeout catches what hangs.
settings.register_profile("project", deadline=None)
settings.load_profile("project")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors: more threads only wait for each other, on a busy machine for seconds."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _stop_servers_when_terminated() -> None:
    """End on SIGTERM as on Ctrl-C, so that no fixture leaves a TorchServe behind."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
