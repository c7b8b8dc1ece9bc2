"""handler.pipelines.arguments: what a request leaves out stays the pipeline's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import closing
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from handler.api.request import GenerationRequest
from handler.assembly import assemble
from handler.config import HandlerConfig
from handler.loading.pipeline import LoadedPipeline
from handler.pipelines.arguments import pipeline_arguments
from handler.pipelines.describe import describe
from handler.pipelines.tasks import task_classes
from handler.service.reading import read_requests
from tests.support.drawings import as_base64, drawing, half_mask
from tests.support.frontend import QUICK
from tests.support.layouts import pixart_of_a_known_size
from tests.support.pipelines import FAMILIES, build, shared


def plain(family: str) -> tuple[GenerationRequest, frozenset[str]]:
    """A request of nothing but its prompt, and the parameters of the pipeline's call."""
    traits = describe(shared(family))
    pictures = {name: as_base64(drawing(0, 512, 512)) for name in traits.required}
    body = {"prompt": "a cat", **pictures}
    (request,) = read_requests([{"body": body}], HandlerConfig(), traits)
    return request, traits.parameters


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"kandinsky_2_2"}))
def test_nothing_is_given_that_was_neither_sent_nor_configured(family: str) -> None:
    given = pipeline_arguments(*plain(family))
    always = {"prompt", "generator", "output_type", "num_images_per_prompt"}
    configured = {"num_inference_steps", "guidance_scale", "height", "width"}
    assert given.keys() <= always | configured
    assert None not in given.values()


def test_pictures_are_given_by_the_names_of_the_parameters() -> None:
    """A ControlNet's picture is called `image` where there is no other."""
    image, mask, control = drawing(0), half_mask(), drawing(1)
    request, _ = plain("stable_diffusion")

    def given(task: str, **pictures: Image.Image) -> dict[str, Any]:
        kind = task_classes(diffusers.StableDiffusionPipeline, diffusers.ControlNetModel)[task]
        parameters = frozenset(inspect.signature(kind.__call__).parameters)
        arguments = pipeline_arguments(request, parameters, pictures)
        return {name: each for name, each in arguments.items() if isinstance(each, Image.Image)}

    assert given("text-to-image+control", control_image=control) == {"image": control}
    assert given("image-to-image", image=image) == {"image": image}
    everything = {"image": image, "mask_image": mask, "control_image": control}
    assert given("inpainting+control", **everything) == everything


@pytest.mark.parametrize("make", [pixart_of_a_known_size, lambda: build("sana")])
def test_a_plain_request_is_drawn_where_none_is_not_the_default(make: Callable[[], Any]) -> None:
    loaded = LoadedPipeline(make(), torch.device("cpu"), torch.float32)
    config = HandlerConfig.from_mapping({**QUICK, "num_inference_steps": 1, "speed": "off"})
    with closing(assemble(loaded, config, model_name="tiny", warm_up=False)) as service:
        (result,) = service.draw(service.read([{"body": {"prompt": "a cat"}}]))
    assert result.images[0].size == (32, 32)
