"""Previews against the pipeline's own decoder, and families that give none."""

from __future__ import annotations

import io
import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from handler.pipelines.preview import Previewer
from handler.pipelines.signature import call_defaults
from scripts.repository import REPOSITORY
from tests.support.pipelines import FAMILIES, build, example_kwargs, shared

DEMO = REPOSITORY / "demo" / "pipeline"


def decoded(jpeg: bytes | None) -> np.ndarray[Any, Any]:
    assert jpeg is not None
    with Image.open(io.BytesIO(jpeg)) as image:
        assert image.format == "JPEG"
        return np.asarray(image.convert("RGB")).astype(float)


def smooth_latents(seed: int, num_channels: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, num_channels, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=16, mode="bicubic")


def test_it_has_the_size_of_the_latents() -> None:
    assert decoded(Previewer(shared("stable_diffusion")).jpeg(torch.zeros(1, 4, 12, 20))).shape == (
        12,
        20,
        3,
    )


def test_it_looks_like_the_decoded_picture() -> None:
    """With an autoencoder that is no random one: the embedded pipeline's."""
    vae = AutoencoderTiny.from_pretrained(DEMO / "vae")
    previewer = Previewer(SimpleNamespace(vae=vae))
    previews, pictures = [], []
    for seed in range(4):
        latents = smooth_latents(seed, num_channels=vae.config.latent_channels)
        previews.append(decoded(previewer.jpeg(latents)))
        with torch.no_grad():
            picture = vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5
        small = torch.nn.functional.adaptive_avg_pool2d(picture.clamp(0, 1), 16)[0]
        pictures.append(small.movedim(0, -1).numpy() * 255)
    errors = [[abs(p - q).mean() for q in pictures] for p in previews]
    for index, row in enumerate(errors):
        others = [error for other, error in enumerate(row) if other != index]
        assert row[index] < 25
        assert min(others) > 2 * row[index]


def test_the_same_latents_give_the_same_bytes() -> None:
    latents = smooth_latents(1)
    first, second = (Previewer(shared("stable_diffusion")).jpeg(latents) for _ in range(2))
    assert first == second
    assert Previewer(shared("stable_diffusion")).jpeg(smooth_latents(2)) != first


def test_it_shows_the_first_of_several_pictures() -> None:
    previewer = Previewer(shared("stable_diffusion"))
    both = torch.cat([smooth_latents(1), smooth_latents(2)])
    assert previewer.jpeg(both) == previewer.jpeg(both[:1])


def test_latents_are_left_alone() -> None:
    latents = smooth_latents(3)
    before = latents.clone()
    Previewer(shared("stable_diffusion")).jpeg(latents)
    assert torch.equal(latents, before)


def test_half_precision_and_numbers_that_are_none() -> None:
    previewer = Previewer(shared("stable_diffusion"))
    assert decoded(previewer.jpeg(smooth_latents(1).half())).shape == (16, 16, 3)
    assert decoded(previewer.jpeg(torch.full((1, 4, 8, 8), float("nan")))).shape == (8, 8, 3)


@pytest.mark.parametrize(
    "latents",
    [None, torch.zeros(1, 64, 16), torch.zeros(1, 4, 2, 8, 8), torch.zeros(1, 16, 8, 8)],
    ids=["none", "packed", "video", "other channels"],
)
def test_latents_that_cannot_be_shown(latents: torch.Tensor | None) -> None:
    previewer = Previewer(shared("stable_diffusion"))
    assert previewer.jpeg(torch.zeros(1, 4, 8, 8)) is not None
    assert previewer.jpeg(latents) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_fails_for_its_preview(family: str) -> None:
    """Whatever the latents of a family look like, there is a preview or there is none."""
    pipeline = build(family)
    previewer = Previewer(pipeline)
    seen: list[bytes | None] = []

    def look(view: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(previewer.jpeg(tensors.get("latents")))
        return tensors

    if "callback_on_step_end" not in call_defaults(pipeline):
        pytest.skip("it tells nobody of its steps")
    pipeline(**example_kwargs(family, 0), callback_on_step_end=look)
    assert seen
    has_autoencoder = getattr(pipeline, "vae", None) is not None
    is_packed = family == "flux"
    assert all((jpeg is not None) == (has_autoencoder and not is_packed) for jpeg in seen)


def test_a_decoder_that_fails_is_asked_once(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = build("stable_diffusion")
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.fill_(float("inf"))
    previewer = Previewer(pipeline)
    with caplog.at_level(logging.WARNING):
        assert [previewer.jpeg(torch.zeros(1, 4, 8, 8)) for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1
    assert "no previews" in caplog.text


def test_a_lack_of_memory_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends neither the picture nor, once it is over, the previews."""

    def lacking(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    pipeline = build("stable_diffusion")
    previewer, latents = Previewer(pipeline), torch.zeros(1, 4, 8, 8)
    with monkeypatch.context() as patch:
        patch.setattr(type(pipeline.vae), "decode", lacking)
        assert previewer.jpeg(latents) is None
    assert previewer.jpeg(latents) is not None
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", lacking)
        assert previewer.jpeg(latents) is None
    assert previewer.jpeg(latents) is not None


def test_fitting_changes_neither_the_decoder_nor_the_random_numbers() -> None:
    pipeline = build("stable_diffusion_xl")  # its decoder is copied to be run in float32
    before = {k: v.clone() for k, v in pipeline.vae.state_dict().items()}
    state = torch.get_rng_state()
    assert Previewer(pipeline).jpeg(torch.zeros(1, 4, 8, 8)) is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in pipeline.vae.state_dict().items())
    assert not any(p.grad_fn for p in pipeline.vae.parameters())
