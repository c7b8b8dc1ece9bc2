"""Requests that share the worker: overtaking, mixing, cancelling, watching, going away."""

from __future__ import annotations

import base64
import json
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import IO

import pytest

from tests.server.client import Answer, curl, pixels, post_json

# Minutes of work on one thread: whatever is over before this has overtaken it.
ENDLESS = {
    "prompt": "a ring",
    "seed": 1,
    "num_inference_steps": 1000,
    "num_images": 4,
    "height": 768,
    "width": 768,
    "output_format": "json",
}
MIXED = [
    {"prompt": "a red heart", "seed": 1, "num_inference_steps": 9},
    {"prompt": "a blue star", "seed": 2, "num_inference_steps": 4, "guidance_scale": 1.0},
    {"prompt": "a green moon", "seed": 3, "num_inference_steps": 12, "scheduler": "euler_a"},
    {"prompt": "a ring", "seed": 4, "num_inference_steps": 6, "scheduler": "dpm++"},
    {"prompt": "a cross", "seed": 5, "num_inference_steps": 5, "height": 128},
    {"prompt": "a square", "seed": 6, "num_inference_steps": 7, "negative_prompt": "blue"},
]


@contextmanager
def watching(url: str, fields: dict[str, object]) -> Iterator[IO[str]]:
    """Post `fields` and give the stream of events, with the first step behind it."""
    process = subprocess.Popen(
        [
            *("curl", "-sSN", "--noproxy", "*", "--max-time", "120", url),
            *("-H", "Content-Type: application/json", "-H", "Accept: text/event-stream"),
            *("-d", json.dumps(fields)),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("event: step"):
                break
        yield process.stdout
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def events(lines: IO[str]) -> list[tuple[str, dict[str, object]]]:
    """Read server-sent events until their end."""
    blocks = [block.splitlines() for block in lines.read().split("\n\n") if "event: " in block]
    return [(head.removeprefix("event: "), json.loads(data[6:])) for head, data in blocks]


def cancel(url: str, request_id: str) -> Answer:
    """Cancel a request that is on its way: it may not have arrived yet."""
    ends_s = time.monotonic() + 30
    while True:
        answer = post_json(url, {"cancel": request_id})
        if answer.status != 404 or time.monotonic() > ends_s:
            return answer


def test_mixed_requests_at_once_equal_each_alone(url: str) -> None:
    alone = [post_json(url, fields) for fields in MIXED]
    with ThreadPoolExecutor(len(MIXED)) as threads:
        together = list(threads.map(lambda fields: post_json(url, fields), MIXED))
    assert {answer.status for answer in (*alone, *together)} == {200}
    pictures = [pixels(answer.body).astype(int) for answer in alone]
    for picture, answer in zip(pictures, together, strict=True):
        assert abs(picture - pixels(answer.body)).max() <= 1
    # Would a neighbour's picture have passed?
    assert abs(pictures[0] - pictures[1]).max() > 1


def test_a_short_request_overtakes_a_long_one_which_is_then_cancelled(url: str) -> None:
    with watching(url, {**ENDLESS, "request_id": "long-1"}) as lines:
        short = post_json(url, {"prompt": "a heart", "num_inference_steps": 2})
        assert short.status == 200
        duplicate = post_json(url, {"prompt": "a heart", "request_id": "long-1"})
        assert duplicate.status == 409
        assert cancel(url, "long-1").status == 200
        name, data = events(lines)[-1]
    assert (name, data["status"]) == ("error", 499)


def test_a_cancelled_request_gets_499(url: str) -> None:
    with ThreadPoolExecutor(1) as thread:
        long = thread.submit(post_json, url, {**ENDLESS, "request_id": "long-2"})
        canceller = cancel(url, "long-2")
        assert canceller.status == 200
        assert canceller.json() == {"cancelled": "long-2"}
        assert long.result().status == 499
        assert long.result().error()["code"] == "cancelled"


def test_an_id_sent_as_a_header_can_be_cancelled_by(url: str) -> None:
    with ThreadPoolExecutor(1) as thread:
        arguments = ("-H", "X-Request-Id: from-header")
        long = thread.submit(post_json, url, ENDLESS, *arguments)
        assert cancel(url, "from-header").status == 200
        assert long.result().status == 499


def test_cancelling_nothing_is_404(url: str) -> None:
    answer = post_json(url, {"cancel": "nobody"})
    assert answer.status == 404
    assert answer.error()["code"] == "not_found"


def test_events_of_a_request(url: str) -> None:
    fields = {"prompt": "a heart", "seed": 5, "num_inference_steps": 6, "previews": 2}
    plain = post_json(url, {"prompt": "a heart", "seed": 5, "num_inference_steps": 6})
    with watching(url, fields) as lines:
        rest = events(lines)
    steps = [data["step"] for name, data in rest if name == "step"]
    assert steps == [2, 3, 4, 5, 6]  # `watching` has read the first.
    previews = [data for name, data in rest if name == "preview"]
    assert [preview["step"] for preview in previews] == [2, 4, 6]
    assert pixels(base64.b64decode(str(previews[0]["image"]))).shape[2] == 3
    name, last = rest[-1]
    assert name == "image"
    assert base64.b64decode(str(last["image"])) == plain.body


def test_a_client_that_goes_away_frees_its_place(url: str) -> None:
    with watching(url, {**ENDLESS, "request_id": "gone"}):
        assert post_json(url, {"prompt": "a", "request_id": "gone"}).status == 409
    ends_s = time.monotonic() + 20
    statuses = []
    while not statuses or (statuses[-1] != 200 and time.monotonic() < ends_s):
        statuses.append(post_json(url, {"prompt": "a", "steps": 1, "request_id": "gone"}).status)
    assert statuses[-1] == 200


def test_a_deadline_ends_a_request_with_504(url: str) -> None:
    started_s = time.monotonic()
    answer = post_json(url, {**ENDLESS, "deadline_s": 0.5})
    assert answer.status == 504
    assert answer.error()["code"] == "deadline_exceeded"
    assert time.monotonic() - started_s < 20


@pytest.mark.parametrize("path", ["/ping", "/predictions/stable_diffusion"])
def test_the_server_is_well_afterwards(url: str, path: str) -> None:
    base = url.removesuffix("/predictions/stable_diffusion")
    arguments = ("-d", "prompt=a") if "predictions" in path else ()
    assert curl(base + path, *arguments).status == 200
