"""scripts.archive.conversion: weights in the original layouts become pipelines, offline."""

from __future__ import annotations

import json
import socket
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from handler.config import HandlerConfig
from handler.loading.pipeline import load_pipeline
from scripts.build_archive import main
from scripts.console import DONE, FAILED, MISUSED
from scripts.inspect_archive import main as inspect_archive
from tests.support.archives import save_pipeline
from tests.support.checkpoints import (
    build_xl,
    checkpoint_of,
    ldm_vae,
    save_checkpoint,
    without_weights,
)
from tests.support.hub import REVISION, serve_hub
from tests.support.hub import Model as HubModel
from tests.support.model_dirs import tensors
from tests.support.packing import UNET, build, content, manifest, unpack
from tests.support.pipelines import build as build_pipeline

BUILDERS = {
    "1": lambda: build_pipeline("stable_diffusion"),
    "2": lambda: build_pipeline("stable_diffusion_v"),
    "xl": build_xl,
}


def make(tmp_path: Path, pipeline: Any) -> tuple[Path, Path]:
    """Save `pipeline` as one file, and its configuration as a folder; return both."""
    pipeline.save_pretrained(tmp_path / "configuration")
    path = save_checkpoint(tmp_path / "sd.safetensors", pipeline)
    return path, without_weights(tmp_path / "configuration")


def convert(tmp_path: Path, path: Path, configuration: object, *arguments: str) -> int:
    """Pack the single file `path` as tmp_path/out/sd.mar."""
    common = ["--pipeline", str(path), "--config-from", str(configuration)]
    return main([*common, "--out", str(tmp_path / "out"), *arguments])


