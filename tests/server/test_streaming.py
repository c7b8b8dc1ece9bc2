"""Events while a request runs, and what becomes of it when nobody listens any more."""

from __future__ import annotations

import base64
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from handler.diffusers_handler import SILENT_AFTER_S
from scripts.torchserve.process import TorchServer
from tests.support.client import curl, pixels, post_json
from tests.support.traffic import ENDLESS, SSE, metrics, until, watching

FIELDS: dict[str, object] = {"prompt": "a heart", "seed": 5, "num_inference_steps": 6}
# Long, but of many short ticks.
LONG = {"prompt": "a ring", "seed": 1, "num_inference_steps": 1000}


def test_events_of_a_request(url: str) -> None:
    plain = post_json(url, FIELDS)
    with watching(url, {**FIELDS, "previews": 2}) as watched:
        rest = watched.events()
    steps = [data for name, data in rest if name == "step"]
    assert [data["step"] for data in steps] == [2, 3, 4, 5, 6]  # `watching` has read the first.
    assert {data["num_steps"] for data in steps} == {6}
    elapsed = [float(str(data["elapsed_s"])) for data in steps]
    assert elapsed == sorted(elapsed)
    previews = [data for name, data in rest if name == "preview"]
    assert [preview["step"] for preview in previews] == [2, 4, 6]
    for preview in previews:
        assert preview["content_type"] == "image/jpeg"
        height, width, _ = pixels(base64.b64decode(str(preview["image"]))).shape
        assert 1 <= height == width < 256
    name, last = rest[-1]
    assert name == "image"
    assert base64.b64decode(str(last["image"])) == plain.body
    assert last["seeds"] == [5]


def test_the_head_of_a_stream(url: str) -> None:
    by_field = post_json(url, {**FIELDS, "stream": True})
    by_header = post_json(url, FIELDS, *SSE)
    for answer in (by_field, by_header):
        assert answer.status == 200
        assert answer.headers["content-type"] == "text/event-stream"
    assert by_field.body.count(b"event: step") == by_header.body.count(b"event: step") == 6


@pytest.mark.parametrize("output_format", ["json", "jpeg", "npy"])
def test_the_last_event_holds_what_the_plain_reply_does(url: str, output_format: str) -> None:
    fields = {**FIELDS, "output_format": output_format}
    plain = post_json(url, fields)
    with watching(url, fields) as watched:
        name, last = watched.events()[-1]
    assert name == "image"
    if output_format == "json":
        assert last == plain.json()
    else:
        assert base64.b64decode(str(last["image"])) == plain.body


def test_an_invalid_stream_is_an_ordinary_error(url: str) -> None:
    answer = post_json(url, {"prompt": "a", "steps": 0}, *SSE)
    assert answer.status == 400
    assert "num_inference_steps" in answer.error()["fields"]


def test_several_streams_at_once_have_each_their_own_events(url: str) -> None:
    bodies = [{**FIELDS, "seed": seed, "num_inference_steps": 5 + seed} for seed in range(6)]
    with ThreadPoolExecutor(6) as threads:
        plain = list(threads.map(lambda b: post_json(url, {**b, "output_format": "npy"}), bodies))
        streams = list(
            threads.map(lambda b: post_json(url, {**b, "output_format": "npy"}, *SSE), bodies)
        )
    for body, one, stream in zip(bodies, plain, streams, strict=True):
        assert stream.body.count(b"event: step") == body["num_inference_steps"]
        encoded = stream.body.split(b'"image":"')[1].split(b'"')[0]
        picture, other = base64.b64decode(encoded), one.body
        assert len(picture) == len(other)
        assert max(abs(a - b) for a, b in zip(picture[-999:], other[-999:], strict=True)) <= 1


def test_a_client_that_leaves_is_cancelled_while_others_run(server: TorchServer, url: str) -> None:
    before = num_disconnected(server)
    with watching(url, LONG) as other, watching(url, {**LONG, "request_id": "gone"}) as leaver:
        assert post_json(url, {"prompt": "a", "request_id": "gone"}).status == 409
        leaver.leave()
        left_s = time.monotonic()
        # Its id is free again as soon as it has ended.
        again = until(
            lambda: post_json(url, {"prompt": "a", "steps": 1, "request_id": "gone"}),
            lambda answer: answer.status == 200,
        )
        assert again.status == 200
        assert time.monotonic() - left_s < 5
        assert other.read_until("event: step")
        assert until(lambda: num_disconnected(server), lambda n: n > before) == before + 1
        other.leave()
    assert is_idle(server)


def test_the_last_client_that_leaves_is_noticed_without_another(
    server: TorchServer, url: str
) -> None:
    assert is_idle(server)
    with watching(url, ENDLESS) as leaver:
        busy = until(lambda: metrics(server)["diffusers_rows_in_flight"], lambda rows: rows == 8)
        assert busy == 8
        leaver.leave()
        started_s = time.monotonic()
        assert is_idle(server)
        assert time.monotonic() - started_s < 3 * SILENT_AFTER_S
    # The worker is the same and well.
    assert curl(url, "-F", "prompt=a").status == 200


def num_disconnected(server: TorchServer) -> float:
    return metrics(server).get("diffusers_requests_total{outcome=disconnected}", 0.0)


def is_idle(server: TorchServer) -> bool:
    """Whether the gauges come down to nothing, without a request that would bring them there."""
    names = ("requests_in_flight", "requests_waiting", "rows_in_flight")
    gauges = until(
        lambda: [metrics(server)[f"diffusers_{name}"] for name in names],
        lambda values: not any(values),
    )
    return not any(gauges)
