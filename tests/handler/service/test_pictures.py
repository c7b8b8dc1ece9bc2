"""Requests with pictures: decoded beside the engine, drawn as the pipeline alone draws them."""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image

from handler.api.call import Call
from handler.api.decoding import Pictures, decode_all
from handler.api.replies import Reply, success_reply
from handler.api.traits import PipelineTraits
from handler.engine import InFlightEngine
from handler.pipelines.describe import describe
from handler.pipelines.signature import call_defaults
from handler.service.draining import Drain
from handler.service.generation import GenerationService
from handler.service.records import Record, Watcher
from tests.support.clock import Clock
from tests.support.pictures import as_base64, encoded
from tests.support.pipelines import build
from tests.support.services import (
    LONG,
    counted,
    error_of,
    finish,
    open_request,
    statuses,
    tick,
    tiny_config,
)

PICTURE = encoded((32, 32))
SENT = {"image": as_base64(PICTURE), "num_inference_steps": 4, "strength": 0.75}
BROKEN = as_base64(PICTURE[:-40])
CLASSES = {
    "text-to-image": StableDiffusionPipeline,
    "image-to-image": StableDiffusionImg2ImgPipeline,
    "inpainting": StableDiffusionInpaintPipeline,
}

Start = Callable[..., GenerationService]


