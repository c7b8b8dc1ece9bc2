"""What clients, files and metrics are told of pictures that a safety checker flags."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from handler.assembly import assemble
from handler.config import HandlerConfig
from handler.errors import ConfigError, ContentFlagged
from handler.loading.pipeline import LoadedPipeline
from handler.service.generation import GenerationService
from tests.support.pipelines import build, with_safety_checker
from tests.support.services import counted, error_of, finish, open_request

SETTINGS = {"num_inference_steps": 2, "height": 32, "width": 32, "min_size_px": 8}


@contextmanager
def serving(pipeline: Any, **settings: Any) -> Iterator[GenerationService]:
    loaded = LoadedPipeline(pipeline, torch.device("cpu"), torch.float32)
    config = HandlerConfig(**SETTINGS | settings)
    service = assemble(loaded, config, model_name="tiny", warm_up=False)
    yield service
    service.close()


def test_a_flagged_picture_is_black_and_says_so() -> None:
    with serving(with_safety_checker(is_strict=True)) as service:
        open_request(service, "png")
        open_request(service, "json", num_images=2, output_format="json")
        open_request(service, "stream", stream=True)
        service.open("v2", {"body": KSERVE_V2}, {})
        replies = finish(service)
        outcomes = counted(service)
    assert {reply.status for reply in replies.values()} == {200}
    assert replies["png"].headers["X-Content-Flagged"] == "true"
    assert replies["json"].headers["X-Content-Flagged"] == "true, true"
    assert json.loads(replies["json"].body)["content_flagged"] == [True, True]
    assert b'"content_flagged":[true]' in replies["stream"].body
    v2 = {each["name"]: each for each in json.loads(replies["v2"].body)["outputs"]}
    assert v2["content_flagged"] == {
        "name": "content_flagged",
        "shape": [1],
        "datatype": "BOOL",
        "data": [True],
    }
    with Image.open(io.BytesIO(replies["png"].body)) as image:
        assert np.asarray(image).max() == 0
        assert json.loads(image.info["generation"])["content_flagged"] is True
        assert "Content flagged: true" in image.info["parameters"]
    assert outcomes["diffusers_requests_total", ("flagged",)] == 4
    assert not outcomes.get(("diffusers_requests_total", ("ok",)))


KSERVE_V2 = {
    "inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a cat"]}],
}


def test_a_picture_that_is_not_flagged_is_as_without_a_checker() -> None:
    with serving(with_safety_checker(is_strict=False)) as service:
        open_request(service, "png")
        open_request(service, "json", output_format="json")
        checked = finish(service)
    with serving(build("stable_diffusion")) as service:
        open_request(service, "png")
        open_request(service, "json", output_format="json")
        plain = finish(service)
    assert checked["png"].body == plain["png"].body
    assert "X-Content-Flagged" not in checked["png"].headers
    assert json.loads(checked["json"].body)["content_flagged"] == [False]
    assert "content_flagged" not in json.loads(plain["json"].body)


def test_a_flagged_picture_is_refused_where_the_operator_says_so() -> None:
    pipeline = with_safety_checker(is_strict=True)
    with serving(pipeline, safety_checker="refuse") as service:
        open_request(service, "a", num_images=2, output_format="json")
        open_request(service, "previews", stream=True, previews=1)
        replies = finish(service)
        outcomes = counted(service)
        with pytest.raises(ContentFlagged):
            service.draw(service.read([{"body": {"prompt": "a cat"}}]))
    assert replies["a"].status == 422
    assert error_of(replies["a"])["code"] == "content_flagged"
    assert "seed 3, 4" in error_of(replies["a"])["message"]
    assert replies["previews"].status == 400
    assert "previews" in error_of(replies["previews"])["fields"]
    assert outcomes["diffusers_requests_total", ("content_flagged",)] == 1
    assert pipeline.safety_checker is not None


def test_pictures_that_nothing_looks_at_cannot_be_refused() -> None:
    with (
        pytest.raises(ConfigError, match="needs a safety checker"),
        serving(build("stable_diffusion"), safety_checker="refuse"),
    ):
        pass
