"""scripts.archive.zip_writer: the bytes it writes, as other readers see them."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3

from handler.errors import ArchiveError
from handler.zips.reader import ZipReader
from scripts.archive.copying import Checksums, Content, Copier, Place
from scripts.archive.manifest import torchserve_manifest
from scripts.archive.zip_writer import WrittenMember, ZipWriter
from scripts.torchserve.options import Options, Ports
from scripts.torchserve.process import TorchServer


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
        writer = ZipWriter(file)
        writer.add("a", [b"x" * 10, b"y"], 11)
        with writer.nested("inner.zip", 10_000) as inner:
            inner.add_bytes("b", b"")
        written = writer.finish()
    data = b"x" * 10 + b"y"
    assert written == [WrittenMember("a", 11, zlib.crc32(data), blake3(data).hexdigest())]
    assert [each.name for each in inner.finish()] == ["b"]


def test_members_copied_at_once_give_the_same_bytes(tmp_path: Path) -> None:
    big = [bytes(range(256)) * 5000, bytes(range(255)) * 9000]
    found = []
    for name in ("alone.zip", "together.zip"):
        with (tmp_path / name).open("x+b") as file, Copier() as copier:
            writer = ZipWriter(file, copier if name == "together.zip" else None)
            writer.add("lora", [big[1]], len(big[1]), align=64)
            with writer.nested("inner.zip", 5_000_000) as inner:
                for index, data in enumerate(big):
                    inner.add(f"{index}.safetensors", [data], len(data), align=64, aligned_at=9)
            writer.add_bytes("last", b"l")
            writer.close()
        found.append((tmp_path / name).read_bytes())
    assert found[0] == found[1]
    with zipfile.ZipFile(tmp_path / "together.zip") as outer:
        assert outer.testzip() is None
        with zipfile.ZipFile(outer.open("inner.zip")) as inner_zip:
            assert inner_zip.read("1.safetensors") == big[1]


@pytest.mark.parametrize("size_bytes", [0, 5, 7])
def test_a_file_that_changed_is_refused(tmp_path: Path, size_bytes: int) -> None:
    with (tmp_path / "a.zip").open("x+b") as file, pytest.raises(ArchiveError, match="changed"):
        ZipWriter(file).add("a", [b"abc", b"def"], size_bytes)


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
    size = 65 * (64 << 20)

    class LeavesHoles(Copier):
        def submit(self, content: Content, place: Place) -> Callable[[], Checksums]:
            if place.size_bytes == size:
                return lambda: Checksums(0, "")
            return super().submit(content, place)

    with (tmp_path / "big.zip").open("x+b") as file, LeavesHoles() as copier:
        writer = ZipWriter(file, copier)
        writer.add("big", [], size, align=64)
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


@pytest.mark.slow
@pytest.mark.server
def test_torchserve_takes_members_past_four_gigabytes(tmp_path: Path) -> None:
    entry = b"""
import os
class Sizes:
    def initialize(self, context):
        folder = context.system_properties["model_dir"]
        self.size = os.path.getsize(os.path.join(folder, "model.zip"))
    def handle(self, data, context):
        return [str(self.size)] * len(data)
"""
    zeros = bytes(4 << 20)
    num_chunks = 1025
    (tmp_path / "store").mkdir()
    archive = tmp_path / "store" / "big.mar"
    with archive.open("x+b") as file:
        writer = ZipWriter(file)
        writer.add_bytes("MAR-INF/MANIFEST.json", torchserve_manifest("big", "1.0"))
        writer.add_bytes("torchserve_entry.py", entry)
        writer.add_bytes("model-config.yaml", b"minWorkers: 1\nmaxWorkers: 1\n")
        writer.add_bytes("requirements.txt", b"")
        with writer.nested("model.zip", 5 << 30) as inner:
            inner.add("big", (zeros for _ in range(num_chunks)), num_chunks * len(zeros))
        writer.close()
    size_bytes = inner.size_bytes
    assert size_bytes > 4 << 30
    server = TorchServer(Options(archive, tmp_path / "run", Ports.free()))
    with server.running(timeout_s=240):
        done = subprocess.run(
            ["curl", "-s", "-d", "a=b", server.predictions_url],
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout == str(size_bytes)
