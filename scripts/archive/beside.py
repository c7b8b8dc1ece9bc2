"""Runs work in a process of its own beside the caller: the checks that import torch for seconds.

Bytes are copied and hashed meanwhile. Threads would not do: what imports holds the interpreter.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, TypeVar, cast

from handler.errors import ArchiveError, ServingError
from scripts.interrupts import signals_as_interrupts

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = ["beside"]

T = TypeVar("T")

_END_S = 10.0


@contextmanager
def beside(work: Callable[[], T], *, is_slow: bool = True) -> Iterator[Callable[[], T]]:
    """Begin `work`; the function that is given waits for its end and returns what it returned.

    It is done in a forked process, which ends with the context; or else before the context begins,
    where it is not slow (which it is not where torch is imported already), or where other threads
    run and a fork is not safe. What `work` raises is raised here, or by that function.
    """
    if not is_slow or "torch" in sys.modules or threading.active_count() > 1:
        done = work()
        yield lambda: done
        return
    from multiprocessing import get_context

    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(work, sender), daemon=True)
    process.start()
    sender.close()
    try:
        yield cache(lambda: cast(T, _received(receiver)))
    finally:
        process.terminate()
        process.join(_END_S)
        if process.is_alive():
            process.kill()
            process.join()
        receiver.close()


def _run(work: Callable[[], object], sender: Connection) -> None:
    """Do the work in the forked process, and send what comes of it.

    Of signals that the whole group gets, as Ctrl-C, the caller hears too, who then ends this.
    """
    for each in (signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    try:
        with signals_as_interrupts():
            try:
                sender.send((work(), None))
            except ServingError as error:
                sender.send((None, error))
    except KeyboardInterrupt:
        pass  # the result is not wanted any more
    except BrokenPipeError:
        pass  # nor is anybody there to take it


def _received(receiver: Connection) -> object:
    try:
        result, error = receiver.recv()
    except EOFError:
        raise ArchiveError(
            "the checks ended without a result: the message above says why, or the machine has "
            "too little memory for them"
        ) from None
    if error is not None:
        raise error
    return result
