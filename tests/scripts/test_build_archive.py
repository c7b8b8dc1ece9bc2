"""scripts.build_archive: the command line, and what stops it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load, save, save_file

from scripts import inspect_archive
from scripts.archive.hub import download
from scripts.build_archive import main
from scripts.console import DONE, FAILED, MISUSED
from scripts.repository import REPOSITORY
from tests.support.archives import save_pipeline
from tests.support.hub import REVISION, serve_hub
from tests.support.hub import Model as HubModel
from tests.support.layouts import lora_of_unet
from tests.support.packing import UNET, build, manifest


def pipeline_files(tmp_path: Path) -> dict[str, bytes]:
    """A tiny Stable Diffusion as a hub has it."""
    pipeline = save_pipeline(tmp_path / "pipeline")
    return {
        path.relative_to(pipeline).as_posix(): path.read_bytes()
        for path in pipeline.rglob("*")
        if path.is_file()
    }


def test_downloads_a_model_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = pipeline_files(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serve_hub({"org/name": HubModel(files)}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        arguments = ["--model-id", "org/name", "--name", "tiny", "--out", str(tmp_path / "out")]
        assert main(arguments) == DONE
        download("org/name", revision="main", out=tmp_path / "kept")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny.mar"]
    mar = tmp_path / "out" / "tiny.mar"
    assert manifest(mar)["source"] == {"model_id": "org/name", "revision": REVISION}
    kept = build(tmp_path, "--force", pipeline=tmp_path / "kept")
    assert manifest(kept) == manifest(mar)


def test_a_model_whose_download_was_cut_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = pipeline_files(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 256)
    out = tmp_path / "out"
    arguments = ["--model-id", "org/name", "--name", "tiny", "--out", str(out)]
    with serve_hub({"org/name": HubModel(files)}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.cut_at_byte = 5_000
        assert main(arguments) == FAILED
        assert "run the same command to go on" in capsys.readouterr().err
        hub.cut_at_byte = None
        hub.requests.clear()
        assert main(arguments) == DONE
    assert any(wanted for _, _, wanted in hub.requests), "it goes on in the middle of a file"
    assert [path.name for path in out.iterdir()] == ["tiny.mar"]


@pytest.mark.parametrize(
    ("dtype", "is_full"),
    [(None, False), ("float16", False), ("bfloat16", True), ("float32", True)],
)
def test_a_model_is_fetched_in_the_precision_that_it_is_packed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str | None, is_full: bool
) -> None:
    """Weights that were halved once stay coarse, whatever they are converted to."""
    files = pipeline_files(tmp_path)
    halved = {
        name.replace(".safetensors", ".fp16.safetensors"): save(
            {key: tensor.half() for key, tensor in load(data).items()}
        )
        for name, data in files.items()
        if name.endswith(".safetensors")
    }
    monkeypatch.delenv("HF_TOKEN", raising=False)
    asked = [] if dtype is None else ["--dtype", dtype]
    with serve_hub({"org/name": HubModel({**files, **halved})}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        arguments = ["--model-id", "org/name", "--name", "tiny", "--out", str(tmp_path), *asked]
        assert main(arguments) == DONE
    assert (UNET in hub.fetched()) == is_full
    assert (UNET.replace(".safe", ".fp16.safe") in hub.fetched()) != is_full


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--set", "heigth=512"], FAILED, "height"),
        (["--lora", "/no/run=3.x/a.safetensors"], MISUSED, "--lora /no/run="),
        (["--set", "height=7.5"], FAILED, "height"),
        (["--set", "height"], MISUSED, "--set height=: wanted NAME=VALUE"),
        (["--set", "height=8", "--set", "height=16"], MISUSED, "given twice"),
        (["--set", "height=["], FAILED, "--set height: '[' is not YAML"),
        (["--set", "height=2001-99-99"], FAILED, "--set height: '2001-99-99' is not YAML: month"),
        (["--smoke-prompt", "a\udcff"], MISUSED, "wanted text in UTF-8"),
        (["--component", "nothing=."], FAILED, "no component nothing"),
        (["--component", "vae=/nowhere"], FAILED, "vae=/nowhere: there is no such file"),
        (["--lora", "/nowhere.safetensors"], FAILED, "/nowhere.safetensors: a LoRA is wanted"),
        (["--config-from", "org/name"], MISUSED, "--config-from is for a checkpoint in one file"),
        (["--lora", "../a=b.safetensors"], MISUSED, "wanted NAME=VALUE"),
        (["--sign", "/nowhere.pem"], FAILED, "/nowhere.pem: no such key"),
        (["--config", "/nowhere.yaml"], MISUSED, "/nowhere.yaml is missing"),
        (["--name", "../a"], MISUSED, "--name '../a'"),
        (["--name", "a."], MISUSED, "--name 'a.': TorchServe refuses two dots in a row"),
        (["--name", "a..b"], MISUSED, "--name 'a..b': TorchServe refuses two dots in a row"),
        (["--lora", "A=a.safetensors", "--lora", "a=b.safetensors"], MISUSED, "given twice"),
        (["--version", ""], MISUSED, "--version ''"),
        (["--dtype", "int8"], MISUSED, "invalid choice"),
    ],
)
def test_what_is_wrong_is_said_and_leaves_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    common = ["--pipeline", str(pipeline), "--name", "tiny", "--out", str(tmp_path / "out")]
    assert main([*common, *arguments]) == code
    error = capsys.readouterr().err
    assert words in error
    assert error.rstrip().count("\n") == 0 or "usage:" in error
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("pipeline", "code", "words"),
    [
        ("org/name", MISUSED, "org/name does not exist: a model of that name on the hub"),
        ("/nowhere", MISUSED, "/nowhere does not exist: give a folder"),
        (str(REPOSITORY / "README.md"), FAILED, "is not a diffusers pipeline: it is a file"),
        (str(REPOSITORY), FAILED, "is not a diffusers pipeline: it has no model_index.json"),
    ],
)
def test_what_is_no_pipeline_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pipeline: str, code: int, words: str
) -> None:
    assert main(["--pipeline", pipeline, "--name", "tiny", "--out", str(tmp_path)]) == code
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_lora_is_called_like_its_file(tmp_path: Path) -> None:
    path = tmp_path / "run=3" / "style.v2.safetensors"
    path.parent.mkdir()
    save_file(lora_of_unet(), path)
    with zipfile.ZipFile(build(tmp_path, "--lora", str(path))) as mar:
        assert "lora/style_v2.safetensors" in mar.namelist()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("<thing>", "it is an embedding (a textual inversion), not a LoRA"),
        ("decoder.conv_in.weight", "it is a VAE alone, not a LoRA"),
    ],
)
def test_what_is_not_a_lora_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    pipeline, path = save_pipeline(tmp_path / "pipeline"), tmp_path / "a.safetensors"
    save_file({name: torch.ones(2, 16)}, path)
    arguments = ["--pipeline", str(pipeline), "--out", str(tmp_path / "out"), "--lora", str(path)]
    assert main(arguments) == FAILED
    assert words in capsys.readouterr().err


def test_a_name_that_is_no_text_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    (pipeline / "unet" / "a\udcff.json").write_text("{}")
    assert main(["--pipeline", str(pipeline), "--name", "t", "--out", str(tmp_path)]) == FAILED
    error = capsys.readouterr().err
    assert "the member name" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "text", [b"handler: {height: 2001-99-99}", b"[" * 20_000, b"!!int x", b"!!timestamp x", b"\xff"]
)
def test_a_configuration_that_is_no_yaml_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes
) -> None:
    config = tmp_path / "own.yaml"
    config.write_bytes(text)
    pipeline = save_pipeline(tmp_path / "pipeline")
    common = ["--pipeline", str(pipeline), "--name", "tiny", "--out", str(tmp_path / "out")]
    assert main([*common, "--config", str(config)]) == FAILED
    error = capsys.readouterr().err
    assert f"{config} is not YAML" in error
    assert error.count("\n") == 1


def test_overwrites_only_by_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mar = build(tmp_path)
    before = mar.read_bytes()
    arguments = ["--pipeline", str(tmp_path / "pipeline"), "--name", "tiny"]
    assert main([*arguments, "--out", str(mar.parent), "--set", "height=64"]) == MISUSED
    assert "exists; --force replaces it (make archive FORCE=1)" in capsys.readouterr().err
    assert mar.read_bytes() == before
    build(tmp_path, "--set", "height=64", "--force")
    assert mar.read_bytes() != before


def test_a_lora_is_on_at_the_scale_that_it_is_packed_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("style", "ink"):
        save_file(lora_of_unet(), tmp_path / f"{name}.safetensors")
    flags = ("--lora", f"{tmp_path / 'style.safetensors'}:0.8", "--lora")
    mar = build(tmp_path, *flags, f"black={tmp_path / 'ink.safetensors'}")
    with zipfile.ZipFile(mar) as packed:
        config = yaml.safe_load(packed.read("model-config.yaml"))
        assert json.loads(packed.read("MAR-INF/PIPELINE.json"))["loras"] == ["black", "style"]
    assert config["handler"]["default_loras"] == {"black": 1.0, "style": 0.8}
    capsys.readouterr()
    assert inspect_archive.main([str(mar)]) == DONE
    assert "LoRAs:        black, style (at 0.8)" in capsys.readouterr().out


def test_a_default_lora_that_is_not_packed_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(lora_of_unet(), tmp_path / "style.safetensors")
    pipeline = save_pipeline(tmp_path / "p")
    flags = ["--lora", str(tmp_path / "style.safetensors"), "--set", "default_loras=[stile]"]
    out = ["--out", str(tmp_path / "out"), "--name", "tiny"]
    assert main(["--pipeline", str(pipeline), *out, *flags]) == FAILED
    said = capsys.readouterr().err
    assert "default_loras: 'stile': no such LoRA; did you mean style? there are style" in said


def test_the_scale_of_a_lora_has_a_range(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--lora", "style=a.safetensors:11", "--out", str(tmp_path)]
    assert main(arguments) == MISUSED
    assert "--lora style: the scale may be from -10 to 10" in capsys.readouterr().err
