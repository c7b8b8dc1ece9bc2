"""Writes zip files in one pass.

Every member is stored. Sizes are known before, so every member has its place at once, and several
are copied together. Checksums are known only afterwards, so headers are written last and there are
no data descriptors, which Java refuses for stored members. The bytes depend on names and contents
alone: no times, no owners, no modes of the source.

A nested zip is written straight into its place in the outer one. Its CRC-32 is put together from
those of its members, so no byte is hashed twice. Why not ``zipfile``: see handler.zips.format.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol

from isal.isal_zlib import crc32, crc32_combine

from handler.errors import ArchiveError
from handler.zips.central_directory import check_name
from handler.zips.format import (
    CENTRAL,
    CENTRAL_SIGNATURE,
    END,
    END64,
    END64_LOCATOR,
    END64_LOCATOR_SIGNATURE,
    END64_SIGNATURE,
    END_SIGNATURE,
    FLAG_UTF8,
    IN_ZIP64,
    LOCAL,
    LOCAL_SIGNATURE,
    UNIX,
    ZIP64_EXTRA,
)
from scripts.archive.copying import Checksums, Content, Copier, Place, copy_hashed

__all__ = ["Container", "WrittenMember", "ZipWriter"]

_VERSION, _VERSION_64 = 20, 45
_MADE_BY_UNIX = UNIX << 8
_MODE = 0o100644 << 16
_DOS_DATE = (1 << 5) | 1  # 1 January 1980, the first day of the format
_ALIGNMENT_EXTRA = 0xD935  # as Android's zipalign registers it
_ALIGNMENT_EXTRA_BYTES = 6


@dataclass(frozen=True, slots=True)
class WrittenMember:
    """One finished member."""

    name: str
    size_bytes: int
    crc32: int
    blake3: str


class Container(Protocol):
    """Something that members are written into: a zip, or a folder."""

    def add(
        self,
        name: str,
        content: Content,
        size_bytes: int,
        *,
        align: int = 1,
        aligned_at: int = 0,
    ) -> None:
        """Write one member of exactly `size_bytes`, which may go on until `finish`."""
        ...

    def nested(self, name: str, most_bytes: int) -> AbstractContextManager[ZipWriter]:
        """Give a writer for a zip that becomes the member `name`."""
        ...

    def finish(self) -> list[WrittenMember]:
        """Wait for what was added; return it, nested zips left out."""
        ...


@dataclass(slots=True)
class _Record:
    """A member on its way: `header` is without checksum and sizes until it is finished."""

    name: str
    offset: int
    header: bytearray
    size_bytes: int
    sums: Callable[[], Checksums] | None = None
    crc32: int | None = None

    def finish(self, crc32: int) -> None:
        """Put checksum and sizes into the header."""
        self.crc32 = crc32
        extra_at = LOCAL.size + len(self.name.encode())
        size_bytes = self.size_bytes
        if self.header[extra_at : extra_at + 2] == b"\1\0":
            struct.pack_into("<L2L", self.header, 14, crc32, IN_ZIP64, IN_ZIP64)
            struct.pack_into("<2Q", self.header, extra_at + 4, size_bytes, size_bytes)
        else:
            struct.pack_into("<3L", self.header, 14, crc32, size_bytes, size_bytes)


@dataclass(slots=True)
class ZipWriter:
    """Writes members to `file`, which can seek, from its present position on.

    With a `copier` members are copied while others are added; without, each at once.
    """

    file: BinaryIO
    copier: Copier | None = None
    crc32: int = 0
    size_bytes: int = 0
    """Bytes taken so far, those that are still being copied too."""
    _start: int = field(init=False)
    _records: list[_Record] = field(default_factory=list)
    _num_finished: int = 0
    _written: list[WrittenMember] = field(default_factory=list)
    _names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._start = self.file.tell()

    def add(
        self,
        name: str,
        content: Content,
        size_bytes: int,
        *,
        align: int = 1,
        aligned_at: int = 0,
    ) -> None:
        """Write one member of exactly `size_bytes`.

        Its byte `aligned_at` comes to lie at a multiple of `align`, counted from this zip's start.
        Raises: ArchiveError, here or from `finish`, where `content` has more or less.
        """
        record = self._reserve(name, size_bytes, align, aligned_at)
        place = Place(name, self.file.fileno(), self._start + self.size_bytes, size_bytes)
        if self.copier is None:
            sums = copy_hashed(content, place)
            record.sums = lambda: sums
        else:
            record.sums = self.copier.submit(content, place)
        self.size_bytes += size_bytes

    def add_bytes(self, name: str, data: bytes) -> None:
        """Write one small member."""
        self.add(name, [data], len(data))

    @contextmanager
    def nested(self, name: str, most_bytes: int) -> Iterator[ZipWriter]:
        """Give a writer for a zip that becomes the member `name`, of at most `most_bytes`."""
        record = self._reserve(name, most_bytes, 64, 0)
        self.file.seek(self._start + self.size_bytes)
        inner = ZipWriter(self.file, self.copier)
        yield inner
        inner.close()
        if inner.size_bytes > most_bytes:
            raise ArchiveError(
                f"{name} grew to {inner.size_bytes} bytes; {most_bytes} were reserved"
            )
        record.size_bytes = inner.size_bytes
        record.finish(inner.crc32)
        self.size_bytes += inner.size_bytes

    def finish(self) -> list[WrittenMember]:
        """Wait for what was added and write the headers; return all members but nested zips."""
        for record in self._records[self._num_finished :]:
            if record.sums is not None:
                sums = record.sums()
                record.finish(sums.crc32)
                self._written.append(
                    WrittenMember(record.name, record.size_bytes, sums.crc32, sums.blake3)
                )
            assert record.crc32 is not None, "its nested zip is still open"
            self._write(record.header, record.offset)
            self.crc32 = crc32_combine(self.crc32, record.crc32, record.size_bytes)
            self._num_finished += 1
        return self._written

    def close(self) -> None:
        """Finish, and write the central directory. The file stays open."""
        self.finish()
        offset = self.size_bytes
        directory = b"".join(_central(record) for record in self._records)
        count, size = len(self._records), len(directory)
        end = b""
        if count >= 0xFFFF or offset + size >= IN_ZIP64:
            fields = (END64.size - 12, _MADE_BY_UNIX | _VERSION_64, _VERSION_64, 0, 0)
            end = END64.pack(END64_SIGNATURE, *fields, count, count, size, offset)
            end += END64_LOCATOR.pack(END64_LOCATOR_SIGNATURE, 0, offset + size, 1)
        count, size, offset_or_mark = min(count, 0xFFFF), min(size, IN_ZIP64), min(offset, IN_ZIP64)
        end += END.pack(END_SIGNATURE, 0, 0, count, count, size, offset_or_mark, 0)
        self._write(directory + end, offset)
        self.size_bytes += len(directory) + len(end)

    def _reserve(self, name: str, most_bytes: int, align: int, aligned_at: int) -> _Record:
        """Reserve the place of a local header, which is written when the member is finished."""
        check_name(name)
        if name.casefold() in self._names:  # as readers compare names
            raise ArchiveError(f"{name} is packed twice")
        self._names.add(name.casefold())
        is_wide = most_bytes >= IN_ZIP64
        extra = struct.pack("<2H2Q", ZIP64_EXTRA, 16, 0, 0) if is_wide else b""
        if align > 1:
            data_at = self.size_bytes + LOCAL.size + len(name.encode()) + len(extra)
            data_at += _ALIGNMENT_EXTRA_BYTES + aligned_at
            pad = -data_at % align
            extra += struct.pack("<3H", _ALIGNMENT_EXTRA, 2 + pad, align) + bytes(pad)
        header = bytearray(_local(name, extra, is_wide))
        record = _Record(name, self.size_bytes, header, most_bytes)
        self._records.append(record)
        self.size_bytes += len(header)
        return record

    def _write(self, data: bytes | bytearray, offset: int) -> None:
        self.file.seek(self._start + offset)
        self.file.write(data)
        self.crc32 = crc32(data, self.crc32)


def _flags(name: str) -> int:
    return 0 if name.isascii() else FLAG_UTF8


def _local(name: str, extra: bytes, is_wide: bool) -> bytes:
    version = _VERSION_64 if is_wide else _VERSION
    raw = name.encode()
    fixed = LOCAL.pack(
        LOCAL_SIGNATURE, version, _flags(name), 0, 0, _DOS_DATE, 0, 0, 0, len(raw), len(extra)
    )
    return fixed + raw + extra


def _central(record: _Record) -> bytes:
    wide = [value for value in (record.size_bytes,) * 2 if value >= IN_ZIP64]
    if record.offset >= IN_ZIP64:
        wide.append(record.offset)
    extra = struct.pack(f"<2H{len(wide)}Q", ZIP64_EXTRA, 8 * len(wide), *wide) if wide else b""
    version = _VERSION_64 if wide else _VERSION
    made_by = _MADE_BY_UNIX | version
    raw = record.name.encode()
    size, offset = min(record.size_bytes, IN_ZIP64), min(record.offset, IN_ZIP64)
    fixed = CENTRAL.pack(
        *(CENTRAL_SIGNATURE, made_by, version, _flags(record.name), 0, 0, _DOS_DATE),
        *(record.crc32, size, size, len(raw), len(extra), 0, 0, 0, _MODE, offset),
    )
    return fixed + raw + extra
