"""Calls from their row to their one reply, on the real engine with a fake clock."""

from __future__ import annotations

import base64
import gc
import io
import json
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from hypothesis import HealthCheck, given, settings
from PIL import Image

from handler.api.replies import Reply
from handler.api.request import GenerationRequest
from handler.config import HandlerConfig
from handler.engine import InFlightEngine
from handler.engine.forward import Counters
from handler.errors import EngineFault, InvalidRequest, OutOfMemory, RequestError
from handler.pipelines import shared_state
from handler.pipelines.cost import Cost
from handler.pipelines.describe import describe
from handler.service.generation import GenerationService, draw_seed
from handler.service.results import as_request_error
from tests.support.clock import Clock
from tests.support.pipelines import build

LONG = 900
Make = Callable[..., GenerationService]


HTTP = {"host": "localhost"}


class Faulty(StableDiffusionPipeline):  # type: ignore[misc]
    """Fails where its prompt says, or returns what is no picture."""

    def encode_prompt(self, prompt: str, *args: Any, **kwargs: Any) -> Any:
        self.asked, self.looked = prompt, 0
        if prompt == "refuse":
            raise ValueError("I do not draw this")
        if prompt == "crash early":
            raise TypeError("early")
        return super().encode_prompt(prompt, *args, **kwargs)

    @property
    def interrupt(self) -> bool:
        self.looked += 1
        if self.looked == 3 and self.asked == "crash late":
            raise ValueError("late")
        if self.looked == 3 and self.asked == "oom":
            raise MemoryError
        return False

    def run_safety_checker(self, image: Any, *args: Any) -> Any:
        if self.asked in _NO_PICTURES:
            self.image_processor = _Spoiler(_NO_PICTURES[self.asked])
        return super().run_safety_checker(image, *args)


_NO_PICTURES = {"no picture": None, "odd picture": ["odd"]}


class _Spoiler:
    def __init__(self, images: object) -> None:
        self._images = images

    def postprocess(self, *args: Any, **kwargs: Any) -> object:
        return self._images


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(clock: Clock) -> Iterator[Make]:
    """Make a service on a tiny pipeline that can be told to fail."""
    services = []

    def start(**settings: Any) -> GenerationService:
        services.append(make_service(clock, **settings))
        return services[-1]

    yield start
    for service in services:
        service.close()


def make_service(clock: Clock, **settings: Any) -> GenerationService:
    tiny = build("stable_diffusion")
    pipeline = Faulty(**tiny.components, requires_safety_checker=False)
    config = HandlerConfig(
        **{
            "num_inference_steps": 4,
            "max_num_inference_steps": 1000,
            "height": 32,
            "width": 32,
            "min_size_px": 8,
            **settings,
        }
    )
    engine = InFlightEngine(pipeline, max_rows=config.max_rows, clock=clock)
    return GenerationService(
        engine, config, describe(pipeline), model_name="tiny", draw_seed=lambda: 5, clock=clock
    )


def open_call(
    service: GenerationService, call_id: str, prompt: str = "a cat", **fields: Any
) -> None:
    service.open(call_id, {"body": {"prompt": prompt, "seed": 3, **fields}}, HTTP)


def finish(service: GenerationService) -> dict[str, Reply]:
    service.advance()
    return service.take_replies()


def error_of(reply: Reply) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(reply.body)["error"]
    return error


def tick(service: GenerationService, times: int = 1) -> None:
    for _ in range(times):
        service.advance(0.0)


def test_a_call_is_answered_once_with_its_picture(make: Make) -> None:
    service = make()
    open_call(service, "a")
    assert service.live_ids == {"a"}
    replies = finish(service)
    assert replies.keys() == {"a"}
    assert (replies["a"].status, replies["a"].content_type) == (200, "image/png")
    with Image.open(io.BytesIO(replies["a"].body)) as image:
        assert image.size == (32, 32)
    assert not service.live_ids
    assert service.take_replies() == {}


