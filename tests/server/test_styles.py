"""Samplers by name, long and weighted prompts, and flagged pictures, over the wire."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from scripts.torchserve.options import Options, Ports
from scripts.torchserve.process import TorchServer
from tests.support.client import pixels, post_json
from tests.support.packing import pack
from tests.support.pipelines import build, overflowing, with_safety_checker

REQUEST = {"prompt": "a red ring", "seed": 1, "steps": 4}
SETTINGS = {"num_inference_steps": 2, "height": 64, "width": 64, "num_threads": 1}
LONG = ", ".join(["masterpiece", *(f"detail {k}" for k in range(60)), "a red ring"])


def picture(url: str, **fields: object) -> np.ndarray:
    answer = post_json(url, {**REQUEST, **fields})
    assert answer.status == 200, answer.body
    return pixels(answer.body).astype(int)


def test_a_sampler_by_the_names_that_people_use(url: str) -> None:
    karras = picture(url, scheduler="DPM++ 2M Karras")
    for same in (
        {"sampler_name": "DPM++ 2M Karras", "use_karras_sigmas": True},
        {"sampler_name": "dpmpp_2m", "scheduler": "karras"},
        {"scheduler": "DPM++ 2M", "sigmas": "karras"},
    ):
        assert np.array_equal(picture(url, **same), karras)
    for other in ("DPM++ 2M", "DPM++ 2M SDE Karras", "DPM++ SDE Karras", "LMS Karras"):
        assert not np.array_equal(picture(url, scheduler=other), karras)


def test_a_sampler_that_diffusers_does_not_have(url: str) -> None:
    answer = post_json(url, {**REQUEST, "scheduler": "DPM++ 2S a Karras"})
    assert answer.status == 400
    assert "diffusers has no such solver" in answer.json()["error"]["fields"]["scheduler"]


def test_as_many_steps_as_in_training_are_refused(url: str) -> None:
    answer = post_json(url, {**REQUEST, "steps": 1000, "scheduler": "DDIM", "sigmas": "ddim"})
    assert answer.status == 400
    assert "allowed: 1 to 999" in answer.json()["error"]["fields"]["num_inference_steps"]


def test_nothing_of_a_long_prompt_is_dropped(url: str) -> None:
    answer = post_json(url, {**REQUEST, "prompt": LONG})
    assert answer.status == 200
    assert "warning" not in answer.headers
    assert not np.array_equal(
        pixels(answer.body), pixels(post_json(url, {**REQUEST, "prompt": LONG[:-9]}).body)
    )


def test_weights_count_where_they_are_asked_for(url: str) -> None:
    prompt = "a (red:1.3) ring [blue]"
    plain = post_json(url, {**REQUEST, "prompt": prompt})
    assert "prompt_weighting" in plain.headers["warning"]
    weighted = post_json(url, {**REQUEST, "prompt": prompt, "prompt_weighting": True})
    assert "warning" not in weighted.headers
    assert not np.array_equal(pixels(plain.body), pixels(weighted.body))


@pytest.fixture(scope="module")
def flagging(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServer]:
    folder = tmp_path_factory.mktemp("flagging")
    with_safety_checker(is_strict=True).save_pretrained(folder / "pipeline")
    archive = pack(folder, folder / "pipeline", settings=SETTINGS)
    server = TorchServer(Options(archive, folder / "run", Ports.free()))
    with server.running(timeout_s=120):
        yield server


def test_a_flagged_picture_says_so(flagging: TorchServer) -> None:
    answer = post_json(flagging.predictions_url, {"prompt": "a"})
    assert answer.status == 200
    assert answer.headers["x-content-flagged"] == "true"
    assert pixels(answer.body).max() == 0
    body = {"prompt": "a", "num_images": 2, "output_format": "json"}
    answer = post_json(flagging.predictions_url, body)
    assert answer.json()["content_flagged"] == [True, True]


def test_a_picture_that_is_not_finite_is_an_error(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("overflows")
    overflowing(build("stable_diffusion")).save_pretrained(folder / "pipeline")
    archive = pack(folder, folder / "pipeline", settings=SETTINGS)
    server = TorchServer(Options(archive, folder / "run", Ports.free()))
    with server.running(timeout_s=120):
        answer = post_json(server.predictions_url, {"prompt": "a"})
    assert answer.status == 500
    assert answer.json()["error"]["code"] == "pipeline_failed"
    assert "DTYPE=float32" in answer.json()["error"]["message"]