class Gate:
    """Decodes no picture before it is opened."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.has_ended = threading.Event()
        self.threads: set[str] = set()

    def __call__(self, *args: Any) -> list[Pictures]:
        self.threads.add(threading.current_thread().name)
        assert self.is_open.wait(60)
        try:
            return decode_all(*args)
        finally:
            self.has_ended.set()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.is_open.set()


@pytest.fixture
def start(clock: Clock, gate: Gate) -> Iterator[Start]:
    """Start services of three tasks; without `gated` pictures are decoded at once."""
    services = []

    def make(
        *,
        gated: bool = False,
        encode: Callable[..., Reply] = success_reply,
        watchers: Sequence[Watcher] = (),
        **settings: Any,
    ) -> GenerationService:
        parts = build("stable_diffusion").components
        pipelines = {
            task: kind(**parts, requires_safety_checker=False) for task, kind in CLASSES.items()
        }
        for pipeline in pipelines.values():
            pipeline.set_progress_bar_config(disable=True)
        text = pipelines["text-to-image"]
        found = describe(text)
        traits = PipelineTraits(
            found.schedulers,
            found.size_multiple_px,
            found.parameters,
            tasks={task: frozenset(call_defaults(each)) for task, each in pipelines.items()},
        )
        config = tiny_config(**settings)
        engine = InFlightEngine(pipelines, max_rows=config.max_rows, clock=clock)
        services.append(
            GenerationService(
                engine,
                text,
                config,
                traits,
                model_name="tiny",
                draw_seed=lambda: 5,
                encode=encode,
                decode=gate if gated else decode_all,
                clock=clock,
                watchers=watchers,
            )
        )
        return services[-1]

    yield make
    gate.is_open.set()
    for service in services:
        service.close()


def alone(task: str, **arguments: Any) -> Any:
    """The picture that diffusers draws without us, of the same weights."""
    pipeline = CLASSES[task](**build("stable_diffusion").components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(3)
    with torch.inference_mode():
        output = pipeline(prompt="a cat", generator=generator, guidance_scale=7.5, **arguments)
    return np.asarray(output.images[0]).astype(int)


def picture_of(reply: Any) -> Any:
    return np.asarray(Image.open(io.BytesIO(reply.body))).astype(int)


def test_what_is_kept_of_a_request_holds_no_file(start: Start) -> None:
    records: list[Record] = []
    service = start(watchers=[records.append])
    open_request(service, "image", **SENT)
    finish(service)
    (record,) = records
    assert record.is_read
    sent = record.requests[0].pictures["image"]
    assert (sent.content, sent.sha256) == (b"", hashlib.sha256(PICTURE).hexdigest())


def test_a_picture_is_drawn_from_as_the_pipeline_alone_does(start: Start) -> None:
    service = start()
    opened = Image.open(io.BytesIO(PICTURE)).convert("RGB")
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 16, 32))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    open_request(service, "text", num_inference_steps=4)
    open_request(service, "image", **SENT)
    open_request(service, "mask", mask=as_base64(buffer.getvalue()), **SENT)
    replies = finish(service)
    assert statuses(replies) == {"text": 200, "image": 200, "mask": 200}
    drawn = {name: picture_of(reply) for name, reply in replies.items()}
    shared = {"num_inference_steps": 4, "strength": 0.75, "image": opened}
    expected = {
        "text": alone("text-to-image", num_inference_steps=4, height=32, width=32),
        "image": alone("image-to-image", **shared),
        "mask": alone("inpainting", mask_image=mask, height=32, width=32, **shared),
    }
    for name, pixels in drawn.items():
        assert abs(pixels - expected[name]).max() <= 1, name
    # Another picture or another strength is another result.
    open_request(service, "other", **{**SENT, "image": as_base64(encoded((32, 32), colour="red"))})
    open_request(service, "weaker", **{**SENT, "strength": 0.5})
    for reply in finish(service).values():
        assert abs(picture_of(reply) - expected["image"]).max() > 1


def test_the_size_of_a_picture_is_the_results(start: Start) -> None:
    service = start()
    open_request(service, "own", image=as_base64(encoded((43, 34))))
    open_request(service, "sent", image=as_base64(encoded((43, 34))), height=16, width=24)
    sizes = {name: picture_of(reply).shape[:2] for name, reply in finish(service).items()}
    assert sizes == {"own": (32, 40), "sent": (16, 24)}


def test_the_hash_of_the_file_goes_with_the_result(start: Start) -> None:
    service = start()
    open_request(service, "a", **SENT)
    text = Image.open(io.BytesIO(finish(service)["a"].body)).text  # type: ignore[attr-defined]
    generation = json.loads(text["generation"])
    assert (generation["task"], generation["strength"]) == ("image-to-image", 0.75)
    assert len(generation["image_sha256"]) == 64


def test_others_are_drawn_while_a_picture_is_decoded(start: Start, gate: Gate) -> None:
    service = start(gated=True)
    open_request(service, "late", **SENT)
    open_request(service, "soon", num_inference_steps=2)
    assert service.load.num_waiting == 2
    while not (replies := service.take_replies()):
        service.advance(0.0)
    assert statuses(replies) == {"soon": 200}
    assert service.live_ids == {"late"}
    gate.is_open.set()
    assert statuses(finish(service)) == {"late": 200}
    assert all(name.startswith("decode") for name in gate.threads)
    assert counted(service)["diffusers_requests_total", ("ok",)] == 2


def test_a_broken_picture_is_the_requests_error(start: Start) -> None:
    service = start()
    open_request(service, "good", **SENT)
    open_request(service, "bad", image=BROKEN)
    open_request(service, "stream", image=BROKEN, stream=True)
    service.open(
        "kserve",
        {"body": {"instances": [{"prompt": "a", **SENT}, {"prompt": "b", "image": BROKEN}]}},
        {},
    )
    # A stream does not begin before it is known that there is anything to draw.
    assert service.stream_of("stream") is None
    replies = finish(service)
    assert statuses(replies) == {"good": 200, "bad": 400, "stream": 400, "kserve": 400}
    named = {"bad": "image", "stream": "image", "kserve": "instances[1].image"}
    for name, field in named.items():
        error = error_of(replies[name])
        assert error["fields"].keys() == {field}
        assert "is a PNG that cannot be decoded" in error["fields"][field]


def test_cancelled_while_it_is_decoded(start: Start, gate: Gate) -> None:
    service = start(gated=True)
    open_request(service, "a", request_id="mine", **SENT)
    service.open("canceller", {"body": {"cancel": "mine"}}, {})
    assert statuses(service.take_replies()) == {"a": 499, "canceller": 200}
    gate.is_open.set()
    assert finish(service) == {}
    assert counted(service)["diffusers_requests_total", ("cancelled",)] == 1
    open_request(service, "b", **SENT)
    assert statuses(finish(service)) == {"b": 200}


def test_dropped_while_it_is_decoded(start: Start, gate: Gate) -> None:
    service = start(gated=True)
    open_request(service, "a", **SENT)
    service.drop("a")
    assert not service.live_ids
    gate.is_open.set()
    assert finish(service) == {}
    assert counted(service)["diffusers_requests_total", ("disconnected",)] == 1


def test_drained_while_it_is_decoded(start: Start, gate: Gate, clock: Clock) -> None:
    service = start(gated=True)
    open_request(service, "a", **SENT)
    service.drain(Drain(until_s=clock() + 10, inquiry="x"))
    tick(service)
    assert service.live_ids == {"a"}
    clock.now_s += 11
    tick(service)
    replies = service.take_replies()
    assert statuses(replies) == {"a": 503}
    assert error_of(replies["a"])["code"] == "draining"
    gate.is_open.set()
    assert finish(service) == {}


def test_a_deadline_counts_from_the_acceptance(start: Start, gate: Gate, clock: Clock) -> None:
    service = start(gated=True)
    open_request(service, "decoding", deadline_s=5, **SENT)
    clock.now_s += 5
    tick(service)
    replies = service.take_replies()
    assert error_of(replies["decoding"])["message"] == (
        "the deadline passed while its pictures or LoRAs were read"
    )
    open_request(service, "drawing", deadline_s=5, **{**SENT, "num_inference_steps": LONG})
    clock.now_s += 4
    gate.is_open.set()
    while service.load.num_running == 0:
        service.advance(0.0)
    clock.now_s += 0.9
    tick(service)
    assert service.take_replies() == {}
    clock.now_s += 0.2
    tick(service)
    assert statuses(service.take_replies()) == {"drawing": 504}


def test_closed_while_it_is_decoded(start: Start, gate: Gate) -> None:
    service = start(gated=True)
    open_request(service, "a", **SENT)
    threading.Timer(0.05, gate.is_open.set).start()
    service.close()
    assert not service.live_ids


def test_a_full_queue_refuses_before_anything_is_decoded(start: Start, gate: Gate) -> None:
    service = start(gated=True, max_rows=2, max_images=1, max_waiting=1)
    for index in range(2):  # one runs, one waits
        open_request(service, f"c{index}", num_inference_steps=2)
    open_request(service, "refused", **SENT)
    assert statuses(service.take_replies()) == {"refused": 503}
    assert not gate.threads
    finish(service)


def test_a_full_queue_refuses_what_was_decoded_meanwhile(start: Start, gate: Gate) -> None:
    service = start(gated=True, max_rows=2, max_images=1, max_waiting=1)
    open_request(service, "late", **SENT)
    for index in range(2):
        open_request(service, f"c{index}", num_inference_steps=LONG, request_id=f"c{index}")
    tick(service)
    gate.is_open.set()
    while not (replies := service.take_replies()):
        service.advance(0.0)
    assert statuses(replies) == {"late": 503}
    assert error_of(replies["late"])["code"] == "queue_full"


def test_one_id_is_taken_while_its_picture_is_decoded(start: Start, gate: Gate) -> None:
    service = start(gated=True)
    open_request(service, "a", request_id="mine", **SENT)
    open_request(service, "b", request_id="mine", **SENT)
    assert statuses(service.take_replies()) == {"b": 409}
    gate.is_open.set()
    assert statuses(finish(service)) == {"a": 200}


@pytest.mark.parametrize(("error", "status"), [(KeyError("a"), 500), (MemoryError(), 507)])
def test_what_the_decoder_does_not_expect_ends_one_request(
    start: Start, error: Exception, status: int
) -> None:
    service = start()

    def fail(*args: Any) -> list[Pictures]:
        raise error

    pipeline = build("stable_diffusion")
    broken = GenerationService(
        InFlightEngine(pipeline),
        pipeline,
        service.config,
        service.traits,
        model_name="tiny",
        decode=fail,
    )
    open_request(broken, "a", **SENT)
    assert statuses(finish(broken)) == {"a": status}
    broken.close()


def test_a_lost_device_ends_what_is_decoded_too(
    start: Start, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What becomes of it afterwards is nobody's, while the pictures that are drawn are encoded."""
    is_encoded = threading.Event()

    def encode(*args: Any, **kwargs: Any) -> Reply:
        assert is_encoded.wait(60)
        return success_reply(*args, **kwargs)

    def fail(engine: InFlightEngine) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    service = start(gated=True, encode=encode)
    open_request(service, "drawn", num_inference_steps=1)
    while service.load.num_running or service.load.num_waiting:
        tick(service)
    open_request(service, "decoded", **{**SENT, "image": BROKEN})
    open_request(service, "next", num_inference_steps=LONG)
    monkeypatch.setattr(InFlightEngine, "step", fail)
    tick(service)
    assert statuses(service.take_replies()) == {"decoded": 503, "next": 503}
    gate.is_open.set()
    gate.has_ended.wait(60)
    tick(service, 3)
    is_encoded.set()
    assert statuses(finish(service)) == {"drawn": 200}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), 507),
        (RuntimeError("CUDA error: device-side assert triggered"), 503),
        (OSError("no disk"), 500),
    ],
)
def test_what_fails_in_a_thread_is_told_as_what_it_is(
    start: Start, error: Exception, status: int
) -> None:
    """A safety checker in the threads that encode computes on the device, too."""

    def encode(call: Call, *args: Any, **kwargs: Any) -> Reply:
        if call.request_id == "bad":
            raise error
        return success_reply(call, *args, **kwargs)

    service = start(encode=encode)
    open_request(service, "bad", num_inference_steps=1, request_id="bad")
    open_request(service, "good", num_inference_steps=1)
    open_request(service, "long", num_inference_steps=40)
    expected = {"bad": status, "good": 200, "long": 503 if status == 503 else 200}
    while "bad" in service.live_ids or "good" in service.live_ids:
        tick(service)
        for request_id, reply in service.take_replies().items():
            assert reply.status == expected.pop(request_id)
    for request_id, reply in finish(service).items():
        assert reply.status == expected.pop(request_id)
    assert not expected
