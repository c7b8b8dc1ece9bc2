"""scripts.verify_archive --smoke: what it draws, and what it says where that fails."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file

from handler.diffusers_handler import DiffusersHandler
from scripts.archive.reader import open_archive
from scripts.archive.smoke import draw_smoke_picture
from scripts.verify_archive import verify
from tests.support.archives import save_pipeline
from tests.support.frontend import Frontend
from tests.support.packing import pack
from tests.support.pipelines import build, overflowing, with_safety_checker
from tests.support.tiny_models import unet


def test_a_pipeline_that_draws_nothing_fails_the_smoke_test(tmp_path: Path) -> None:
    pipeline = save_pipeline(tmp_path / "pipeline")
    path = pipeline / "vae" / "diffusion_pytorch_model.safetensors"
    weights = {name: tensor * 0 for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    mar = pack(tmp_path, pipeline)
    assert verify(mar) == []
    assert verify(mar, is_smoke=True) == ["the picture has one colour only"]


def test_a_pipeline_that_overflows_fails_the_smoke_test_with_what_to_do(tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    overflowing(build("stable_diffusion")).save_pretrained(pipeline)
    (problem,) = verify(pack(tmp_path, pipeline), is_smoke=True)
    assert "the picture is not finite" in problem
    assert "DTYPE=float32" in problem


def test_a_picture_that_the_safety_checker_flags_fails_the_smoke_test(tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    with_safety_checker(is_strict=True).save_pretrained(pipeline)
    problems = [
        verify(pack(tmp_path, pipeline, settings={"safety_checker": mode}), is_smoke=True)
        for mode in ("flag", "refuse", "off")
    ]
    assert [len(each) for each in problems] == [1, 1, 0]
    assert all("the safety checker flags" in each[0] for each in problems[:2])


def test_the_packed_configuration_is_tried(tmp_path: Path) -> None:
    mar = pack(tmp_path, settings={"scheduler": "nonsense", "device": "cuda"})
    (problem,) = verify(mar, is_smoke=True)
    assert "scheduler: 'nonsense' does not go with this pipeline" in problem


@pytest.mark.parametrize("settings", [{"scheduler": "euler"}, {"scheduler": "pndm"}, {}])
def test_the_smoke_picture_has_the_steps_that_its_scheduler_needs(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """PNDM's Runge-Kutta start takes more steps than two."""
    pipeline = save_pipeline(tmp_path / "pipeline")
    path = pipeline / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "skip_prk_steps": False}))
    assert verify(pack(tmp_path, pipeline, settings=settings), is_smoke=True) == []


def request_picture(mar: Path, model_dir: Path, body: dict[str, Any]) -> Image.Image:
    """Serve an archive as TorchServe does, and post one request."""
    with zipfile.ZipFile(mar) as archive:
        archive.extractall(model_dir)
    config = yaml.safe_load((model_dir / "model-config.yaml").read_text())
    handler = DiffusersHandler()
    frontend = Frontend(handler, model_dir, config)
    handler.initialize(frontend.context)
    posted = frontend.post(body)
    frontend.run()
    assert posted.status == 200, posted.body
    return Image.open(io.BytesIO(posted.body)).convert("RGB")


SMOKE_BODY = {"prompt": "a dog", "seed": 0, "num_inference_steps": 2, "height": 64, "width": 64}


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({}, {}),
        ({"speed": "max"}, {}),
        # Each of them is seen in the picture: without it, the request draws another one.
        ({"scheduler": "euler"}, {"scheduler": "ddim"}),
        ({"guidance_scale": 2.0}, {"guidance_scale": 7.5}),
        ({"negative_prompt": "blue sky"}, {"negative_prompt": "a"}),
        ({"min_size_px": 128, "height": 128, "width": 128}, {"height": 192}),
    ],
    ids=lambda value: ",".join(value),
)
def test_the_smoke_picture_is_what_a_request_draws(
    tmp_path: Path, settings: dict[str, Any], changes: dict[str, Any]
) -> None:
    mar = pack(tmp_path, settings=settings, smoke_prompt="a dog")
    with open_archive(mar) as view:
        smoke = draw_smoke_picture(view)
    side_px = settings.get("min_size_px", 64)
    body = {**SMOKE_BODY, "height": side_px, "width": side_px}
    # What `speed: max` compiles is left out of both.
    served = pack(
        tmp_path,
        tmp_path / "pipeline",
        settings={**settings, "speed": "safe"},
        smoke_prompt="a dog",
    )
    drawn = request_picture(served, tmp_path / "model", body)
    assert ImageChops.difference(smoke, drawn).getbbox() is None
    other = request_picture(served, tmp_path / "other", {**body, **(changes or {"seed": 1})})
    assert other.size != smoke.size or ImageChops.difference(smoke, other).getbbox() is not None


def test_the_smoke_test_says_that_it_does_not_compile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(pack(tmp_path, settings={"speed": "max"}), is_smoke=True) == []
    assert "speed: safe, not max" in capsys.readouterr().err
    assert verify(pack(tmp_path, tmp_path / "pipeline"), is_smoke=True) == []
    assert capsys.readouterr().err == ""


def test_warm_up_sizes_that_stop_the_start_fail_the_smoke_test(tmp_path: Path) -> None:
    (problem,) = verify(pack(tmp_path, settings={"warm_up_sizes": ["100x64"]}), is_smoke=True)
    assert "warm_up_sizes: height: 100 is not a multiple of 8" in problem


def test_the_smoke_prompt_is_as_long_as_a_request_may_have_it(tmp_path: Path) -> None:
    assert verify(pack(tmp_path, settings={"max_prompt_chars": 1}), is_smoke=True) == []


def test_a_pipeline_that_fails_says_why(tmp_path: Path) -> None:
    """Each component is whole, but the denoiser takes embeddings of another width."""
    pipeline = build("stable_diffusion")
    pipeline.unet = unet(cross_attention_dim=24)
    pipeline.save_pretrained(tmp_path / "pipeline")
    mar = pack(tmp_path, tmp_path / "pipeline")
    assert verify(mar) == []
    (problem,) = verify(mar, is_smoke=True)
    assert problem.startswith("the pipeline loads, but draws nothing: mat1 and mat2 shapes")
