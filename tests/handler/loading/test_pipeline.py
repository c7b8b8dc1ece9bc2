"""handler.loading.pipeline: mapped pipelines are the ones that diffusers loads, without a copy."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from handler.config import HandlerConfig
from handler.errors import ArchiveError, ConfigError
from handler.loading.pipeline import choose_device, choose_dtype, load_pipeline
from handler.pipelines.describe import describe
from scripts.zip_weights import zip_pipeline
from tests.support.archives import save_pipeline
from tests.support.pipelines import FAMILIES, build, example_kwargs, shared

MAPPED = ("stable_diffusion_xl", "stable_diffusion_3", "pixart_sigma", "z_image", "kandinsky_2_2")


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where private folders go; nothing may be left there."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def packed(tmp_path: Path, family: str = "stable_diffusion") -> Path:
    """Pack `family` as TorchServe would have it: a model_dir with a model.zip."""
    pipeline = save_pipeline(tmp_path / "pipeline", family)
    zip_pipeline(pipeline, tmp_path / "m" / "model.zip")
    return tmp_path / "m"


def refusal(model_dir: Path) -> str:
    with pytest.raises(ArchiveError) as caught:
        load_pipeline(model_dir, HandlerConfig(), None)
    return str(caught.value)


def tensors(pipeline: Any) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of a pipeline, by component and name."""
    return {
        f"{component}.{name}": tensor
        for component, module in pipeline.components.items()
        if isinstance(module, torch.nn.Module)
        for source in (module.named_parameters(), module.named_buffers())
        for name, tensor in source
    }


