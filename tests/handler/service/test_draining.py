"""A server that is about to stop: what it refuses, finishes, ends, and tells."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from handler.api.replies import Reply, success_reply
from handler.service.draining import Drain, num_live_in
from handler.service.generation import GenerationService
from tests.support.clock import Clock
from tests.support.services import (
    HTTP,
    LONG,
    Make,
    counted,
    error_of,
    finish,
    open_request,
    statuses,
    tick,
)

INQUIRY = "drain-1"


def num_live(service: GenerationService) -> int | None:
    """What the service answers who asks for the requests that are left."""
    service.open("asker", {"body": {"cancel": INQUIRY}}, HTTP)
    return num_live_in(service.take_replies()["asker"].body)


def test_new_requests_are_refused_and_live_ones_finished(make: Make, clock: Clock) -> None:
    service = make(max_rows=4, max_images=2)
    # The last one waits for the others' rows: it was taken in, too.
    for name in ("a", "b", "c"):
        open_request(service, name, stream=name == "b")
    tick(service)
    service.drain(Drain(clock() + 1e6, INQUIRY))
    open_request(service, "new")
    open_request(service, "stream", stream=True)
    open_request(service, "invalid", num_inference_steps=0)
    tick(service)
    refused = service.take_replies()
    assert statuses(refused) == {"new": 503, "stream": 503, "invalid": 400}
    for name in ("new", "stream"):
        assert error_of(refused[name])["code"] == "draining"
        assert refused[name].content_type == "application/json"
        # Not before it can have started again.
        assert int(refused[name].headers["Retry-After"]) > 1e6
    assert statuses(finish(service)) == {"a": 200, "b": 200, "c": 200}
    assert num_live(service) == 0
    assert counted(service)["diffusers_requests_total", ("draining",)] == 2


def test_a_live_request_can_still_be_cancelled(make: Make, clock: Clock) -> None:
    service = make()
    open_request(service, "long", num_inference_steps=LONG)
    tick(service)
    service.drain(Drain(clock() + 1e6, INQUIRY))
    service.open("canceller", {"body": {"cancel": "long"}}, HTTP)
    assert statuses(finish(service)) == {"canceller": 200, "long": 499}


def test_what_takes_longer_than_the_drain_is_told_so(make: Make, clock: Clock) -> None:
    service = make()
    open_request(service, "plain", num_inference_steps=LONG)
    open_request(service, "stream", num_inference_steps=LONG, stream=True)
    service.drain(Drain(clock() + 1e6, INQUIRY))
    tick(service, 3)
    assert not service.take_replies()
    stream = service.stream_of("stream")
    assert stream is not None
    stream.opening()
    assert num_live(service) == 2
    service.drain(Drain(clock(), INQUIRY))
    tick(service)
    replies = service.take_replies()
    assert statuses(replies) == {"plain": 503, "stream": 503}
    assert error_of(replies["plain"])["code"] == "draining"
    assert int(replies["plain"].headers["Retry-After"]) >= 1
    event, data = replies["stream"].body.decode("ascii").strip().split("\n\n")[-1].split("\n")
    assert event == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "draining"
    assert num_live(service) == 0
    tick(service)
    assert service.load.is_idle


def test_what_is_drawn_already_is_delivered(make: Make, clock: Clock) -> None:
    may_encode = threading.Event()

    def encode(*args: Any, **kwargs: Any) -> Reply:
        assert may_encode.wait(60)
        return success_reply(*args, **kwargs)

    service = make(num_inference_steps=1, encode=encode)
    open_request(service, "drawn")
    while not service.load.is_idle:
        tick(service)
    service.drain(Drain(clock(), INQUIRY))
    tick(service)
    assert num_live(service) == 1
    may_encode.set()
    assert statuses(finish(service)) == {"drawn": 200}


def test_a_reply_that_was_not_taken_yet_counts_as_live(make: Make, clock: Clock) -> None:
    service = make()
    service.drain(Drain(clock() + 1e6, INQUIRY))
    open_request(service, "new")
    service.open("asker", {"body": {"cancel": INQUIRY}}, HTTP)
    replies = service.take_replies()
    assert num_live_in(replies["asker"].body) == 1
    assert num_live_in(replies["new"].body) is None


def test_only_who_drains_may_ask(make: Make, clock: Clock) -> None:
    service = make()
    for drain in (None, Drain(clock() + 1e6, "another")):
        service.drain(drain)
        service.open("asker", {"body": {"cancel": INQUIRY}}, HTTP)
        assert statuses(service.take_replies()) == {"asker": 404}


def test_a_drain_can_be_called_off(make: Make, clock: Clock) -> None:
    service = make()
    service.drain(Drain(clock() + 1e6, INQUIRY))
    service.drain(None)
    open_request(service, "new")
    assert statuses(finish(service)) == {"new": 200}


def test_the_file_says_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "drain.json"
    assert Drain.read(path, 0.0) is None
    for drain in (Drain(100.0, "first"), Drain(200.5, "second")):
        drain.write(path)
        assert Drain.read(path, 100.0) == drain
    assert list(tmp_path.iterdir()) == [path]


def test_a_drain_that_nobody_waits_for_any_more_is_none(tmp_path: Path) -> None:
    """Whoever asked for it was killed; the server must not refuse for ever."""
    path = tmp_path / "drain.json"
    Drain(100.0, "mine").write(path)
    assert Drain.read(path, 110.0) is not None
    assert Drain.read(path, 500.0) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'{"until_s": 3}', b"\xff"])
def test_what_is_no_drain_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "drain.json"
    path.write_bytes(content)
    assert Drain.read(path, 0.0) is None


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"live": "3"}', b'{"cancelled": 1}'])
def test_another_reply_is_no_number(body: bytes) -> None:
    assert num_live_in(body) is None
