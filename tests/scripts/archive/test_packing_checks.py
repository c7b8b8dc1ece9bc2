"""What packing refuses and takes, by configurations and the names and shapes of weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
import yaml
from safetensors.torch import save_file

from scripts.build_archive import main
from scripts.console import DONE, FAILED, MISUSED
from scripts.verify_archive import verify
from tests.support.archives import save_pipeline
from tests.support.layouts import (
    UNET,
    after_ip_adapter,
    edit_index,
    edit_json,
    edit_weights,
    lora_of_unet,
    plain_fp8,
    quantized_by,
    scaled_fp8,
    with_old_feature_extractor,
    without_third_encoder,
)
from tests.support.packing import manifest, pack, unpack, zip_folder
from tests.support.pipelines import build
from tests.support.tiny_models import clip, unet


def pack_by_command(tmp_path: Path, pipeline: Path, *arguments: str) -> int:
    """Run the command on `pipeline`; its archive is tmp_path/out/tiny.mar."""
    common = ["--pipeline", str(pipeline), "--name", "tiny", "--out", str(tmp_path / "out")]
    return main([*common, *arguments])


def refusal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pipeline: Path, *arguments: str
) -> str:
    """What is said of a pipeline that is not packed; nothing is left of it."""
    capsys.readouterr()
    assert pack_by_command(tmp_path, pipeline, *arguments) == FAILED
    assert not (tmp_path / "out").exists() or not [*(tmp_path / "out").iterdir()]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("build_archive: error: not packed: ")


def packed_config(tmp_path: Path) -> dict[str, Any]:
    folder = unpack(tmp_path / "out" / "tiny.mar", tmp_path / "unpacked")
    found: dict[str, Any] = yaml.safe_load((folder / "model-config.yaml").read_text())
    return found["handler"]


def with_unet(folder: Path, **changes: Any) -> Path:
    pipeline = build("stable_diffusion")
    pipeline.unet = unet(**changes)
    pipeline.save_pretrained(folder)
    return folder


def with_second_pipeline(folder: Path) -> Path:
    """The folder of a whole pipeline, where the VAE alone was meant."""
    save_pipeline(folder)
    shutil.copy(folder / "model_index.json", folder / "vae" / "model_index.json")
    return folder


def with_projected_encoder(folder: Path) -> Path:
    """Stable Diffusion XL whose second text encoder has no projection."""
    pipeline = build("stable_diffusion_xl")
    pipeline.text_encoder_2 = clip()
    pipeline.save_pretrained(folder)
    return folder


def with_empty_vocabulary(folder: Path) -> Path:
    save_pipeline(folder)
    shutil.rmtree(folder / "tokenizer")
    tokenizer = transformers.CLIPTokenizer(vocab={"<|endoftext|>": 0}, merges=[])
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def without_text_encoder(folder: Path) -> Path:
    save_pipeline(folder)
    shutil.rmtree(folder / "text_encoder")
    return edit_index(folder, text_encoder=[None, None])


LEFT = "conv_in.weigth"


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (lambda f: save_pipeline(f, "kandinsky_2_2"), "needs image_embeds"),
        (lambda f: save_pipeline(f, "stable_cascade_prior"), "gives embeddings"),
        (scaled_fp8, "unet: its weights are scaled (there are "),
        (
            lambda f: edit_weights(save_pipeline(f), UNET, **{LEFT: torch.ones(2)}),
            f"unet: 1 weights are left over, such as {LEFT}: they are of another model",
        ),
        (
            lambda f: edit_json(save_pipeline(f), "text_encoder/config.json", num_hidden_layers=1),
            "text_encoder: 16 weights are left over",
        ),
        (
            lambda f: edit_weights(save_pipeline(f), UNET, **{"conv_in.bias": None}),
            "unet: 1 weights are missing or of the wrong shape, such as conv_in.bias",
        ),
        (
            lambda f: with_unet(f, in_channels=16, out_channels=16),
            "unet and vae do not fit together: unet draws 16 channels, and the vae reads",
        ),
        (with_projected_encoder, "text_encoder_2: it is a CLIPTextModel, and StableDiffusionXL"),
        (with_empty_vocabulary, "tokenizer: its vocabulary is empty"),
        (
            lambda f: quantized_by(f, "bitsandbytes"),
            "unet: its weights are quantized by bitsandbytes, and bitsandbytes is not installed",
        ),
        (
            lambda f: edit_index(save_pipeline(f), scheduler=["diffusers", "UNet2DModel"]),
            "scheduler: ",
        ),
        (
            without_text_encoder,
            "the pipeline has no text encoder (text_encoder)",
        ),
    ],
    ids=lambda value: "" if callable(value) else value[:40],
)
def test_what_cannot_be_served_is_refused_and_leaves_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    layout: Callable[[Path], Path],
    words: str,
) -> None:
    pipeline = layout(tmp_path / "pipeline")
    message = refusal(tmp_path, capsys, pipeline)
    assert words in message
    # Whatever packed it, verify says the same.
    problems = verify(zip_folder(pipeline, tmp_path / "bare.zip"))
    assert any(words in problem for problem in problems), problems


def test_a_whole_pipeline_in_the_place_of_a_component_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(tmp_path, capsys, with_second_pipeline(tmp_path / "pipeline"))
    assert message.startswith("vae/model_index.json: a whole pipeline is in the place of a")


@pytest.mark.parametrize(
    "layout",
    [
        after_ip_adapter,
        with_old_feature_extractor,
        without_third_encoder,
        plain_fp8,
        lambda f: save_pipeline(f, "stable_diffusion_xl"),
        lambda f: save_pipeline(f, "z_image"),
        lambda f: save_pipeline(f, "latent_consistency"),
    ],
)
def test_what_people_have_is_packed_and_draws(
    tmp_path: Path, layout: Callable[[Path], Path]
) -> None:
    pipeline = layout(tmp_path / "pipeline")
    small = ("--set", "height=64", "--set", "width=64")
    assert pack_by_command(tmp_path, pipeline, "--smoke", *small) == DONE
    assert verify(tmp_path / "out" / "tiny.mar") == []


def test_an_image_position_buffer_of_old_transformers_is_no_leftover(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    name = "text_encoder/model.safetensors"
    edit_weights(pipeline, name, **{"text_model.embeddings.position_ids": torch.arange(77)[None]})
    assert pack_by_command(tmp_path, pipeline) == DONE


def test_the_other_half_of_a_text_model_is_no_leftover(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    name = "text_encoder/model.safetensors"
    edit_weights(pipeline, name, **{"vision_model.embeddings.class_embedding": torch.ones(16)})
    assert pack_by_command(tmp_path, pipeline) == DONE


def test_every_problem_is_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = scaled_fp8(tmp_path / "pipeline")
    edit_json(pipeline, "vae/config.json", latent_channels=16)
    message = refusal(tmp_path, capsys, pipeline)
    assert "unet: its weights are scaled" in message
    assert "; vae: " in message


def test_what_is_refused_is_packed_by_no_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline", "stable_diffusion_img2img")
    assert pack_by_command(tmp_path, pipeline, "--no-check") == DONE
    assert "asks for nothing" not in capsys.readouterr().err
    assert pack_by_command(tmp_path, pipeline, "--no-check", "--smoke", "--force") == MISUSED


def test_a_worker_refuses_scaled_weights_too(tmp_path: Path) -> None:
    pipeline = scaled_fp8(tmp_path / "pipeline")
    assert any("its weights are scaled" in each for each in verify(pack(tmp_path, pipeline)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["scheduler=nonsense"], "scheduler: 'nonsense' does not go with this pipeline"),
        (["height=100"], "height: 100 is not a multiple of 8"),
        (["negative_prompt=x", "guidance_scale=3"], "negative_prompt: this pipeline takes none"),
    ],
)
def test_a_configuration_that_the_pipeline_does_not_do_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str], words: str
) -> None:
    flags = [part for setting in settings for part in ("--set", setting)]
    family = "latent_consistency" if "negative" in words else "stable_diffusion"
    pipeline = save_pipeline(tmp_path / "pipeline", family)
    assert words in refusal(tmp_path, capsys, pipeline, *flags)


def test_smoke_names_what_draws_nothing_and_leaves_no_archive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = with_unet(tmp_path / "pipeline", cross_attention_dim=24)
    message = refusal(tmp_path, capsys, pipeline, "--smoke")
    assert message.startswith("the pipeline loads, but draws nothing: mat1 and mat2 shapes")
    assert pack_by_command(tmp_path, pipeline) == DONE


# LoRAs.


def kohya(module: torch.nn.Module, prefix: str, ends: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """A LoRA of the linear layers of `module` whose names end so, by kohya's keys."""
    found: dict[str, torch.Tensor] = {}
    for name, layer in module.named_modules():
        if name.endswith(ends) and isinstance(layer, torch.nn.Linear):
            key = f"{prefix}_{name.replace('.', '_')}"
            found[f"{key}.lora_down.weight"] = torch.ones(2, layer.in_features)
            found[f"{key}.lora_up.weight"] = torch.ones(layer.out_features, 2)
            found[f"{key}.alpha"] = torch.tensor(2.0)
    return found


