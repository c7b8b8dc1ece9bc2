"""scripts.archive.manifest: what the manifests say."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import diffusers
from safetensors.torch import load_file

import handler
from scripts.archive.manifest import dump, torchserve_manifest
from scripts.repository import REPOSITORY
from tests.support.archives import save_pipeline
from tests.support.packing import UNET, manifest, pack


def test_torchserves_manifest_has_the_form_that_its_archiver_writes() -> None:
    code = (
        "from model_archiver.manifest_components.manifest import Manifest\n"
        "from model_archiver.manifest_components.model import Model\n"
        "model = Model('tiny', 'model.zip', 'torchserve_entry.py', model_version='2.0',\n"
        "    requirements_file='requirements.txt', config_file='model-config.yaml')\n"
        "print(Manifest('python', model))"
    )  # in a process of its own, for it leaves a file open
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    theirs = json.loads(done.stdout)
    ours = json.loads(torchserve_manifest("tiny", "2.0"))
    assert len(theirs.pop("createdOn")) == len(ours.pop("createdOn"))
    theirs["archiverVersion"] = theirs["archiverVersion"].strip()
    assert ours == theirs


def test_the_manifest_tells_what_it_is(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    (pipeline / "README.md").write_text(
        "---\nlicense: creativeml-openrail-m\ntags: [a]\n---\n# Model\n## License\nBe kind.\n# M\n"
    )
    found = manifest(pack(tmp_path, pipeline, smoke_prompt="a tree"))
    assert found["pipeline"]["class"] == "StableDiffusionPipeline"
    unet = load_file(pipeline / UNET)
    numbers = sum(tensor.numel() for tensor in unet.values())
    assert found["pipeline"]["components"]["unet"] == {
        "class": "diffusers.UNet2DConditionModel",
        "parameters": numbers,
        "size_bytes": numbers * 4,
        "dtypes": {"F32": numbers},
    }
    assert found["licence"] == {"license": "creativeml-openrail-m", "text": "Be kind."}
    assert found["source"] == {"kind": "folder"}
    assert found["made_with"]["diffusers"] == diffusers.__version__
    assert found["smoke_prompt"] == "a tree"
    assert found["model_members"][UNET]["size_bytes"] == (pipeline / UNET).stat().st_size
    assert str(tmp_path) not in json.dumps(found)


def test_the_tools_version_is_the_projects() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    source = REPOSITORY / project["tool"]["hatch"]["version"]["path"]
    assert source == Path(handler.__file__).resolve()


def test_halves_of_surrogate_pairs_stay_as_json_has_them() -> None:
    data = dump({"model_id": "a\udcff"})
    assert b"\\udcff" in data
    assert json.loads(data) == {"model_id": "a\udcff"}
