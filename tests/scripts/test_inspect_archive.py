"""scripts.inspect_archive: the same facts whatever the form of the archive."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import save_file

from handler.api.description import describe
from handler.pipelines.describe import describe as describe_pipeline
from handler.pipelines.tasks import pipelines_of
from scripts.archive.writer import ArchivePlan, write_archive
from scripts.console import DONE, FAILED, MISUSED
from scripts.inspect_archive import inspect, main
from tests.support.archives import save_pipeline
from tests.support.layouts import lora_of_unet
from tests.support.pipelines import shared
from tests.support.zips import zip_bytes


def test_the_page_of_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    (pipeline / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Model\n")
    plan = ArchivePlan(
        pipeline, "tiny", "2.0", dtype="float16", settings={"height": 64}, smoke_prompt="a tree"
    )
    write_archive(plan, tmp_path / "tiny.mar")
    assert main([str(tmp_path / "tiny.mar")]) == DONE
    page = capsys.readouterr().out
    for line in (
        "model:        tiny 2.0",
        "pipeline:     StableDiffusionPipeline",
        "opening:      weights are mapped in place",
        "source:       a folder",
        "licence:      apache-2.0",
        "converted to: float16",
        "settings:     height=64",
        "smoke prompt: a tree",
        "signature:    none",
    ):
        assert line in page.splitlines()
    assert "height 64, width 32" in page
    assert "max_images 4" in page
    assert "eta, clip_skip, guidance_rescale" in page
    assert "samplers:     DDIM, DDPM, DEIS, DPM++ 2M, DPM++ 2M SDE," in page
    assert "F16" in page
    assert "F32" not in page


def test_facts_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_archive(ArchivePlan(save_pipeline(tmp_path / "p"), "tiny"), tmp_path / "tiny.mar")
    assert main([str(tmp_path / "tiny.mar"), "--json"]) == DONE
    facts = json.loads(capsys.readouterr().out)
    number = facts["pipeline"]["parameters"]
    assert number > 1000
    assert facts["memory_bytes"] == {
        "float32": number * 4,
        "float16": number * 2,
        "as_packed": number * 4,
    }
    assert facts["size_bytes"] == (tmp_path / "tiny.mar").stat().st_size


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_3", "flux"])
def test_the_fields_are_those_that_the_worker_lists(tmp_path: Path, family: str) -> None:
    facts = inspect(save_pipeline(tmp_path / "pipeline", family))
    pipeline = shared(family)
    worker = describe(describe_pipeline(pipeline, pipelines_of(pipeline)))
    assert facts["fields"] == worker["fields"]
    assert facts["pipeline"]["tasks"] == worker["tasks"]
    assert {"step_cache", "task", "image"} <= {*facts["fields"]}
    assert ("prompt_weighting" in facts["fields"]) == (family == "stable_diffusion")


def test_packed_loras_and_every_schedule_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(lora_of_unet(), tmp_path / "style.safetensors")
    plan = ArchivePlan(
        save_pipeline(tmp_path / "p"), "tiny", loras={"style": tmp_path / "style.safetensors"}
    )
    write_archive(plan, tmp_path / "tiny.mar")
    assert main([str(tmp_path / "tiny.mar")]) == DONE
    lines = capsys.readouterr().out.splitlines()
    (fields,) = (line for line in lines if line.startswith("fields:"))
    assert ", loras" in fields
    sigmas = [line for line in lines if line.startswith("sigmas:")]
    assert any("sgm_uniform, simple, normal, ddim_uniform with DDIM," in line for line in sigmas)
    assert any("karras, exponential, beta, sgm_uniform" in line for line in sigmas)


def test_every_form_has_the_same_components(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    write_archive(ArchivePlan(pipeline, "tiny"), tmp_path / "tiny.mar")
    write_archive(ArchivePlan(pipeline, "tiny", is_folder=True), tmp_path / "tiny")
    upstream = _pack_as_upstream(pipeline, tmp_path)
    facts = {path: inspect(path) for path in (pipeline, tmp_path / "tiny", upstream)}
    expected = inspect(tmp_path / "tiny.mar")
    assert {each["pipeline"]["parameters"] for each in facts.values()} == {
        expected["pipeline"]["parameters"]
    }
    assert all(each["pipeline"] == expected["pipeline"] for each in facts.values())
    assert [each["form"] for each in facts.values()] == [
        "pipeline folder",
        "archive folder",
        "archive",
    ]
    assert not facts[upstream]["is_mapped"]
    assert facts[upstream]["source"] is None
    assert facts[upstream]["torchserve"]["modelName"] == "upstream"


def _pack_as_upstream(pipeline: Path, tmp_path: Path) -> Path:
    """Zip with deflate, then archive with deflate, as the upstream example's steps do."""
    import shutil

    work = tmp_path / "work"
    work.mkdir()
    shutil.make_archive(str(work / "model"), "zip", pipeline)
    (work / "handler.py").write_text("class Handler: pass\n")
    archiver = Path(sys.executable).with_name("torch-model-archiver")
    subprocess.run(
        [
            *(str(archiver), "--model-name", "upstream", "--version", "1.0"),
            *("--handler", str(work / "handler.py"), "--extra-files", str(work / "model.zip")),
            *("--export-path", str(work)),
        ],
        check=True,
        env={**os.environ, "TMPDIR": str(work)},
    )
    return work / "upstream.mar"


