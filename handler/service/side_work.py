"""Slow work on live requests in threads, while the engine's thread goes on.

Pictures that were sent are decoded here, and those that were drawn are encoded.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from handler.service.live_requests import LiveRequest

__all__ = ["SideWork", "wait_for_any"]

_Made = TypeVar("_Made")


class SideWork(Generic[_Made]):
    """Runs a function of a live request, once for each, in `num_threads` threads named `name`."""

    def __init__(self, name: str, num_threads: int) -> None:
        # What torch gives to new threads is what the engine's has at the moment they begin, and
        # that may be fewer: some forwards run on fewer.
        use_all = partial(torch.set_num_threads, torch.get_num_threads())
        self._threads = ThreadPoolExecutor(num_threads, name, use_all)
        self._pending: dict[LiveRequest, Future[_Made]] = {}

    def __contains__(self, live: LiveRequest) -> bool:
        return live in self._pending

    @property
    def requests(self) -> list[LiveRequest]:
        """Those whose work was not taken yet, in the order that it was begun in."""
        return list(self._pending)

    @property
    def futures(self) -> list[Future[_Made]]:
        """What they wait for."""
        return list(self._pending.values())

    def start(self, live: LiveRequest, work: Callable[..., _Made], *args: Any) -> None:
        """Begin ``work(live, *args)``."""
        self._pending[live] = self._threads.submit(work, live, *args)

    def take_finished(self) -> list[tuple[LiveRequest, Future[_Made]]]:
        """Return what is done or has failed, each once."""
        finished = [(live, future) for live, future in self._pending.items() if future.done()]
        for live, _ in finished:
            del self._pending[live]
        return finished

    def discard(self, live: LiveRequest) -> None:
        """Forget `live`; what is still done of it is nobody's."""
        future = self._pending.pop(live, None)
        if future is not None:
            future.cancel()

    def close(self) -> None:
        """Wait for the threads to end."""
        self._threads.shutdown()


def wait_for_any(works: list[SideWork[Any]], timeout_s: float | None) -> None:
    """Block until a piece of work is done or `timeout_s` are over; None: however long it takes."""
    futures = [future for work in works for future in work.futures]
    wait(futures, timeout=timeout_s, return_when=FIRST_COMPLETED)
