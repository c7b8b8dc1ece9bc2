"""Copies bytes and takes their checksums on the way; changes with what makes that fast.

SHA-256 is the slowest part, so it has a thread of its own. A whole file is mapped for it and
copied by the kernel: against reading and writing that halves the system's time.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from scripts.console import Progress

__all__ = ["Content", "FileContent", "copy_hashed"]

_CHUNK_BYTES = 2 << 20
_NOT_BY_THE_KERNEL = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


@dataclass(frozen=True, slots=True)
class FileContent:
    """The bytes of the whole file `path`; `progress` hears of them as they are copied."""

    path: Path
    progress: Progress = lambda num_bytes: None


Buffer = bytes | bytearray | memoryview
Content = FileContent | Iterable[Buffer]


def copy_hashed(content: Content, file: BinaryIO) -> tuple[int, str, int]:
    """Write `content` to `file` at its position; return CRC-32, SHA-256 and length.

    A chunk's buffer is free again two chunks later.
    """
    crc32 = written = 0
    sha256 = hashlib.sha256()
    pending: Future[None] | None = None
    if isinstance(content, FileContent):
        chunks: Iterator[Buffer] = _copy_file(content, file)
    else:
        chunks = _write(content, file)
    with ThreadPoolExecutor(max_workers=1) as hasher:
        for chunk in chunks:
            following = hasher.submit(sha256.update, chunk)
            crc32 = zlib.crc32(chunk, crc32)
            written += len(chunk)
            if pending is not None:
                pending.result()
            pending = following
    return crc32, sha256.hexdigest(), written


def _write(chunks: Iterable[Buffer], file: BinaryIO) -> Iterator[Buffer]:
    for chunk in chunks:
        file.write(chunk)
        yield chunk


def _copy_file(content: FileContent, file: BinaryIO) -> Iterator[memoryview]:
    """Copy a file chunk by chunk; yield each chunk, mapped, after it is copied."""
    with content.path.open("rb") as source:
        size_bytes = os.fstat(source.fileno()).st_size
        if size_bytes == 0:
            return
        mapped = mmap.mmap(source.fileno(), size_bytes, access=mmap.ACCESS_READ)
        for offset in range(0, size_bytes, _CHUNK_BYTES):
            length = min(_CHUNK_BYTES, size_bytes - offset)
            chunk = memoryview(mapped)[offset : offset + length]
            _copy_range(source, file, offset, chunk)
            yield chunk
            content.progress(length)
            if offset >= _CHUNK_BYTES:
                # Hashed by now: without this the whole file would count as memory of ours.
                mapped.madvise(mmap.MADV_DONTNEED, offset - _CHUNK_BYTES, _CHUNK_BYTES)


def _copy_range(source: BinaryIO, file: BinaryIO, offset: int, chunk: memoryview) -> None:
    """Append `chunk`, which is at `offset` of `source`, to `file`."""
    file.flush()
    position, left = file.tell(), len(chunk)
    while left > 0:
        try:
            copied = os.copy_file_range(
                source.fileno(), file.fileno(), left, offset + len(chunk) - left, position
            )
        except OSError as error:
            if error.errno not in _NOT_BY_THE_KERNEL:
                raise
            copied = 0
        if copied == 0:  # another kind of file system
            file.seek(position)
            file.write(chunk[len(chunk) - left :])
            return
        position += copied
        left -= copied
    file.seek(position)
