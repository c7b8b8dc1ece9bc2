"""scripts.archive.hub_cache: the cache of a model is packed as one of its snapshots."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from handler.errors import ArchiveError
from scripts.archive.hub_cache import find_snapshot
from scripts.build_archive import main
from scripts.console import DONE, MISUSED
from tests.support.archives import save_in_hub_cache, save_pipeline
from tests.support.packing import manifest

OLD = "aaaaaaabbbbb"


def make_cache(tmp_path: Path) -> Path:
    """A cache with two snapshots, of which the branch main is abc123; return its root."""
    root = save_in_hub_cache(tmp_path).parents[1]
    old = root / "snapshots" / OLD
    old.mkdir()
    (old / "model_index.json").write_text("{}")
    (root / "refs" / "v1").write_text(f"{OLD}\n")
    (root / "snapshots" / "unfinished").mkdir()
    return root


@pytest.mark.parametrize("place", [".", "snapshots"])
def test_the_branch_main_is_packed(tmp_path: Path, place: str) -> None:
    root = make_cache(tmp_path)
    assert main(["--pipeline", str(root / place), "--out", str(tmp_path / "out")]) == DONE
    mar = tmp_path / "out" / "name.mar"
    assert manifest(mar)["source"] == {"model_id": "org/name", "revision": "abc123"}


@pytest.mark.parametrize(
    ("revision", "name"),
    [("main", "abc123"), ("abc123", "abc123"), ("v1", OLD), (OLD, OLD), (OLD[:7], OLD)],
)
def test_a_revision_is_a_branch_a_tag_or_a_commit(tmp_path: Path, revision: str, name: str) -> None:
    root = make_cache(tmp_path)
    assert find_snapshot(root, revision) == root / "snapshots" / name


@pytest.mark.parametrize("revision", ["v2", "aaaa", "unfinished"])
def test_a_revision_that_is_not_there_is_refused(tmp_path: Path, revision: str) -> None:
    root = make_cache(tmp_path)
    with pytest.raises(ArchiveError) as caught:
        find_snapshot(root, revision)
    assert f"holds no whole snapshot of {revision}" in str(caught.value)
    assert f"; REVISION= takes one of: {OLD}, abc123" in str(caught.value)


def test_the_only_snapshot_needs_no_branch(tmp_path: Path) -> None:
    root = save_in_hub_cache(tmp_path).parents[1]
    shutil.rmtree(root / "refs")
    assert find_snapshot(root) == root / "snapshots" / "abc123"


def test_a_cache_without_a_whole_snapshot_is_told(tmp_path: Path) -> None:
    (tmp_path / "models--org--name" / "snapshots" / "abc123").mkdir(parents=True)
    with pytest.raises(ArchiveError, match="make archive MODEL_ID=org/name fetches it"):
        find_snapshot(tmp_path / "models--org--name")


def test_other_folders_have_no_revisions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = save_pipeline(tmp_path / "p")
    assert find_snapshot(pipeline) == pipeline
    arguments = ["--pipeline", str(pipeline), "--revision", "v1", "--out", str(tmp_path / "out")]
    assert main(arguments) == MISUSED
    assert f"--revision v1: {pipeline} is not a hub cache" in capsys.readouterr().err