def test_the_same_call_gives_the_same_bytes_alone_and_in_company(make: Make) -> None:
    service = make(max_rows=8)
    open_call(service, "alone")
    alone = finish(service)["alone"]
    for index in range(5):
        open_call(service, f"c{index}", "a dog", seed=50 + index, num_inference_steps=2 + index)
    open_call(service, "company")
    company = finish(service)["company"]
    pictures = [np.asarray(Image.open(io.BytesIO(r.body))).astype(int) for r in (alone, company)]
    assert abs(pictures[0] - pictures[1]).max() <= 1


def test_whatever_is_wrong_with_a_call_is_its_reply(make: Make) -> None:
    service = make()
    service.open("a", {}, {})
    service.open("b", {"body": {"prompt": 7}}, {})
    service.open("c", {"body": object()}, {})
    assert {k: r.status for k, r in service.take_replies().items()} == {
        "a": 400,
        "b": 400,
        "c": 400,
    }
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
    open_call(service, "good")
    open_call(service, "bad", prompt)
    open_call(service, "stream", prompt, stream=True)
    replies = finish(service)
    assert replies["good"].status == 200
    assert replies["bad"].status == replies["stream"].status == status
    assert error_of(replies["bad"])["code"] == code
    assert f'"code":"{code}"'.encode() in replies["stream"].body


def test_one_failing_instance_fails_its_call_and_nobody_elses(make: Make) -> None:
    service = make()
    prompts = ["a cat", "crash late", "a dog"]
    instances = [{"prompt": p, "num_inference_steps": LONG if p == "a dog" else 5} for p in prompts]
    service.open("kserve", {"body": {"instances": instances}}, {})
    service.open("v2", {"body": {"instances": ["a cat", "a dog"]}}, {})
    open_call(service, "plain")
    replies = finish(service)
    assert {k: r.status for k, r in replies.items()} == {"kserve": 500, "v2": 200, "plain": 200}
    assert len(json.loads(replies["v2"].body)["predictions"]) == 2
    # The other instances of the failed call do not run on.
    assert not service._engine.num_running
    assert not service._engine.num_waiting


def test_instances_that_end_in_one_tick_are_encoded_and_counted_once(make: Make) -> None:
    service = make(max_rows=16)
    service.open("kserve", {"body": {"instances": ["a", "b", "c"]}}, {})
    reply = finish(service)["kserve"]
    assert len(json.loads(reply.body)["predictions"]) == 3
    samples = {(s.name, s.dimensions): s for s in service.meter.samples(Counters(), {})}
    assert samples["diffusers_images_total", ()].value == 3
    assert samples["diffusers_steps_total", ()].value == 3 * 4
    assert samples["diffusers_requests_total", ("ok",)].value == 1


def test_an_instance_that_never_fits_refuses_the_whole_call(make: Make) -> None:
    service = make(max_pixels=4096)
    service._engine.limits = type(service._engine.limits)(16, 1024, 16)
    instances = [{"prompt": "small"}, {"prompt": "large", "height": 64, "width": 64}]
    service.open("a", {"body": {"instances": instances}}, {})
    assert service.take_replies()["a"].status == 413
    assert not service._engine.num_waiting


def test_an_encoder_that_fails_is_a_500_for_its_call(make: Make) -> None:
    service = make()
    open_call(service, "bad", "odd picture")
    open_call(service, "stream", "odd picture", stream=True)
    open_call(service, "good")
    replies = finish(service)
    assert {k: r.status for k, r in replies.items()} == {"bad": 500, "stream": 500, "good": 200}
    assert error_of(replies["bad"])["message"].startswith("the picture could not be enc")


# Ids.


@pytest.mark.parametrize("by_header", [True, False])
def test_an_id_of_a_live_call_is_taken_until_it_is_answered(make: Make, by_header: bool) -> None:
    service = make()
    headers = {"x-request-id": "mine"} if by_header else {}
    fields = {} if by_header else {"request_id": "mine"}
    service.open("a", {"body": {"prompt": "a", **fields}}, headers)
    service.open("b", {"body": {"prompt": "b", **fields}}, headers)
    service.open("c", {"body": {"prompt": "c", "request_id": "a"}}, {})
    replies = finish(service)
    assert {k: r.status for k, r in replies.items()} == {"a": 200, "b": 409, "c": 409}
    assert "request_id" in error_of(replies["b"])["fields"]
    open_call(service, "a", request_id="mine")
    assert finish(service)["a"].status == 200


