"""Runs several transfers at once; where one fails, the others stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

__all__ = ["run_all"]

_MOST_AT_ONCE = 4


def run_all(jobs: Sequence[Callable[[threading.Event], object]]) -> None:
    """Run `jobs`, each told by an event when to stop; raise the first error when all have ended."""
    stopped = threading.Event()
    with ThreadPoolExecutor(max_workers=_MOST_AT_ONCE) as pool:
        futures = [pool.submit(job, stopped) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
