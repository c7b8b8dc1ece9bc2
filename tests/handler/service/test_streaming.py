"""Requests that want their events while they run."""

from __future__ import annotations

import base64
import json

import pytest

from tests.support.services import Make, finish, open_request, tick


def test_a_streams_events_come_as_they_happen(make: Make) -> None:
    service = make()
    open_request(service, "s", stream=True, num_inference_steps=3)
    stream = service.stream_of("s")
    assert stream is not None
    assert stream.opening().content_type == "text/event-stream"
    while not (events := stream.take()):
        tick(service)
    assert events.startswith(b"event: step")
    reply = finish(service)["s"]
    assert reply.body.count(b"event: image") == 1
    assert service.stream_of("s") is None
    open_request(service, "plain")
    assert service.stream_of("plain") is None


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp", "npy", "json", "array"])
def test_a_stream_ends_with_what_the_plain_reply_holds(make: Make, output_format: str) -> None:
    service = make()
    open_request(service, "plain", output_format=output_format)
    open_request(service, "stream", output_format=output_format, stream=True)
    replies = finish(service)
    assert replies["stream"].content_type == "text/event-stream"
    event, data = replies["stream"].body.decode("ascii").strip().split("\n\n")[-1].split("\n")
    assert event == "event: image"
    value = json.loads(data.removeprefix("data: "))
    if output_format in ("json", "array"):
        assert value == json.loads(replies["plain"].body)
    else:
        assert base64.b64decode(value["image"]) == replies["plain"].body
        assert value["seeds"] == [3]
        assert value["content_type"] == replies["plain"].content_type
