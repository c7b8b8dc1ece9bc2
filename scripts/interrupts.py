"""Signals that end a block of code as Ctrl-C does: what it has opened is closed again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["signals_as_interrupts", "signals_held"]


@contextmanager
def signals_as_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt in the block at the first SIGTERM, SIGHUP or SIGINT; ignore the rest.

    A second one would cut the cleaning up short, and `timeout` sends two at once. Signals that are
    ignored, as with nohup, or that somebody else handles are left alone, and so are all of them
    outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        each: handler
        for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
        if (handler := signal.getsignal(each)) in (signal.SIG_DFL, signal.default_int_handler)
    }

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for each in before:
        signal.signal(each, interrupt)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def signals_held() -> Iterator[None]:
    """Let the block run to its end before the first signal that came in it is handled."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    before = {
        each: handler
        for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
        if callable(handler := signal.getsignal(each))
    }
    for each in before:
        signal.signal(each, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    for number, frame in came[:1]:
        before[signal.Signals(number)](number, frame)
