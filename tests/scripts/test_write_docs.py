"""The generated tables are current, whole, and told apart from stale ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from handler.api.schema import PICTURE_FIELDS, REPLY_FIELDS
from handler.config import OUTPUT_FORMATS, keys
from scripts.console import DONE, FAILED, UsageError
from scripts.repository import REPOSITORY
from scripts.write_docs import DOCUMENTS, main, render


def rows(document: str) -> dict[str, list[str]]:
    """The cells of every table row, by what stands in code in the first."""
    lines = (REPOSITORY / "docs" / document).read_text().splitlines()
    cells = [line.split(" | ") for line in lines if line.startswith("| `")]
    return {re.findall("`([^`]+)`", row[0])[0]: row for row in cells}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_are_current(path: Path) -> None:
    """What fails here is mended by `python -m scripts.write_docs`."""
    assert render(path) == path.read_text()


def test_the_tables_name_every_field_key_and_format() -> None:
    requests = rows("requests.md")
    fields = {**PICTURE_FIELDS, **REPLY_FIELDS}
    assert requests.keys() >= {*fields, *OUTPUT_FORMATS}
    for field in PICTURE_FIELDS.values():
        assert re.findall("`([^`]+)`", requests[field.name][1]) == list(field.aliases)
    assert "`guidance_scale` (7.5)" in requests["guidance_scale"][3]
    configuration = rows("configuration.md")
    assert configuration.keys() >= {key.name for key in keys()}
    assert configuration["max_rows"][1:3] == ["`16`", "2 to 1024"]


def test_a_table_that_was_changed_by_hand_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "requests.md"
    current = (REPOSITORY / "docs" / "requests.md").read_text()
    path.write_text(current.replace("| `seed` |", "| `sede` |") + "by hand\n")
    assert render(path) == current + "by hand\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("<!-- table: nothing -->\n<!-- end of table -->\n", "no table is called 'nothing'"),
        ("<!-- table: errors -->\n", "a table has no end"),
    ],
)
def test_markers_are_checked(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "x.md"
    path.write_text(text)
    with pytest.raises(UsageError, match=complaint):
        render(path)


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scripts.write_docs.REPOSITORY", tmp_path)
    path = tmp_path / "x.md"
    path.write_text("a\n<!-- table: errors -->\n<!-- end of table -->\nb\n")
    monkeypatch.setattr("scripts.write_docs.DOCUMENTS", (path,))
    assert main(["--check"]) == FAILED
    assert capsys.readouterr().out == "x.md is stale\n"
    assert "invalid_request" not in path.read_text()
    assert main([]) == DONE
    assert "| 400 Bad Request | `invalid_request` |" in path.read_text()
    assert path.read_text().startswith("a\n<!--")
    assert main(["--check"]) == DONE