# Cancelling, in every state.


@pytest.mark.parametrize("wanted", ["target", "chosen"])
def test_cancelling_a_running_call(make: Make, wanted: str) -> None:
    service = make()
    open_call(service, "other", num_inference_steps=6)
    open_call(service, "target", num_inference_steps=LONG, request_id="chosen")
    tick(service, 3)
    service.open("canceller", {"body": {"cancel": wanted}}, {})
    replies = service.take_replies()
    assert {k: r.status for k, r in replies.items()} == {"target": 499, "canceller": 200}
    assert json.loads(replies["canceller"].body) == {"cancelled": wanted}
    assert service._engine.num_running == 1
    assert finish(service)["other"].status == 200


def test_cancelling_a_waiting_call(make: Make) -> None:
    service = make(max_rows=2, max_images=1)
    open_call(service, "running", num_inference_steps=9)
    open_call(service, "waiting")
    tick(service)
    assert service._engine.num_waiting == 1
    service.open("canceller", {"body": {"cancel": "waiting"}}, {})
    assert service.take_replies()["waiting"].status == 499
    assert finish(service).keys() == {"running"}


def test_cancelling_before_the_first_tick_and_twice(make: Make) -> None:
    service = make()
    open_call(service, "target")
    for canceller in ("one", "two"):
        service.open(canceller, {"body": {"cancel": "target"}}, {})
    replies = finish(service)
    assert {k: r.status for k, r in replies.items()} == {"target": 499, "one": 200, "two": 404}


def test_cancelling_a_call_that_is_being_encoded(make: Make) -> None:
    service = make(encode_threads=1)
    gate = threading.Event()
    service._encoders.submit(gate.wait, 60)
    open_call(service, "target", num_inference_steps=1)
    while service._engine.has_work:
        tick(service)
    assert service.live_ids == {"target"}
    service.open("canceller", {"body": {"cancel": "target"}}, {})
    replies = service.take_replies()
    gate.set()
    assert {k: r.status for k, r in replies.items()} == {"target": 499, "canceller": 200}
    # The picture that the pool is still to encode is nobody's reply.
    open_call(service, "next")
    assert finish(service).keys() == {"next"}


def test_cancelling_what_is_answered_or_unknown_is_404(make: Make) -> None:
    service = make()
    open_call(service, "done")
    done = finish(service)
    for wanted in ("done", "nobody", "canceller"):
        service.open("canceller", {"body": {"cancel": wanted}}, {})
        assert service.take_replies()["canceller"].status == 404
    assert done["done"].status == 200


def test_cancelling_a_kserve_call_ends_all_of_it(make: Make) -> None:
    service = make()
    instances = [{"prompt": "a", "num_inference_steps": n} for n in (1, LONG)]
    service.open("target", {"body": {"instances": instances}}, {})
    tick(service, 8)
    service.open("canceller", {"body": {"cancel": "target"}}, {})
    assert finish(service)["target"].status == 499
    assert not service._engine.num_running


def test_a_dropped_call_is_answered_to_nobody_in_any_state(make: Make) -> None:
    service = make(max_rows=4, max_images=1, encode_threads=1)
    gate = threading.Event()
    service._encoders.submit(gate.wait, 60)
    open_call(service, "encoding", num_inference_steps=1)
    tick(service, 8)
    for call_id in ("running", "running too", "waiting"):
        open_call(service, call_id, num_inference_steps=LONG)
    service.open("answered", {}, {})
    tick(service)
    for call_id in ("encoding", "running", "waiting", "answered", "running too", "never there"):
        service.drop(call_id)
    gate.set()
    assert not service.live_ids
    assert not service._engine.num_running
    assert not service._engine.num_waiting
    assert finish(service) == {}


# The waiting room.


