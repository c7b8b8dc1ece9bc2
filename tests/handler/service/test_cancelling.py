"""Requests that are cancelled, or whose client goes away, in every state."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from handler.api.replies import Reply, success_reply
from tests.support.services import LONG, Make, counted, finish, open_request, statuses, tick


def gated(gate: threading.Event) -> Callable[..., Reply]:
    """An encoder that waits for `gate`."""

    def encode(*args: Any, **kwargs: Any) -> Reply:
        assert gate.wait(60)
        return success_reply(*args, **kwargs)

    return encode


@pytest.mark.parametrize("wanted", ["target", "chosen"])
def test_cancelling_a_running_request(make: Make, wanted: str) -> None:
    service = make()
    open_request(service, "other", num_inference_steps=6)
    open_request(service, "target", num_inference_steps=LONG, request_id="chosen")
    tick(service, 3)
    service.open("canceller", {"body": {"cancel": wanted}}, {})
    replies = service.take_replies()
    assert statuses(replies) == {"target": 499, "canceller": 200}
    assert json.loads(replies["canceller"].body) == {"cancelled": wanted}
    assert service.load.num_running == 1
    assert finish(service)["other"].status == 200


def test_cancelling_a_waiting_request(make: Make) -> None:
    service = make(max_rows=2, max_images=1)
    open_request(service, "running", num_inference_steps=9)
    open_request(service, "waiting")
    tick(service)
    assert service.load.num_waiting == 1
    service.open("canceller", {"body": {"cancel": "waiting"}}, {})
    assert service.take_replies()["waiting"].status == 499
    assert finish(service).keys() == {"running"}


def test_cancelling_before_the_first_tick_and_twice(make: Make) -> None:
    service = make()
    open_request(service, "target")
    for canceller in ("one", "two"):
        service.open(canceller, {"body": {"cancel": "target"}}, {})
    assert statuses(finish(service)) == {"target": 499, "one": 200, "two": 404}


def test_cancelling_a_request_that_is_being_encoded(make: Make) -> None:
    gate = threading.Event()
    service = make(encode_threads=1, encode=gated(gate))
    open_request(service, "target", num_inference_steps=1)
    while not service.load.is_idle:
        tick(service)
    assert service.live_ids == {"target"}
    service.open("canceller", {"body": {"cancel": "target"}}, {})
    replies = service.take_replies()
    gate.set()
    assert statuses(replies) == {"target": 499, "canceller": 200}
    # The picture that the pool is still to encode is nobody's reply.
    open_request(service, "next")
    assert finish(service).keys() == {"next"}


def test_cancelling_what_is_answered_or_unknown_is_404(make: Make) -> None:
    service = make()
    open_request(service, "done")
    done = finish(service)
    for wanted in ("done", "nobody", "canceller"):
        service.open("canceller", {"body": {"cancel": wanted}}, {})
        assert service.take_replies()["canceller"].status == 404
    assert done["done"].status == 200


def test_cancelling_a_kserve_request_ends_all_of_it(make: Make) -> None:
    service = make()
    instances = [{"prompt": "a", "num_inference_steps": n} for n in (1, LONG)]
    service.open("target", {"body": {"instances": instances}}, {})
    tick(service, 8)
    service.open("canceller", {"body": {"cancel": "target"}}, {})
    assert finish(service)["target"].status == 499
    assert service.load.is_idle


def test_a_dropped_request_is_answered_to_nobody_in_any_state(make: Make) -> None:
    gate = threading.Event()
    service = make(max_rows=4, max_images=1, encode_threads=1, encode=gated(gate))
    open_request(service, "encoding", num_inference_steps=1)
    tick(service, 8)
    for request_id in ("running", "running too", "waiting"):
        open_request(service, request_id, num_inference_steps=LONG)
    service.open("answered", {}, {})
    tick(service)
    assert (service.load.num_running, service.load.num_waiting) == (2, 1)
    for request_id in ("encoding", "running", "waiting", "answered", "running too", "never there"):
        service.drop(request_id)
    gate.set()
    assert not service.live_ids
    assert service.load.is_idle
    assert finish(service) == {}


def test_the_steps_of_a_dropped_request_are_counted_without_another(make: Make) -> None:
    service = make()
    open_request(service, "gone", num_inference_steps=LONG)
    tick(service, 9)
    service.drop("gone")
    service.advance(0.0)
    assert 0 < counted(service)["diffusers_steps_total", ()] <= 9
    assert service.load.is_idle
