"""scripts.download_weights against the stand-in for the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.archive.pipeline_files import list_pipeline
from scripts.archive.source import read_source_note
from scripts.console import DONE, FAILED, MISUSED
from scripts.download_weights import main
from scripts.repository import REPOSITORY
from tests.support.hub import REVISION, Hub, Model, serve_hub

INDEX = json.dumps(
    {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
).encode()
FILES = {
    "README.md": b"# a model",
    "model_index.json": INDEX,
    "picture.png": b"no part of it",
    "model.ckpt": b"pickle",
    "scheduler/scheduler_config.json": b"{}",
    "tokenizer/merges.txt": b"#version: 0.2",
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.bin": b"pickle",
    "unet/diffusion_pytorch_model.fp16.bin": b"pickle",
    "unet/diffusion_pytorch_model.safetensors": b"full" * 1000,
    "unet/diffusion_pytorch_model.fp16.safetensors": b"half" * 500,
    "unet/diffusion_pytorch_model.safetensors.index.json": b"{}",
    "vae/config.json": b"{}",
    "vae/diffusion_pytorch_model.safetensors": b"vae",
}
NEEDED = {
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/merges.txt",
    "unet/config.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    models = {
        "org/model": Model(FILES),
        "org/gated": Model(FILES, token="hf_good", is_gated=True),
        "org/private": Model(FILES, token="hf_good"),
        "org/pickled": Model(
            {
                "model_index.json": INDEX,
                "unet/diffusion_pytorch_model.bin": b"pickle",
            }
        ),
        "org/other": Model({"config.json": b"{}"}),
        "org/single": Model({"sd.safetensors": b"", "sd-xl.safetensors": b""}),
        "org/lora": Model({"pytorch_lora_weights.safetensors": b""}),
    }
    with serve_hub(models) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield running


def test_fetches_one_variant_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "pipeline"
    assert main(["org/model", "--out", str(out)]) == DONE
    found = {name: (out / name).read_bytes() for name in NEEDED}
    assert found == {name: FILES[name] for name in NEEDED}
    assert hub.fetched() == NEEDED
    assert read_source_note(out) == {
        "model_id": "org/model",
        "revision": REVISION,
        "is_complete": True,
    }
    assert {file.name for file in list_pipeline(out).files} == NEEDED


def test_fetches_full_precision_when_asked(hub: Hub, tmp_path: Path) -> None:
    assert main(["org/model", "--out", str(tmp_path / "pipeline"), "--full"]) == DONE
    assert "unet/diffusion_pytorch_model.safetensors" in hub.fetched()
    assert "unet/diffusion_pytorch_model.fp16.safetensors" not in hub.fetched()


def test_goes_on_where_it_was_cut(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "pipeline"
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 256)
    hub.cut_at_byte = 700
    assert main(["org/model", "--out", str(out)]) == FAILED
    assert "run the same command to go on" in capsys.readouterr().err
    assert "not finished" in _refusal(out)

    hub.cut_at_byte = None
    hub.requests.clear()
    assert main(["org/model", "--out", str(out)]) == DONE
    name = "unet/diffusion_pytorch_model.fp16.safetensors"
    assert (out / name).read_bytes() == FILES[name]
    ranges = [wanted for method, path, wanted in hub.requests if (method, path) == ("GET", name)]
    assert ranges == ["bytes=512-"]

    hub.requests.clear()
    assert main(["org/model", "--out", str(out)]) == DONE
    assert hub.fetched() == set()


def _refusal(folder: Path) -> str:
    from handler.errors import ArchiveError

    with pytest.raises(ArchiveError) as caught:
        list_pipeline(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "token", "code", "words"),
    [
        (["org/gated"], None, FAILED, "gated: accept its terms at its page on the hub and set"),
        (["org/gated"], "hf_bad", FAILED, "with the account that HF_TOKEN belongs to"),
        (["org/private"], None, FAILED, "does not exist, or it is private: set HF_TOKEN"),
        (["org/missing"], "hf_good", FAILED, "does not exist, or HF_TOKEN may not read it"),
        (["org/model", "--revision", "v9"], None, FAILED, "has no revision 'v9'"),
        (["org/pickled"], None, FAILED, "unet has only pickled weights (unet/diffusion_pytorch"),
        (["org/other"], None, FAILED, "is not a diffusers pipeline: it has no model_index.json"),
        (
            ["org/single"],
            None,
            FAILED,
            "but files of weights (sd-xl.safetensors, sd.safetensors); fetch one with "
            "hf download org/single sd-xl.safetensors --local-dir . and pack it with --pipeline",
        ),
        (
            ["org/lora"],
            None,
            FAILED,
            "it is a LoRA; fetch it with hf download org/lora --local-dir",
        ),
        (["not a model"], None, MISUSED, "is not a model id such as org/name: "),
        (
            [str(REPOSITORY)],
            None,
            MISUSED,
            f"org/name; pack a folder with --pipeline {REPOSITORY}: ",
        ),
    ],
)
def test_says_what_is_missing(
    hub: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    token: str | None,
    code: int,
    words: str,
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    assert main([*arguments, "--out", str(tmp_path / "pipeline")]) == code
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1


def test_a_token_opens_a_gated_model(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert main(["org/gated", "--out", str(tmp_path / "pipeline")]) == DONE


def test_leaves_a_folder_of_another_kind_alone(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["org/model", "--out", str(tmp_path)]) == MISUSED
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "name", ["unet/../../model.fp16.safetensors", "/evil.safetensors", "../README.md", "..\\evil"]
)
def test_fetches_nothing_where_a_name_leads_elsewhere(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    hub.models["org/evil"] = Model({**FILES, name: b"evil"})
    assert main(["org/evil", "--out", str(tmp_path / "a" / "b")]) == FAILED
    assert f"{name!r} is refused" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert hub.fetched() == set()


def test_says_so_when_there_is_no_hub(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main(["org/model", "--out", str(tmp_path / "pipeline")]) == FAILED
    assert "could not be fetched" in capsys.readouterr().err
