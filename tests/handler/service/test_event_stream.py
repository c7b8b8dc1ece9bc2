"""Server-sent events of one request, byte for byte."""

from __future__ import annotations

import base64
import dataclasses
import json

import pytest
import torch

from handler.api.replies import Reply, error_reply
from handler.engine.ticket import StepEnd
from handler.errors import Cancelled, RequestError, TooLarge
from handler.pipelines.preview import Previewer
from handler.service.event_stream import EventStream
from tests.support.clock import Clock
from tests.support.pipelines import shared

LATENTS = torch.zeros(1, 4, 16, 16)
PNG = Reply(200, "OK", "image/png", b"\x89PNG", {"X-Seed": "3, 4", "X-Request-Id": "a"})


def make(preview_every: int = 0) -> tuple[EventStream, Clock]:
    clock = Clock(7.0)
    return EventStream(Previewer(shared("stable_diffusion")), preview_every, clock), clock


def test_a_step() -> None:
    stream, clock = make()
    clock.now_s += 1.23456
    stream.on_step(StepEnd(3, 50, LATENTS))
    assert stream.take() == (b'event: step\ndata: {"step":3,"num_steps":50,"elapsed_s":1.235}\n\n')
    assert stream.take() == b""


def test_a_pipeline_that_does_not_tell_its_steps() -> None:
    stream, _ = make(preview_every=1)
    stream.on_step(StepEnd(1, None, None))
    assert stream.take() == b'event: step\ndata: {"step":1,"num_steps":null,"elapsed_s":0.0}\n\n'


def test_events_are_handed_out_once_and_in_order() -> None:
    stream, _ = make()
    for step in (1, 2):
        stream.on_step(StepEnd(step, 3, None))
    first = stream.take()
    stream.on_step(StepEnd(3, 3, None))
    assert [first.count(b"event"), stream.take().count(b"event")] == [2, 1]


@pytest.mark.parametrize(("every", "steps"), [(0, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4]), (9, [])])
def test_a_preview_every_so_many_steps(every: int, steps: list[int]) -> None:
    stream, _ = make(preview_every=every)
    for step in range(1, 6):
        stream.on_step(StepEnd(step, 5, LATENTS))
    blocks = stream.take().decode("ascii").split("\n\n")
    previews = [json.loads(b.split("data: ")[1]) for b in blocks if b.startswith("event: preview")]
    assert [p["step"] for p in previews] == steps
    assert {p["content_type"] for p in previews} <= {"image/jpeg"}
    assert all(base64.b64decode(p["image"]).startswith(b"\xff\xd8") for p in previews)


def test_the_opening_fixes_status_and_type() -> None:
    stream, _ = make()
    assert stream.opening() == Reply(200, "OK", "text/event-stream", b": accepted\n\n")
    stream.on_step(StepEnd(1, 2, None))
    assert stream.opening().body.startswith(b": accepted\n\nevent: step\n")
    assert stream.take() == b""


def test_the_last_chunk_holds_what_is_pending_and_the_picture() -> None:
    stream, _ = make()
    stream.on_step(StepEnd(2, 2, None))
    last = stream.close(PNG)
    assert (last.status, last.content_type, last.headers) == (200, "text/event-stream", PNG.headers)
    step, image, rest = last.body.split(b"\n\n")
    assert step.startswith(b"event: step")
    assert image == (
        b'event: image\ndata: {"content_type":"image/png","seeds":[3,4],"image":"iVBORw=="}'
    )
    assert rest == b""


def test_a_warning_is_told_with_the_picture() -> None:
    stream, _ = make()
    warned = dataclasses.replace(PNG, headers={**PNG.headers, "Warning": '299 - "cut"'})
    data = json.loads(stream.close(warned).body.split(b"data: ")[1])
    assert data["warning"] == '299 - "cut"'


def test_json_is_passed_on_as_it_is() -> None:
    stream, _ = make()
    body = b'{"images":["AA=="],"seeds":[9007199254740991],"x":0.1}'
    last = stream.close(Reply(200, "OK", "application/json", body))
    assert last.body == b"event: image\ndata: " + body + b"\n\n"


@pytest.mark.parametrize("error", [Cancelled("cancelled"), TooLarge("large\nand more")])
def test_an_error_is_an_event_with_its_status(error: RequestError) -> None:
    stream, _ = make()
    stream.opening()
    last = stream.close(error_reply(error, request_id="a"))
    assert last.status == error.status
    event, data = last.body.decode("ascii").strip().split("\n")
    assert event == "event: error"
    assert json.loads(data.removeprefix("data: ")) == {"status": error.status, **error.body()}


def test_an_error_before_the_stream_has_begun_is_an_ordinary_reply() -> None:
    stream, _ = make()
    stream.on_step(StepEnd(1, 2, None))
    reply = error_reply(TooLarge("large"), request_id="a")
    assert stream.close(reply) is reply
