"""scripts.zipwriter: the bytes it writes, as other readers see them."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.crc32 import combine_crc32
from handler.errors import ArchiveError
from handler.zipread import ZipReader
from scripts.zipwriter import ZipWriter


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_combined_checksums_are_those_of_both_in_a_row(first: bytes, second: bytes) -> None:
    combined = combine_crc32(zlib.crc32(first), zlib.crc32(second), len(second))
    assert combined == zlib.crc32(first + second)


def _write(path: Path, *, wide: bool = False) -> None:
    with path.open("x+b") as file:
        writer = ZipWriter(file)
        writer.add_bytes("first.txt", b"one")
        with writer.nested("inner.zip", (5 << 30) if wide else 100_000) as inner:
            inner.add("größe.safetensors", [b"abc", b"def"], 6, align=64, aligned_at=3)
            inner.add_bytes("folder/empty", b"")
        writer.add_bytes("last.txt", b"three")
        writer.close()


@pytest.mark.parametrize("wide", [False, True])
def test_every_reader_agrees(tmp_path: Path, wide: bool) -> None:
    path = tmp_path / "outer.zip"
    _write(path, wide=wide)
    with zipfile.ZipFile(path) as outer:
        assert outer.testzip() is None
        assert outer.namelist() == ["first.txt", "inner.zip", "last.txt"]
        assert {info.compress_type for info in outer.infolist()} == {zipfile.ZIP_STORED}
        assert {info.flag_bits & 0x8 for info in outer.infolist()} == {0}
        with zipfile.ZipFile(io.BytesIO(outer.read("inner.zip"))) as inner:
            assert inner.testzip() is None
            assert inner.read("größe.safetensors") == b"abcdef"
    with path.open("rb") as file:
        reader = ZipReader(file)
        assert reader.read("last.txt") == b"three"
        place = reader.members["inner.zip"]
        nested = ZipReader(file, start=place.offset, size_bytes=place.size_bytes)
        member = nested.members["größe.safetensors"]
        assert nested.read("größe.safetensors") == b"abcdef"
        assert (member.offset - place.offset + 3) % 64 == 0
    unzip = [sys.executable, "-m", "zipfile", "-t", str(path)]
    assert subprocess.run(unzip, capture_output=True, check=True).returncode == 0


def test_what_was_written_is_told(tmp_path: Path) -> None:
    with (tmp_path / "a.zip").open("x+b") as file:
        written = ZipWriter(file).add("a", [b"x" * 10, b"y"], 11)
    data = b"x" * 10 + b"y"
    assert written.crc32 == zlib.crc32(data)
    assert written.sha256 == hashlib.sha256(data).hexdigest()
    assert written.size_bytes == 11


@pytest.mark.parametrize("size_bytes", [0, 5, 7])
def test_a_file_that_changed_is_refused(tmp_path: Path, size_bytes: int) -> None:
    with (tmp_path / "a.zip").open("x+b") as file, pytest.raises(ArchiveError, match="changed"):
        ZipWriter(file).add("a", [b"abcdef"], size_bytes)


@pytest.mark.parametrize("name", ["../a", "/a", "a//b", "", "a\\b"])
def test_writes_only_names_that_it_would_read(tmp_path: Path, name: str) -> None:
    with (tmp_path / "a.zip").open("x+b") as file, pytest.raises(ArchiveError):
        ZipWriter(file).add_bytes(name, b"")


def test_no_name_twice(tmp_path: Path) -> None:
    with (tmp_path / "a.zip").open("x+b") as file:
        writer = ZipWriter(file)
        writer.add_bytes("a", b"")
        with pytest.raises(ArchiveError, match="packed twice"):
            writer.add_bytes("a", b"")


def test_members_past_four_gigabytes(tmp_path: Path) -> None:
    """Offsets and sizes that need zip64, over a file that keeps no bytes of its holes."""

    class Holes(io.FileIO):
        """Seeks over long runs of zeros instead of writing them."""

        def write(self, data: object) -> int:
            view = memoryview(data)  # type: ignore[arg-type]
            if view.nbytes >= 1 << 20 and view.obj is zeros:
                self.seek(view.nbytes, io.SEEK_CUR)
                return view.nbytes
            return super().write(view)

    zeros = bytes(64 << 20)
    size = 65 * len(zeros)
    with Holes(tmp_path / "big.zip", "w+") as file:
        writer = ZipWriter(file)  # type: ignore[arg-type]
        writer._records.clear()
        header = writer._begin("big", size, 64, 0)
        for _ in range(65):
            file.write(zeros)
        writer._finish("big", header, size, 0)
        writer.add_bytes("after", b"it")
        writer.close()
    assert (tmp_path / "big.zip").stat().st_size > 4 << 30
    with zipfile.ZipFile(tmp_path / "big.zip") as archive:
        assert archive.getinfo("big").file_size == size
        assert archive.getinfo("after").header_offset > 4 << 30
        assert archive.read("after") == b"it"
    with (tmp_path / "big.zip").open("rb") as file:
        reader = ZipReader(file)
        assert reader.sizes == {"big": size, "after": 2}
        assert reader.read("after") == b"it"