def test_what_cannot_be_read_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.mar").write_bytes(b"no zip")
    assert main([str(tmp_path / "bad.mar")]) == FAILED
    assert capsys.readouterr().err.count("\n") == 1
    assert main([str(tmp_path / "none.mar")]) == MISUSED


def _changed(mar: Path, **changes: bytes) -> Path:
    """Write an archive again with other members."""
    with zipfile.ZipFile(mar) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    for name in files:
        files[name] = changes.get(Path(name).stem.lower().replace("-", "_"), files[name])
    mar.write_bytes(zip_bytes(files))
    return mar


@pytest.mark.parametrize(
    ("name", "fact", "line"),
    [
        ("licence", {"license": "mit", "text": 5}, "licence:      mit: 5"),
        ("licence", {"text": "free\x1b[2J\x9b2J\nmore"}, "licence:      free\ufffd[2J\ufffd2J"),
        ("licence", [1], "signature:    none"),
        ("source", "hub", "signature:    none"),
        ("made_with", [1], "signature:    none"),
        ("made_with", {"torch": [1]}, "made with:    torch [1]"),
        ("smoke_prompt", ["a", 3], "smoke prompt: a, 3"),
        ("smoke_prompt", "\u5bcc\u58eb\u3000\u5c71", "smoke prompt: \u5bcc\u58eb\u3000\u5c71"),
        ("loras", 7, "LoRAs:        7"),
    ],
)
def test_what_a_manifest_claims_is_only_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, fact: object, line: str
) -> None:
    mar = tmp_path / "tiny.mar"
    write_archive(ArchivePlan(save_pipeline(tmp_path / "pipeline"), "tiny"), mar)
    with zipfile.ZipFile(mar) as archive:
        manifest = json.loads(archive.read("MAR-INF/PIPELINE.json"))
    _changed(mar, pipeline=json.dumps({**manifest, name: fact}).encode())
    assert main([str(mar)]) == DONE
    page = capsys.readouterr().out
    assert line in page.splitlines()
    assert "\x1b" not in page
    assert main([str(mar), "--json"]) == DONE
    assert capsys.readouterr().out.isascii()


@pytest.mark.parametrize("config", [b"[" * 20_000, b"x: 2001-99-99", b"[1]"])
def test_members_that_cannot_be_parsed_are_left_out(tmp_path: Path, config: bytes) -> None:
    mar = tmp_path / "tiny.mar"
    write_archive(ArchivePlan(save_pipeline(tmp_path / "pipeline"), "tiny"), mar)
    facts = inspect(_changed(mar, manifest=b"[" * 100_000, model_config=config))
    assert (facts["torchserve"], facts["defaults"]) == (None, None)


def test_pickles_are_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    (pipeline / "unet" / "old.bin").write_bytes(b"")
    assert main([str(pipeline)]) == DONE
    assert "pickled weights, which the worker refuses: ['unet/old.bin']" in capsys.readouterr().out
