"""handler.zipread: what it reads, what it refuses, and that nothing else can come of any bytes."""

from __future__ import annotations

import io
import os
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.errors import ArchiveError
from handler.zipread import ZipReader
from tests.archives import zip_bytes

FILES = {"a.txt": b"alpha" * 40, "folder/b.json": b"{}", "empty": b""}


def read_all(data: bytes) -> dict[str, bytes]:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        reader = ZipReader(file, label="test.zip")
        return {name: reader.read(name) for name in reader.members}


def refusal(data: bytes) -> str:
    with pytest.raises(ArchiveError) as caught:
        read_all(data)
    return str(caught.value)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_reads_what_zipfile_writes(compression: int) -> None:
    assert read_all(zip_bytes(FILES, compression)) == FILES


def test_reads_a_zip_inside_another_file(tmp_path: Path) -> None:
    data = zip_bytes(FILES)
    (tmp_path / "outer").write_bytes(b"before" + data + b"after")
    with (tmp_path / "outer").open("rb") as file:
        reader = ZipReader(file, start=6, size_bytes=len(data))
        assert {name: reader.read(name) for name in reader.members} == FILES
        assert reader.head("a.txt", 7) == b"alphaal"


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
        *("a\nb", "a\x00b", ".."),
    ],
)
def test_refuses_names_that_are_no_plain_paths(name: str) -> None:
    data = zip_bytes({"x" * len(name): b"data"}).replace(b"x" * len(name), name.encode())
    assert "is no plain relative path" in refusal(data)


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
        (zip_bytes({"aa": b"1", "ab": b"2"}).replace(b"ab", b"aa"), "is there twice"),
        (zip_bytes({"aa": b"1", "ab": b"2"}).replace(b"ab", b"AA"), "is there twice"),
        (zip_bytes({"a": b"1", "b/c": b"2"}).replace(b"b/c", b"a/c"), "both a file and the folder"),
        (zip_bytes(FILES)[:-1], "no zip archive, or it is cut off"),
        (zip_bytes(FILES)[100:], "its directory is not where"),
        (zip_bytes(FILES) + b"x", "bytes follow its end record"),
        (b"", "no zip archive"),
        (b"PK\5\6", "no zip archive"),
        (_patched(_central(8), "<H", 1), "is encrypted"),
        (_patched(_central(10), "<H", 12), "headers disagree"),
        (_patched(_central(24), "<L", 1 << 30), "impossible"),
        (_patched(_central(24), "<L", 100), "larger than the 100"),
        (_patched(_central(16), "<L", 7), "do not match its checksum"),
        (_patched(_central(42), "<L", 1 << 30), "points outside itself"),
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
    assert "overlaps another member" in refusal(bytes(data))


def test_a_bomb_stops_at_the_size_it_claims() -> None:
    bomb = zip_bytes({"bomb": bytes(50 << 20)}, zipfile.ZIP_DEFLATED)
    data = bytearray(bomb)
    struct.pack_into("<L", data, data.index(b"PK\1\2") + 24, 1000)
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        reader = ZipReader(file)
        with pytest.raises(ArchiveError, match="larger than the 1000"):
            next(reader.chunks(reader.members["bomb"]))


GOOD = [zip_bytes(FILES), zip_bytes(FILES, zipfile.ZIP_DEFLATED)]


@given(
    data=st.sampled_from(GOOD),
    edits=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.integers(0, 20),
)
def test_any_edit_is_refused_or_harmless(
    data: bytes, edits: list[tuple[int, int]], cut: int
) -> None:
    """Whatever a few bytes are changed to: refused in our words, or files of the claimed sizes."""
    changed = bytearray(data)
    for at, value in edits:
        changed[at % len(changed)] = value
    try:
        found = read_all(bytes(changed[: len(changed) - cut]))
    except ArchiveError:
        return
    for name, content in found.items():
        assert len(content) < 10_000
        assert not os.path.isabs(name)
        assert ".." not in name.split("/")


@given(st.binary(max_size=400))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ArchiveError):
        read_all(data + b"no end record here")


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


def test_the_checksum_is_of_the_unpacked_bytes() -> None:
    data = zip_bytes({"a": b"hello"})
    stored = struct.unpack_from("<L", data, data.index(b"PK\1\2") + 16)[0]
    assert stored == zlib.crc32(b"hello")


@pytest.mark.parametrize("piece_bytes", [7, 100, 1 << 20])
def test_stored_members_are_checked_in_pieces(
    monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr("handler.zipread._PIECE_BYTES", piece_bytes)
    monkeypatch.setattr("handler.zipread._CACHED_BYTES", 16)
    for at in (None, 0, 7, 199):
        data = bytearray(zip_bytes(FILES))
        if at is not None:
            data[data.index(FILES["a.txt"]) + at] ^= 4
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            reader = ZipReader(file)
            if at is None:
                reader.check_stored(list(reader.members.values()))
                continue
            with pytest.raises(ArchiveError, match=r"a\.txt is damaged"):
                reader.check_stored(list(reader.members.values()))
