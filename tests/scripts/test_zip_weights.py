"""scripts.zip_weights: a stored, aligned, reproducible zip, or a refusal."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import pytest

from handler.loading.safetensors_map import read_header
from handler.zips.reader import ZipReader
from scripts.console import DONE, FAILED, MISUSED
from scripts.zip_weights import main
from tests.support.archives import save_pipeline


def test_holds_the_pipelines_files_stored_and_sorted(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "p-2.1")
    (pipeline / "notes.doc").write_bytes(b"mine")
    assert main([str(pipeline)]) == DONE
    with zipfile.ZipFile(tmp_path / "p-2.1.zip") as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert names == sorted(names)
        expected = {
            path.relative_to(pipeline).as_posix()
            for path in pipeline.rglob("*")
            if path.is_file() and path.name != "notes.doc"
        }
        assert set(names) == expected
        for name in names:
            assert archive.read(name) == (pipeline / name).read_bytes()


def test_tensors_lie_at_multiples_of_64(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "p")
    out = tmp_path / "out.zip"
    assert main([str(pipeline), "--out", str(out)]) == DONE
    with out.open("rb") as file:
        members = ZipReader(file).members
        weights = [each for name, each in members.items() if name.endswith(".safetensors")]
        assert len(weights) == 3
        for member in weights:
            header = read_header(file, member.size_bytes, member.name, member.offset)
            assert (member.offset + header.data_offset) % 64 == 0


def test_the_same_pipeline_gives_the_same_bytes(tmp_path: Path) -> None:
    """In another folder, with other times and modes, made in another order."""
    first = save_pipeline(tmp_path / "first")
    second = tmp_path / "elsewhere" / "second"
    for path in sorted(first.rglob("*"), reverse=True):
        if path.is_file():
            target = second / path.relative_to(first)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            os.utime(target, (1_000_000_000, 1_000_000_000))
            target.chmod(0o600)
    main([str(first), "--out", str(tmp_path / "a.zip")])
    main([str(second), "--out", str(tmp_path / "b.zip")])
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_overwrites_only_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = save_pipeline(tmp_path / "p")
    out = tmp_path / "out.zip"
    out.write_bytes(b"mine")
    assert main([str(pipeline), "--out", str(out)]) == MISUSED
    assert capsys.readouterr().err == f"zip_weights: error: {out} exists; --force replaces it\n"
    assert out.read_bytes() == b"mine"
    assert main([str(pipeline), "--out", str(out), "--force"]) == DONE
    assert zipfile.is_zipfile(out)


@pytest.mark.parametrize("damage", ["cut", "header"])
def test_damaged_weights_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    pipeline = save_pipeline(tmp_path / "p")
    path = pipeline / "vae" / "diffusion_pytorch_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] if damage == "cut" else b"\xff" * 8 + data[8:])
    assert main([str(pipeline), "--out", str(tmp_path / "out.zip")]) == FAILED
    assert str(path) in capsys.readouterr().err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["p"]


def test_refuses_a_folder_that_is_no_pipeline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == FAILED
    assert "is not a diffusers pipeline" in capsys.readouterr().err


def test_help_teaches_and_misuse_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == DONE
    assert "examples:" in capsys.readouterr().out
    assert main([]) == MISUSED
    assert main(["a", "--wrong"]) == MISUSED
