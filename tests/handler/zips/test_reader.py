"""handler.zips.reader: whoever wrote a zip, its members are read, and nothing but those."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import tempfile
import zipfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.errors import ArchiveError
from handler.zips.reader import CHECKSUM_BUFFER_BYTES, ZipReader
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


@pytest.mark.parametrize(
    ("name", "data", "words"), [("a", b"hello", "ends before its packed"), ("a/", b"", "holds byt")]
)
def test_refuses_members_behind_the_end_of_a_deflated_one(
    name: str, data: bytes, words: str
) -> None:
    """One who inflates to the end of the stream would go on at a header of another's making."""
    packed = deflated(data)
    packed += struct.pack("<4s3L", b"PK\7\10", zlib.crc32(data), len(packed), len(data))
    packed += local_member("entry.py", b"import os")
    numbers = (zlib.crc32(data), len(packed), len(data))
    descriptor = struct.pack("<4s3L", b"PK\7\10", *numbers)
    zipped = streamed_zip(data, packed, name=name, size=len(data), descriptor=descriptor)
    assert words in refusal(zipped)


def test_refuses_a_deflated_member_that_is_cut_off() -> None:
    data = b"hello" * 9
    packed = deflated(data)[:-1]
    numbers = struct.pack("<3L", zlib.crc32(data), len(packed), 45)
    assert "a is damaged" in refusal(
        streamed_zip(data, packed, name="a", size=45, descriptor=numbers)
    )


@pytest.mark.skipif(shutil.which("zip") is None, reason="needs Info-ZIP")
@pytest.mark.parametrize("is_streamed", [False, True])
def test_reads_what_info_zip_writes(tmp_path: Path, is_streamed: bool) -> None:
    for name, data in FILES.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    target = "-" if is_streamed else str(tmp_path / "out.zip")
    run = subprocess.run(
        ["zip", "-r", target, "."], cwd=tmp_path / "in", check=True, capture_output=True
    )
    assert read_all(run.stdout if is_streamed else (tmp_path / "out.zip").read_bytes()) == FILES


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_reads_what_shutil_writes_and_zipfile_appends_to(tmp_path: Path, compression: int) -> None:
    (tmp_path / "in" / "folder" / "empty").mkdir(parents=True)
    (tmp_path / "in" / "folder" / "b.json").write_bytes(b"{}")
    path = Path(shutil.make_archive(str(tmp_path / "out"), "zip", tmp_path / "in"))
    with zipfile.ZipFile(path, "a", compression) as archive:
        archive.writestr("folder2/", b"")
        with archive.open("wide", "w", force_zip64=True) as member:
            member.write(b"x" * 100)
    expected = {"folder/b.json": b"{}", "wide": b"x" * 100}
    assert read_all(path.read_bytes()) == expected


def test_a_bomb_stops_at_the_size_it_claims() -> None:
    data = with_both_headers(24, 1000, {"bomb": bytes(50 << 20)})
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


@pytest.mark.parametrize("piece_bytes", [70_000, CHECKSUM_BUFFER_BYTES, 2 * CHECKSUM_BUFFER_BYTES])
def test_stored_members_are_checked_in_pieces(piece_bytes: int) -> None:
    content = random.Random(0).randbytes(2 * CHECKSUM_BUFFER_BYTES + 7)
    for at in (None, 0, CHECKSUM_BUFFER_BYTES, len(content) - 1):
        data = bytearray(zip_bytes({"empty": b"", "a.txt": content}))
        if at is not None:
            data[data.index(content) + at] ^= 4
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            reader = ZipReader(file)
            if at is None:
                reader.check_stored(list(reader.members.values()), piece_bytes)
                continue
            with pytest.raises(ArchiveError, match=r"a\.txt is damaged"):
                reader.check_stored(list(reader.members.values()), piece_bytes)


def test_bytes_are_given_as_they_come() -> None:
    """Whoever hashes or copies a member of gigabytes holds a chunk of it at a time."""
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with tempfile.TemporaryFile() as file:
            file.write(zip_bytes({"a": bytes(1000)}, compression))
            file.flush()
            reader = ZipReader(file)
            chunks = list(reader.chunks(reader.members["a"], 64))
            assert b"".join(chunks) == bytes(1000)
            assert max(map(len, chunks)) == 64


def test_small_members_are_read_whole_and_large_ones_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zip_bytes(FILES))
    with (tmp_path / "a.zip").open("rb") as file:
        reader = ZipReader(file)
        assert reader.sizes == {name: len(data) for name, data in FILES.items()}
        with pytest.raises(ArchiveError, match="claims 200 bytes; at most 199"):
            reader.read("a.txt", limit_bytes=199)
        with pytest.raises(ArchiveError, match="none is missing"):
            reader.read("none")
        reader.extract(reader.members["a.txt"], tmp_path / "new" / "a.txt")
        assert (tmp_path / "new" / "a.txt").read_bytes() == FILES["a.txt"]
        with pytest.raises(FileExistsError):
            reader.extract(reader.members["a.txt"], tmp_path / "new" / "a.txt")
