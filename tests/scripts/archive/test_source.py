"""scripts.archive.source: where a pipeline came from."""

from __future__ import annotations

from pathlib import Path

from scripts.archive.licence import find_licence
from scripts.archive.pipeline_source import read_folder
from scripts.archive.source import find_source, read_source_note, write_source_note
from tests.support.archives import save_in_hub_cache
from tests.support.packing import manifest, pack


def test_the_hubs_cache_is_a_source_with_a_name(tmp_path: Path) -> None:
    found = manifest(pack(tmp_path, save_in_hub_cache(tmp_path)))
    assert found["source"] == {"model_id": "org/name", "revision": "abc123"}


def test_a_folder_has_no_name_that_others_know(tmp_path: Path) -> None:
    """Its path would differ from desk to desk, and with it the archive's bytes."""
    assert find_source(tmp_path) == {"kind": "folder"}


def test_a_download_is_known_by_its_note(tmp_path: Path) -> None:
    assert read_source_note(tmp_path) is None
    write_source_note(tmp_path, "org/name", "abc", is_complete=False)
    assert read_source_note(tmp_path) == {
        "model_id": "org/name",
        "revision": "abc",
        "is_complete": False,
    }
    assert find_source(tmp_path) == {"model_id": "org/name", "revision": "abc"}
    (tmp_path / ".source.json").write_text("{")
    assert read_source_note(tmp_path) is None


def test_licences_are_found_in_the_card_and_in_their_file(tmp_path: Path) -> None:
    assert find_licence(read_folder(tmp_path).files) == {}
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: 'own'\ntags: [a]\n---\n# A\n## Licence\nCard.\n## B\n"
    )
    found = find_licence(read_folder(tmp_path).files)
    assert found == {"license": "other", "license_name": "own", "text": "Card."}
    (tmp_path / "LICENSE.txt").write_text("File.")
    assert find_licence(read_folder(tmp_path).files)["text"] == "File."
