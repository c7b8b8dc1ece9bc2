"""scripts.embedded: the embedded pipeline is packed when it must be, and replaces nobody's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import embedded
from scripts.build_archive import main, pack_embedded
from scripts.console import DONE, MISUSED
from scripts.inspect_archive import inspect
from tests.support.toy_archive import write_toy_archive


def test_it_is_packed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = pack_embedded(tmp_path)
    assert "Packing the embedded pipeline" in capsys.readouterr().out
    before = archive.stat()
    assert pack_embedded(tmp_path) == archive
    assert capsys.readouterr().out == ""
    assert archive.stat() == before
    assert inspect(archive)["smoke_prompt"] == embedded.EMBEDDED_PROMPT


def test_it_is_packed_again_where_its_sources_are_others(tmp_path: Path) -> None:
    """As after an update of the package."""
    archive = pack_embedded(tmp_path)
    before = archive.stat()
    (tmp_path / ".embedded").write_text("0" * 64)
    pack_embedded(tmp_path)
    assert archive.stat() != before
    assert embedded.is_current(tmp_path)


def test_an_archive_of_that_name_of_the_users_own_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = write_toy_archive(tmp_path, "stable_diffusion")
    before = own.read_bytes()
    assert main(["--out", str(tmp_path)]) == MISUSED
    assert "is an archive of your own" in capsys.readouterr().err
    assert own.read_bytes() == before
    assert main(["--out", str(tmp_path), "--force"]) == DONE
    assert embedded.is_current(tmp_path)


def test_a_name_or_a_setting_makes_it_an_archive_of_the_users_own(tmp_path: Path) -> None:
    pack_embedded(tmp_path)
    assert main(["--out", str(tmp_path), "--set", "height=512", "--force"]) == DONE
    with pytest.raises(embedded.UsageError, match="of your own"):
        pack_embedded(tmp_path)
    assert main(["--out", str(tmp_path), "--name", "toy"]) == DONE
    assert inspect(tmp_path / "toy.mar")["torchserve"]["modelName"] == "toy"


def test_a_pipeline_names_its_archive(tmp_path: Path) -> None:
    pipeline = str(embedded.EMBEDDED_PIPELINE)
    assert main(["--out", str(tmp_path), "--pipeline", f"{pipeline}/"]) == DONE
    assert [path.name for path in tmp_path.glob("*.mar")] == ["pipeline.mar"]
