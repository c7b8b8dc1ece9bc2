"""scripts.archive.mistaken: every mistake is told by its own name, with the command to run next."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from handler.errors import ArchiveError
from scripts.archive.mistaken import mistaken_pipeline
from scripts.archive.pipeline_files import list_pipeline
from scripts.errors import UsageError
from tests.support.archives import save_in_hub_cache, save_pipeline
from tests.support.packing import pack, unpack, zip_folder

LORAS = {
    "kohya": "lora_unet_down_blocks_0_attn1_to_q.lora_down.weight",
    "diffusers": "unet.down_blocks.0.attn1.to_q.lora_A.weight",
    "old": "unet.down_blocks.0.attn1.processor.to_q_lora.down.weight",
    "loha": "lora_unet_down_blocks_0_attn1_to_q.hada_w1_a",
    "lokr": "lora_unet_down_blocks_0_attn1_to_q.lokr_w1",
}


def said(path: Path) -> str:
    with pytest.raises(ArchiveError) as caught:
        list_pipeline(path)
    message = str(caught.value)
    assert message.startswith(f"{path} is not a diffusers pipeline: ")
    return message


def save_weights(path: Path, name: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.ones(2)}, path)
    return path


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("org/name", "--model-id org/name (make archive MODEL_ID=org/name)"),
        ("./org/name/x", "give a folder that save_pretrained or scripts.download_weights wrote"),
    ],
)
def test_nothing_is_there(path: str, words: str) -> None:
    error = mistaken_pipeline(Path(path))
    assert isinstance(error, UsageError)
    assert "does not exist" in str(error)
    assert words in str(error)


@pytest.mark.parametrize("name", LORAS.values(), ids=LORAS.keys())
def test_a_file_that_is_a_lora(tmp_path: Path, name: str) -> None:
    path = save_weights(tmp_path / "a style.safetensors", name)
    assert f"it is a LoRA; pack the pipeline that it belongs to, with --lora '{path}'" in said(path)


def test_a_file_with_a_whole_checkpoint(tmp_path: Path) -> None:
    path = save_weights(tmp_path / "sd.safetensors", "model.diffusion_model.out.2.weight")
    assert f"from_single_file('{path}').save_pretrained('sd')" in said(path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sd.zip", "it is a zip; unpack it and give the folder: python -m zipfile -e "),
        ("sd.ckpt", "it is a file of pickled weights"),
        ("sd.safetensors", "it is a damaged file of weights"),
        ("sd.txt", "it is a file; give a folder"),
    ],
)
def test_other_files(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"?")
    assert words in said(tmp_path / name)


def test_a_finished_archive(tmp_path: Path) -> None:
    mar = pack(tmp_path)
    assert f"make serve STORE={tmp_path} NAME=tiny serves it" in said(mar)
    folder = unpack(mar, tmp_path / "sd")
    assert f"make serve STORE={tmp_path} NAME=sd serves it" in said(folder)


@pytest.mark.parametrize("place", [".", "snapshots"])
def test_the_hubs_cache(tmp_path: Path, place: str) -> None:
    save_in_hub_cache(tmp_path)
    root = tmp_path / "models--org--name"
    old = root / "snapshots" / "aaa"
    old.mkdir()
    (old / "model_index.json").write_text("{}")
    expected = f"make archive PIPELINE={root}/snapshots/abc123 NAME=name"
    assert f"it is the hub's cache of org/name; give the snapshot: {expected}" in said(root / place)
    shutil.rmtree(root / "snapshots")
    (root / "snapshots").mkdir()
    assert "make archive MODEL_ID=org/name fetches it" in said(root / place)


def _lora_repository(folder: Path) -> None:
    save_weights(folder / "pytorch_lora_weights.safetensors", LORAS["diffusers"])


def _peft_repository(folder: Path) -> None:
    save_weights(folder / "adapter_model.safetensors", LORAS["diffusers"])
    (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize("make", [_lora_repository, _peft_repository])
def test_a_folder_with_a_lora(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "lora")
    (weights,) = (tmp_path / "lora").glob("*.safetensors")
    assert f"with --lora {weights}" in said(tmp_path / "lora")


def test_a_folder_with_one_component(tmp_path: Path) -> None:
    vae = save_pipeline(tmp_path / "p") / "vae"
    message = said(vae)
    assert "it is one component (it has a config.json)" in message
    assert f"with --component NAME={vae}" in message


def test_a_folder_around_the_pipeline(tmp_path: Path) -> None:
    save_pipeline(tmp_path / "downloads" / "sd")
    assert f"one is in it: make archive PIPELINE={tmp_path}/downloads/sd" in said(
        tmp_path / "downloads"
    )


def test_a_folder_of_anything_else(tmp_path: Path) -> None:
    assert "it has no model_index.json; give a folder that" in said(tmp_path)


def test_following_the_advice_about_a_zip_packs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zipped = zip_folder(save_pipeline(tmp_path / "p"), tmp_path / "sd.zip")
    assert f"python -m zipfile -e {zipped} sd && make archive PIPELINE=sd" in said(zipped)
    shutil.unpack_archive(zipped, tmp_path / "sd")
    assert list_pipeline(tmp_path / "sd").files
