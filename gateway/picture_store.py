"""Pictures that are fetched by a URL: files with unguessable names that expire, and are bounded.

All of it is on disk, so that a gateway that starts again serves, and deletes, what is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from handler.errors import RequestError

__all__ = ["MEDIA_TYPES", "PictureStore", "StoreFull"]

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_NAME = re.compile(r"[A-Za-z0-9_-]{32}\.(png|jpeg|webp)")


class StoreFull(RequestError):
    """The picture does not fit into the store, or onto its disk."""

    status, phrase, code = 507, "Insufficient Storage", "picture_store_full"


class PictureStore:
    """A folder of pictures; its owner calls `sweep` now and then."""

    def __init__(
        self,
        folder: Path,
        expires_s: float,
        max_bytes: int,
        clock_s: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._expires_s = expires_s
        self._max_bytes = max_bytes
        self._clock_s = clock_s
        self._sizes: dict[str, int] = {}
        """Oldest first."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._find_earlier()

    @property
    def expires_s(self) -> float:
        """How long a picture can be fetched."""
        return self._expires_s

    async def add(self, picture: bytes, image_format: str) -> str:
        """Keep a picture; return its name.

        Raises:
            StoreFull: it is larger than the store may be, or the disk is full.
        """
        if len(picture) > self._max_bytes:
            raise StoreFull(
                f"a picture of {len(picture)} bytes; all together may have {self._max_bytes}"
            )
        name = f"{secrets.token_urlsafe(24)}.{image_format}"
        self._sizes[name] = len(picture)
        self._make_room()
        try:
            await asyncio.to_thread(self._write, name, picture)
        except OSError as error:
            self._delete(name)
            raise StoreFull(f"the picture cannot be kept: {error.strerror}") from error
        return name

    async def get(self, name: str) -> bytes | None:
        """Return a picture; None where there is none of this name, or not any more."""
        if not _NAME.fullmatch(name) or name not in self._sizes:
            return None
        path = self._folder / name
        try:
            if self._is_expired(path):
                self._delete(name)
                return None
            return await asyncio.to_thread(path.read_bytes)
        except OSError:
            return None

    def sweep(self) -> None:
        """Delete what has expired."""
        for name in list(self._sizes):
            try:
                if not self._is_expired(self._folder / name):
                    return  # those behind it are younger
            except FileNotFoundError:
                continue  # being written
            self._delete(name)

    def _find_earlier(self) -> None:
        found = []
        for path in self._folder.iterdir():
            if path.name.endswith(".part"):
                path.unlink(missing_ok=True)
            elif _NAME.fullmatch(path.name):
                stat = path.stat()
                found.append((stat.st_mtime, path.name, stat.st_size))
        self._sizes = {name: size for _, name, size in sorted(found)}
        self._make_room()
        self.sweep()

    def _write(self, name: str, picture: bytes) -> None:
        path = self._folder / name
        part = path.with_suffix(path.suffix + ".part")
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(picture)
        now_s = self._clock_s()
        os.utime(part, (now_s, now_s))
        part.replace(path)

    def _make_room(self) -> None:
        total = sum(self._sizes.values())
        for name in list(self._sizes):
            if total <= self._max_bytes:
                return
            total -= self._sizes[name]
            self._delete(name)

    def _is_expired(self, path: Path) -> bool:
        return self._clock_s() - path.stat().st_mtime >= self._expires_s

    def _delete(self, name: str) -> None:
        self._sizes.pop(name, None)
        with contextlib.suppress(OSError):
            (self._folder / name).unlink()
