"""Processes in the background, found again by the file that each leaves in its state folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

__all__ = ["end_process", "read_saved", "running_process", "save"]


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


def running_process(saved: Mapping[str, Any]) -> psutil.Process | None:
    """Return the process of `pid` and `created_s`, unless it has ended.

    Raises:
        KeyError, TypeError, ValueError: these are not in `saved`.
        psutil.Error: nothing is known of it.
    """
    try:
        process = psutil.Process(saved["pid"])
        # The PID alone may have been given to somebody else since.
        if process.create_time() != saved["created_s"]:
            return None
        # Where nothing reaps orphans (a container without an init) a dead one stays a zombie.
        return None if process.status() == psutil.STATUS_ZOMBIE else process
    except psutil.NoSuchProcess:
        return None


def end_process(process: psutil.Process, timeout_s: float) -> None:
    """Ask a process to end, and force it after `timeout_s`; it may have ended already."""
    with suppress(psutil.NoSuchProcess):
        process.terminate()
        try:
            process.wait(timeout_s)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait(10)
