"""Requests that run out of time, and those that are refused because they would."""

from __future__ import annotations

import functools
from typing import Any

from tests.support.clock import Clock
from tests.support.services import (
    LONG,
    Make,
    error_of,
    faulty,
    finish,
    open_request,
    statuses,
    tick,
)


class SlowForward:
    """Wraps a module's forward, which then takes `seconds` of a fake clock."""

    def __init__(self, module: Any, clock: Clock, seconds: float) -> None:
        self.seconds = seconds
        forward = module.forward

        @functools.wraps(forward)
        def slow(*args: Any, **kwargs: Any) -> Any:
            clock.now_s += self.seconds
            return forward(*args, **kwargs)

        module.forward = slow


def test_a_deadline_that_cannot_be_met_is_refused_at_once(make: Make, clock: Clock) -> None:
    pipeline = faulty()
    denoiser = SlowForward(pipeline.unet, clock, seconds=1.0)
    service = make(pipeline=pipeline)
    open_request(service, "other", num_inference_steps=30)
    tick(service, 20)
    denoiser.seconds = 0.0
    open_request(service, "late", num_inference_steps=9, deadline_s=5)
    open_request(service, "fine", num_inference_steps=4, deadline_s=5)
    reply = service.take_replies()["late"]
    assert reply.status == 504
    assert error_of(reply) == {
        "code": "deadline_exceeded",
        "message": "the deadline of 5 s cannot be met: at the present pace 9 steps need at least"
        " 9 s; ask for fewer, or for a later one",
        "fields": {},
    }
    assert finish(service)["fine"].status == 200


def test_a_deadline_ends_a_running_request_and_frees_its_rows(make: Make, clock: Clock) -> None:
    service = make(max_rows=4, max_images=1)
    open_request(service, "late", num_inference_steps=LONG, deadline_s=5)
    open_request(service, "other")
    open_request(service, "next")
    tick(service, 2)
    assert service.load.num_waiting == 1
    clock.now_s += 5.0
    tick(service)
    assert service.load.num_waiting == 0
    reply = service.take_replies()["late"]
    assert reply.status == 504
    assert "deadline" in error_of(reply)["message"]
    assert statuses(finish(service)) == {"other": 200, "next": 200}


def test_a_deadline_ends_a_waiting_request(make: Make, clock: Clock) -> None:
    service = make(max_rows=2, max_images=1)
    open_request(service, "running", num_inference_steps=20)
    open_request(service, "late", deadline_s=0.5)
    tick(service)
    clock.now_s += 0.49
    tick(service)
    assert "late" in service.live_ids
    assert not service.take_replies()
    clock.now_s += 0.01
    tick(service)
    assert service.take_replies()["late"].status == 504
    assert finish(service)["running"].status == 200


def test_the_configured_deadline_holds_for_all(make: Make, clock: Clock) -> None:
    service = make(deadline_s=2.0)
    open_request(service, "a", num_inference_steps=LONG)
    service.open("b", {"body": {"instances": [{"prompt": "a", "num_inference_steps": LONG}]}}, {})
    tick(service)
    clock.now_s += 2.0
    assert {r.status for r in finish(service).values()} == {504}
