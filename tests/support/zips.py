"""Zips in memory, and what a `ZipReader` makes of them."""

from __future__ import annotations

import io
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Mapping

import pytest

from handler.errors import ArchiveError
from handler.zips.reader import ZipReader

FILES = {"a.txt": b"alpha" * 40, "folder/b.json": b"{}", "empty": b""}


def zip_bytes(files: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Zip `files` as Python does."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return buffer.getvalue()


def read_all(data: bytes) -> dict[str, bytes]:
    """Return every member of the zip `data`, as the reader gives it."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        reader = ZipReader(file, label="test.zip")
        return {name: reader.read(name) for name in reader.members}


def refusal(data: bytes) -> str:
    """Return what the reader says of the zip `data`, which it must refuse."""
    with pytest.raises(ArchiveError) as caught:
        read_all(data)
    return str(caught.value)


def with_both_headers(field: int, value: int, files: dict[str, bytes] = FILES) -> bytes:
    """A zip whose first member has `value` at `field` of both its headers."""
    data = bytearray(zip_bytes(files, zipfile.ZIP_DEFLATED))
    struct.pack_into("<L", data, data.index(b"PK\1\2") + field, value)
    struct.pack_into("<L", data, field - 2, value)
    return bytes(data)


def local_member(name: str, data: bytes) -> bytes:
    """A stored member as one who reads local headers only takes it."""
    numbers = (zlib.crc32(data), len(data), len(data), len(name), 0)
    return struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 33, *numbers) + name.encode() + data


def streamed_zip(data: bytes, packed: bytes, *, name: str, size: int, descriptor: bytes) -> bytes:
    """A zip of one deflated member whose sizes stand behind it."""
    crc32 = zlib.crc32(data)
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 8, 8, 0, 33, 0, 0, 0, len(name), 0)
    body = local + name.encode() + packed + descriptor
    numbers = (crc32, len(packed), size, len(name), 0, 0, 0, 0, 0, 0)
    central = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 8, 8, 0, 33, *numbers)
    central += name.encode()
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(central), len(body), 0)
    return body + central + end


def deflated(data: bytes) -> bytes:
    deflate = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return deflate.compress(data) + deflate.flush()
