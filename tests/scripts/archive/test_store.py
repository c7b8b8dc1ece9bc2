"""scripts.archive.store: inspect and verify look at the archive that serve would take."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import pytest

from scripts.archive.manifest import TORCHSERVE_MANIFEST_NAME
from scripts.archive.store import add_archive, choose_archive, chosen_archive
from scripts.errors import UsageError
from scripts.repository import REPOSITORY
from tests.support.toy_archive import write_toy_archive


def chosen(*arguments: str) -> Path:
    parser = argparse.ArgumentParser()
    add_archive(parser)
    return chosen_archive(parser.parse_args(arguments))


def test_the_stores_only_archive_needs_no_name(tmp_path: Path) -> None:
    store = ["--store", str(tmp_path)]
    with pytest.raises(UsageError, match="has no archive; `make archive`"):
        chosen(*store)
    first = write_toy_archive(tmp_path, "first")
    assert chosen(*store) == first
    second = write_toy_archive(tmp_path, "second")
    with pytest.raises(UsageError, match="choose one with NAME=: first, second"):
        chosen(*store)
    assert chosen(*store, "--name", "second") == second
    with pytest.raises(UsageError, match="no archive called third; it has: first, second"):
        chosen(*store, "--name", "third")


def test_two_archives_of_one_name_are_told_apart_by_nobody(tmp_path: Path) -> None:
    write_toy_archive(tmp_path, "first")
    (tmp_path / "first" / TORCHSERVE_MANIFEST_NAME).parent.mkdir(parents=True)
    (tmp_path / "first" / TORCHSERVE_MANIFEST_NAME).touch()
    with pytest.raises(UsageError, match="have one name: remove the older one"):
        choose_archive(tmp_path, "first")


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    path = write_toy_archive(tmp_path)
    assert chosen(str(path)) == path
    with pytest.raises(UsageError, match="no such archive"):
        chosen(str(tmp_path / "none.mar"))
    with pytest.raises(UsageError, match="give one of them"):
        chosen(str(path), "--name", "other")


@pytest.mark.parametrize("target", ["inspect", "verify"])
def test_make_says_store_and_name(tmp_path: Path, target: str) -> None:
    (tmp_path / ".installed").touch()
    run = subprocess.run(
        ["make", "-n", "-o", f"{tmp_path}/.installed", target, f"VENV={tmp_path}", "STORE=s"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    assert '--store "s"' in run.stdout
    assert "stable_diffusion" not in run.stdout