def kohya_of_both() -> dict[str, torch.Tensor]:
    pipeline = build("stable_diffusion")
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    encoder = ("q_proj", "k_proj", "v_proj", "out_proj")
    return {
        **kohya(pipeline.unet, "lora_unet", attention),
        **kohya(pipeline.text_encoder, "lora_te", encoder),
    }


def of_another_model() -> dict[str, torch.Tensor]:
    unet_lora = kohya(build("stable_diffusion").unet, "lora_unet", ("to_q",))
    return {key.replace("lora_unet_", "lora_unet_other_"): t for key, t in unet_lora.items()}


def partly_of_another_model() -> dict[str, torch.Tensor]:
    unet_lora = kohya(build("stable_diffusion").unet, "lora_unet", ("to_q",))
    name = "lora_unet_down_blocks_7_attentions_0_transformer_blocks_0_attn1_to_q"
    extra = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(8, 2)}
    return {**unet_lora, **{f"{name}.{end}": tensor for end, tensor in extra.items()}}


def loha() -> dict[str, torch.Tensor]:
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    parts = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    return {f"{key}.{part}": torch.ones(8, 8) for part in parts}


@pytest.mark.parametrize("lora", [lora_of_unet, kohya_of_both])
def test_a_lora_of_the_model_is_packed(
    tmp_path: Path, lora: Callable[[], dict[str, torch.Tensor]]
) -> None:
    save_file(lora(), tmp_path / "style.safetensors")
    pipeline = save_pipeline(tmp_path / "pipeline")
    flags = ("--lora", str(tmp_path / "style.safetensors"), "--smoke")
    assert pack_by_command(tmp_path, pipeline, *flags) == DONE
    assert manifest(tmp_path / "out" / "tiny.mar")["loras"] == ["style"]


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (of_another_model, "the pipeline has none of its layers lora_unet_other_down_blocks_0"),
        (
            partly_of_another_model,
            "1 of its 9 layers are not in the pipeline, such as lora_unet_down_blocks_7",
        ),
        (
            lambda: lora_of_unet(**{"lora_B.weight": torch.ones(16, 2, 1, 1)}),
            "it does not fit the pipeline",
        ),
        (loha, "it is a LoHa of LyCORIS, which is not applied"),
        (lambda: {"thing": torch.ones(1, 16)}, "it is a textual inversion"),
    ],
)
def test_what_is_not_applied_as_a_lora_is_refused_by_its_keys(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    lora: Callable[[], dict[str, torch.Tensor]],
    words: str,
) -> None:
    save_file(lora(), tmp_path / "style.safetensors")
    pipeline = save_pipeline(tmp_path / "pipeline")
    flags = ("--lora", str(tmp_path / "style.safetensors"))
    message = refusal(tmp_path, capsys, pipeline, *flags)
    assert message.startswith("the LoRA style: ")
    assert words in message
    packed = pack(tmp_path, pipeline, loras={"style": tmp_path / "style.safetensors"})
    assert any(words in problem for problem in verify(packed))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_lora_of_values_that_are_not_finite_is_refused_by_its_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    weights = lora_of_unet(**{"lora_B.weight": torch.full((8, 2, 1, 1), value)})
    save_file(weights, tmp_path / "style.safetensors")
    pipeline = save_pipeline(tmp_path / "pipeline")
    message = refusal(tmp_path, capsys, pipeline, "--lora", str(tmp_path / "style.safetensors"))
    assert message.startswith("the LoRA style: 1 of its 2 tensors hold values that are not finite")
    assert "such as unet.conv_in.lora_B.weight" in message


