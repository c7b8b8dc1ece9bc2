"""scripts.archive.copying: the bytes arrive, with their checksums, whichever way they take."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from handler.errors import ArchiveError
from scripts.archive.copying import Buffer, Checksums, Copier, FileContent, Place, copy_hashed

SIZES = (0, 1, 256 << 10, (2 << 20) + 1, 5_000_000)


def _data(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def _sums(data: bytes) -> Checksums:
    return Checksums(zlib.crc32(data), blake3(data).hexdigest())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", ["file", "short writes", "chunks"])
def test_bytes_and_checksums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, way: str
) -> None:
    data = _data(size)
    (tmp_path / "source").write_bytes(data)
    original = os.pwrite

    def short(descriptor: int, chunk: memoryview, offset: int) -> int:
        return original(descriptor, chunk[:300_000], offset)

    if way == "short writes":
        monkeypatch.setattr(os, "pwrite", short)
    heard: list[int] = []
    content = FileContent(tmp_path / "source", heard.append)
    with (tmp_path / "target").open("x+b") as file:
        file.write(b"before" + bytes(size) + b"after")
        file.flush()
        place = Place("member", file.fileno(), 6, size)
        if way == "chunks":
            found = copy_hashed([data[:10], data[10:]], place)
        else:
            found = copy_hashed(content, place)
            assert sum(heard) == size
    assert found == _sums(data)
    assert (tmp_path / "target").read_bytes() == b"before" + data + b"after"


def test_contents_are_copied_at_once_each_to_its_place(tmp_path: Path) -> None:
    parts = [_data(size) for size in (3_000_000, 10, 5_000_001, 0, 700_000)]
    ends = list(itertools.accumulate(len(part) for part in parts))
    with (tmp_path / "target").open("x+b") as file, Copier() as copier:
        waiting = []
        for index, (part, end) in enumerate(zip(parts, ends, strict=True)):
            source = tmp_path / str(index)
            source.write_bytes(part)
            place = Place(source.name, file.fileno(), end - len(part), len(part))
            waiting.append(copier.submit(FileContent(source), place))
        assert [each() for each in waiting] == [_sums(part) for part in parts]
    assert (tmp_path / "target").read_bytes() == b"".join(parts)


def test_an_error_stops_copies_in_flight(tmp_path: Path) -> None:
    has_begun = threading.Event()

    def endless() -> Iterator[Buffer]:
        while True:
            yield b"x" * 1000
            has_begun.set()

    with (tmp_path / "target").open("x+b") as file:
        copier = Copier()
        with contextlib.suppress(KeyboardInterrupt), copier:
            result = copier.submit(endless(), Place("endless", file.fileno(), 0, 1 << 40))
            has_begun.wait()
            raise KeyboardInterrupt
        with pytest.raises(ArchiveError, match="endless was not packed"):
            result()


@pytest.mark.parametrize("room", [0, 3, 5])
def test_nothing_is_written_beyond_its_place(tmp_path: Path, room: int) -> None:
    (tmp_path / "source").write_bytes(b"data")
    with (tmp_path / "target").open("x+b") as file:
        with pytest.raises(ArchiveError, match="member changed while it was packed"):
            copy_hashed(FileContent(tmp_path / "source"), Place("member", file.fileno(), 0, room))
        assert (tmp_path / "target").stat().st_size <= room


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "pwrite", full)
    (tmp_path / "source").write_bytes(b"data")
    with (
        (tmp_path / "target").open("x+b") as file,
        pytest.raises(OSError, match="no space left"),
    ):
        copy_hashed(FileContent(tmp_path / "source"), Place("member", file.fileno(), 0, 4))


def test_a_part_of_a_file(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    data = bytes(index % 251 for index in range(3 << 20))
    source.write_bytes(data)
    part = data[1_000_000:2_500_000]
    with target.open("w+b") as file:
        content = FileContent(source, offset=1_000_000, size_bytes=len(part))
        sums = copy_hashed(content, Place("a", file.fileno(), 0, len(part)))
    assert target.read_bytes() == part
    assert sums.blake3 == blake3(part).hexdigest()


def test_a_file_that_was_changed_since_it_was_listed(tmp_path: Path) -> None:
    """Of the same size: training scripts write their checkpoints over the old ones."""
    source = tmp_path / "source"
    source.write_bytes(b"before")
    mtime_ns = source.stat().st_mtime_ns
    with (tmp_path / "target").open("w+b") as file:
        place = Place("a", file.fileno(), 0, 6)
        copy_hashed(FileContent(source, mtime_ns=mtime_ns), place)
        source.write_bytes(b"after!")
        os.utime(source, ns=(mtime_ns + 1, mtime_ns + 1))
        with pytest.raises(ArchiveError, match="source changed while it was packed"):
            copy_hashed(FileContent(source, mtime_ns=mtime_ns), place)
