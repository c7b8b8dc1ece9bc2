"""scripts.archive.controlnets: ControlNets in an archive, from their folder to the worker."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from handler.config import HandlerConfig
from handler.errors import ArchiveError
from handler.loading.pipeline import load_pipeline
from scripts.archive.checks import check_models
from scripts.archive.reader import open_archive
from scripts.build_archive import main as build_archive
from scripts.errors import UsageError
from scripts.inspect_archive import inspect
from tests.support.archives import save_pipeline
from tests.support.packing import build, manifest, pack, unpack
from tests.support.picture_tasks import make_controlnet
from tests.support.pipelines import build as build_pipeline

TINY: Any = build_pipeline("stable_diffusion")


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Two ControlNets of the tiny model, as folders."""
    found = {name: tmp_path / name for name in ("canny", "depth")}
    for name, folder in found.items():
        make_controlnet(TINY, name).save_pretrained(folder)
    return found


def flags(folders: dict[str, Path]) -> list[str]:
    return [part for name, path in folders.items() for part in ("--controlnet", f"{name}={path}")]


def load(archive: Path, folder: Path) -> Any:
    return load_pipeline(unpack(archive, folder), HandlerConfig(device="cpu"), None)


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters())


def test_packed_controlnets_are_loaded_by_their_names_and_mapped(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    archive = build(tmp_path, *flags(folders))
    assert manifest(archive)["controlnets"] == ["canny", "depth"]
    loaded = load(archive, tmp_path / "unpacked")
    assert [*loaded.controlnets] == ["canny", "depth"]
    for name, controlnet in loaded.controlnets.items():
        expected = weights_of(make_controlnet(TINY, name))
        found = weights_of(controlnet)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert not any(each.untyped_storage().resizable() for each in found.values()), "mapped"


def test_packing_again_keeps_controlnets_and_can_leave_one_out(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    archive = build(tmp_path, *flags(folders))
    again = tmp_path / "again"
    common = ["--from", str(archive), "--out", str(again), "--name", "again"]
    assert build_archive([*common]) == 0
    assert manifest(again / "again.mar")["controlnets"] == ["canny", "depth"]
    assert build_archive([*common, "--controlnet", "canny=none", "--force"]) == 0
    assert manifest(again / "again.mar")["controlnets"] == ["depth"]
    assert [*load(again / "again.mar", tmp_path / "unpacked").controlnets] == ["depth"]
    with pytest.raises(UsageError, match="--controlnet edges=none: there is no ControlNet"):
        pack(tmp_path, archive, is_repacked=True, controlnets={"edges": None})


def test_what_an_archive_serves_is_inspected(tmp_path: Path, folders: dict[str, Path]) -> None:
    del folders["depth"]
    facts = inspect(build(tmp_path, *flags(folders)))
    assert facts["controlnets"] == ["canny"]
    assert facts["pipeline"]["tasks"] == [
        *("text-to-image", "image-to-image", "inpainting"),
        *("text-to-image+control:canny", "image-to-image+control:canny"),
        "inpainting+control:canny",
    ]


@pytest.mark.parametrize(
    ("family", "tasks"),
    [
        ("stable_diffusion_inpaint", ["inpainting"]),
        ("stable_diffusion_img2img", ["image-to-image", "inpainting"]),
        ("stable_diffusion_3", ["text-to-image", "image-to-image"]),  # of four channels
    ],
)
def test_tasks_are_told_without_loading_weights(
    family: str, tasks: list[str], tmp_path: Path
) -> None:
    pipeline = build_pipeline(family)
    pipeline.save_pretrained(tmp_path / "pipeline")
    for weights in (tmp_path / "pipeline").rglob("unet/*.safetensors"):
        header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
        size = weights.stat().st_size
        with weights.open("r+b") as file:  # the header stays; the numbers are gone
            file.truncate(header)
            file.truncate(size)
    assert inspect(tmp_path / "pipeline")["pipeline"]["tasks"] == tasks


def problem(tmp_path: Path, folder: Path) -> str:
    pipeline = tmp_path / "pipeline"
    if not pipeline.exists():
        save_pipeline(pipeline)
    with pytest.raises(ArchiveError) as caught:
        pack(tmp_path, pipeline, is_checked=True, controlnets={"canny": folder})
    return str(caught.value)


def test_what_is_no_controlnet_of_the_model_is_refused(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    canny = folders["canny"]
    config = json.loads((canny / "config.json").read_text())

    (canny / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKL"}))
    assert "AutoencoderKL', not a ControlNet" in problem(tmp_path, canny)
    (canny / "config.json").write_text(json.dumps({**config, "_class_name": "SD3ControlNetModel"}))
    assert "StableDiffusionPipeline takes no SD3ControlNetModel" in problem(tmp_path, canny)
    (canny / "config.json").write_text(json.dumps({**config, "layers_per_block": 2}))
    assert "the ControlNet canny: " in problem(tmp_path, canny)

    keys = config.keys() - {"_class_name", "_diffusers_version"}
    other = {**{key: config[key] for key in keys}, "cross_attention_dim": 24}
    diffusers.ControlNetModel(**other).save_pretrained(canny)
    said = problem(tmp_path, canny)
    assert "of another model: its cross_attention_dim is 24, and that of the unet is 16" in said

    assert "wanted as its folder" in problem(tmp_path, tmp_path / "nowhere")
    weights = canny / "diffusion_pytorch_model.safetensors"
    shutil.move(weights, weights.with_suffix(".bin"))
    assert "pickled weights are refused" in problem(tmp_path, canny)


def test_a_damaged_controlnet_is_found_by_verify(tmp_path: Path, folders: dict[str, Path]) -> None:
    archive = pack(tmp_path, is_folder=True, controlnets={"canny": folders["canny"]})
    with open_archive(archive) as view:
        assert [*check_models(view)] == []
    pipeline = save_pipeline(tmp_path / "other")
    shutil.copytree(folders["canny"], pipeline / "controlnets" / "canny")
    config = pipeline / "controlnets" / "canny" / "config.json"
    config.write_text(config.read_text().replace('"layers_per_block": 1', '"layers_per_block": 2'))
    with open_archive(pipeline) as view:
        problems = [*check_models(view)]
    assert len(problems) == 1
    assert problems[0].startswith("the ControlNet canny: ")
