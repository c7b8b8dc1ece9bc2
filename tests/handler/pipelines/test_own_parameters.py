"""Parameters that some pipelines have of their own, as fields: they do what they are for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from handler.assembly import assemble
from handler.config import HandlerConfig
from handler.errors import InvalidRequest
from handler.loading.pipeline import LoadedPipeline
from handler.pipelines.describe import describe
from handler.service.generation import GenerationService
from tests.support.pipelines import build

SETTINGS = {"num_inference_steps": 2, "height": 64, "width": 64, "min_size_px": 8, "max_images": 1}


@contextmanager
def serving(pipeline: Any) -> Iterator[GenerationService]:
    loaded = LoadedPipeline(pipeline, torch.device("cpu"), torch.float32)
    service = assemble(loaded, HandlerConfig(**SETTINGS), model_name="tiny", warm_up=False)
    yield service
    service.close()


def draw(service: GenerationService, **fields: Any) -> np.ndarray[Any, Any]:
    body = {"prompt": "a b", "seed": 1, **fields}
    (result,) = service.draw(service.read([{"body": body}]))
    return np.asarray(result.images[0])


def refusal(service: GenerationService, **fields: Any) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as error:
        draw(service, **fields)
    return error.value.fields


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("stable_diffusion", "clip_skip", 1),
        ("stable_diffusion_xl", "clip_skip", 1),
        ("stable_diffusion", "guidance_rescale", 0.7),
        ("stable_diffusion_pag", "pag_scale", 9),
        ("stable_diffusion_pag", "pag_adaptive_scale", 0.002),
        ("z_image", "cfg_truncation", 0.1),
        ("kandinsky_2_2_combined", "prior_num_inference_steps", 3),
    ],
)
def test_a_parameter_is_a_field_that_counts(family: str, field: str, value: float) -> None:
    with serving(build(family)) as service:
        assert field in service.traits.parameters
        assert not np.array_equal(draw(service), draw(service, **{field: value}))


def test_a_field_is_refused_where_the_pipeline_has_no_such_parameter() -> None:
    with serving(build("pixart_sigma")) as service:
        assert refusal(service, clip_skip=1, pag_scale=2, true_cfg_scale=2) == dict.fromkeys(
            ("clip_skip", "pag_scale", "true_cfg_scale"), "this pipeline has no such parameter"
        )


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl"])
def test_more_layers_than_there_are_cannot_be_skipped(family: str) -> None:
    with serving(build(family)) as service:
        assert refusal(service, clip_skip=2) == {"clip_skip": "2 is out of range; allowed: 0 to 1"}


def test_true_guidance_needs_a_negative_prompt() -> None:
    with serving(build("flux")) as service:
        assert "needs a negative_prompt" in refusal(service, true_cfg_scale=3)["true_cfg_scale"]
        plain = draw(service, negative_prompt="c")
        assert not np.array_equal(draw(service, negative_prompt="c", true_cfg_scale=3), plain)
        assert np.array_equal(draw(service, true_cfg_scale=1), draw(service))


def test_guidance_that_the_model_ignores_is_refused() -> None:
    """The same bytes for 1 and 12 would be a fault."""
    pipeline = build("flux")
    with serving(pipeline) as service:
        assert not np.array_equal(draw(service, guidance_scale=1), draw(service, guidance_scale=12))
    pipeline.transformer.register_to_config(guidance_embeds=False)
    assert "guidance_scale" not in describe(pipeline).parameters
    with serving(pipeline) as service:
        assert refusal(service, guidance_scale=12) == {
            "guidance_scale": "this pipeline has no such parameter; its guidance is true_cfg_scale,"
            " with a negative_prompt"
        }
