"""scripts.archive.reader: which files of an archive count, and where its pipeline must be."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.verify_archive import verify
from tests.support.archives import save_in_hub_cache
from tests.support.packing import move_and_link, pack, rewrite


def test_members_that_only_torchserve_would_see_are_named(tmp_path: Path) -> None:
    """It reads local headers one after the other, and the last of two of a name stays."""
    mar = pack(tmp_path)
    data = mar.read_bytes()
    with zipfile.ZipFile(mar) as archive:
        directory = archive.start_dir
        offset = archive.getinfo("torchserve_entry.py").header_offset
        end = min(i.header_offset for i in archive.infolist() if i.header_offset > offset)
    forged = bytearray(data[:directory] + data[offset:end] + data[directory:])
    struct.pack_into("<L", forged, forged.rindex(b"PK\5\6") + 16, directory + end - offset)
    mar.write_bytes(forged)
    assert "not belong to a member" in "".join(verify(mar))


def _hide(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: move_and_link(f, "model-config.yaml"), "refused in an archive: model-config"),
        (lambda f: move_and_link(f, "handler"), "refused in an archive: handler"),
        (lambda f: (f / "greenlet").symlink_to(f.parent / "pipeline"), "in an archive: greenlet"),
        (lambda f: (f / "x").symlink_to("nowhere"), "refused in an archive: x"),
        (lambda f: os.mkfifo(f / "pipe"), "refused in an archive: pipe"),
        (lambda f: _hide(f / "handler/.x.bin"), "handler/.x.bin is not in the manifest"),
        (lambda f: _hide(f / ".hidden/x.pkl"), ".hidden/x.pkl is not in the manifest"),
        (lambda f: _hide(f / "model_index.json"), "model_index.json is not in the manifest"),
        (lambda f: move_and_link(f, "MAR-INF/MANIFEST.json"), "in an archive: MAR-INF/MANIFEST"),
    ],
)
def test_links_and_hidden_files_of_a_folder_are_named(
    tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    folder = pack(tmp_path, is_folder=True)
    damage(folder)
    problems = verify(folder)
    assert any(words in problem for problem in problems), problems


def test_a_pipeline_of_the_hubs_cache_is_links(tmp_path: Path) -> None:
    snapshot = save_in_hub_cache(tmp_path)
    assert verify(snapshot) == []
    assert verify(pack(tmp_path, snapshot, is_folder=True)) == []


def test_truncation_is_named(tmp_path: Path) -> None:
    mar = pack(tmp_path)
    mar.write_bytes(mar.read_bytes()[:-100])
    assert "cut off" in verify(mar)[0]


@pytest.mark.parametrize(
    ("folder", "words"), [("model", "PIPELINE.json is missing"), ("pipe", "no worker looks")]
)
def test_a_pipeline_must_lie_where_the_worker_looks(
    tmp_path: Path, folder: str, words: str
) -> None:
    def unzip_inside(files: dict[str, bytes]) -> None:
        with zipfile.ZipFile(io.BytesIO(files.pop("model.zip"))) as inner:
            files.update({f"{folder}/{name}": inner.read(name) for name in inner.namelist()})
        del files["MAR-INF/PIPELINE.json"]

    (problem,) = verify(rewrite(pack(tmp_path), unzip_inside))
    assert words in problem
