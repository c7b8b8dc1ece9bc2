"""Replies: content types, headers, JSON shapes, and the bytes that repeat."""

from __future__ import annotations

import base64
import io
import json
from itertools import count

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from handler.api.call import Call, Envelope
from handler.api.replies import Reply, cancel_reply, error_reply, success_reply
from handler.api.request import GenerationRequest
from handler.api.result import Result, Timings
from handler.config import HandlerConfig
from handler.errors import InvalidRequest, QueueFull, RequestError

CONFIG = HandlerConfig()


def request(prompt: str = "a cat", seed: int = 7, num_images: int = 1) -> GenerationRequest:
    return GenerationRequest(
        prompt=prompt,
        negative_prompt=None,
        seed=seed,
        num_inference_steps=20,
        guidance_scale=7.5,
        height=8,
        width=16,
        num_images=num_images,
        scheduler=None,
    )


def result(
    prompt: str = "a cat",
    seed: int = 7,
    num_images: int = 1,
    warnings: tuple[str, ...] = (),
    timings: Timings | None = None,
) -> Result:
    rng = np.random.default_rng(seed)
    images = tuple(
        Image.fromarray(rng.integers(0, 256, (8, 16, 3), dtype=np.uint8)) for _ in range(num_images)
    )
    timings = timings or Timings(queue_s=0.001, denoise_s=1.5, decode_s=0.25)
    return Result(request(prompt, seed, num_images), images, timings, warnings)


def reply_to(
    results: list[Result],
    output_format: str = "png",
    envelope: Envelope = Envelope.PLAIN,
    envelope_id: str | None = None,
    config: HandlerConfig = CONFIG,
    request_id: str = "id-1",
    jpeg_quality: int = CONFIG.jpeg_quality,
) -> Reply:
    call = Call(
        requests=tuple(r.request for r in results),
        envelope=envelope,
        output_format=output_format,
        request_id=None,
        deadline_s=None,
        stream=False,
        preview_every=0,
        envelope_id=envelope_id,
        jpeg_quality=jpeg_quality,
    )
    ticks = count()
    return success_reply(
        call,
        results,
        request_id=request_id,
        model_name="sd",
        config=config,
        clock_s=lambda: next(ticks) * 0.0125,
    )


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize(
    ("output_format", "content_type"),
    [("png", "image/png"), ("jpeg", "image/jpeg"), ("webp", "image/webp")],
)
def test_image_replies(output_format: str, content_type: str) -> None:
    reply = reply_to([result()], output_format)
    assert (reply.status, reply.content_type) == (200, content_type)
    image = Image.open(io.BytesIO(reply.body))
    assert image.format == output_format.upper()
    assert image.size == (16, 8)


def test_headers() -> None:
    headers = reply_to([result()]).headers
    assert headers == {
        "X-Request-Id": "id-1",
        "X-Seed": "7",
        "Server-Timing": "queue;dur=1.0, denoise;dur=1500.0, decode;dur=250.0, encode;dur=12.5",
    }


def test_json_reply() -> None:
    finished = result(num_images=3, warnings=("cut",))
    reply = reply_to([finished], "json")
    assert reply.content_type == "application/json"
    assert reply.headers["X-Seed"] == "7, 8, 9"
    body = json.loads(reply.body)
    assert set(body) == {"images", "content_type", "seeds", "parameters", "warnings"}
    assert body["content_type"] == "image/png"
    assert body["seeds"] == [7, 8, 9]
    assert body["warnings"] == ["cut"]
    assert body["parameters"]["prompt"] == "a cat"
    assert body["parameters"]["num_inference_steps"] == 20
    for encoded, image in zip(body["images"], finished.images, strict=True):
        assert np.array_equal(pixels(base64.b64decode(encoded)), np.asarray(image))


def test_each_picture_carries_its_own_seed() -> None:
    body = json.loads(reply_to([result(num_images=2)], "json").body)
    texts = [Image.open(io.BytesIO(base64.b64decode(each))).text for each in body["images"]]  # type: ignore[attr-defined]
    assert ["Seed: 7," in texts[0]["parameters"], "Seed: 8," in texts[1]["parameters"]] == [
        True,
        True,
    ]


def test_array_reply_speaks_the_upstream_clients_protocol() -> None:
    finished = result()
    reply = reply_to([finished], "array")
    assert reply.content_type == "application/json"
    array = np.array(json.loads(reply.body.decode()), dtype="uint8")
    assert array.shape == (8, 16, 3)
    assert np.array_equal(array, np.asarray(finished.images[0]))


@pytest.mark.parametrize("output_format", ["array", "npy"])
def test_several_pictures_get_a_first_dimension(output_format: str) -> None:
    finished = result(num_images=2)
    body = reply_to([finished], output_format).body
    several = np.load(io.BytesIO(body)) if output_format == "npy" else np.array(json.loads(body))
    assert several.shape == (2, 8, 16, 3)
    for array, image in zip(several, finished.images, strict=True):
        assert np.array_equal(array, np.asarray(image))


def test_npy_reply() -> None:
    finished = result()
    reply = reply_to([finished], "npy")
    assert reply.content_type == "application/x-npy"
    assert np.array_equal(np.load(io.BytesIO(reply.body)), np.asarray(finished.images[0]))


