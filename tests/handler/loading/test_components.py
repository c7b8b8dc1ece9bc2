"""handler.loading.components: models are built over mapped weights, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from handler.config import HandlerConfig
from handler.loading.pipeline import load_pipeline
from scripts.zip_weights import zip_pipeline
from tests.support.archives import save_pipeline
from tests.support.model_dirs import packed, refusal, tensors, with_index, with_weights
from tests.support.pipelines import shared


def mapped_files(tensor: torch.Tensor) -> str:
    """The file that the memory of `tensor` is mapped from, or nothing."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return line.split(maxsplit=5)[5] if line.count("/") else ""
    return ""


def test_weights_lie_in_the_archive(tmp_path: Path) -> None:
    model_dir = packed(tmp_path)
    found = tensors(load_pipeline(model_dir, HandlerConfig(), None).pipeline)
    parameters = {name: tensor for name, tensor in found.items() if "position_ids" not in name}
    archive = str(model_dir / "model.zip")
    assert {mapped_files(tensor) for tensor in parameters.values()} == {archive}
    assert all(tensor.data_ptr() % 4 == 0 for tensor in parameters.values())
    converted = load_pipeline(model_dir, HandlerConfig(dtype="bfloat16"), None)
    assert archive not in {mapped_files(tensor) for tensor in tensors(converted.pipeline).values()}


def test_a_plain_folder_is_mapped_too(tmp_path: Path) -> None:
    save_pipeline(tmp_path / "m" / "model")
    found = tensors(load_pipeline(tmp_path / "m", HandlerConfig(), None).pipeline)
    where = mapped_files(found["unet.conv_in.weight"])
    assert where == str(tmp_path / "m/model/unet/diffusion_pytorch_model.safetensors")


def test_old_names_of_weights_are_left_to_diffusers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Checkpoints from before diffusers 0.15 name a VAE's attention otherwise."""
    prefix = "decoder.mid_block.attentions.0"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {
        f"{prefix}.{new}.{kind}": f"{prefix}.{old}.{kind}"
        for new, old in names.items()
        for kind in ("weight", "bias")
    }
    loaded = load_pipeline(with_weights(tmp_path, "vae", weights), HandlerConfig(), None)
    expected = tensors(shared("stable_diffusion"))
    assert all(torch.equal(tensors(loaded.pipeline)[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("component", "weight"),
    [
        ("unet", "conv_in.weight"),
        ("vae", "decoder.conv_in.bias"),
        ("text_encoder", "final_layer_norm.weight"),
    ],
)
def test_missing_weights_are_not_made_up(tmp_path: Path, component: str, weight: str) -> None:
    """Both libraries fill them with random numbers and go on."""
    path = next((save_pipeline(tmp_path / "look") / component).glob("*.safetensors"))
    name = next(each for each in load_file(path) if each.endswith(weight))
    message = refusal(with_weights(tmp_path, component, {name: None}))
    assert f"{component}: 1 weights are missing or of the wrong shape" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "AutoencoderKL"}, "has no pipeline AutoencoderKL"),
        ({"_class_name": "NoSuchPipeline"}, "has no pipeline NoSuchPipeline"),
        ({"unet": ["diffusers", "NoSuchModel"]}, "has no NoSuchModel in diffusers"),
        ({"unet": ["diffusers", "DiffusionPipeline"]}, "is not a model, scheduler or tokenizer"),
        ({"unet": ["transformers", "TrainingArguments"]}, "is not a model, scheduler or tokenizer"),
        ({"unet": ["transformers", "logging"]}, "has no logging in transformers"),
    ],
)
def test_refuses_classes_that_are_no_components(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    assert words in refusal(with_index(tmp_path, **changes))


def test_a_tokenizer_without_words_is_refused(tmp_path: Path) -> None:
    """Transformers makes an empty one of it, for which all prompts are equal."""
    pipeline = save_pipeline(tmp_path / "pipeline")
    (pipeline / "tokenizer" / "tokenizer.json").unlink()
    zip_pipeline(pipeline, tmp_path / "m" / "model.zip")
    assert refusal(tmp_path / "m").startswith("tokenizer: has no vocabulary (tokenizer.json")
