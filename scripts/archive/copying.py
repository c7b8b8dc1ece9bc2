"""Copies bytes to their place in an archive and takes their checksums.

Members are copied several at once, each through a buffer that stays in a core's own cache: what is
read is hashed there and written from there, so that what is hashed is what is written, and memory
is read once. (``copy_file_range`` leaves nothing to hash: what it copied had to be read again, and
took 1.5 times the CPU time where it was measured.) While a core has nothing else to do, BLAKE3 is
taken by a thread of its own. What is in memory does not grow with what is copied.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from blake3 import blake3
from isal.isal_zlib import crc32

from handler.errors import ArchiveError
from scripts.console import Progress

__all__ = [
    "Buffer",
    "Checksums",
    "Content",
    "Copier",
    "FileContent",
    "Place",
    "check_unchanged",
    "copy_hashed",
]

_CHUNK_BYTES = 256 << 10
_CHUNKS_AHEAD = 4
_MOST_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class FileContent:
    """The bytes of the file `path`; `progress` hears of them as they are copied.

    Those from `offset` on, `size_bytes` of them where that is said. `mtime_ns` is when the file was
    last changed, as far as the one who wants the copy knows.
    """

    path: Path
    progress: Progress = lambda num_bytes: None
    offset: int = 0
    size_bytes: int | None = None
    mtime_ns: int | None = None


Buffer = bytes | bytearray | memoryview
Content = FileContent | Iterable[Buffer]


@dataclass(frozen=True, slots=True)
class Place:
    """Room for exactly `size_bytes` from `offset` of an open file; `name` is for messages."""

    name: str
    descriptor: int
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Checksums:
    """The checksums of what was copied."""

    crc32: int
    blake3: str


class Copier:
    """Copies several contents at once, in threads that end with its context.

    Where the context ends by an exception, copies in flight stop where they are.
    """

    def __init__(self) -> None:
        self._num_workers = min(_MOST_AT_ONCE, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(max_workers=self._num_workers)
        self._stopped = threading.Event()
        self._num_copying = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Copier:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._stopped.set()
        self._pool.shutdown(cancel_futures=error is not None)

    def submit(self, content: Content, place: Place) -> Callable[[], Checksums]:
        """Begin to copy; the result waits for its end, and raises what `copy_hashed` does."""
        return self._pool.submit(self._copy, content, place).result

    def _copy(self, content: Content, place: Place) -> Checksums:
        with self._lock:
            self._num_copying += 1
        try:
            return copy_hashed(content, place, self._stopped, self._has_idle_core)
        finally:
            with self._lock:
                self._num_copying -= 1

    def _has_idle_core(self) -> bool:
        return self._num_copying < self._num_workers


def copy_hashed(
    content: Content,
    place: Place,
    stopped: threading.Event | None = None,
    has_idle_core: Callable[[], bool] = lambda: False,
) -> Checksums:
    """Write `content` to `place`; give up halfway where `stopped` is set.

    Chunks that come while it `has_idle_core` are hashed in another thread.
    Raises: ArchiveError, where it has more or less bytes than there is room for, or its file was
    changed since it was listed.
    """
    checksum = written = 0
    with _Hasher() as hasher:
        for chunk in _read(content) if isinstance(content, FileContent) else content:
            if stopped is not None and stopped.is_set():
                raise ArchiveError(f"{place.name} was not packed to its end")
            if written + len(chunk) > place.size_bytes:
                raise _changed(place, "more")
            checksum = crc32(chunk, checksum)
            hasher.update(chunk, is_aside=has_idle_core())
            _write(chunk, place.descriptor, place.offset + written)
            written += len(chunk)
        if written < place.size_bytes:
            raise _changed(place, str(written))
        return Checksums(checksum, hasher.hexdigest())


class _Hasher:
    """Takes the BLAKE3 of chunks, in the thread that brings them or in one aside.

    A chunk may be changed when `_CHUNKS_AHEAD` others have come.
    """

    def __init__(self) -> None:
        self._blake3 = blake3()
        self._aside: ThreadPoolExecutor | None = None
        self._pending: deque[Future[object]] = deque()

    def __enter__(self) -> _Hasher:
        return self

    def __exit__(self, *error: object) -> None:
        if self._aside is not None:
            self._aside.shutdown()

    def update(self, chunk: Buffer, *, is_aside: bool) -> None:
        """Take the next chunk."""
        if not is_aside:
            self._wait(0)
            self._blake3.update(chunk)
            return
        if self._aside is None:
            self._aside = ThreadPoolExecutor(max_workers=1)
        self._wait(_CHUNKS_AHEAD - 1)
        self._pending.append(self._aside.submit(self._blake3.update, chunk))

    def hexdigest(self) -> str:
        """Return the hash of all chunks."""
        self._wait(0)
        return self._blake3.hexdigest()

    def _wait(self, most: int) -> None:
        """Wait until at most so many chunks are left to be hashed."""
        while len(self._pending) > most:
            self._pending.popleft().result()


def _changed(place: Place, found: str) -> ArchiveError:
    return ArchiveError(
        f"{place.name} changed while it was packed: {place.size_bytes} → {found} bytes"
    )


def _read(content: FileContent) -> Iterator[memoryview]:
    """Read a file chunk by chunk; a chunk's buffer is used again after `_CHUNKS_AHEAD` others."""
    buffers = [memoryview(bytearray(_CHUNK_BYTES)) for _ in range(_CHUNKS_AHEAD + 1)]
    offset, left = content.offset, content.size_bytes
    with content.path.open("rb", buffering=0) as source:
        while left is None or left > 0:
            buffers.append(buffers.pop(0))
            wanted = buffers[-1] if left is None else buffers[-1][:left]
            length = os.preadv(source.fileno(), [wanted], offset)
            if not length:
                break
            yield buffers[-1][:length]
            content.progress(length)
            offset += length
            left = None if left is None else left - length
        check_unchanged(content.path, source.fileno(), content.mtime_ns)


def check_unchanged(path: Path, descriptor: int, mtime_ns: int | None) -> None:
    """Refuse an open file that was written to after `mtime_ns`. Raises: ArchiveError."""
    if mtime_ns is not None and os.fstat(descriptor).st_mtime_ns != mtime_ns:
        raise ArchiveError(f"{path} changed while it was packed: pack it again when it is finished")


def _write(chunk: Buffer, descriptor: int, offset: int) -> None:
    """Write all of `chunk`: one pwrite may take less."""
    left = memoryview(chunk)
    while left:
        count = os.pwrite(descriptor, left, offset)
        left, offset = left[count:], offset + count
