"""The demo pipeline with a picture to begin with, and the fourth latent channel that this needs."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from demo.build import (
    LATENT_SCALE,
    NUM_COLOR_CHANNELS,
    NUM_LATENT_CHANNELS,
    build_autoencoder,
    build_pipeline,
    save_pipeline,
    widen_unet,
)
from demo.evaluate import PIPELINE
from demo.judge import judge
from demo.sprites import COLORS, SIZE_PX, Sprite, render
from demo.widen import main as widen

PROMPT = "a red heart on a white background"
SIDE_PX = 768


@pytest.fixture(scope="module")
def blue_circle() -> Image.Image:
    pixels = (render(Sprite("circle", "blue", "white", 7.0, 12.0, 12.0)) + 1) * 127.5
    small = Image.fromarray(pixels.round().astype(np.uint8))
    return small.resize((SIDE_PX, SIDE_PX), Image.Resampling.NEAREST)


@pytest.fixture
def narrow(tmp_path: Path) -> DiffusionPipeline:
    """A pipeline whose latents have three channels, and weights that predict something."""
    torch.manual_seed(1)
    pipeline = build_pipeline()
    config = {**pipeline.unet.config, "in_channels": 3, "out_channels": 3}
    pipeline.unet = UNet2DConditionModel.from_config(config).eval()
    return pipeline


def v_of(unet: UNet2DConditionModel, latents: torch.Tensor) -> torch.Tensor:
    states = torch.randn(1, 4, 128, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        v: torch.Tensor = unet(latents, 500, states.repeat(len(latents), 1, 1)).sample
    return v


def noise(num_channels: int, seed: int = 0) -> torch.Tensor:
    noise_of = torch.Generator().manual_seed(seed)
    return torch.randn(2, num_channels, SIZE_PX, SIZE_PX, generator=noise_of)


def test_a_blue_circle_becomes_a_red_heart(
    pipeline: DiffusionPipeline, blue_circle: Image.Image
) -> None:
    before = judge(blue_circle)
    assert (before.shape, before.color) == ("circle", "blue")
    other = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    image = other(
        PROMPT,
        image=blue_circle,
        strength=0.9,
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    verdict = judge(image)
    assert (verdict.shape, verdict.color, verdict.background) == ("heart", "red", "white")


def test_a_mask_over_the_left_half_leaves_the_right_half(
    pipeline: DiffusionPipeline, blue_circle: Image.Image
) -> None:
    other = StableDiffusionInpaintPipeline(**pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    mask = Image.new("L", blue_circle.size, 0)
    mask.paste(255, (0, 0, SIDE_PX // 2, SIDE_PX))
    image = other(
        PROMPT,
        image=blue_circle,
        mask_image=mask,
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    start, drawn = np.asarray(blue_circle).astype(int), np.asarray(image).astype(int)
    half = SIDE_PX // 2
    assert np.array_equal(drawn[:, half:], start[:, half:])
    inside = drawn[half - 64 : half + 64, half - 128 : half - 32].reshape(-1, 3)
    color = np.median(inside, axis=0)
    named = min(COLORS, key=lambda name: np.abs(color - COLORS[name]).sum())
    assert named == "red"


def test_the_fourth_channel_of_the_autoencoder_is_zero_and_not_read() -> None:
    vae = build_autoencoder()
    pictures = noise(NUM_COLOR_CHANNELS).repeat_interleave(32, 2).repeat_interleave(32, 3)
    latents = noise(NUM_LATENT_CHANNELS) / LATENT_SCALE
    other = latents.clone()
    other[:, NUM_COLOR_CHANNELS:] = 1.0
    with torch.no_grad():
        encoded = vae.encode(pictures).latents
        assert encoded.shape[1] == NUM_LATENT_CHANNELS
        assert not encoded[:, NUM_COLOR_CHANNELS:].any()
        assert encoded[:, :NUM_COLOR_CHANNELS].any()
        assert torch.equal(vae.decode(latents).sample, vae.decode(other).sample)
        assert not torch.equal(vae.decode(latents).sample, vae.decode(latents + 0.01).sample)


def test_the_shipped_unet_neither_reads_nor_draws_the_fourth_channel(
    pipeline: DiffusionPipeline,
) -> None:
    latents = noise(NUM_LATENT_CHANNELS)
    other = latents.clone()
    other[:, NUM_COLOR_CHANNELS:] = 100.0
    v = v_of(pipeline.unet, latents)
    assert torch.equal(v, v_of(pipeline.unet, other))
    assert not v[:, NUM_COLOR_CHANNELS:].any()
    assert v[:, :NUM_COLOR_CHANNELS].any()


@pytest.mark.parametrize(
    "scheduler",
    [
        "DDIMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_noise_in_the_fourth_channel_does_not_grow(
    pipeline: DiffusionPipeline, scheduler: str
) -> None:
    parts = dict(pipeline.components)
    parts["scheduler"] = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    own = type(pipeline)(**parts, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    latents = own(
        PROMPT,
        height=SIDE_PX,
        width=SIDE_PX,
        num_inference_steps=8,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    fourth = latents[:, NUM_COLOR_CHANNELS:]
    assert fourth.numel() > 0
    # It begins with a standard deviation of one.
    assert fourth.std() < 1.05


def test_widening_changes_nothing_in_the_three_channels(narrow: DiffusionPipeline) -> None:
    colors = noise(NUM_COLOR_CHANNELS)
    before = v_of(narrow.unet, colors)
    widen_unet(narrow.unet)
    after = v_of(narrow.unet, torch.cat([colors, noise(1, seed=1)], dim=1))
    assert torch.allclose(after[:, :NUM_COLOR_CHANNELS], before, atol=1e-5)
    assert not after[:, NUM_COLOR_CHANNELS:].any()
    assert narrow.unet.config.in_channels == narrow.unet.config.out_channels == NUM_LATENT_CHANNELS


def test_the_command_widens_a_folder_once(
    narrow: DiffusionPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    save_pipeline(narrow, old)
    assert widen([str(old), "--out", str(new)]) == 0
    wide = DiffusionPipeline.from_pretrained(new)
    colors = noise(NUM_COLOR_CHANNELS)
    v = v_of(wide.unet, torch.cat([colors, noise(1, seed=1)], dim=1))
    assert torch.allclose(v[:, :3], v_of(narrow.unet.float(), colors), atol=1e-5)
    assert wide.vae.config.latent_channels == NUM_LATENT_CHANNELS
    assert widen([str(old), "--out", str(new)]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert widen([str(PIPELINE), "--out", str(tmp_path / "again")]) == 1
    assert "its latents have 4 channels, not 3" in capsys.readouterr().err
