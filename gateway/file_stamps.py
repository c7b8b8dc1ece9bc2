"""Tells whether a file has changed."""

from __future__ import annotations

from pathlib import Path

__all__ = ["file_stamp"]


def file_stamp(path: Path) -> object:
    """Something that differs once the file does; None where there is no such file."""
    try:
        stat = path.stat()
    except OSError:
        return None
    # Its change time too: who may read it counts, and a command may set the other time back.
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino
