"""The tiny pipelines are what the other tests take them for: the same every time, and sensitive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.pipelines import FAMILIES, build, example_kwargs, image_of, shared

families = pytest.mark.parametrize("family", FAMILIES)

VISIBLE = 5e-3  # far above any rounding, below every change that a test relies on


@families
def test_a_family_is_the_same_every_time_and_after_saving(family: str, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    pipeline, same = build(family), build(family)
    assert torch.equal(torch.get_rng_state(), state)
    pipeline.save_pretrained(tmp_path)
    saved = type(pipeline).from_pretrained(tmp_path)
    saved.set_progress_bar_config(disable=True)

    image, again, loaded = (
        image_of(p(**example_kwargs(family, 0))) for p in (pipeline, same, saved)
    )
    assert torch.equal(image, again)
    # Kernels round differently where the mapped file aligns the weights differently.
    assert torch.allclose(image, loaded, atol=1e-5)


@families
def test_every_argument_shows_in_the_picture(family: str) -> None:
    pipeline = shared(family)
    image = image_of(pipeline(**example_kwargs(family, 0)))
    assert image.isfinite().all()
    assert image.std() > 0.05
    assert ((image > 0) & (image < 1)).float().mean() > 0.9, "clipping would hide differences"
    for name, change in _changes(family).items():
        changed = image_of(pipeline(**{**example_kwargs(family, 0), **change}))
        assert (changed - image).abs().max() > VISIBLE, name


@families
def test_no_parameter_is_constant(family: str) -> None:
    for name, component in shared(family).components.items():
        if isinstance(component, torch.nn.Module):
            for path, parameter in component.named_parameters():
                assert parameter.max() > parameter.min(), f"{name}.{path}"


def _changes(family: str) -> dict[str, dict[str, Any]]:
    given, other = example_kwargs(family, 0), example_kwargs(family, 1)
    condition = "image_embeds" if family == "kandinsky_2_2" else "prompt"
    return {
        "seed": {"generator": other["generator"]},
        "steps": {"num_inference_steps": given["num_inference_steps"] + 1},
        "guidance": {"guidance_scale": 5.0},
        "condition": {condition: other[condition]},
    }
