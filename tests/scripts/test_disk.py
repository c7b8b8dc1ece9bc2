"""scripts.disk: full disks are said before they are full, and nothing of killed runs stays."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from handler.errors import ArchiveError
from scripts.build_archive import main
from scripts.console import DONE, FAILED, atomic_output
from scripts.disk import check_space, staging_folder
from scripts.repository import REPOSITORY
from tests.support.archives import save_pipeline

_WAITING = """
import sys, time
from pathlib import Path
from scripts.disk import staging_folder

with staging_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_bytes(bytes(1000))
    print("begun", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "a.mar"
    command = [sys.executable, "-c", _WAITING, str(target)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        (running,) = tmp_path.iterdir()
        with staging_folder(target) as own:
            assert running.exists(), "a run that is still going on keeps its own"
            assert own != running
        process.kill()
    assert running.exists()
    (tmp_path / ".b.mar.abcd.part").mkdir()
    with staging_folder(target) as own:
        assert sorted(tmp_path.iterdir()) == [own, tmp_path / ".b.mar.abcd.part"]
    assert os.listdir(tmp_path) == [".b.mar.abcd.part"]


def test_a_packing_cleans_up_after_a_killed_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    abandoned = out / ".tiny.mar.k1ll3d.part"
    abandoned.mkdir(parents=True)
    (abandoned / "tiny.mar").write_bytes(b"half")
    pipeline = save_pipeline(tmp_path / "tiny")
    assert main(["--pipeline", str(pipeline), "--out", str(out)]) == DONE
    assert os.listdir(out) == ["tiny.mar"]


def with_free_bytes(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Let every disk have `free` bytes left."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=free))


def test_room_is_looked_for_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = save_pipeline(tmp_path / "tiny")
    with_free_bytes(monkeypatch, 100_000)
    out = tmp_path / "out"
    assert main(["--pipeline", str(pipeline), "--out", str(out)]) == FAILED
    error = capsys.readouterr().err
    mount = next(each for each in out.parents if os.path.ismount(each))
    assert f"{out}/tiny.mar needs 0." in error
    assert f"for the archive, and the disk at {mount} has 0.1 MB free" in error
    assert "(--out, STORE=)" in error
    assert not out.exists() or not os.listdir(out)


def test_what_fits_is_let_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free_bytes(monkeypatch, 5_000_000_000)
    check_space(tmp_path / "not" / "made" / "yet", 5_000_000_000, "it")
    with pytest.raises(ArchiveError, match=r"needs 5\.1 GB for it, .* has 5\.0 GB free"):
        check_space(tmp_path / "not" / "made" / "yet", 5_100_000_000, "it")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_on_the_way_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
) -> None:
    def fail(*arguments: Any) -> int:
        raise OSError(number, os.strerror(number))

    pipeline = save_pipeline(tmp_path / "tiny")
    monkeypatch.setattr("os.pwrite", fail)
    out = tmp_path / "out"
    assert main(["--pipeline", str(pipeline), "--out", str(out)]) == FAILED
    error = capsys.readouterr().err
    assert f"{out}/tiny.mar was not written: the disk at " in error
    assert "is full" in error
    assert error.count("\n") == 1
    assert os.listdir(out) == []


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), atomic_output(tmp_path / "a", force=False):
        raise PermissionError(errno.EACCES, "no")