def mapped_files(tensor: torch.Tensor) -> str:
    """The file that the memory of `tensor` is mapped from, or nothing."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return line.split(maxsplit=5)[5] if line.count("/") else ""
    return ""


@pytest.mark.parametrize("family", MAPPED)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_equals_what_diffusers_loads(
    tmp_path: Path, scratch: Path, caplog: pytest.LogCaptureFixture, family: str, dtype: str
) -> None:
    model_dir = packed(tmp_path, family)
    with caplog.at_level(logging.WARNING, "handler"):
        loaded = load_pipeline(model_dir, HandlerConfig(dtype=dtype), None)
    assert not [record for record in caplog.records if record.name.startswith("handler")]
    assert loaded.dtype == getattr(torch, dtype)
    assert loaded.device == torch.device("cpu")
    expected = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", dtype=loaded.dtype)
    assert type(loaded.pipeline) is type(expected)
    wanted, found = tensors(expected), tensors(loaded.pipeline)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    modules = [m for m in loaded.pipeline.components.values() if isinstance(m, torch.nn.Module)]
    assert not any(module.training for module in modules)
    assert list(scratch.iterdir()) == []


def test_draws_the_same_picture(tmp_path: Path) -> None:
    loaded = load_pipeline(packed(tmp_path), HandlerConfig(), None)
    kwargs = example_kwargs("stable_diffusion", 0)
    expected = shared("stable_diffusion")(**example_kwargs("stable_diffusion", 0)).images
    assert np.array_equal(loaded.pipeline(**kwargs).images, expected)


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


def test_an_upstream_archive_loads_with_one_log_line(
    tmp_path: Path, scratch: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The upstream example zips with deflate, folders included."""
    pipeline = save_pipeline(tmp_path / "pipeline")
    (tmp_path / "m").mkdir()
    with zipfile.ZipFile(tmp_path / "m/model.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(pipeline.rglob("*")):
            archive.write(path, path.relative_to(pipeline))
    with caplog.at_level(logging.WARNING, "handler"):
        loaded = load_pipeline(tmp_path / "m", HandlerConfig(), None)
    ours = [each for each in caplog.records if each.name.startswith("handler")]
    assert len(ours) == 1
    assert "deflated" in ours[0].message
    assert list(scratch.iterdir()) == []
    expected = tensors(shared("stable_diffusion"))
    assert all(torch.equal(tensors(loaded.pipeline)[name], expected[name]) for name in expected)


def test_half_precision_files_of_the_hub_load(tmp_path: Path) -> None:
    build("stable_diffusion").to(torch.float16).save_pretrained(
        tmp_path / "pipeline", variant="fp16"
    )
    zip_pipeline(tmp_path / "pipeline", tmp_path / "m" / "model.zip")
    loaded = load_pipeline(tmp_path / "m", HandlerConfig(dtype="float16"), None)
    expected = shared("stable_diffusion").unet.conv_in.weight.half()
    assert torch.equal(loaded.pipeline.unet.conv_in.weight, expected)


def test_sharded_weights_load(tmp_path: Path) -> None:
    build("stable_diffusion").save_pretrained(tmp_path / "pipeline", max_shard_size="60KB")
    assert len(list((tmp_path / "pipeline/unet").glob("*-of-*.safetensors"))) > 2
    zip_pipeline(tmp_path / "pipeline", tmp_path / "m" / "model.zip")
    loaded = load_pipeline(tmp_path / "m", HandlerConfig(), None)
    expected = tensors(shared("stable_diffusion"))
    assert all(torch.equal(tensors(loaded.pipeline)[name], expected[name]) for name in expected)


def _rewrite(tmp_path: Path, component: str, changes: dict[str, str | None]) -> Path:
    """Pack Stable Diffusion with weights of `component` renamed, or removed."""
    pipeline = save_pipeline(tmp_path / "pipeline")
    path = next((pipeline / component).glob("*.safetensors"))
    weights = load_file(path)
    for name, changed in changes.items():
        tensor = weights.pop(name)
        if changed is not None:
            weights[changed] = tensor
    save_file(weights, path, metadata={"format": "pt"})
    zip_pipeline(pipeline, tmp_path / "m" / "model.zip")
    return tmp_path / "m"


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
    loaded = load_pipeline(_rewrite(tmp_path, "vae", weights), HandlerConfig(), None)
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
    message = refusal(_rewrite(tmp_path, component, {name: None}))
    assert f"{component}: 1 weights are missing or of the wrong shape" in message
    assert "\n" not in message


def _with_index(tmp_path: Path, **changes: object) -> Path:
    pipeline = save_pipeline(tmp_path / "pipeline")
    index = json.loads((pipeline / "model_index.json").read_bytes())
    (pipeline / "model_index.json").write_text(json.dumps({**index, **changes}))
    zip_pipeline(pipeline, tmp_path / "m" / "model.zip")
    return tmp_path / "m"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "AutoencoderKL"}, "has no pipeline AutoencoderKL"),
        ({"_class_name": "NoSuchPipeline"}, "has no pipeline NoSuchPipeline"),
        ({"unet": ["diffusers", "NoSuchModel"]}, "unet: diffusers.NoSuchModel does not exist"),
        ({"unet": ["diffusers", "DiffusionPipeline"]}, "is not a model, scheduler or tokenizer"),
        ({"unet": ["transformers", "TrainingArguments"]}, "is not a model, scheduler or tokenizer"),
        ({"unet": ["transformers", "logging"]}, "does not exist"),
    ],
)
def test_refuses_classes_that_are_no_components(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    assert words in refusal(_with_index(tmp_path, **changes))


def test_what_a_library_cannot_read_is_one_line(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    (pipeline / "tokenizer" / "tokenizer.json").write_text("{")
    (pipeline / "tokenizer" / "tokenizer_config.json").write_text("{")
    zip_pipeline(pipeline, tmp_path / "m" / "model.zip")
    message = refusal(tmp_path / "m")
    assert message.startswith("the pipeline does not load: ")
    assert "\n" not in message


def test_a_tokenizer_without_words_is_refused(tmp_path: Path) -> None:
    """transformers makes an empty one of it, for which all prompts are equal."""
    pipeline = save_pipeline(tmp_path / "pipeline")
    (pipeline / "tokenizer" / "tokenizer.json").unlink()
    zip_pipeline(pipeline, tmp_path / "m" / "model.zip")
    assert refusal(tmp_path / "m").startswith("tokenizer: has no vocabulary (tokenizer.json")


def _link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing")


def _make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [_link_to_nothing, _make_fifo])
def test_what_is_no_file_is_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    pipeline = save_pipeline(tmp_path / "m" / "model")
    damage(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    assert "is not a file" in refusal(tmp_path / "m")


@pytest.mark.parametrize("is_zipped", [False, True])
def test_an_index_of_any_length_is_refused_in_one_short_line(
    tmp_path: Path, is_zipped: bool
) -> None:
    pipeline = save_pipeline(tmp_path / "m" / "model")
    index = json.loads((pipeline / "model_index.json").read_bytes())
    for num_letters, words in ((300_000, "only classes of"), (2 << 20, "it may have 1048576")):
        text = json.dumps({**index, "unet": ["x", "y" * num_letters]})
        (pipeline / "model_index.json").write_text(text)
        if is_zipped:
            shutil.make_archive(str(tmp_path / "m" / "model"), "zip", pipeline)
        message = refusal(tmp_path / "m")
        assert words in message
        assert len(message) < 500


def test_what_the_system_refuses_is_one_line(tmp_path: Path, scratch: Path) -> None:
    model_dir = packed(tmp_path)
    scratch.rmdir()
    assert "cannot be opened: [Errno 2] No such file" in refusal(model_dir)


def test_never_asks_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*arguments: object) -> None:
        raise AssertionError("somebody asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_pipeline(packed(tmp_path), HandlerConfig(), None)


def test_packed_loras_are_active(tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model_dir = packed(tmp_path)
    donor = build("stable_diffusion")
    modules = ["to_q", "to_v"]
    donor.unet.add_adapter(LoraConfig(r=2, target_modules=modules, init_lora_weights=False))
    donor.save_lora_weights(
        tmp_path / "m" / "lora",
        unet_lora_layers=get_peft_model_state_dict(donor.unet),
        weight_name="style.safetensors",
    )
    pipeline = load_pipeline(model_dir, HandlerConfig(), None).pipeline
    assert pipeline.get_list_adapters() == {"unet": ["style"]}
    assert pipeline.get_active_adapters() == ["style"]
    styled = pipeline(**example_kwargs("stable_diffusion", 0)).images
    plain = shared("stable_diffusion")(**example_kwargs("stable_diffusion", 0)).images
    assert np.abs(styled - plain).max() > 1e-3


def test_a_damaged_lora_is_refused(tmp_path: Path) -> None:
    """It lies beside model.zip, whose checksums do not cover it."""
    model_dir, name = packed(tmp_path), "lora/style.safetensors"
    (model_dir / "lora").mkdir()
    save_file({"other.weight": torch.ones(2)}, model_dir / name)
    (model_dir / "MAR-INF").mkdir()
    manifest = model_dir / "MAR-INF" / "PIPELINE.json"
    digest = hashlib.sha256((model_dir / name).read_bytes()).hexdigest()
    for sha256, words in ((digest, "does not fit"), ("0" * 64, "is damaged: it does not match")):
        manifest.write_text(json.dumps({"members": {name: {"sha256": sha256}}}))
        assert words in refusal(model_dir)
    manifest.write_text("{}")
    assert "PIPELINE.json is damaged" in refusal(model_dir)


def test_a_lora_that_does_not_fit_is_named(tmp_path: Path) -> None:
    model_dir = packed(tmp_path)
    (model_dir / "lora").mkdir()
    save_file({"other.weight": torch.ones(2)}, model_dir / "lora" / "wrong.safetensors")
    message = refusal(model_dir)
    assert "wrong.safetensors: this LoRA does not fit" in message


@pytest.mark.parametrize(
    ("configured", "gpu_id", "expected"),
    [(None, None, "cpu"), (None, 0, "cpu"), (None, -1, "cpu"), ("cpu", 3, "cpu")],
)
def test_device_without_cuda(configured: str | None, gpu_id: int | None, expected: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert choose_device(configured, gpu_id) == torch.device(expected)


@pytest.mark.parametrize(
    ("configured", "gpu_id", "expected"),
    [
        (None, 1, "cuda:1"),
        (None, None, "cpu"),
        ("cuda", 1, "cuda:1"),
        ("cuda:0", 1, "cuda:0"),
        ("cpu", 1, "cpu"),
    ],
)
def test_device_with_cuda(
    monkeypatch: pytest.MonkeyPatch, configured: str | None, gpu_id: int | None, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(configured, gpu_id) == torch.device(expected)


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(ConfigError, match="finds no CUDA device"):
        choose_device("cuda", None)
    with pytest.raises(ConfigError, match="device is 'quantum'"):
        choose_device("quantum", None)


def test_precision_follows_the_device() -> None:
    assert choose_dtype(None, torch.device("cpu")) is torch.float32
    assert choose_dtype(None, torch.device("cuda:0")) is torch.float16
    assert choose_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
    with pytest.raises(ConfigError, match="dtype is 'int8'"):
        choose_dtype("int8", torch.device("cpu"))


TEXT_TO_IMAGE = sorted(
    name
    for name in FAMILIES
    if name.split("_")[-1] not in ("prior", "img2img", "inpaint", "controlnet", "2")
)


def _drawn_size(pipeline: Any, kwargs: dict[str, Any], side_px: int) -> tuple[int, ...] | None:
    """The size of a picture of side_px x 3 side_px, or None where the pipeline refuses it."""
    try:
        images = pipeline(**{**kwargs, "height": side_px, "width": 3 * side_px}).images
    except (ValueError, RuntimeError):
        return None
    return tuple(images.shape[1:3])


@pytest.mark.parametrize("family", TEXT_TO_IMAGE)
def test_the_size_multiple_is_what_comes_out_exactly(family: str) -> None:
    pipeline = shared(family)
    multiple = describe(pipeline).size_multiple_px
    side_px = multiple * 5 if multiple < 16 else multiple
    found = _drawn_size(pipeline, example_kwargs(family, 0), side_px)
    assert found == (side_px, 3 * side_px)
    if family == "kandinsky_2_2_combined":
        # Its scale is its decoder's, which it does not tell: what is asked is on the safe side.
        return
    odd_px = side_px + multiple // 2
    found = _drawn_size(pipeline, example_kwargs(family, 0), odd_px)
    assert found != (odd_px, 3 * odd_px)


@pytest.mark.parametrize("num_blocks", [2, 3, 4])
def test_the_size_multiple_with_a_tiny_vae(num_blocks: int) -> None:
    """Its scale is in other fields than AutoencoderKL's, and Stable Diffusion wants 8 at least."""
    channels = (4,) * num_blocks
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=(1,) * num_blocks,
        num_decoder_blocks=(1,) * num_blocks,
        latent_channels=4,
    )
    parts = {**build("stable_diffusion").components, "vae": vae}
    pipeline = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    assert describe(pipeline).size_multiple_px == 8
    kwargs = example_kwargs("stable_diffusion", 0)
    assert _drawn_size(pipeline, kwargs, 40) == (40, 120)
    assert _drawn_size(pipeline, kwargs, 44) is None


def test_describes_what_requests_may_ask() -> None:
    traits = describe(shared("stable_diffusion"))
    assert traits.schedulers[0] == "DDIMScheduler"
    assert {"EulerDiscreteScheduler", "DPMSolverMultistepScheduler"} < set(traits.schedulers)
    assert len(set(traits.schedulers)) == len(traits.schedulers)
    assert {"prompt", "negative_prompt", "guidance_scale"} < traits.parameters
    assert "self" not in traits.parameters
    for name in traits.schedulers:
        scheduler = getattr(diffusers, name)
        scheduler.from_config(shared("stable_diffusion").scheduler.config)
    assert describe(shared("flux")).schedulers == ("FlowMatchEulerDiscreteScheduler",)
