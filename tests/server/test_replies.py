"""What comes back: formats, headers, metadata, and the same bytes again."""

from __future__ import annotations

import base64
import io
import json
import re
import time

import numpy as np
import pytest
from PIL import Image

from scripts.torchserve.process import TorchServer
from tests.support.client import MEDIA_TYPES, curl, decode, pixels, post_json

REQUEST = {"prompt": "a yellow star on a blue background", "seed": 11}


@pytest.fixture(scope="module")
def reference(url: str) -> np.ndarray:
    answer = post_json(url, REQUEST)
    assert answer.status == 200, answer.body
    return pixels(answer.body).astype(int)


@pytest.mark.parametrize("output_format", MEDIA_TYPES)
def test_output_format(url: str, reference: np.ndarray, output_format: str) -> None:
    answer = post_json(url, {**REQUEST, "output_format": output_format})
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"] == MEDIA_TYPES[output_format]
    picture = decode(output_format, answer.body)
    assert (picture.dtype, picture.shape) == (np.uint8, reference.shape)
    is_lossy = output_format in ("jpeg", "webp")
    assert abs(picture - reference).mean() <= (4.0 if is_lossy else 0.0)


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp", "npy", "json"])
def test_accept_header(url: str, output_format: str) -> None:
    by_header = post_json(url, REQUEST, "-H", f"Accept: {MEDIA_TYPES[output_format]}")
    by_field = post_json(url, {**REQUEST, "output_format": output_format})
    assert by_header.headers["content-type"] == MEDIA_TYPES[output_format]
    if output_format == "json":
        assert by_header.json()["images"] == by_field.json()["images"]
    else:
        assert by_header.body == by_field.body


def test_the_field_beats_the_header(url: str) -> None:
    answer = post_json(url, {**REQUEST, "output_format": "webp"}, "-H", "Accept: image/jpeg")
    assert answer.headers["content-type"] == "image/webp"


def test_headers(url: str) -> None:
    answer = post_json(url, REQUEST)
    assert answer.headers["x-seed"] == "11"
    assert answer.headers["x-request-id"]
    stages = re.findall(r"(\w+);dur=([\d.]+)", answer.headers["server-timing"])
    assert [name for name, _ in stages] == ["queue", "denoise", "decode", "encode"]
    assert all(float(milliseconds) >= 0 for _, milliseconds in stages)


def test_the_same_request_gives_the_same_bytes(url: str) -> None:
    for output_format in ("png", "jpeg", "webp", "npy", "array"):
        body = {**REQUEST, "output_format": output_format}
        assert post_json(url, body).body == post_json(url, body).body


def test_without_a_seed_one_is_drawn_and_reported(url: str) -> None:
    seeds = {post_json(url, {"prompt": "a moon"}).headers["x-seed"] for _ in range(3)}
    assert len(seeds) == 3


def test_json_reply_describes_the_request(url: str) -> None:
    answer = post_json(url, {**REQUEST, "num_images": 2, "output_format": "json"})
    assert answer.status == 200, answer.body
    reply = answer.json()
    assert len(reply["images"]) == 2
    assert reply["seeds"] == [11, 12]
    parameters = reply["parameters"]
    assert parameters["prompt"] == REQUEST["prompt"]
    assert (parameters["num_inference_steps"], parameters["guidance_scale"]) == (4, 7.5)


def test_image_k_of_a_request_is_drawn_with_seed_plus_k(url: str) -> None:
    several = post_json(url, {**REQUEST, "num_images": 2, "output_format": "json"}).json()
    second = post_json(url, {**REQUEST, "seed": 12})
    difference = pixels(base64.b64decode(several["images"][1])) - pixels(second.body).astype(int)
    assert abs(difference).max() <= 1


def test_png_carries_its_parameters(url: str) -> None:
    answer = post_json(url, REQUEST)
    with Image.open(io.BytesIO(answer.body)) as image:
        line = image.text["parameters"]  # type: ignore[attr-defined]
        others = [text for key, text in image.text.items() if key != "parameters"]  # type: ignore[attr-defined]
    assert line.startswith(str(REQUEST["prompt"]))
    assert "Steps: 4" in line
    assert "Seed: 11" in line
    assert json.loads(others[0])["seed"] == 11


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_exif_carries_the_parameters(url: str, output_format: str) -> None:
    answer = post_json(url, {**REQUEST, "output_format": output_format})
    with Image.open(io.BytesIO(answer.body)) as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert b"Seed: 11" in comment.replace(b"\0", b"")


def test_what_of_a_prompt_is_read_as_text_is_in_a_header(url: str) -> None:
    answer = post_json(url, {"prompt": "a (red:1.3) heart"})
    assert answer.status == 200, answer.body
    assert "(word:1.3)" in answer.headers["warning"]


def test_metrics_count_requests_and_pictures(server: TorchServer, url: str) -> None:
    names = ('diffusers_requests_total{outcome="ok"', "diffusers_images_total{")
    before = [metric(server, name) for name in names]
    post_json(url, {**REQUEST, "num_images": 2, "output_format": "json"})
    ends_s = time.monotonic() + 20
    # TorchServe reads them from the worker's output, beside the reply.
    while [metric(server, name) for name in names] != [before[0] + 1, before[1] + 2]:
        assert time.monotonic() < ends_s, curl(server.metrics_url).body.decode()
    text = curl(server.metrics_url).body.decode()
    assert "# TYPE diffusers_requests_total counter" in text
    assert "# TYPE diffusers_requests_in_flight gauge" in text
    assert "# TYPE diffusers_request_seconds histogram" in text
    assert "# TYPE ts_inference_requests_total counter" in text


def metric(server: TorchServer, start: str) -> float:
    """Return the value of the metric whose line begins with `start`; 0 while it has none."""
    lines = curl(server.metrics_url).body.decode().splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(start)), 0.0)
