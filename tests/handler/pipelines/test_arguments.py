"""handler.pipelines.arguments: what a request leaves out stays the pipeline's own."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import diffusers
import pytest
import torch

from handler.api.request import GenerationRequest
from handler.assembly import assemble
from handler.config import HandlerConfig
from handler.loading.pipeline import LoadedPipeline
from handler.pipelines.arguments import pipeline_arguments
from handler.pipelines.describe import describe
from handler.service.reading import read_requests
from tests.support.frontend import QUICK
from tests.support.pipelines import FAMILIES, build, shared


def plain(family: str) -> tuple[GenerationRequest, frozenset[str]]:
    """A request of nothing but its prompt, and the parameters of the pipeline's call."""
    traits = describe(shared(family))
    (request,) = read_requests([{"body": {"prompt": "a cat"}}], HandlerConfig(), traits)
    return request, traits.parameters


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"kandinsky_2_2"}))
def test_nothing_is_given_that_was_neither_sent_nor_configured(family: str) -> None:
    given = pipeline_arguments(*plain(family))
    always = {"prompt", "generator", "output_type", "num_images_per_prompt"}
    configured = {"num_inference_steps", "guidance_scale", "height", "width"}
    assert given.keys() <= always | configured
    assert None not in given.values()


def without_none_as_default(family: str) -> Any:
    """A pipeline whose negative prompt may not be None, of a size for which it has a table."""
    pipeline = build(family)
    if family == "pixart_sigma":
        config = {**pipeline.transformer.config, "sample_size": 32}
        pipeline.transformer = diffusers.PixArtTransformer2DModel.from_config(config).eval()
    return pipeline


@pytest.mark.parametrize("family", ["pixart_sigma", "sana"])
def test_a_plain_request_is_drawn_where_none_is_not_the_default(family: str) -> None:
    pipeline = without_none_as_default(family)
    loaded = LoadedPipeline(pipeline, torch.device("cpu"), torch.float32)
    config = HandlerConfig.from_mapping({**QUICK, "num_inference_steps": 1, "speed": "off"})
    with closing(assemble(loaded, config, model_name="tiny", warm_up=False)) as service:
        (result,) = service.draw(service.read([{"body": {"prompt": "a cat"}}]))
    assert result.images[0].size == (32, 32)
