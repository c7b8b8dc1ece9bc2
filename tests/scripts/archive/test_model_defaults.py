"""scripts.archive.model_defaults: what a model draws by when its call is given nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest

from scripts.archive.model_defaults import find_defaults
from scripts.archive.reader import open_archive
from scripts.archive.skeleton import build_skeleton
from scripts.repository import REPOSITORY
from tests.support.pipelines import FAMILIES, build, example_kwargs, shared
from tests.support.tiny_models import unet


def test_the_embedded_pipeline_draws_by_the_projects_own() -> None:
    with open_archive(REPOSITORY / "demo" / "pipeline") as view:
        skeleton = build_skeleton(view.index, view.model, view.headers)
    assert find_defaults(skeleton.pipeline) == {
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "height": 768,
        "width": 768,
    }


@pytest.mark.parametrize(
    ("family", "steps", "guidance"),
    [
        ("stable_diffusion_xl", 50, 5.0),
        ("stable_diffusion_3", 28, 7.0),
        ("latent_consistency", 4, 8.5),
        ("pixart_sigma", 20, 4.5),
        ("flux", 28, 3.5),
    ],
)
def test_steps_and_guidance_are_those_of_the_class(
    family: str, steps: int, guidance: float
) -> None:
    found = find_defaults(shared(family))
    assert (found["num_inference_steps"], found["guidance_scale"]) == (steps, guidance)


# Those whose call draws in its own size in a moment; the others draw 1024 x 1024 or need a picture.
_SMALL = {
    *("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "stable_diffusion_v"),
    *("stable_diffusion_pag", "latent_consistency", "flux"),
}


@pytest.mark.parametrize("family", sorted(_SMALL & FAMILIES.keys()))
def test_the_size_is_what_the_call_makes_of_none(family: str) -> None:
    pipeline = shared(family)
    kwargs = {**example_kwargs(family, 0), "num_inference_steps": 1}
    del kwargs["height"], kwargs["width"]
    height, width = pipeline(**kwargs).images.shape[1:3]
    found = find_defaults(pipeline)
    assert (found["height"], found["width"]) == (height, width)


@pytest.mark.parametrize(
    ("sample_size", "scale", "expected"),
    [(64, 8, (512, 512)), (96, 8, (768, 768)), ([40, 72], 8, (320, 576))],
)
def test_the_sample_size_times_the_scale(
    sample_size: Any, scale: int, expected: tuple[int, int]
) -> None:
    """Stable Diffusion 1.5 and 2.1, and a denoiser whose pictures are not square."""
    pipeline = build("stable_diffusion")
    pipeline.unet = unet(sample_size=sample_size)
    pipeline.vae_scale_factor = scale
    found = find_defaults(pipeline)
    assert (found["height"], found["width"]) == expected


def test_what_a_class_does_not_say_is_left_out() -> None:
    pipeline = diffusers.DDPMPipeline(
        unet=diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        ),
        scheduler=diffusers.DDPMScheduler(),
    )
    assert find_defaults(pipeline) == {"num_inference_steps": 1000}


def test_nothing_is_asked_of_the_weights(tmp_path: Path) -> None:
    build("stable_diffusion_xl").save_pretrained(tmp_path / "p")
    with open_archive(tmp_path / "p") as view:
        skeleton = build_skeleton(view.index, view.model, view.headers)
    assert find_defaults(skeleton.pipeline) == find_defaults(shared("stable_diffusion_xl"))
