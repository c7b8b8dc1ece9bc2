"""Work beside the engine's thread."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from handler.service.side_work import SideWork


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
def test_it_has_all_threads_also_where_it_begins_in_a_forward_on_fewer() -> None:
    work = SideWork[int]("beside", 1)
    torch.set_num_threads(1)
    live: Any = object()
    work.start(live, lambda _: torch.get_num_threads())
    (future,) = work.futures
    assert future.result(60) == 2
    work.close()
