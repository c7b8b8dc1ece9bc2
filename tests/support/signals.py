"""Child processes that signals reach, wherever the tests themselves are run."""

from __future__ import annotations

import signal

__all__ = ["default_signals"]


def default_signals() -> None:
    """Have the signals that end a command end it: the `preexec_fn` of a child that gets them.

    A runner in the background, or under nohup, ignores some of them, and children inherit that.
    """
    for each in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)
