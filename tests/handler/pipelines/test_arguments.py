"""handler.pipelines.arguments: what a request leaves out stays the pipeline's own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

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
from tests.support.layouts import pixart_of_a_known_size
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


@pytest.mark.parametrize("make", [pixart_of_a_known_size, lambda: build("sana")])
def test_a_plain_request_is_drawn_where_none_is_not_the_default(make: Callable[[], Any]) -> None:
    loaded = LoadedPipeline(make(), torch.device("cpu"), torch.float32)
    config = HandlerConfig.from_mapping({**QUICK, "num_inference_steps": 1, "speed": "off"})
    with closing(assemble(loaded, config, model_name="tiny", warm_up=False)) as service:
        (result,) = service.draw(service.read([{"body": {"prompt": "a cat"}}]))
    assert result.images[0].size == (32, 32)
