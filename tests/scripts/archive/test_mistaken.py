"""scripts.archive.mistaken: every mistake is told by its own name, with the command to run next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from handler.errors import ArchiveError
from scripts.archive.mistaken import mistaken_pipeline
from scripts.archive.pipeline_files import list_pipeline
from scripts.errors import UsageError
from tests.support.archives import save_pipeline
from tests.support.packing import pack, unpack

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
        ("org/name", "packed by make archive MODEL_ID=org/name"),
        ("./org/name/x", "give a folder that save_pretrained or the command download wrote"),
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


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("<thing>", "it is an embedding (a textual inversion); embeddings are not served yet"),
        ("emb_params", "it is an embedding (a textual inversion); embeddings are not served yet"),
        ("decoder.conv_in.weight", "it is a VAE alone; {pack}, with --component vae={path}"),
        ("first_stage_model.decoder.mid.attn_1.k.bias", "it is a VAE alone"),
        ("text_model.final_layer_norm.bias", "{pack}, with --component text_encoder={path}"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "it is a text encoder alone"),
        ("model.diffusion_model.out.2.weight", "{pack}, with --component unet={path}, or trans"),
        ("double_blocks.0.img_attn.proj.weight", "it is a denoiser (UNet or transformer) alone"),
        ("control_model.zero_convs.0.0.weight", "it is a ControlNet; ControlNets are not served"),
        ("anything.weight", "it is a file of weights of no known kind; give a folder"),
    ],
)
def test_a_file_with_a_part_of_a_pipeline(tmp_path: Path, name: str, words: str) -> None:
    path = save_weights(tmp_path / "a.safetensors", name)
    pack = "pack the pipeline that it belongs to"
    assert words.format(path=path, pack=pack) in said(path)


def test_a_file_with_a_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "sd.safetensors"
    names = ("model.diffusion_model.out.2.weight", "cond_stage_model.logit_scale")
    save_file({name: torch.ones(2) for name in names}, path)
    assert "it is a whole checkpoint in one file" in said(path)
    assert f"make archive PIPELINE={path} ARGS='--config-from FOLDER'" in said(path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sd.zip", "it is a zip; make archive PIPELINE="),
        ("sd.ckpt", "it is a file of pickled weights"),
        ("sd.ckpt", "torch.load(sys.argv[1], weights_only=True)"),
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
    assert f"make archive FROM={mar} packs it again" in said(mar)
    folder = unpack(mar, tmp_path / "sd")
    assert f"make serve STORE={tmp_path} NAME=sd serves it" in said(folder)


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
