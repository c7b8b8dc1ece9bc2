"""Requests from their body to their one reply, on the real engine with a fake clock."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.clock import Clock
from tests.support.pipelines import build, overflowing
from tests.support.services import (
    LONG,
    Make,
    counted,
    error_of,
    faulty,
    finish,
    make_service,
    open_request,
    statuses,
    tick,
)


def test_a_request_is_answered_once_with_its_picture(make: Make) -> None:
    service = make()
    open_request(service, "a")
    assert service.live_ids == {"a"}
    replies = finish(service)
    assert replies.keys() == {"a"}
    assert (replies["a"].status, replies["a"].content_type) == (200, "image/png")
    with Image.open(io.BytesIO(replies["a"].body)) as image:
        assert image.size == (32, 32)
    assert not service.live_ids
    assert service.take_replies() == {}


def test_the_same_request_gives_the_same_picture_alone_and_in_company(make: Make) -> None:
    service = make(max_rows=8)
    open_request(service, "alone")
    alone = finish(service)["alone"]
    for index in range(5):
        open_request(service, f"c{index}", "a dog", seed=50 + index, num_inference_steps=2 + index)
    open_request(service, "company")
    company = finish(service)["company"]
    pictures = [np.asarray(Image.open(io.BytesIO(r.body))).astype(int) for r in (alone, company)]
    assert abs(pictures[0] - pictures[1]).max() <= 1


def test_whatever_is_wrong_with_a_request_is_its_reply(make: Make) -> None:
    service = make()
    service.open("a", {}, {})
    service.open("b", {"body": {"prompt": 7}}, {})
    service.open("c", {"body": object()}, {})
    assert statuses(service.take_replies()) == {"a": 400, "b": 400, "c": 400}
    assert not service.live_ids


@pytest.mark.parametrize(
    ("prompt", "status", "code"),
    [
        ("refuse", 400, "invalid_request"),
        ("crash early", 500, "engine_fault"),
        ("crash late", 500, "engine_fault"),
        ("no picture", 500, "engine_fault"),
        ("oom", 507, "out_of_memory"),
    ],
)
def test_a_request_that_fails_ends_alone(make: Make, prompt: str, status: int, code: str) -> None:
    service = make()
    open_request(service, "good")
    open_request(service, "bad", prompt)
    open_request(service, "stream", prompt, stream=True)
    replies = finish(service)
    assert replies["good"].status == 200
    assert replies["bad"].status == replies["stream"].status == status
    assert error_of(replies["bad"])["code"] == code
    assert f'"code":"{code}"'.encode() in replies["stream"].body


def test_a_picture_that_is_not_finite_is_an_error_that_says_what_to_do(make: Make) -> None:
    service = make(pipeline=overflowing(build("stable_diffusion")))
    open_request(service, "png")
    open_request(service, "stream", stream=True)
    replies = finish(service)
    assert replies["png"].status == replies["stream"].status == 500
    assert error_of(replies["png"])["code"] == "pipeline_failed"
    assert "DTYPE=float32" in error_of(replies["png"])["message"]
    assert counted(service)["diffusers_requests_total", ("pipeline_failed",)] == 2


@pytest.mark.parametrize(
    ("prompt", "cause"),
    [("crash late", "ValueError: late"), ("odd picture", "AttributeError"), ("refuse", None)],
)
def test_the_log_says_why_where_the_client_is_not_told(
    make: Make, prompt: str, cause: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    service = make()
    open_request(service, "bad", prompt)
    finish(service)
    assert ("request bad: " in caplog.text) == (cause is not None)
    assert (cause or "") in caplog.text


def test_one_failing_instance_fails_its_request_and_nobody_elses(make: Make) -> None:
    service = make()
    prompts = ["a cat", "crash late", "a dog"]
    instances = [{"prompt": p, "num_inference_steps": LONG if p == "a dog" else 5} for p in prompts]
    service.open("kserve", {"body": {"instances": instances}}, {})
    service.open("v2", {"body": {"instances": ["a cat", "a dog"]}}, {})
    open_request(service, "plain")
    replies = finish(service)
    assert statuses(replies) == {"kserve": 500, "v2": 200, "plain": 200}
    assert len(json.loads(replies["v2"].body)["predictions"]) == 2
    # The other instances of the failed request do not run on.
    assert service.load.is_idle


def test_instances_that_end_in_one_tick_are_encoded_and_counted_once(make: Make) -> None:
    service = make(max_rows=16)
    service.open("kserve", {"body": {"instances": ["a", "b", "c"]}}, {})
    reply = finish(service)["kserve"]
    assert len(json.loads(reply.body)["predictions"]) == 3
    counts = counted(service)
    assert counts["diffusers_images_total", ()] == 3
    assert counts["diffusers_steps_total", ()] == 3 * 4
    assert counts["diffusers_requests_total", ("ok",)] == 1


def test_an_instance_that_never_fits_refuses_the_whole_request(make: Make) -> None:
    service = make(engine_max_pixels=1024)
    instances = [{"prompt": "small"}, {"prompt": "large", "height": 64, "width": 64}]
    service.open("a", {"body": {"instances": instances}}, {})
    assert service.take_replies()["a"].status == 413
    assert service.load.is_idle


def test_an_encoder_that_fails_is_a_500_for_its_request(make: Make) -> None:
    service = make()
    open_request(service, "bad", "odd picture")
    open_request(service, "stream", "odd picture", stream=True)
    open_request(service, "good")
    replies = finish(service)
    assert statuses(replies) == {"bad": 500, "stream": 500, "good": 200}
    assert error_of(replies["bad"])["message"].startswith("the picture could not be enc")


@pytest.mark.parametrize("by_header", [True, False])
def test_an_id_of_a_live_request_is_taken_until_it_is_answered(make: Make, by_header: bool) -> None:
    service = make()
    headers = {"x-request-id": "mine"} if by_header else {}
    fields = {} if by_header else {"request_id": "mine"}
    service.open("a", {"body": {"prompt": "a", **fields}}, headers)
    service.open("b", {"body": {"prompt": "b", **fields}}, headers)
    service.open("c", {"body": {"prompt": "c", "request_id": "a"}}, {})
    replies = finish(service)
    assert statuses(replies) == {"a": 200, "b": 409, "c": 409}
    assert "request_id" in error_of(replies["b"])["fields"]
    open_request(service, "a", request_id="mine")
    assert finish(service)["a"].status == 200


class Fuse:
    """Calls `inner`, and fails once: at the call that it is set to."""

    def __init__(self, inner: Callable[[], Any]) -> None:
        self._inner = inner
        self.fails_in = 0

    def __call__(self) -> Any:
        self.fails_in -= 1
        if self.fails_in == 0:
            raise ZeroDivisionError
        return self._inner()


@pytest.mark.parametrize(
    ("broken", "fails_in"),
    [("draw_seed", 1), ("service_clock", 1), ("service_clock", 2)],
    ids=["as it is read", "as it is accepted", "as its stream begins"],
)
def test_a_fault_while_a_request_is_taken_in_is_its_own(
    make: Make, clock: Clock, broken: str, fails_in: int, caplog: pytest.LogCaptureFixture
) -> None:
    fuse = Fuse(clock)
    service = make(**{broken: fuse})
    open_request(service, "before", num_inference_steps=9)
    tick(service)
    fuse.fails_in = fails_in
    open_request(service, "bad", stream=True, seed=None)
    assert fuse.fails_in == 0
    open_request(service, "after")
    replies = finish(service)
    assert statuses(replies) == {"bad": 500, "before": 200, "after": 200}
    assert "ZeroDivisionError" in caplog.text
    assert not service.live_ids


@pytest.mark.parametrize(("hold_s", "num_ticks"), [(0.0, 1), (9.0, 10), (90.0, 20)])
def test_a_reply_may_be_held_for_a_while_but_not_beyond_the_cycle(
    make: Make, clock: Clock, hold_s: float, num_ticks: int
) -> None:
    """Each reading of the clock is a second, and a tick of the service reads it once."""

    def one_more_second() -> float:
        clock.now_s += 1
        return clock.now_s

    service = make(service_clock=one_more_second)
    open_request(service, "long", num_inference_steps=LONG)
    open_request(service, "wrong", num_inference_steps=-1)
    begun_s = clock.now_s
    service.advance(20.0, hold_s=hold_s)
    # The first reading is the beginning's.
    assert clock.now_s - begun_s == pytest.approx(1 + num_ticks, abs=1)
    assert statuses(service.take_replies()) == {"wrong": 400}
    assert "long" in service.live_ids


def test_closing_ends_all_and_gives_the_pipeline_back(clock: Clock) -> None:
    pipeline = faulty()
    service = make_service(clock, pipeline=pipeline)
    assert "forward" in vars(pipeline.unet)
    open_request(service, "a", num_inference_steps=LONG)
    tick(service)
    service.close()
    assert not service.live_ids
    assert "forward" not in vars(pipeline.unet)
