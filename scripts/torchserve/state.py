"""The state directory of one TorchServe instance: what lies in it, whose it is, what is left over.

Everything that an instance writes is in here, private to its user (mode 0700): configuration,
keys, sockets, unpacked archives, logs, the PID file.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from scripts.errors import ServerError
from scripts.torchserve.options import INSTANCE_MARK

__all__ = [
    "FLEET_LOG",
    "FLEET_RECORD",
    "FLEET_RESTART",
    "FLEET_STOP",
    "MAX_SOCKETS_PATH_BYTES",
    "StateDir",
]

FLEET_RECORD, FLEET_LOG = "fleet.json", "fleet.log"
"""What a supervisor keeps beside the directories of its instances."""
FLEET_STOP, FLEET_RESTART = "fleet-stop.json", "fleet-restart.json"
"""How long it may drain them, as whoever sends it the signal writes it."""
_OF_THE_FLEET = (FLEET_RECORD, FLEET_LOG, FLEET_STOP, FLEET_RESTART)

# A Unix socket's path may have 107 bytes. The longest of ours is the worker's, which the frontend
# names `<TEMP>/.ts.sock.<port>`.
MAX_SOCKETS_PATH_BYTES = 107 - len("/.ts.sock.65535")
# TorchServe unpacks (or links) each archive into a directory of such a name.
UNPACKED = re.compile(r"[0-9a-f]{32}")
LINK_NAME = "temp"


class StateDir:
    """The files of an instance under `path`, which need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.tmp, self.temp, self.logs = (self.path / name for name in ("tmp", "temp", "logs"))
        self.log_file = self.logs / "server.log"
        self.console = self.logs / "console.log"
        self.config = self.path / "config.properties"
        self.saved = self.path / "server.json"
        self.keys = self.path / "key_file.json"
        self.pid_file = self.tmp / ".model_server.pid"
        self.drain_file = self.tmp / "drain.json"
        # What grpc_methods puts before TorchServe's own classes.
        self.classes = self.path / "org"
        # Holds the directory that `sockets` is in, where that is not `temp` itself.
        self._sockets_record = self.path / "sockets"

    @property
    def sockets(self) -> Path:
        """The directory of the sockets, by a name that is short enough for them.

        It is `temp`, or a link to it: with a long path `prepare` makes one in a short private
        directory.
        """
        try:
            return Path(self._sockets_record.read_text()) / LINK_NAME
        except OSError:
            return self.temp

    @property
    def management_socket(self) -> Path:
        """Where the management API listens."""
        return self.sockets / "management.sock"

    @property
    def is_ours(self) -> bool:
        """Whether an instance has run here."""
        return _has_mark(self.path)

    def check_ownership(self) -> None:
        """Raise ServerError where `path` holds anything that no instance put there.

        Its mode would be changed, and `make clean` would delete what is called as ours.
        """
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise ServerError(f"{self.path} is not a directory: choose another RUN_DIR")
        if not _is_empty_or_ours(self.path):
            raise ServerError(
                f"{self.path} is not empty, and no server made it: choose another RUN_DIR, such "
                f"as RUN_DIR={self.path / 'run'}"
            )

    def prepare(self) -> None:
        """Make the directories, and remove what a killed instance left behind."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.chmod(0o700)
        # First, so that what is here is known for ours should the start be interrupted.
        self.write_config(f"{INSTANCE_MARK}\n")
        for directory in (self.tmp, self.temp, self.logs):
            directory.mkdir(mode=0o700, exist_ok=True)
        self.clean()
        self._link_sockets()

    def write_config(self, text: str) -> None:
        """Write the configuration, whole or not at all: its mark says whose `path` is."""
        part = self.path / f".{self.config.name}.part"
        try:
            part.write_text(text)
            part.replace(self.config)
        finally:
            part.unlink(missing_ok=True)

    def clean(self) -> None:
        """Remove what is of no use without a running instance: unpacked archives, sockets, keys."""
        models = self.temp / "models"
        for entry in _entries(models):
            if UNPACKED.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)  # Follows no link.
        for entry in _entries(self.temp):
            if entry.name == "management.sock" or entry.name.startswith(".ts.sock."):
                os.unlink(entry.path)
        with suppress(OSError):  # There is none, or something else in it.
            models.rmdir()
        shutil.rmtree(self.classes, ignore_errors=True)
        self._unlink_sockets()
        for leftover in (self.saved, self.pid_file, self.keys, self.drain_file):
            leftover.unlink(missing_ok=True)

    def _link_sockets(self) -> None:
        if len(os.fsencode(self.temp)) <= MAX_SOCKETS_PATH_BYTES:
            return
        for parent in (None, "/tmp"):
            directory = Path(tempfile.mkdtemp(prefix="torchserve-", dir=parent))  # Mode 0700.
            if len(os.fsencode(directory / LINK_NAME)) <= MAX_SOCKETS_PATH_BYTES:
                (directory / LINK_NAME).symlink_to(self.temp)
                self._sockets_record.write_text(str(directory))
                return
            directory.rmdir()
        raise ServerError(
            f"{self.temp} is too long for the worker's socket ({MAX_SOCKETS_PATH_BYTES} bytes "
            "at most), and so is the temporary directory: set TMPDIR=/tmp"
        )

    def _unlink_sockets(self) -> None:
        link = self.sockets
        if link != self.temp:
            # Where another user has put something else there since, it stays.
            if link.is_symlink() and os.readlink(link) == str(self.temp):
                link.unlink()
                link.parent.rmdir()
            self._sockets_record.unlink()


def _has_mark(path: Path) -> bool:
    try:
        lines = (path / "config.properties").read_text("utf-8", "replace").splitlines()
    except OSError:
        return False
    return INSTANCE_MARK in lines


def _is_empty_or_ours(path: Path) -> bool:
    """Whether an instance may live in `path`; RUN_DIR=.run/second makes .run as well."""
    return _has_mark(path) or all(
        (entry.name in _OF_THE_FLEET and entry.is_file(follow_symlinks=False))
        or (
            entry.is_dir(follow_symlinks=False)
            and any(_entries(Path(entry.path)))
            and _is_empty_or_ours(Path(entry.path))
        )
        for entry in _entries(path)
    )


def _entries(path: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            yield from list(entries)
    except FileNotFoundError:
        return
