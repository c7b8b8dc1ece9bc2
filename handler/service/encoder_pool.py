"""Encode finished pictures in a pool of threads, while the engine's thread goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from handler.api.replies import Reply
from handler.api.result import Result
from handler.service.live_requests import LiveRequest

__all__ = ["EncoderPool"]


class EncoderPool:
    """Runs `encode(live, results)` in `num_threads` threads, once for a live request."""

    def __init__(
        self, encode: Callable[[LiveRequest, Sequence[Result]], Reply], num_threads: int
    ) -> None:
        self._encode = encode
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="encode")
        self._pending: dict[LiveRequest, Future[Reply]] = {}

    def __contains__(self, live: LiveRequest) -> bool:
        return live in self._pending

    def start(self, live: LiveRequest, results: Sequence[Result]) -> None:
        """Begin to encode the results of `live`."""
        self._pending[live] = self._threads.submit(self._encode, live, results)

    def take_finished(self) -> list[tuple[LiveRequest, Future[Reply]]]:
        """Return what has been encoded or has failed, each once."""
        finished = [(live, future) for live, future in self._pending.items() if future.done()]
        for live, _ in finished:
            del self._pending[live]
        return finished

    def discard(self, live: LiveRequest) -> None:
        """Forget `live`; what is still encoded of it is nobody's."""
        self._pending.pop(live, None)

    def wait(self, timeout_s: float | None) -> None:
        """Block until one is finished or `timeout_s` are over; None: however long it takes."""
        wait(self._pending.values(), timeout=timeout_s, return_when=FIRST_COMPLETED)

    def close(self) -> None:
        """Wait for the threads to end."""
        self._threads.shutdown()
