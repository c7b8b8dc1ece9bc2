"""handler.loading.pipeline: loaded pipelines are the ones that diffusers loads, without a copy."""

from __future__ import annotations

import hashlib
import json
import logging
import zipfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from handler.config import HandlerConfig
from handler.engine import InFlightEngine
from handler.errors import ConfigError
from handler.loading.lora_files import LoraReader
from handler.loading.pipeline import choose_device, choose_dtype, load_pipeline
from scripts.zip_weights import zip_pipeline
from tests.support.archives import save_pipeline
from tests.support.loras import kohya_lora
from tests.support.model_dirs import packed, refusal, tensors
from tests.support.pipelines import build, example_kwargs, shared, with_safety_checker

MAPPED = ("stable_diffusion_xl", "stable_diffusion_3", "pixart_sigma", "z_image", "kandinsky_2_2")


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


@pytest.mark.parametrize("mode", ["off", "flag", "refuse"])
def test_a_safety_checker_is_loaded_unless_it_is_off(tmp_path: Path, mode: str) -> None:
    with_safety_checker(is_strict=True).save_pretrained(tmp_path / "pipeline")
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    zip_pipeline(tmp_path / "pipeline", model_dir / "model.zip")
    loaded = load_pipeline(model_dir, HandlerConfig(safety_checker=mode), None)
    assert (loaded.pipeline.safety_checker is None) == (mode == "off")


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


def test_what_a_library_cannot_read_is_one_line(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    (pipeline / "tokenizer" / "tokenizer.json").write_text("{")
    (pipeline / "tokenizer" / "tokenizer_config.json").write_text("{")
    zip_pipeline(pipeline, tmp_path / "m" / "model.zip")
    message = refusal(tmp_path / "m")
    assert message.startswith("the pipeline does not load: ")
    assert "\n" not in message


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


def test_a_packed_lora_of_kohya_is_applied_whole(tmp_path: Path) -> None:
    """Attention and MLP of the text encoder: diffusers by itself drops the attention."""
    model_dir = packed(tmp_path)
    (model_dir / "lora").mkdir()
    ends = ("to_q", "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    plain = build("stable_diffusion")
    modules = {"lora_unet": plain.unet, "lora_te": plain.text_encoder}
    file = kohya_lora(modules, alpha=3.0, ends=ends)
    save_file(file, model_dir / "lora" / "style.safetensors")
    pipeline = load_pipeline(model_dir, HandlerConfig(), None).pipeline
    adapted = [
        name
        for component in (pipeline.unet, pipeline.text_encoder)
        for name, module in component.named_modules()
        if "style" in getattr(module, "scaling", ())
    ]
    assert len(adapted) == len(file) // 3
    with closing(InFlightEngine(plain)) as engine:
        engine.attach_lora("style", engine.prepare_lora(LoraReader(plain).read(file, {})))
        ticket = engine.submit(example_kwargs("stable_diffusion", 0), adapters={"style": 1.0})
        engine.run()
        expected = ticket.result().images
    styled = pipeline(**example_kwargs("stable_diffusion", 0)).images
    assert np.abs(styled - expected).max() < 3e-5


def test_a_damaged_lora_is_refused(tmp_path: Path) -> None:
    """It lies beside model.zip, whose checksums do not cover it."""
    model_dir, name = packed(tmp_path), "lora/style.safetensors"
    (model_dir / "lora").mkdir()
    save_file({"other.weight": torch.ones(2)}, model_dir / name)
    (model_dir / "MAR-INF").mkdir()
    manifest = model_dir / "MAR-INF" / "PIPELINE.json"
    data = (model_dir / name).read_bytes()
    for key, digest in (
        ("blake3", blake3(data).hexdigest()),
        ("sha256", hashlib.sha256(data).hexdigest()),  # as older archives have it
    ):
        for listed, words in ((digest, "does not fit"), ("0" * 64, "damaged: it does not match")):
            manifest.write_text(json.dumps({"members": {name: {key: listed}}}))
            assert words in refusal(model_dir)
    manifest.write_text(json.dumps({"members": {name: {"crc32": 0}}}))
    assert f"PIPELINE.json is damaged: {name}: the manifest lists none" in refusal(model_dir)
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
        ("cuda", None, "cuda:0"),
        ("cuda", -1, "cuda:0"),
        ("cuda:0", 1, "cuda:0"),
        ("cpu", 1, "cpu"),
    ],
)
def test_device_with_cuda(
    monkeypatch: pytest.MonkeyPatch, configured: str | None, gpu_id: int | None, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(configured, gpu_id) == torch.device(expected)


def test_a_card_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="'cuda:2', but torch finds only cuda:0 to cuda:1"):
        choose_device("cuda:2", 0)


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
