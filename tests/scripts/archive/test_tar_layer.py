"""scripts.archive.tar_layer: tar archives that everybody reads, from any byte on."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from handler.errors import ArchiveError
from handler.loading.model_dir import Extent
from scripts.archive.tar_layer import TarLayer


@pytest.fixture
def layer(tmp_path: Path) -> TarLayer:
    (tmp_path / "file").write_bytes(b"0123456789" * 200)
    long_name = f"models/{'a' * 120}/{'ü' * 60}"
    return TarLayer(
        {
            "models/model/unet/x": Extent(tmp_path / "file", 3, 1024),
            "models/empty": b"",
            long_name: b"abc",
        }
    )


def test_python_reads_it(layer: TarLayer) -> None:
    data = b"".join(layer.chunks())
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = archive.getmembers()
        files = {each.name: archive.extractfile(each) for each in members if each.isreg()}
        read = {name: file.read() for name, file in files.items() if file is not None}
    folders = [each.name for each in members if each.isdir()]
    assert folders == ["models", f"models/{'a' * 120}", "models/model", "models/model/unet"]
    assert list(read) == list(layer.files)
    assert read["models/model/unet/x"] == (b"0123456789" * 200)[3:1027]
    assert {(each.mtime, each.uid, each.gid, each.uname) for each in members} == {(0, 0, 0, "")}
    assert {oct(each.mode) for each in members if each.isreg()} == {"0o644"}
    assert layer.size_bytes == len(data)
    assert layer.digest == f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.mark.parametrize("start", [0, 1, 511, 512, 3000, 4000])
def test_from_any_byte_on(layer: TarLayer, start: int) -> None:
    assert b"".join(layer.chunks(start)) == b"".join(layer.chunks())[start:]


def test_a_file_that_is_cut_meanwhile(layer: TarLayer, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"short")
    with pytest.raises(ArchiveError, match="is cut off"):
        b"".join(layer.chunks())