@pytest.mark.parametrize("output_format", ["png", "jpeg"])
def test_kserve_v1_reply(output_format: str) -> None:
    results = [result("a", 1), result("b", 2, num_images=2)]
    reply = reply_to(results, output_format, Envelope.KSERVE_V1)
    assert reply.content_type == "application/json"
    assert "X-Seed" not in reply.headers
    predictions = json.loads(reply.body)["predictions"]
    assert [p["seeds"] for p in predictions] == [[1], [2, 3]]
    assert [p["parameters"]["prompt"] for p in predictions] == ["a", "b"]
    first = Image.open(io.BytesIO(base64.b64decode(predictions[0]["images"][0])))
    assert first.format == output_format.upper()


@pytest.mark.parametrize("envelope_id", [None, "7"])
def test_kserve_v2_reply(envelope_id: str | None) -> None:
    results = [result("a", 1), result("b", 2)]
    reply = reply_to(results, "png", Envelope.KSERVE_V2, envelope_id)
    body = json.loads(reply.body)
    assert body["model_name"] == "sd"
    assert body.get("id") == envelope_id
    images, seeds = body["outputs"]
    assert (images["name"], images["datatype"], images["shape"]) == ("images", "BYTES", [2])
    assert (seeds["name"], seeds["datatype"], seeds["data"]) == ("seeds", "INT64", [1, 2])
    for encoded, finished in zip(images["data"], results, strict=True):
        assert np.array_equal(pixels(base64.b64decode(encoded)), np.asarray(finished.images[0]))


def test_the_longest_stage_stands_for_requests_side_by_side() -> None:
    results = [
        result(timings=Timings(queue_s=1, denoise_s=2, decode_s=3)),
        result(timings=Timings(queue_s=3, denoise_s=1, decode_s=2)),
    ]
    timing = reply_to(results, envelope=Envelope.KSERVE_V1).headers["Server-Timing"]
    assert timing.startswith("queue;dur=3000.0, denoise;dur=2000.0, decode;dur=3000.0, encode;")


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp", "npy", "json", "array"])
def test_bodies_do_not_depend_on_time_or_id(output_format: str) -> None:
    first = reply_to([result()], output_format, request_id="one")
    slow = Timings(queue_s=9, denoise_s=9, decode_s=9)
    second = reply_to([result(timings=slow)], output_format, request_id="two")
    assert first.body == second.body
    assert first.headers != second.headers
    assert reply_to([result(seed=8)], output_format).body != first.body


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_metadata_can_be_turned_off(output_format: str) -> None:
    secret = "unmistakable"
    off = HandlerConfig(embed_metadata=False)
    with_metadata = reply_to([result(secret)], output_format).body
    without = reply_to([result(secret)], output_format, config=off).body
    forms = (secret.encode(), secret.encode("utf-16-be"))
    assert any(form in with_metadata for form in forms)
    assert not any(form in without for form in forms)


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_jpeg_quality_is_that_of_the_call(output_format: str) -> None:
    coarse, middle, fine = (
        len(reply_to([result()], output_format, jpeg_quality=quality).body)
        for quality in (5, 90, 100)
    )
    assert coarse < middle < fine


def test_warnings_are_headers_in_rfc_7234s_form() -> None:
    warnings = ('3 tokens dropped: "on a mat"', "second")
    header = reply_to([result(warnings=warnings)]).headers["Warning"]
    assert header == '299 - "3 tokens dropped: \\"on a mat\\"", 299 - "second"'


def test_a_warning_of_several_requests_is_given_once() -> None:
    results = [result(warnings=("cut",)), result(warnings=("cut",))]
    assert reply_to(results, envelope=Envelope.KSERVE_V1).headers["Warning"] == '299 - "cut"'


def test_no_warning_no_header() -> None:
    assert "Warning" not in reply_to([result()]).headers


@given(st.lists(st.text(), max_size=12), st.text())
def test_headers_are_printable_ascii(warnings: list[str], request_id: str) -> None:
    reply = reply_to([result(warnings=tuple(warnings))], "npy", request_id=request_id)
    for name, value in reply.headers.items():
        assert name.isascii()
        assert all(" " <= c <= "~" for c in value)
        assert len(value) <= 4000


def test_error_reply() -> None:
    reply = error_reply(InvalidRequest("seed: bad", {"seed": "bad"}), request_id="id-1")
    assert (reply.status, reply.phrase) == (400, "Bad Request")
    assert reply.content_type == "application/json"
    assert reply.headers == {"X-Request-Id": "id-1"}
    assert json.loads(reply.body) == {
        "error": {"code": "invalid_request", "message": "seed: bad", "fields": {"seed": "bad"}}
    }


def test_an_errors_own_headers_are_sent() -> None:
    reply = error_reply(QueueFull("full", retry_after_s=3), request_id="id-1")
    assert reply.headers["Retry-After"] == "3"


@given(st.text(), st.dictionaries(st.text(), st.text()), st.text())
def test_any_error_can_be_sent(message: str, fields: dict[str, str], request_id: str) -> None:
    reply = error_reply(RequestError(message, fields), request_id=request_id)
    assert json.loads(reply.body)["error"]["message"] == message
    assert all(" " <= c <= "~" for c in reply.headers["X-Request-Id"])


def test_cancel_reply() -> None:
    reply = cancel_reply("victim", request_id="id-2")
    assert reply.status == 200
    assert json.loads(reply.body) == {"cancelled": "victim"}
    assert reply.headers == {"X-Request-Id": "id-2"}
