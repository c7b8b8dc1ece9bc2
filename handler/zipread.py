"""Reads zip archives that nobody vouches for; changes when what we accept as a zip changes.

Stricter than ``zipfile``: what two readers could understand differently is refused. Nothing is
unpacked here by its own will; the caller gets checked members and asks for their bytes.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from handler.crc32 import combine_crc32
from handler.errors import ArchiveError

__all__ = ["CHUNK_BYTES", "ZipMember", "ZipReader", "check_name"]

CHUNK_BYTES = 4 << 20
_PIECE_BYTES = 64 << 20
_CACHED_BYTES = 256 << 10
STORED, DEFLATED = 0, 8
MAX_MEMBERS = 20_000
MAX_DIRECTORY_BYTES = 16 << 20
MAX_DEFLATE_RATIO = 1032  # what the deflate format can reach at most

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_UNIX = 3
_FLAG_ENCRYPTED = 0x1 | 0x40 | 0x2000
_FLAG_UTF8 = 0x800


@dataclass(frozen=True, slots=True)
class ZipMember:
    """One regular file of an archive; `offset` is where its data begins in the opened file."""

    name: str
    size_bytes: int
    packed_bytes: int
    crc32: int
    is_stored: bool
    offset: int


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    flags: int
    method: int
    crc32: int
    packed_bytes: int
    size_bytes: int
    header_offset: int


def check_name(name: str) -> None:
    """Refuse a member name that is not a plain relative path.

    Raises: ArchiveError, naming the member.
    """
    parts = name.split("/")
    if (
        not name
        or len(name) > 1024
        or "\\" in name
        or any(ord(letter) < 32 for letter in name)
        or ":" in parts[0]
        or any(part in ("", ".", "..") for part in parts)
    ):
        raise ArchiveError(f"the member name {name!r} is refused: it is no plain relative path")


class ZipReader:
    """The members of the zip that fills `size_bytes` from `start` of `file`, all checked.

    `members` maps names to members, directories left out. Reads are positioned: two readers may
    share a file, and two threads a reader.
    """

    def __init__(
        self, file: BinaryIO, *, start: int = 0, size_bytes: int | None = None, label: str = ""
    ) -> None:
        self._file = file  # kept open as long as the reader lives
        self._descriptor = file.fileno()
        self._start = start
        self._size = os.fstat(self._descriptor).st_size if size_bytes is None else size_bytes
        self.label = label or str(getattr(file, "name", "archive"))
        entries = self._entries()
        self.members = {entry.name: self._member(entry) for entry in entries}
        self._check_tree()
        self._check_overlaps(entries)

    @property
    def sizes(self) -> dict[str, int]:
        """Unpacked sizes by name."""
        return {name: member.size_bytes for name, member in self.members.items()}

    def stream(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a member; see `chunks`."""
        return self.chunks(self._named(name))

    def head(self, name: str, num_bytes: int) -> bytes:
        """Return the first bytes of a member, whose checksum stays unchecked."""
        found = bytearray()
        for chunk in self._unpacked(self._named(name), min(CHUNK_BYTES, max(num_bytes, 1))):
            found += chunk
            if len(found) >= num_bytes:
                break
        return bytes(found[:num_bytes])

    def _named(self, name: str) -> ZipMember:
        if name not in self.members:
            raise self._error(f"{name} is missing")
        return self.members[name]

    def chunks(self, member: ZipMember, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Yield the unpacked bytes of `member`; checks size and CRC-32 on the way.

        Raises: ArchiveError at the end, or at once where it yields more than it declared.
        """
        crc32 = size = 0
        for chunk in self._unpacked(member, chunk_bytes):
            size += len(chunk)
            if size > member.size_bytes:
                raise self._error(f"{member.name} is larger than the {member.size_bytes} it claims")
            crc32 = zlib.crc32(chunk, crc32)
            yield chunk
        if size != member.size_bytes or crc32 != member.crc32:
            raise self._damaged(member)

    def read(self, name: str, limit_bytes: int = 64 << 20) -> bytes:
        """Return a whole small member. Raises: ArchiveError if absent, damaged or too large."""
        member = self._named(name)
        if member.size_bytes > limit_bytes:
            raise self._error(f"{name} claims {member.size_bytes} bytes; at most {limit_bytes}")
        return b"".join(self.chunks(member))

    def check_stored(self, members: Collection[ZipMember]) -> None:
        """Compare the checksums of stored members, in pieces on all cores.

        The pages that are read for it stay cached for whoever maps them next.
        Raises: ArchiveError, naming the first damaged member.
        """
        pieces = [
            (member, start, min(_PIECE_BYTES, member.size_bytes - start))
            for member in members
            for start in range(0, member.size_bytes, _PIECE_BYTES)
        ]
        found: dict[ZipMember, int] = dict.fromkeys(members, 0)
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            checksums = pool.map(
                lambda piece: self._checksum(piece[0].offset + piece[1], piece[2]), pieces
            )
            for (member, _, length), crc32 in zip(pieces, checksums, strict=True):
                found[member] = combine_crc32(found[member], crc32, length)
        for member, crc32 in found.items():
            if crc32 != member.crc32:
                raise self._damaged(member)

    def _checksum(self, offset: int, length: int) -> int:
        """CRC-32 of `length` bytes, through a buffer that stays in the core's own cache."""
        buffer = memoryview(bytearray(min(_CACHED_BYTES, length)))
        crc32 = 0
        while length > 0:
            count = os.preadv(self._descriptor, [buffer[:length]], offset)
            if count == 0:
                raise self._error("the file ends early: it is cut off")
            crc32 = zlib.crc32(buffer[:count], crc32)
            offset += count
            length -= count
        return crc32

    def _damaged(self, member: ZipMember) -> ArchiveError:
        return self._error(f"{member.name} is damaged: its bytes do not match its checksum")

    def extract(self, member: ZipMember, target: Path) -> None:
        """Write `member` to the new file `target`, whose folder is made."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as out:
            for chunk in self.chunks(member):
                out.write(chunk)

    def _unpacked(self, member: ZipMember, chunk_bytes: int) -> Iterator[bytes]:
        inflate = None if member.is_stored else zlib.decompressobj(-zlib.MAX_WBITS)
        for offset in range(0, member.packed_bytes, chunk_bytes):
            length = min(chunk_bytes, member.packed_bytes - offset)
            packed = self._read_absolute(member.offset + offset, length)
            if inflate is None:
                yield packed
                continue
            try:
                while packed:
                    yield inflate.decompress(packed, chunk_bytes)
                    packed = inflate.unconsumed_tail
            except zlib.error as error:
                raise self._error(f"{member.name} is damaged: {error}") from error
        if inflate is not None:
            yield inflate.flush()

    def _error(self, problem: str) -> ArchiveError:
        return ArchiveError(f"{self.label}: {problem}")

    def _read_absolute(self, offset: int, length: int) -> bytes:
        """Read exactly `length` bytes: one pread may return less than asked for."""
        pieces = []
        while length > 0:
            piece = os.pread(self._descriptor, length, offset)
            if not piece:
                raise self._error("the file ends early: it is cut off")
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read(self, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > self._size:
            raise self._error("it points outside itself: it is damaged or cut off")
        return self._read_absolute(self._start + offset, length)

    def _directory(self) -> tuple[int, int, int]:
        """Find the central directory: its number of entries, its size and its offset."""
        tail_length = min(self._size, _END.size + 0xFFFF)
        tail_start = self._size - tail_length
        tail = self._read(tail_start, tail_length)
        at = tail.rfind(b"PK\5\6")
        if at < 0 or at + _END.size > len(tail):
            raise self._error("it is no zip archive, or it is cut off")
        _, disk, disk_of_directory, here, count, size, offset, comment = _END.unpack_from(tail, at)
        if at + _END.size + comment != len(tail):
            raise self._error("it is cut off, or bytes follow its end record")
        end = tail_start + at
        if 0xFFFF in (count, here) or 0xFFFFFFFF in (size, offset):
            end, fields = self._directory64(end)
            disk, disk_of_directory, here, count, size, offset = fields
        if disk or disk_of_directory or here != count:
            raise self._error("archives in several parts are not read")
        if count > MAX_MEMBERS or size > MAX_DIRECTORY_BYTES:
            raise self._error(f"it claims {count} members in a directory of {size} bytes")
        if offset + size != end:
            raise self._error("its directory is not where its end record says")
        return count, size, offset

    def _directory64(self, end: int) -> tuple[int, tuple[int, ...]]:
        locator = self._read(end - _END64_LOCATOR.size, _END64_LOCATOR.size)
        signature, _, offset, _ = _END64_LOCATOR.unpack(locator)
        if signature != b"PK\6\7":
            raise self._error("its zip64 end record is missing")
        signature, length, _, _, *fields = _END64.unpack(self._read(offset, _END64.size))
        if signature != b"PK\6\6" or offset + 12 + length != end - _END64_LOCATOR.size:
            raise self._error("its zip64 end record is damaged")
        return offset, tuple(fields)

    def _entries(self) -> list[_Entry]:
        count, size, offset = self._directory()
        directory = self._read(offset, size)
        entries: list[_Entry] = []
        seen: dict[str, str] = {}
        at = 0
        for _ in range(count):
            if at + _CENTRAL.size > size:
                raise self._error("its directory is cut off")
            entry, at = self._entry(directory, at)
            if entry is None:
                continue
            check_name(entry.name)
            folded = entry.name.casefold()
            if folded in seen:
                raise self._error(f"{entry.name} is there twice (as {seen[folded]})")
            seen[folded] = entry.name
            entries.append(entry)
        if at != size:
            raise self._error("its directory holds more than it counts")
        return entries

    def _entry(self, directory: bytes, at: int) -> tuple[_Entry | None, int]:
        """Decode one record of the central directory; None for a folder."""
        fields = _CENTRAL.unpack_from(directory, at)
        signature, made_by, _, flags, method, _, _, crc32, packed, size = fields[:10]
        name_length, extra_length, comment_length, disk, _, attributes, offset = fields[10:]
        name_at = at + _CENTRAL.size
        extra_at = name_at + name_length
        after = extra_at + extra_length + comment_length
        if signature != b"PK\1\2" or after > len(directory):
            raise self._error("its directory is damaged")
        name = self._decode_name(directory[name_at:extra_at], flags)
        extra = directory[extra_at : extra_at + extra_length]
        size, packed, offset = self._wide(name, extra, [size, packed, offset])
        if disk not in (0, 0xFFFF) or flags & _FLAG_ENCRYPTED:
            raise self._error(f"{name} is encrypted or in another part")
        kind = (attributes >> 16) & 0o170000 if made_by >> 8 == _UNIX else 0
        if kind not in (0, 0o100000, 0o040000):
            raise self._error(f"{name} is a link or a special file: refused")
        if name.endswith("/") or kind == 0o040000:
            check_name(name.removesuffix("/"))
            if size:
                raise self._error(f"the folder {name} claims to hold bytes")
            return None, after
        return _Entry(name, flags, method, crc32, packed, size, offset), after

    def _decode_name(self, raw: bytes, flags: int) -> str:
        try:
            return raw.decode("utf-8" if flags & _FLAG_UTF8 else "ascii")
        except UnicodeDecodeError as error:
            raise self._error(f"the member name {raw!r} is not readable") from error

    def _wide(self, name: str, extra: bytes, values: list[int]) -> list[int]:
        """Replace the 32-bit `values` that are all ones by those of the zip64 extra field."""
        at = 0
        while at + 4 <= len(extra):
            kind, length = struct.unpack_from("<2H", extra, at)
            at += 4
            if kind == 1:
                wide = extra[at : at + length]
                for index, value in enumerate(values):
                    if value == 0xFFFFFFFF:
                        if len(wide) < 8:
                            raise self._error(f"{name}: its zip64 field is damaged")
                        values[index] = struct.unpack_from("<Q", wide)[0]
                        wide = wide[8:]
                return values
            at += length
        if 0xFFFFFFFF in values:
            raise self._error(f"{name}: its zip64 field is missing")
        return values

    def _member(self, entry: _Entry) -> ZipMember:
        """Check the local header of `entry` against the directory and find its data."""
        fields = _LOCAL.unpack(self._read(entry.header_offset, _LOCAL.size))
        signature, _, flags, method = fields[:4]
        name_length, extra_length = fields[9:]
        raw_name = self._read(entry.header_offset + _LOCAL.size, name_length)
        if (
            signature != b"PK\3\4"
            or method != entry.method
            or flags != entry.flags
            or self._decode_name(raw_name, flags) != entry.name
        ):
            raise self._error(f"{entry.name}: its two headers disagree")
        if method not in (STORED, DEFLATED):
            raise self._error(f"{entry.name} is packed by method {method}: only 0 and 8 are read")
        packed, size = entry.packed_bytes, entry.size_bytes
        if method == STORED and packed != size:
            raise self._error(f"{entry.name}: stored, yet its two sizes differ")
        if size > packed * MAX_DEFLATE_RATIO:
            raise self._error(f"{entry.name} claims {size} bytes out of {packed}: impossible")
        offset = entry.header_offset + _LOCAL.size + name_length + extra_length
        if offset + packed > self._size:
            raise self._error(f"{entry.name} is cut off")
        return ZipMember(
            entry.name, size, packed, entry.crc32, method == STORED, self._start + offset
        )

    def _check_tree(self) -> None:
        """No member may be a folder of another one."""
        for name in self.members:
            folder = name
            while "/" in folder:
                folder = folder.rpartition("/")[0]
                if folder in self.members:
                    raise self._error(f"{folder} is both a file and the folder of {name}")

    def _check_overlaps(self, entries: list[_Entry]) -> None:
        end = 0
        for entry in sorted(entries, key=lambda each: each.header_offset):
            if entry.header_offset < end:
                raise self._error(f"{entry.name} overlaps another member")
            member = self.members[entry.name]
            end = member.offset - self._start + member.packed_bytes
