"""scripts.archive.sbom: valid CycloneDX that says what is in an archive, the same every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from handler.errors import ArchiveError
from scripts.archive.sbom import sbom
from scripts.archive.source import write_source_note
from scripts.console import DONE, MISUSED
from scripts.inspect_archive import main
from tests.support.archives import save_pipeline
from tests.support.packing import UNET, manifest, pack


def bill(archive: Path) -> dict[str, Any]:
    text = sbom(archive)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    found: dict[str, Any] = json.loads(text)
    return found


def named(components: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (found,) = (each for each in components if each["name"] == name)
    return found


def test_it_lists_everything_with_its_hash(tmp_path: Path) -> None:
    archive = pack(tmp_path)
    found = bill(archive)
    model = found["metadata"]["component"]
    assert (model["type"], model["name"]) == ("machine-learning-model", "tiny")
    unet = named(found["components"], "unet")
    assert unet["type"] == "machine-learning-model"
    assert unet["description"] == "diffusers.UNet2DConditionModel"
    wanted = manifest(archive)["model_members"][UNET]["blake3"]
    (digest,) = named(unet["components"], UNET)["hashes"]
    assert digest == {"alg": "BLAKE3", "content": wanted}
    assert named(found["components"], "scheduler")["type"] == "data"
    torch = named(found["components"], "torch")
    assert torch["purl"] == f"pkg:pypi/torch@{manifest(archive)['made_with']['torch']}"
    listed = {file["name"] for each in found["components"] for file in each.get("components", [])}
    packed = manifest(archive)
    assert listed == packed["members"].keys() | packed["model_members"].keys()


def test_equal_archives_have_equal_bills(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    first = sbom(pack(tmp_path / "a", pipeline))
    assert sbom(pack(tmp_path / "b", pipeline)) == first
    other = json.loads(sbom(pack(tmp_path / "c", pipeline, version="2.0")))
    assert other["serialNumber"] != json.loads(first)["serialNumber"]
    assert "timestamp" not in other["metadata"]


@pytest.mark.parametrize(
    ("card", "wanted"),
    [
        ("license: apache-2.0", {"id": "Apache-2.0"}),
        ("license: other\nlicense_name: own-1.0", {"name": "own-1.0"}),
        ("license: creativeml-openrail-m", {"name": "creativeml-openrail-m"}),
    ],
)
def test_licence_and_source(tmp_path: Path, card: str, wanted: dict[str, str]) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    (pipeline / "README.md").write_text(f"---\n{card}\n---\n")
    write_source_note(pipeline, "org/name", "0123abcd", is_complete=True)
    model = bill(pack(tmp_path, pipeline))["metadata"]["component"]
    assert model["licenses"] == [{"license": wanted}]
    assert model["purl"] == "pkg:huggingface/org/name@0123abcd"
    (reference,) = model["externalReferences"]
    assert reference["url"] == "https://huggingface.co/org/name/tree/0123abcd"


def test_the_command_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = pack(tmp_path)
    assert main([str(archive), "--sbom"]) == DONE
    assert capsys.readouterr().out == f"{sbom(archive)}\n"
    assert main([str(archive), "--sbom", "--json"]) == MISUSED


def test_without_a_manifest_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"PIPELINE.json is missing"):
        sbom(save_pipeline(tmp_path / "pipeline"))
