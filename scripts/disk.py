"""Room on disks: whether there is enough, and folders for what is on its way."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from handler.errors import ArchiveError

__all__ = ["check_space", "full_disk", "staging_folder"]

_SUFFIX = ".part"


def check_space(target: Path, size_bytes: int, what: str, elsewhere: str = "--out, STORE=") -> None:
    """Raise ArchiveError unless the disk of `target`, yet to be made, has room for `size_bytes`.

    `elsewhere` is what chooses another place.
    """
    folder = _existing(target.absolute().parent)
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < size_bytes:
        raise ArchiveError(
            f"{target} needs {_shown(size_bytes)} for {what}, and the disk at "
            f"{_mount_point(folder)} has {_shown(free_bytes)} free: free some, or write elsewhere "
            f"({elsewhere})"
        )


def full_disk(error: OSError, target: Path) -> ArchiveError | None:
    """Return the error that says which disk is full, where `error` comes of that."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    folder = _existing(target.absolute().parent)
    return ArchiveError(
        f"{target} was not written: the disk at {_mount_point(folder)} is full "
        f"({_shown(shutil.disk_usage(folder).free)} free): free some, or write elsewhere"
    )


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """Give a new hidden folder beside `target`, which is removed with all that is in it.

    It is locked while it is in use. Those that killed runs left of the same target are removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}."
    _remove_abandoned(target.parent, prefix)
    folder, descriptor = _make_locked(target.parent, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _make_locked(parent: Path, prefix: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=_SUFFIX, dir=parent))
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        _lock(descriptor)
        if folder.exists():  # another run may have taken it for abandoned before it was locked
            return folder, descriptor
        os.close(descriptor)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for path in parent.iterdir():
        is_ours = path.name.startswith(prefix) and path.name.endswith(_SUFFIX)
        if not is_ours or path.is_symlink() or not path.is_dir():
            continue
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            if _lock(descriptor):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open folder; say whether it could be: not where another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.parents) if each.exists())


def _mount_point(folder: Path) -> Path:
    return next(each for each in (folder, *folder.parents) if os.path.ismount(each))


def _shown(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:,.1f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:,.1f} MB"
