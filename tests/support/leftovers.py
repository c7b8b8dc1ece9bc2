"""End what a process of the tests has started once that process is gone, however it went.

Fixtures stop what they start; a process that is killed has none any more. What it started is known
by a variable of its environment, which children inherit.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

__all__ = ["MARK", "end_with_this_process", "is_alive"]

MARK = "STARTED_BY_TESTS"
_LOOK_S = 0.5
_GRACE_S = 10.0
_TIMES = 3  # A server may have started another one meanwhile.


def end_with_this_process() -> None:
    """Let all that this process starts from now on end when it has ended."""
    pid, mark = os.getpid(), f"{os.getpid()}-{time.time_ns()}"
    null = [(os.POSIX_SPAWN_OPEN, each, os.devnull, os.O_RDWR, 0) for each in range(3)]
    os.posix_spawn(
        sys.executable,
        [sys.executable, str(Path(__file__)), str(pid), mark],
        {name: value for name, value in os.environ.items() if name != MARK},
        file_actions=null,
        setsid=True,
    )
    os.environ[MARK] = mark


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs: one that has ended may still be listed, as a zombie."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _started_with(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and is_alive(process):
                found.append(process)
    return found


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
            process.resume()  # Suspended, it would not see the signal.
    for process in psutil.wait_procs(processes, _GRACE_S)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def main() -> None:
    """Wait for the end of a process, and end what carries its mark."""
    pid, mark = int(sys.argv[1]), sys.argv[2]
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        while is_alive(process):
            time.sleep(_LOOK_S)
    for _ in range(_TIMES):
        if left := _started_with(mark):
            _end(left)


if __name__ == "__main__":
    main()