def test_the_steps_of_a_dropped_call_are_counted_without_another(make: Make) -> None:
    service = make()
    open_call(service, "gone", num_inference_steps=LONG)
    while service._engine.counters.ticks < 9:
        tick(service)
    service.drop("gone")
    service.advance(0.0)
    samples = {(s.name, s.dimensions): s for s in service.meter.samples(Counters(), {})}
    assert 0 < samples["diffusers_steps_total", ()].value <= 9
    assert not service._engine.has_work


def test_a_full_waiting_room_says_when_to_come_back(make: Make) -> None:
    service = make(max_rows=4, max_images=1, max_waiting=2)
    for index in range(5):  # two run, two wait
        open_call(service, f"c{index}")
    replies = service.take_replies()
    assert {k: r.status for k, r in replies.items()} == {"c4": 503}
    assert int(replies["c4"].headers["Retry-After"]) >= 1
    assert error_of(replies["c4"])["code"] == "queue_full"
    assert [r.status for r in finish(service).values()] == [200] * 4
    assert not service._engine.has_work or service._engine.num_running == 0


def test_a_call_that_must_be_alone_has_no_second_beside_it(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_state, "swaps_processors", lambda kind: True)
    service = make(max_rows=16, max_images=1, max_waiting=1)
    for index in range(4):  # one runs, one waits
        open_call(service, f"c{index}")
        tick(service)
    assert {k: r.status for k, r in service.take_replies().items()} == {"c2": 503, "c3": 503}
    assert [r.status for r in finish(service).values()] == [200] * 2


def test_calls_that_fit_at_once_do_not_wait(make: Make) -> None:
    service = make(max_rows=8, max_images=1, max_waiting=0)
    for index in range(5):
        open_call(service, f"c{index}")
    assert service.take_replies().keys() == {"c4"}
    assert len(finish(service)) == 4


def test_a_call_larger_than_the_waiting_room_is_taken_in_alone(make: Make) -> None:
    service = make(max_rows=2, max_images=1, max_waiting=0)
    service.open("kserve", {"body": {"instances": ["a", "b", "c"]}}, {})
    open_call(service, "plain")
    replies = finish(service)
    assert {k: r.status for k, r in replies.items()} == {"kserve": 200, "plain": 503}


# Deadlines.


def test_a_deadline_that_cannot_be_met_is_refused_at_once(make: Make) -> None:
    service = make()
    for _ in range(16):
        service._engine._pace.note(1.0, [Cost(2, 32 * 32, 32 * 32)])
    open_call(service, "late", num_inference_steps=9, deadline_s=5)
    open_call(service, "fine", num_inference_steps=4, deadline_s=5)
    reply = service.take_replies()["late"]
    assert reply.status == 504
    assert error_of(reply) == {
        "code": "deadline_exceeded",
        "message": "the deadline of 5 s cannot be met: at the present pace 9 steps need at least"
        " 9 s; ask for fewer, or for a later one",
        "fields": {},
    }
    assert finish(service)["fine"].status == 200


def test_a_deadline_ends_a_running_call_and_frees_its_rows(make: Make, clock: Clock) -> None:
    service = make(max_rows=4, max_images=1)
    open_call(service, "late", num_inference_steps=LONG, deadline_s=5)
    open_call(service, "other")
    open_call(service, "next")
    tick(service, 2)
    assert service._engine.num_waiting == 1
    clock.now_s += 5.0
    tick(service)
    assert service._engine.num_waiting == 0
    reply = service.take_replies()["late"]
    assert reply.status == 504
    assert "deadline" in error_of(reply)["message"]
    assert {k: r.status for k, r in finish(service).items()} == {"other": 200, "next": 200}


def test_a_deadline_ends_a_waiting_call(make: Make, clock: Clock) -> None:
    service = make(max_rows=2, max_images=1)
    open_call(service, "running", num_inference_steps=20)
    open_call(service, "late", deadline_s=0.5)
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
    open_call(service, "a", num_inference_steps=LONG)
    service.open("b", {"body": {"instances": [{"prompt": "a", "num_inference_steps": LONG}]}}, {})
    tick(service)
    clock.now_s += 2.0
    assert {r.status for r in finish(service).values()} == {504}


# Streams.


