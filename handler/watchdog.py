"""A watchdog timer for TorchServe's cycles: notices that none comes although requests are live.

A client that leaves a stream is seen by its id missing from the next cycle. Where it was the only
one there is no next cycle, and what it holds would be held until somebody else comes.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

__all__ = ["Watchdog"]


class Watchdog:
    """Calls `on_timeout` when `timeout_s` have passed since `start` without `stop`.

    By a signal (SIGALRM), since a request's greenlet can be ended only in the thread that it runs
    in: the main one, which sits waiting for TorchServe and there handles signals. Where that
    signal is in use already, or this is not the main thread, the watchdog does nothing.
    """

    def __init__(self, on_timeout: Callable[[], None], timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._is_ours = (
            hasattr(signal, "setitimer")
            and threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
        )
        if self._is_ours:
            signal.signal(signal.SIGALRM, lambda _signal, _frame: on_timeout())

    def start(self) -> None:
        """Start the timer, or start it again from the beginning."""
        if self._is_ours:
            signal.setitimer(signal.ITIMER_REAL, self._timeout_s)

    def stop(self) -> None:
        """Stop the timer."""
        if self._is_ours:
            signal.setitimer(signal.ITIMER_REAL, 0)
