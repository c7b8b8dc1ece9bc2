"""Notice that TorchServe sends no more cycles, which is how it lets go of its last request.

A client that leaves a stream is seen by its id missing from the next cycle. Where it was the only
one there is no next cycle, and what it holds would be held until somebody else comes.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

__all__ = ["SilenceAlarm"]


class SilenceAlarm:
    """Calls `ring` when `set` was called and `after_s` have passed without `clear`.

    By a signal, since a request's greenlet can be ended only in the thread that it runs in: the
    main one, which sits waiting for TorchServe and there handles signals. Where alarms are in use
    already, or this is not the main thread, it never rings.
    """

    def __init__(self, ring: Callable[[], None], after_s: float) -> None:
        self._ring = ring
        self._after_s = after_s
        self._is_ours = (
            hasattr(signal, "setitimer")
            and threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
        )
        if self._is_ours:
            signal.signal(signal.SIGALRM, lambda _signal, _frame: self._ring())

    def set(self) -> None:
        """Start to wait."""
        if self._is_ours:
            signal.setitimer(signal.ITIMER_REAL, self._after_s)

    def clear(self) -> None:
        """Stop waiting."""
        if self._is_ours:
            signal.setitimer(signal.ITIMER_REAL, 0)