def test_a_streams_events_come_as_they_happen(make: Make) -> None:
    service = make()
    open_call(service, "s", stream=True, num_inference_steps=3)
    stream = service.stream_of("s")
    assert stream is not None
    assert stream.opening().content_type == "text/event-stream"
    while not (events := stream.take()):
        tick(service)
    assert events.startswith(b"event: step")
    reply = finish(service)["s"]
    assert reply.body.count(b"event: image") == 1
    assert service.stream_of("s") is None
    open_call(service, "plain")
    assert service.stream_of("plain") is None


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp", "npy", "json", "array"])
def test_a_stream_ends_with_what_the_plain_reply_holds(make: Make, output_format: str) -> None:
    service = make()
    open_call(service, "plain", output_format=output_format)
    open_call(service, "stream", output_format=output_format, stream=True)
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


# Drawing beside the calls.


def request(**changes: Any) -> GenerationRequest:
    values: dict[str, Any] = {
        "prompt": "a dog",
        "negative_prompt": None,
        "seed": 1,
        "num_inference_steps": 3,
        "guidance_scale": 7.5,
        "height": 32,
        "width": 32,
        "num_images": 1,
        "scheduler": None,
    }
    return GenerationRequest(**{**values, **changes})


def test_drawing_leaves_calls_in_flight_alive(make: Make) -> None:
    service = make()
    open_call(service, "short", num_inference_steps=1)
    open_call(service, "long", num_inference_steps=40)
    open_call(service, "bad", "crash late")
    tick(service)
    results = service.draw([request(), request(num_images=2, num_inference_steps=9)])
    assert [len(result.images) for result in results] == [1, 2]
    assert service.live_ids == {"short", "long", "bad"}
    replies = finish(service)
    assert {k: r.status for k, r in replies.items()} == {"short": 200, "long": 200, "bad": 500}


def test_drawing_nothing_gives_nothing(make: Make) -> None:
    assert make().draw([]) == []


def test_drawing_raises_the_first_error_and_leaves_nothing_behind(make: Make) -> None:
    service = make()
    with pytest.raises(EngineFault):
        service.draw([request(), request(prompt="crash late")])
    with pytest.raises(InvalidRequest, match="scheduler"):
        service.draw([request(), request(scheduler="NoScheduler")])
    assert not service._engine.num_waiting
    assert not service._engine.num_running


# Errors.


def test_errors_keep_or_get_their_status(caplog: pytest.LogCaptureFixture) -> None:
    known = InvalidRequest("no")
    assert as_request_error(known, 0) is known
    assert isinstance(as_request_error(MemoryError(), 0), OutOfMemory)
    assert isinstance(as_request_error(RuntimeError("CUDA out of memory"), 0), OutOfMemory)
    assert isinstance(as_request_error(ValueError("no"), 0), InvalidRequest)
    assert isinstance(as_request_error(ValueError("no"), 1), EngineFault)
    told = as_request_error(KeyError("a secret"), 0)
    assert isinstance(told, RequestError)
    assert "secret" not in told.message


