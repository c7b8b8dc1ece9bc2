"""Processes that go on when the command that started them has ended."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.interrupts import signals_held

__all__ = ["last_lines", "start_in_background"]

_LOG_LINES = 15
# Popen warns of one that is forgotten while it runs.
_started: list[subprocess.Popen[bytes]] = []


def start_in_background(
    command: Sequence[str], environment: Mapping[str, str], log_file: Path
) -> tuple[subprocess.Popen[bytes], int]:
    """Start `command` in a session of its own; what it says is added to `log_file`.

    Returns the process, and where in the log its own words begin.
    """
    with log_file.open("ab") as log:
        begins_at = log.tell()
        with signals_held():
            started = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal that started it is not for it.
            )
    _started.append(started)
    return started, begins_at


def last_lines(log_file: Path, begins_at: int) -> str:
    """Return the last lines of what a process has said since `begins_at`, indented."""
    said = log_file.read_bytes()[begins_at:].decode("utf-8", "replace")
    return "\n".join(f"    {line}" for line in said.splitlines()[-_LOG_LINES:])
