"""The central directory of an untrusted zip file: parsed, and checked against all its members.

Stricter than ``zipfile``: what two readers could understand differently is refused. TorchServe goes
from local header to local header and never looks at the directory, so the members that the
directory lists must fill the file from its start, and both headers of each must say the same.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass

from handler.errors import ArchiveError
from handler.messages import show
from handler.zips.format import (
    CENTRAL,
    CENTRAL_SIGNATURE,
    DESCRIPTOR_SIGNATURE,
    END,
    END64,
    END64_LOCATOR,
    END64_LOCATOR_SIGNATURE,
    END64_SIGNATURE,
    END_SIGNATURE,
    FLAG_DESCRIPTOR,
    FLAG_ENCRYPTED,
    FLAG_UTF8,
    IN_ZIP64,
    LOCAL,
    LOCAL_SIGNATURE,
    UNIX,
    ZIP64_EXTRA,
)

__all__ = ["ZipMember", "check_name", "read_directory"]

STORED, DEFLATED = 0, 8
MAX_MEMBERS = 20_000
MAX_DIRECTORY_BYTES = 16 << 20
_MAX_PART_BYTES = 255  # what file systems take
MAX_DEFLATE_RATIO = 1032  # what the deflate format can reach at most

_EMPTY = {STORED: b"", DEFLATED: b"\3\0"}


@dataclass(frozen=True, slots=True)
class ZipMember:
    """One regular file of an archive; `offset` is where its data begins in the opened file."""

    name: str
    size_bytes: int
    packed_bytes: int
    crc32: int
    is_stored: bool
    has_descriptor: bool
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
    is_folder: bool


def check_name(name: str) -> None:
    """Refuse a member name that is not a plain relative path.

    Raises: ArchiveError, naming the member.
    """
    parts = name.split("/")
    if (
        not name
        or len(name) > 1024
        or any(len(part.encode(errors="replace")) > _MAX_PART_BYTES for part in parts)
        or "\\" in name
        or any(ord(letter) < 32 or "\ud800" <= letter <= "\udfff" for letter in name)
        or ":" in parts[0]
        or any(part in ("", ".", "..") for part in parts)
    ):
        raise ArchiveError(
            f"the member name {show(name)} is refused: it is not a plain relative path"
        )


def read_directory(
    read: Callable[[int, int], bytes], start: int, size_bytes: int, label: str
) -> dict[str, ZipMember]:
    """Return by name the members of the zip that fills `size_bytes` from `start`, folders left out.

    All are checked; ``read(offset, length)`` gives the opened file's bytes. Raises: ArchiveError.
    """
    return _Directory(read, start, size_bytes, label).members()


@dataclass(frozen=True, slots=True)
class _Directory:
    bytes_at: Callable[[int, int], bytes]
    start: int
    size_bytes: int
    label: str

    def members(self) -> dict[str, ZipMember]:
        count, size, offset = self._directory()
        entries = self._entries(count, self._read(offset, size))
        entries.sort(key=lambda each: each.header_offset)
        starts = [*(each.header_offset for each in entries), offset]
        if starts[0]:
            raise self._error(f"its first {starts[0]} bytes do not belong to a member")
        members: dict[str, ZipMember] = {}
        for entry, next_start in zip(entries, starts[1:], strict=True):
            member = self._member(entry)
            self._check_end(entry, member.offset - self.start + member.packed_bytes, next_start)
            if not entry.is_folder:
                members[entry.name] = member
        self._check_tree(members)
        return members

    def _error(self, problem: str) -> ArchiveError:
        return ArchiveError(f"{self.label}: {problem}")

    def _read(self, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise self._error("it points outside itself: it is damaged or cut off")
        return self.bytes_at(self.start + offset, length)

    def _directory(self) -> tuple[int, int, int]:
        """Find the central directory: its number of entries, its size and its offset."""
        tail_length = min(self.size_bytes, END.size + 0xFFFF)
        tail_start = self.size_bytes - tail_length
        tail = self._read(tail_start, tail_length)
        at = tail.rfind(END_SIGNATURE)
        if at < 0 or at + END.size > len(tail):
            raise self._error("it is not a zip archive, or it is cut off")
        _, disk, disk_of_directory, here, count, size, offset, comment = END.unpack_from(tail, at)
        if at + END.size + comment != len(tail):
            raise self._error("it is cut off, or bytes follow its end record")
        end = tail_start + at
        if 0xFFFF in (count, here) or IN_ZIP64 in (size, offset):
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
        locator = self._read(end - END64_LOCATOR.size, END64_LOCATOR.size)
        signature, _, offset, _ = END64_LOCATOR.unpack(locator)
        if signature != END64_LOCATOR_SIGNATURE:
            raise self._error("its zip64 end record is missing")
        signature, length, _, _, *fields = END64.unpack(self._read(offset, END64.size))
        if signature != END64_SIGNATURE or offset + 12 + length != end - END64_LOCATOR.size:
            raise self._error("its zip64 end record is damaged")
        return offset, tuple(fields)

    def _entries(self, count: int, directory: bytes) -> list[_Entry]:
        entries: list[_Entry] = []
        seen: dict[str, str] = {}
        at = 0
        for _ in range(count):
            if at + CENTRAL.size > len(directory):
                raise self._error("its directory is cut off")
            entry, at = self._entry(directory, at)
            entries.append(entry)
            if entry.is_folder:
                continue
            check_name(entry.name)
            folded = entry.name.casefold()
            if folded in seen:
                raise self._error(f"{entry.name} is listed twice (as {seen[folded]})")
            seen[folded] = entry.name
        if at != len(directory):
            raise self._error("its directory holds more than it counts")
        return entries

    def _entry(self, directory: bytes, at: int) -> tuple[_Entry, int]:
        """Decode one record of the central directory; say also where the next begins."""
        fields = CENTRAL.unpack_from(directory, at)
        signature, made_by, _, flags, method, _, _, crc32, packed, size = fields[:10]
        name_length, extra_length, comment_length, disk, _, attributes, offset = fields[10:]
        name_at = at + CENTRAL.size
        extra_at = name_at + name_length
        after = extra_at + extra_length + comment_length
        if signature != CENTRAL_SIGNATURE or after > len(directory):
            raise self._error("its directory is damaged")
        name = self._decode_name(directory[name_at:extra_at], flags)
        extra = directory[extra_at : extra_at + extra_length]
        size, packed, offset = self._wide(name, extra, [size, packed, offset])
        if disk not in (0, 0xFFFF) or flags & FLAG_ENCRYPTED:
            raise self._error(f"{name} is encrypted or in another part")
        kind = (attributes >> 16) & 0o170000 if made_by >> 8 == UNIX else 0
        if kind not in (0, 0o100000, 0o040000):
            raise self._error(f"{name} is a link or a special file: refused")
        is_folder = name.endswith("/")
        if is_folder:
            check_name(name.removesuffix("/"))
        if (is_folder and size) or (kind == 0o040000 and not is_folder):
            raise self._error(f"{name} is a folder and a file at once")
        return _Entry(name, flags, method, crc32, packed, size, offset, is_folder), after

    def _decode_name(self, raw: bytes, flags: int) -> str:
        try:
            return raw.decode("utf-8" if flags & FLAG_UTF8 else "ascii")
        except UnicodeDecodeError as error:
            raise self._error(f"the member name {raw!r} is not readable") from error

    def _wide(self, name: str, extra: bytes, values: list[int]) -> list[int]:
        """Replace the 32-bit `values` that are all ones by those of the zip64 extra field."""
        if IN_ZIP64 not in values:
            return values
        found = []
        at = 0
        while at + 4 <= len(extra):
            kind, length = struct.unpack_from("<2H", extra, at)
            at += 4
            if kind == ZIP64_EXTRA:
                found.append(extra[at : at + length])
            at += length
        if len(found) != 1:
            raise self._error(f"{name}: it has {len(found)} zip64 fields and needs one")
        wide = found[0]
        if len(wide) < 8 * values.count(IN_ZIP64):
            raise self._error(f"{name}: its zip64 field is damaged")
        numbers = (number for (number,) in struct.iter_unpack("<Q", wide[: len(wide) // 8 * 8]))
        return [next(numbers) if value == IN_ZIP64 else value for value in values]

    def _member(self, entry: _Entry) -> ZipMember:
        """Check the local header of `entry` against the directory and find its data."""
        offset = self._check_local(entry)
        method, packed, size = entry.method, entry.packed_bytes, entry.size_bytes
        if method not in (STORED, DEFLATED):
            raise self._error(f"{entry.name} is packed by method {method}: only 0 and 8 are read")
        if method == STORED and packed != size:
            raise self._error(f"{entry.name}: stored, yet its two sizes differ")
        if size > packed * MAX_DEFLATE_RATIO:
            raise self._error(f"{entry.name} claims {size} bytes out of {packed}: impossible")
        if offset + packed > self.size_bytes:
            raise self._error(f"{entry.name} is cut off")
        empty = _EMPTY[method]
        if entry.is_folder and (packed != len(empty) or self._read(offset, packed) != empty):
            raise self._error(f"the folder {entry.name} holds bytes")
        return ZipMember(
            entry.name,
            size,
            packed,
            entry.crc32,
            is_stored=method == STORED,
            has_descriptor=bool(entry.flags & FLAG_DESCRIPTOR),
            offset=self.start + offset,
        )

    def _check_local(self, entry: _Entry) -> int:
        """Compare the local header with the directory's; return where it ends."""
        fields = LOCAL.unpack(self._read(entry.header_offset, LOCAL.size))
        signature, _, flags, method, _, _, crc32, packed, size, name_length, extra_length = fields
        extra_at = entry.header_offset + LOCAL.size + name_length
        raw_name = self._read(extra_at - name_length, name_length)
        extra = self._read(extra_at, extra_length)
        is_same = (
            signature == LOCAL_SIGNATURE
            and method == entry.method
            and flags == entry.flags
            and self._decode_name(raw_name, flags) == entry.name
        )
        if is_same and not flags & FLAG_DESCRIPTOR:
            # Java takes both sizes from the zip64 field, or neither.
            is_same = (size == IN_ZIP64) == (packed == IN_ZIP64)
            size, packed = self._wide(entry.name, extra, [size, packed])
            claimed = (entry.crc32, entry.packed_bytes, entry.size_bytes)
            is_same = is_same and (crc32, packed, size) == claimed
        if not is_same:
            raise self._error(f"{entry.name}: its two headers disagree")
        return int(extra_at + extra_length)

    def _check_end(self, entry: _Entry, end: int, next_start: int) -> None:
        """Nothing may lie between a member and what follows it but its data descriptor."""
        if end > next_start:
            raise self._error(f"{entry.name} overlaps what follows it")
        if not entry.flags & FLAG_DESCRIPTOR:
            allowed = {b""}
        else:
            values = (entry.crc32, entry.packed_bytes, entry.size_bytes)
            narrow = struct.pack("<3L", *(min(value, IN_ZIP64) for value in values))
            wide = struct.pack("<L2Q", *values)
            signs = (b"", DESCRIPTOR_SIGNATURE)
            allowed = {sign + each for sign in signs for each in (narrow, wide)}
        length = next_start - end
        if length > 24 or self._read(end, length) not in allowed:
            raise self._error(f"the {length} bytes after {entry.name} do not belong to a member")

    def _check_tree(self, members: Collection[str]) -> None:
        """No member may be a folder of another one."""
        for name in members:
            folder = name
            while "/" in folder:
                folder = folder.rpartition("/")[0]
                if folder in members:
                    raise self._error(f"{folder} is both a file and the folder of {name}")