@pytest.fixture
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("nothing may be fetched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.usefixtures("_no_network")
def test_a_checkpoint_becomes_the_pipeline_that_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    pipeline = BUILDERS[family]()
    path, configuration = make(tmp_path, pipeline)
    assert convert(tmp_path, path, configuration) == DONE
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["sd.mar"]
    mar = tmp_path / "out" / "sd.mar"
    assert manifest(mar)["source"] == {
        "kind": "single file",
        "file": "sd.safetensors",
        "configuration_kind": "folder",
    }
    assert inspect_archive([str(mar)]) == DONE
    shown = capsys.readouterr().out
    assert "the single file sd.safetensors, configured as a folder" in shown
    model_dir = unpack(mar, tmp_path / "m")
    found = tensors(load_pipeline(model_dir, HandlerConfig(), None).pipeline)
    expected = tensors(pipeline)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    with zipfile.ZipFile(model_dir / "model.zip") as archive:
        for name in archive.namelist():
            if not name.endswith(".safetensors"):
                assert archive.read(name) == (configuration / name).read_bytes()


def test_the_same_file_gives_the_same_bytes_wherever_it_is(tmp_path: Path) -> None:
    path, configuration = make(tmp_path, BUILDERS["1"]())
    assert convert(tmp_path, path, configuration) == DONE
    other = tmp_path / "other"
    other.mkdir()
    path.rename(other / path.name)
    configuration.rename(other / "of-another-name")
    assert convert(other, other / path.name, other / "of-another-name") == DONE
    assert (other / "out/sd.mar").read_bytes() == (tmp_path / "out/sd.mar").read_bytes()


@pytest.mark.parametrize(
    ("before", "asked", "after"),
    [
        (torch.float16, None, "F16"),
        (torch.bfloat16, None, "BF16"),
        (torch.float32, "float16", "F16"),
        (torch.float16, "float32", "F32"),
    ],
)
def test_weights_keep_their_precision_or_get_the_wanted_one(
    tmp_path: Path, before: torch.dtype, asked: str | None, after: str
) -> None:
    path, configuration = make(tmp_path, BUILDERS["1"]().to(before))
    assert convert(tmp_path, path, configuration, *(["--dtype", asked] if asked else [])) == DONE
    components = manifest(tmp_path / "out" / "sd.mar")["pipeline"]["components"]
    for name in ("unet", "vae", "text_encoder"):
        assert components[name]["dtypes"].keys() == {after}


def test_a_checkpoint_loses_the_safety_checker_that_it_cannot_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, configuration = make(tmp_path, BUILDERS["1"]())
    index = json.loads((configuration / "model_index.json").read_bytes())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["requires_safety_checker"] = True
    (configuration / "model_index.json").write_text(json.dumps(index))
    assert convert(tmp_path, path, configuration) == DONE
    assert "left out: safety_checker, which a single file" in capsys.readouterr().err
    model_dir = unpack(tmp_path / "out" / "sd.mar", tmp_path / "m")
    assert load_pipeline(model_dir, HandlerConfig(), None).pipeline.safety_checker is None


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ([], {"prediction_type": "epsilon", "timestep_spacing": "leading"}),
        (["v_pred"], {"prediction_type": "v_prediction", "timestep_spacing": "leading"}),
        (["v_pred", "ztsnr"], {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    ],
)
def test_a_checkpoint_that_is_marked_so_predicts_v(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    marks: list[str],
    expected: dict[str, object],
) -> None:
    pipeline = BUILDERS["1"]()
    path, configuration = make(tmp_path, pipeline)
    weights = {name: each.contiguous() for name, each in checkpoint_of(pipeline).items()}
    save_file({**weights, **{mark: torch.empty(0) for mark in marks}}, path)
    assert convert(tmp_path, path, configuration) == DONE
    with zipfile.ZipFile(unpack(tmp_path / "out/sd.mar", tmp_path / "m") / "model.zip") as archive:
        found = json.loads(archive.read("scheduler/scheduler_config.json"))
    assert expected.items() <= found.items()
    assert found.get("rescale_betas_zero_snr", False) is ("ztsnr" in marks)
    assert ("scheduler: prediction_type=v_prediction" in capsys.readouterr().err) == bool(marks)


def test_a_component_that_the_file_lacks_is_given(tmp_path: Path) -> None:
    pipeline = BUILDERS["1"]()
    path, configuration = make(tmp_path, pipeline)
    weights = {
        name: tensor.contiguous()
        for name, tensor in checkpoint_of(pipeline).items()
        if not name.startswith("first_stage_model.")
    }
    save_file(weights, path)
    assert convert(tmp_path, path, configuration) == FAILED
    vae = save_pipeline(tmp_path / "p") / "vae"
    assert convert(tmp_path, path, configuration, "--component", f"vae={vae}") == DONE


def test_the_configuration_comes_from_the_hub_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = make(tmp_path, BUILDERS["1"]())
    files = content(save_pipeline(tmp_path / "hub"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serve_hub({"org/name": HubModel(files)}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert convert(tmp_path, path, f"org/name@{REVISION}") == DONE
    assert hub.fetched() == {name for name in files if not name.endswith(".safetensors")}
    source = manifest(tmp_path / "out" / "sd.mar")["source"]
    assert source["configuration_model_id"] == "org/name"
    assert source["configuration_revision"] == REVISION


@pytest.mark.usefixtures("_no_network")
def test_without_a_configuration_it_is_said_where_there_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_checkpoint(tmp_path / "sd.safetensors", BUILDERS["1"]())
    assert main(["--pipeline", str(path), "--out", str(tmp_path / "out")]) == MISUSED
    error = capsys.readouterr().err
    assert "is a whole checkpoint (for diffusers: v1): it holds weights alone" in error
    assert "ARGS='--config-from stable-diffusion-v1-5/stable-diffusion-v1-5'" in error
    assert convert(tmp_path, path, "neither") == MISUSED
    assert "--config-from neither: no such folder, nor a model id" in capsys.readouterr().err


def _cut(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.diffusion_model.out.2.weight"]


def _cut_encoder(weights: dict[str, torch.Tensor]) -> None:
    del weights["cond_stage_model.transformer.text_model.final_layer_norm.bias"]


def _scaled(weights: dict[str, torch.Tensor]) -> None:
    weights["model.diffusion_model.out.2.scale_weight"] = torch.ones(1)


def _deeper(weights: dict[str, torch.Tensor]) -> None:
    weights["model.diffusion_model.input_blocks.9.0.more.weight"] = torch.ones(4)


def _infinite(weights: dict[str, torch.Tensor]) -> None:
    weights["model.diffusion_model.out.2.bias"] = torch.full((4,), 1e30)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_cut, "it lacks some of the weights of a component"),
        (_cut_encoder, "its text_encoder lacks 1 of its weights, such as "),
        (_scaled, "is quantised with scales of its own"),
        (_deeper, "has 4 values that UNet2DConditionModel with this configuration does not take"),
        (_infinite, "its unet has values that are not finite in torch.float16: conv_out.bias"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, words: str
) -> None:
    pipeline = BUILDERS["1"]()
    path, configuration = make(tmp_path, pipeline)
    weights = {name: each.contiguous() for name, each in checkpoint_of(pipeline).items()}
    change(weights)
    save_file(weights, path)
    capsys.readouterr()  # what saving the pipeline said
    assert convert(tmp_path, path, configuration, "--dtype", "float16") == FAILED
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_vae_in_its_original_layout_replaces_the_pipelines(tmp_path: Path, prefix: str) -> None:
    vae = build_pipeline("stable_diffusion").vae
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(1.0)
    path = tmp_path / "vae.safetensors"
    save_file({name: each.contiguous() for name, each in ldm_vae(vae, prefix).items()}, path)
    mar = build(tmp_path, "--component", f"vae={path}")
    assert manifest(mar)["replaced_components"] == {"vae": {"kind": "file", "file": path.name}}
    loaded = load_pipeline(unpack(mar, tmp_path / "m"), HandlerConfig(), None).pipeline
    assert torch.equal(loaded.vae.decoder.conv_out.bias, vae.decoder.conv_out.bias)
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["tiny.mar"]


def test_a_file_in_diffusers_own_layout_is_packed_as_it_is(tmp_path: Path) -> None:
    name = "vae/diffusion_pytorch_model.safetensors"
    other = save_pipeline(tmp_path / "other") / name
    save_file({key: tensor + 1 for key, tensor in load_file(other).items()}, other)
    mar = build(tmp_path, "--component", f"vae={other}")
    with zipfile.ZipFile(unpack(mar, tmp_path / "m") / "model.zip") as archive:
        assert archive.read(name) == other.read_bytes()


@pytest.mark.parametrize(
    ("component", "names", "words"),
    [
        ("vae", ["decoder.conv_in.weight"], "lacks"),
        ("unet", ["emb_params"], "lacks"),
        ("text_encoder", ["anything"], "diffusers converts no other layout of that"),
    ],
)
def test_a_file_of_another_kind_is_refused_as_a_component(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    component: str,
    names: list[str],
    words: str,
) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    path = tmp_path / "other.safetensors"
    save_file({name: torch.ones(2, 2) for name in names}, path)
    arguments = ["--pipeline", str(pipeline), "--name", "tiny", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--component", f"{component}={path}"]) == FAILED
    error = capsys.readouterr().err
    assert f"{path}" in error
    assert words in error or "cannot be converted" in error
    assert not list((tmp_path / "out").iterdir())


def test_a_lone_unet_in_its_original_layout_replaces_the_pipelines(tmp_path: Path) -> None:
    """As people share fine-tuned denoisers: everything else is the base model's."""
    pipeline = BUILDERS["1"]()
    full = save_pipeline(tmp_path / "full")
    weights = {
        name: each.contiguous()
        for name, each in checkpoint_of(pipeline).items()
        if name.startswith("model.diffusion_model.")
    }
    path = tmp_path / "unet.safetensors"
    save_file(weights, path)
    mar = build(tmp_path, "--component", f"unet={path}", pipeline=full)
    with zipfile.ZipFile(unpack(mar, tmp_path / "m") / "model.zip") as archive:
        assert archive.read(UNET) == (full / UNET).read_bytes()
