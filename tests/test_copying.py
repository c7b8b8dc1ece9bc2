"""scripts.copying: the bytes arrive, with their checksums, whichever way they take."""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from pathlib import Path

import pytest

from scripts.copying import FileContent, copy_hashed

SIZES = (0, 1, 2 << 20, (2 << 20) + 1, 5_000_000)


def _data(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", ["kernel", "foreign", "short", "chunks"])
def test_bytes_and_checksums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, way: str
) -> None:
    data = _data(size)
    (tmp_path / "source").write_bytes(data)
    original = os.copy_file_range

    def foreign(*arguments: int) -> int:
        raise OSError(errno.EXDEV, "another file system")

    def short(source: int, target: int, count: int, *offsets: int) -> int:
        return original(source, target, min(count, 700_000), *offsets)

    if way in ("foreign", "short"):
        monkeypatch.setattr(os, "copy_file_range", {"foreign": foreign, "short": short}[way])
    heard: list[int] = []
    content = FileContent(tmp_path / "source", heard.append)
    with (tmp_path / "target").open("x+b") as file:
        file.write(b"before")
        if way == "chunks":
            found = copy_hashed([data[:10], data[10:]], file)
        else:
            found = copy_hashed(content, file)
            assert sum(heard) == size
        file.write(b"after")
    assert found == (zlib.crc32(data), hashlib.sha256(data).hexdigest(), size)
    assert (tmp_path / "target").read_bytes() == b"before" + data + b"after"


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: int) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "copy_file_range", full)
    (tmp_path / "source").write_bytes(b"data")
    with (
        (tmp_path / "target").open("x+b") as file,
        pytest.raises(OSError, match="no space left"),
    ):
        copy_hashed(FileContent(tmp_path / "source"), file)