# Defaults and claims.


def test_the_models_defaults_are_packed_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline", "latent_consistency")
    assert pack_by_command(tmp_path, pipeline) == DONE
    said = "gets 32x32 (height x width), 4 steps and guidance 8.5; limits: min_size_px 32"
    assert said in capsys.readouterr().err
    config = packed_config(tmp_path)
    assert (config["height"], config["num_inference_steps"]) == (32, 4)
    assert config["guidance_scale"] == 8.5


def test_a_configuration_of_the_users_beats_the_models_defaults(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("handler:\n  height: 128\n  num_inference_steps: 9\n")
    pipeline = save_pipeline(tmp_path / "pipeline", "latent_consistency")
    flags = ("--config", str(own), "--set", "guidance_scale=2")
    assert pack_by_command(tmp_path, pipeline, *flags) == DONE
    config = packed_config(tmp_path)
    assert (config["height"], config["width"], config["num_inference_steps"]) == (128, 32, 9)
    assert config["guidance_scale"] == 2


def test_what_is_quantized_is_not_claimed_to_be_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = plain_fp8(tmp_path / "pipeline")
    assert pack_by_command(tmp_path, pipeline, "--dtype", "float16") == DONE
    assert "not converted, for it is quantized: unet" in capsys.readouterr().err
    assert "converted_to" not in manifest(tmp_path / "out" / "tiny.mar")


def test_a_tiny_autoencoder_goes_with_stable_diffusion(tmp_path: Path) -> None:
    """Another class than the annotated one, and one that many take for its speed."""
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
    )
    parts = {**build("stable_diffusion").components, "vae": tiny}
    pipeline = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.save_pretrained(tmp_path / "pipeline")
    assert pack_by_command(tmp_path, tmp_path / "pipeline") == DONE
