"""Processes in the background, found again by the file that each leaves in its state folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Self

import psutil

from scripts.interrupts import signals_held

__all__ = [
    "BackgroundProcess",
    "end_process",
    "end_session",
    "is_suspended",
    "last_lines",
    "read_saved",
    "running_process",
    "save",
    "start_in_background",
    "started_s",
    "wake",
]

_LOG_LINES = 15
# A log that is larger is put aside when its process starts again.
_MAX_LOG_BYTES = 64 * 1024**2
# Popen warns of one that is forgotten while it runs.
_started: list[subprocess.Popen[bytes]] = []


def save(path: Path, values: Mapping[str, object]) -> None:
    """Write what `read_saved` reads; whoever reads it meanwhile sees all of it or nothing."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(values, indent=2) + "\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_saved(path: Path) -> dict[str, Any]:
    """Return what a process has left. Raises: OSError, ValueError."""
    saved: dict[str, Any] = json.loads(path.read_text())
    return saved


def started_s(pid: int) -> float:
    """When a process started, in seconds after the machine did: no step of the clock moves that.

    Raises:
        psutil.Error: nothing is known of it.
    """
    # An object of psutil's keeps what it has once computed with the clock as it was.
    after_boot_s: float = psutil.Process(pid).create_time() - psutil.boot_time()
    return round(after_boot_s, 2)


def running_process(saved: Mapping[str, Any]) -> psutil.Process | None:
    """Return the process of `pid` that started at `created_s`, unless it has ended.

    Raises:
        KeyError, TypeError, ValueError: these are not in `saved`.
        psutil.Error: nothing is known of it.
    """
    try:
        process = psutil.Process(saved["pid"])
        # The PID alone may have been given to somebody else since.
        if started_s(process.pid) != saved["created_s"]:
            return None
        # Where nothing reaps orphans (a container without an init) a dead one stays a zombie.
        return None if process.status() == psutil.STATUS_ZOMBIE else process
    except psutil.NoSuchProcess:
        return None


def is_suspended(process: psutil.Process) -> bool:
    """Whether a process has been stopped by a signal, and does nothing until SIGCONT."""
    try:
        return bool(process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP))
    except psutil.NoSuchProcess:
        return False


def wake(process: psutil.Process) -> None:
    """Let a process go on that is suspended: before that it sees no signal but SIGKILL."""
    with suppress(psutil.NoSuchProcess):
        process.resume()


def end_process(process: psutil.Process, timeout_s: float) -> None:
    """Ask a process to end, and force it after `timeout_s`; it may have ended already."""
    with suppress(psutil.NoSuchProcess):
        process.terminate()
        wake(process)
        try:
            process.wait(timeout_s)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait(10)


def end_session(leader: subprocess.Popen[bytes]) -> None:
    """Kill what `leader` has started: at this point of a start nothing has anything to save."""
    with suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)
    leader.wait()


def start_in_background(
    command: Sequence[str], environment: Mapping[str, str], log_file: Path
) -> tuple[subprocess.Popen[bytes], int]:
    """Start `command` in a session of its own; what it says is added to `log_file`.

    A log that has grown large is put aside, as `.1`. Returns the process, and where in the log its
    own words begin.
    """
    if log_file.exists() and log_file.stat().st_size > _MAX_LOG_BYTES:
        log_file.replace(log_file.with_name(f"{log_file.name}.1"))
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


class BackgroundProcess:
    """A process that is found again by its state folder, of a kind of which that holds one."""

    name: ClassVar[str]
    """Of the files that it keeps there, ``.json`` and ``.log``."""

    def __init__(self, process: psutil.Process, saved: Mapping[str, Any], state_dir: Path) -> None:
        self.url: str = saved["url"]
        self.started_as: str = saved["started_as"]
        self.process = process
        self.saved = saved
        self._state_dir = state_dir

    @classmethod
    def find(cls, state_dir: Path) -> Self | None:
        """Return the one that runs with this state folder, if any."""
        try:
            saved = read_saved(state_dir / f"{cls.name}.json")
            process = running_process(saved)
            return None if process is None else cls(process, saved, state_dir)
        except (OSError, ValueError, KeyError, TypeError, psutil.Error):
            return None

    @classmethod
    def launch(
        cls,
        command: Sequence[str],
        environment: Mapping[str, str],
        state_dir: Path,
        wait: Callable[[subprocess.Popen[bytes], Path, int], str],
        **values: str,
    ) -> Self:
        """Start one, and return it when `wait` has found its URL; if that raises, nothing is left.

        `wait` gets the process, its log, and where in that its own words begin. `values` are saved
        with what is needed to find it.
        """
        log_file = state_dir / f"{cls.name}.log"
        launched, begins_at = start_in_background(command, environment, log_file)
        try:
            url = wait(launched, log_file, begins_at)
            process = psutil.Process(launched.pid)
            saved = {
                "pid": launched.pid,
                "created_s": started_s(launched.pid),
                "url": url,
                **values,
            }
            save(state_dir / f"{cls.name}.json", saved)
        except BaseException:
            end_session(launched)
            raise
        return cls(process, saved, state_dir)

    @property
    def pid(self) -> int:
        """Its process id."""
        return int(self.process.pid)

    def stop(self, timeout_s: float) -> None:
        """End it once its requests are finished, by force after `timeout_s`."""
        self.end(timeout_s)
        (self._state_dir / f"{self.name}.json").unlink(missing_ok=True)

    def end(self, timeout_s: float) -> None:
        """Ask the process to end, and force it after `timeout_s`."""
        end_process(self.process, timeout_s)
