"""What every test runs under."""

from __future__ import annotations

import os
import signal
import zlib

import pytest
import torch
from hypothesis import settings

from tests.support.leftovers import end_with_this_process

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


def pytest_configure() -> None:
    """Leave no server behind, even where this process is killed."""
    end_with_this_process()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the modules that start servers, so that no process has one of them alone at last.

    Of `TEST_SHARE`, such as 1/2, keep the first half of all modules, in no order of meaning.
    """
    long = {item.path for item in items if item.get_closest_marker("server")}
    items.sort(key=lambda item: item.path not in long)
    share = os.environ.get("TEST_SHARE")
    if not share:
        return
    number, total = map(int, share.split("/"))
    out = [item for item in items if not _is_in_share(item.path.name, number, total)]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in set(out)]


def _is_in_share(module: str, number: int, total: int) -> bool:
    return zlib.crc32(module.encode()) % total == number - 1