@pytest.mark.parametrize("broken", ["read_call", "EventStream"])
def test_a_fault_while_a_call_is_taken_in_is_its_own(
    make: Make, broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = make()
    open_call(service, "before", num_inference_steps=9)
    tick(service)
    with monkeypatch.context() as patch:
        patch.setattr(f"handler.service.generation.{broken}", lambda *args, **kwargs: 1 / 0)
        open_call(service, "bad", stream=True)
    open_call(service, "after")
    replies = finish(service)
    assert {k: r.status for k, r in replies.items()} == {"bad": 500, "before": 200, "after": 200}
    assert "ZeroDivisionError" in caplog.text
    assert not service.live_ids


def test_drawn_seeds_differ_and_can_be_typed() -> None:
    seeds = {draw_seed() for _ in range(50)}
    assert len(seeds) > 45
    assert all(0 <= seed < 2**32 for seed in seeds)


# Nothing is kept, and nothing is lost.


def test_a_hundred_calls_leave_no_reference(make: Make, quiet: None) -> None:
    service = make(max_rows=8, max_images=1)
    refs: list[weakref.ref[Any]] = []
    endings = ["a cat", "crash late", "crash early", "no picture", "a cat"]
    for index in range(100):
        open_call(
            service,
            f"c{index}",
            endings[index % 5],
            stream=index % 3 == 0,
            num_inference_steps=2 if index % 5 else 30,
        )
        live = service._live[f"c{index}"]
        refs += [weakref.ref(live), *(weakref.ref(t) for t in live.tickets)]
        refs += [weakref.ref(live.stream)] if live.stream else []
        del live
        if index % 5 == 0:
            tick(service, 2)
            if index % 10 == 0:
                service.drop(f"c{index}")
            else:
                service.open(f"x{index}", {"body": {"cancel": f"c{index}"}}, {})
    replies = finish(service)
    assert len(replies) >= 80
    del replies
    gc.collect()
    assert [ref for ref in refs if ref() is not None] == []


@pytest.fixture
def quiet() -> Iterator[None]:
    """pytest keeps what is logged, and with it the frames of every traceback."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("open"),
            st.fixed_dictionaries(
                {
                    "prompt": st.sampled_from(["a cat", "a dog", "refuse", "crash late", ""]),
                    "num_inference_steps": st.integers(1, 12),
                    "guidance_scale": st.sampled_from([1.0, 7.5]),
                    "stream": st.booleans(),
                    "deadline_s": st.sampled_from([None, 0.01, 3.0]),
                    "request_id": st.sampled_from([None, None, "x", "y"]),
                    "n": st.sampled_from([1, 1, 2]),
                }
            ),
        ),
        st.tuples(st.just("kserve"), st.lists(st.sampled_from(["a", "crash late"]), max_size=4)),
        st.tuples(st.just("cancel"), st.sampled_from(["x", "y", "0", "1", "2", "3"])),
        st.tuples(st.just("drop"), st.integers(0, 12)),
        st.tuples(st.just("tick"), st.integers(1, 6)),
        st.tuples(st.just("wait"), st.sampled_from([0.02, 5.0])),
        st.tuples(st.just("draw"), st.none()),
    ),
    max_size=25,
)


@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(actions=ACTIONS)
def test_every_call_is_answered_exactly_once_whatever_happens(
    shared_service: tuple[GenerationService, Clock], actions: list[tuple[str, Any]]
) -> None:
    service, clock = shared_service
    opened: list[str] = []
    dropped: set[str] = set()
    answered: list[str] = []

    def opens(row: dict[str, Any]) -> None:
        opened.append(str(len(opened)))
        service.open(opened[-1], row, {})

    def collect() -> None:
        answered.extend(service.take_replies())

    for action, value in actions:
        if action == "open":
            fields = {k: v for k, v in value.items() if v is not None}
            opens({"body": {**fields, "output_format": "json"}})
        elif action == "kserve":
            opens({"body": {"instances": value}})
        elif action == "cancel":
            opens({"body": {"cancel": value}})
        elif action == "drop" and value < len(opened):
            collect()
            if opened[value] in service.live_ids:
                dropped.add(opened[value])
            service.drop(opened[value])
        elif action == "tick":
            tick(service, value)
            collect()
        elif action == "wait":
            clock.now_s += value
        elif action == "draw":
            service.draw([request(num_inference_steps=1)])
        assert service._engine.in_flight.rows <= service._config.max_rows
    service.advance()
    collect()
    assert sorted(answered) == sorted(set(opened) - dropped)
    assert not service.live_ids
    assert not service._engine.num_running
    assert not service._engine.num_waiting
    assert not service._by_ticket


@pytest.fixture(scope="module")
def shared_service() -> Iterator[tuple[GenerationService, Clock]]:
    """One for all examples: after each it must be as good as new."""
    clock = Clock()
    service = make_service(clock, max_rows=6, max_images=2, max_waiting=3)
    yield service, clock
    service.close()


def test_closing_ends_all_and_gives_the_pipeline_back(clock: Clock) -> None:
    service = make_service(clock)
    pipeline = service._engine.pipeline
    assert "forward" in vars(pipeline.unet)
    open_call(service, "a", num_inference_steps=LONG)
    tick(service)
    service.close()
    assert not service.live_ids
    assert "forward" not in vars(pipeline.unet)
