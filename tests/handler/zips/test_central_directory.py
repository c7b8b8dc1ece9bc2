"""handler.zips.central_directory: what two readers could understand differently is refused."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.errors import ArchiveError
from tests.support.zips import (
    FILES,
    deflated,
    local_member,
    read_all,
    refusal,
    streamed_zip,
    with_both_headers,
    zip_bytes,
)


def test_leaves_folders_out() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.mkdir("folder")
        archive.writestr("folder/b", b"x")
    assert read_all(buffer.getvalue()) == {"folder/b": b"x"}


def test_reads_data_descriptors_and_zip64() -> None:
    class Unseekable(io.RawIOBase):
        def __init__(self) -> None:
            self.data = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: object) -> int:
            self.data += bytes(data)  # type: ignore[call-overload]
            return len(bytes(data))  # type: ignore[call-overload]

    stream = Unseekable()
    with (
        zipfile.ZipFile(stream, "w") as archive,  # type: ignore[call-overload]
        archive.open("a.txt", "w", force_zip64=True) as member,
    ):
        member.write(FILES["a.txt"])
    assert read_all(bytes(stream.data)) == {"a.txt": FILES["a.txt"]}


@pytest.mark.parametrize(
    "name",
    [
        *("../a", "a/../../b", "/etc/passwd", "a//b", "./a", "a/.", "C:/a", "a\\b", "..\\a"),
        *("a\nb", "a\x00b", "..", "a/" + "b" * 256),
    ],
)
def test_refuses_names_that_are_no_plain_paths(name: str) -> None:
    data = zip_bytes({"x" * len(name): b"data"}).replace(b"x" * len(name), name.encode())
    assert "is not a plain relative path" in refusal(data)


def _with_mode(mode: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo("link")
        info.create_system = 3
        info.external_attr = mode << 16
        archive.writestr(info, "/etc/passwd")
    return buffer.getvalue()


@pytest.mark.parametrize("mode", [0o120777, 0o020666, 0o060666, 0o010666, 0o140777])
def test_refuses_links_and_special_files(mode: int) -> None:
    assert "is a link or a special file" in refusal(_with_mode(mode))


def _patched(offset_of: Callable[[bytes], int], layout: str, value: int) -> bytes:
    data = bytearray(zip_bytes(FILES, zipfile.ZIP_DEFLATED))
    struct.pack_into(layout, data, offset_of(bytes(data)), value)
    return bytes(data)


def _central(field: int) -> Callable[[bytes], int]:
    return lambda data: data.index(b"PK\1\2") + field


def _end(field: int) -> Callable[[bytes], int]:
    return lambda data: data.rindex(b"PK\5\6") + field


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (zip_bytes({"aa": b"1", "ab": b"2"}).replace(b"ab", b"aa"), "is listed twice"),
        (zip_bytes({"aa": b"1", "ab": b"2"}).replace(b"ab", b"AA"), "is listed twice"),
        (zip_bytes({"a": b"1", "b/c": b"2"}).replace(b"b/c", b"a/c"), "both a file and the folder"),
        (zip_bytes(FILES)[:-1], "not a zip archive, or it is cut off"),
        (zip_bytes(FILES)[100:], "its directory is not where"),
        (zip_bytes(FILES) + b"x", "bytes follow its end record"),
        (b"", "not a zip archive"),
        (b"PK\5\6", "not a zip archive"),
        (_patched(_central(8), "<H", 1), "is encrypted"),
        (_patched(_central(10), "<H", 12), "headers disagree"),
        (with_both_headers(24, 1 << 30), "impossible"),
        (with_both_headers(24, 100), "larger than the 100"),
        (with_both_headers(16, 7), "do not match its checksum"),
        (_patched(_central(42), "<L", 1 << 30), "not belong to a member"),
        (_patched(_end(16), "<L", 1 << 30), "its directory is not where"),
        (_patched(_end(10), "<H", 2), "several parts"),
        (_patched(_end(4), "<H", 1), "several parts"),
    ],
)
def test_refuses_what_is_damaged_or_lies(data: bytes, words: str) -> None:
    message = refusal(data)
    assert words in message
    assert message.startswith("test.zip: ")


def test_refuses_members_that_share_bytes() -> None:
    data = bytearray(zip_bytes({"a": b"1" * 50, "b": b"2"}))
    second = data.index(b"PK\1\2", data.index(b"PK\1\2") + 4)
    first_local = bytes(data[: 30 + 1])
    data[30 + 1 : 30 + 1 + len(first_local)] = first_local.replace(b"a", b"b")
    struct.pack_into("<L", data, second + 42, 31)
    struct.pack_into("<2L", data, second + 20, 1, 1)
    assert "overlaps what follows it" in refusal(bytes(data))


@pytest.mark.parametrize("before", ["first", "middle", "directory"])
def test_refuses_members_that_the_directory_does_not_list(before: str) -> None:
    """TorchServe reads local headers one after the other and would unpack it."""
    data = zip_bytes({"a": b"1", "b": b"2"})
    second = data.index(b"PK\3\4", 4)
    directory = data.index(b"PK\1\2")
    at = {"first": 0, "middle": second, "directory": directory}[before]
    evil = local_member("entry.py", b"import os")
    moved = bytearray(data[:at] + evil + data[at:])
    struct.pack_into("<L", moved, moved.rindex(b"PK\5\6") + 16, directory + len(evil))
    entry = moved.index(b"PK\1\2")
    for offset in (0, second):
        if offset >= at:
            struct.pack_into("<L", moved, entry + 42, offset + len(evil))
        entry = moved.find(b"PK\1\2", entry + 4)
    with zipfile.ZipFile(io.BytesIO(moved)) as archive:
        assert archive.testzip() is None
    assert "not belong to a member" in refusal(bytes(moved))


@pytest.mark.parametrize("field", [14, 18, 22])
def test_refuses_local_headers_that_say_something_else(field: int) -> None:
    data = bytearray(zip_bytes(FILES))
    data[field] ^= 1
    assert "a.txt: its two headers disagree" in refusal(bytes(data))


@pytest.mark.parametrize("sign", [b"", b"PK\7\10"])
@pytest.mark.parametrize("layout", ["<3L", "<L2Q"])
def test_data_descriptors_are_compared(sign: bytes, layout: str) -> None:
    data = b"hello" * 9
    packed = deflated(data)
    true = sign + struct.pack(layout, zlib.crc32(data), len(packed), len(data))
    assert read_all(streamed_zip(data, packed, name="a", size=45, descriptor=true)) == {"a": data}
    false = sign + struct.pack(layout, zlib.crc32(data), len(packed) - 1, len(data))
    for wrong in (false, b"", true + b"x", true[:-1]):
        zipped = streamed_zip(data, packed, name="a", size=45, descriptor=wrong)
        assert "not belong to a member" in refusal(zipped)


def test_refuses_a_folder_that_others_take_for_a_file() -> None:
    assert "a folder and a file at once" in refusal(_with_mode(0o040755))


@given(
    fields=st.tuples(*[st.sampled_from([0, 1, 2, 0xFFFF, 0xFFFFFFFF, 40, 100])] * 4),
    tail=st.binary(max_size=30),
)
def test_end_records_that_lie(fields: tuple[int, int, int, int], tail: bytes) -> None:
    count, size, offset, comment = fields
    few = min(count, 0xFFFF)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, few, few, size, offset, min(comment, 0xFFFF))
    body = zip_bytes(FILES)
    try:
        read_all(body[: body.rindex(b"PK\5\6")] + end + tail)
    except ArchiveError:
        return
    assert (count, comment, tail) in {(3, 0, b""), (0, 0, b"")}
