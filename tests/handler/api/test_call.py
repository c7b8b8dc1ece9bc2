"""Whole calls: every form of request draws the same picture, and nothing gets past the checks."""

from __future__ import annotations

import pytest

from handler.api.body import HOW_TO_SEND
from handler.api.call import CancelCall, DescribeCall, Envelope
from handler.api.schema import REPLY_FIELDS, default_of
from handler.config import OUTPUT_FORMATS, HandlerConfig
from handler.errors import InvalidRequest
from tests.support.calls import (
    CONFIG,
    JSON,
    MULTIPART,
    TEXT,
    URLENCODED,
    body,
    call,
    problems,
    read,
)

V2 = {
    "inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a cat"]}],
    "parameters": {"seed": 5},
}


@pytest.mark.parametrize(
    ("row", "headers"),
    [
        ({"body": {"data": "a cat", "seed": 5}}, JSON),
        ({"body": {"prompt": "a cat", "seed": 5}}, JSON),
        ({"body": {"inputs": "a cat", "parameters": {"seed": 5}}}, JSON),
        ({"body": bytearray(b'{"prompt": "a cat", "seed": 5}')}, {}),
        ({"data": bytearray(b"a cat"), "seed": bytearray(b"5")}, URLENCODED),
        ({"data": bytearray(b"a cat\n"), "seed": "5"}, MULTIPART),
        ({"prompt": bytearray(b"a cat"), "seed": bytearray(b"5")}, {}),  # gRPC
        ({"body": {"instances": [{"data": "a cat", "seed": 5}]}}, JSON),
        ({"body": V2}, JSON),
    ],
)
def test_all_forms_draw_the_same_picture(row: dict[str, object], headers: dict[str, str]) -> None:
    (request,) = call(row, headers).requests
    assert (request.prompt, request.seed) == ("a cat", 5)
    assert request == call(body(seed=5)).requests[0]


@pytest.mark.parametrize(
    ("row", "headers"),
    [
        ({"body": "a cat"}, JSON),
        ({"body": "a cat"}, TEXT),
        ({"body": bytearray(b"a cat\n")}, {}),
        ({"body": {"instances": ["a cat"]}}, JSON),
    ],
)
def test_bare_prompts_draw_it_too(row: dict[str, object], headers: dict[str, str]) -> None:
    assert call(row, headers).requests == call(body(seed=99)).requests


def test_what_a_plain_call_says_beside_its_request() -> None:
    found = call(body())
    assert found.envelope is Envelope.PLAIN
    assert found.output_format == "png"
    assert (found.request_id, found.deadline_s, found.envelope_id) == (None, None, None)
    assert (found.stream, found.preview_every) == (False, 0)


def test_several_instances_are_several_requests() -> None:
    found = call({"body": {"instances": ["a", {"prompt": "b", "seed": 7}], "steps": 5}})
    assert found.envelope is Envelope.KSERVE_V1
    assert [(r.prompt, r.seed, r.num_inference_steps) for r in found.requests] == [
        ("a", 99, 5),
        ("b", 7, 5),
    ]


def test_problems_of_all_instances_and_of_the_call_at_once() -> None:
    found = problems(
        {
            "body": {
                "instances": [
                    {"prompt": "a", "seed": -2},
                    5,
                    {"prompt": "b", "stream": True, "sed": 1},
                ],
                "parameters": {"steps": 999, "output_format": "gif", "deadline_s": 0},
            }
        }
    )
    assert set(found) == {
        "instances[0].seed",
        "instances[1]",
        "instances[2].stream",
        "instances[2].sed",
        "num_inference_steps",
        "output_format",
        "deadline_s",
    }


def test_the_form_decoders_leftovers_say_how_to_send_a_prompt() -> None:
    assert problems({}, URLENCODED)["prompt"] == HOW_TO_SEND
    found = problems({"a cat with 1": bytearray(b"2 hats")}, URLENCODED)
    assert found["prompt"] == HOW_TO_SEND
    assert "unknown field" in found["a cat with 1"]
    assert problems({"seed": b"5"}, {})["prompt"] == "is missing"


def test_files_that_are_not_text_are_named_beside_the_rest() -> None:
    found = problems({"prompt": "a", "extra": b"\x89PNG", "seed": "x"}, MULTIPART)
    assert found["extra"] == "is not UTF-8 text (byte 0x89 at 0)"
    assert "is not an integer" in found["seed"]


@pytest.mark.parametrize("output_format", OUTPUT_FORMATS)
def test_output_format_by_field_header_and_default(output_format: str) -> None:
    config = HandlerConfig(default_output=output_format)
    assert call(body(output_format=output_format)).output_format == output_format
    assert call(body(), config=config).output_format == output_format
    assert call(body(), {"accept": "*/*"}, config).output_format == output_format


def test_the_field_beats_the_header_and_the_header_the_default() -> None:
    webp = {"accept": "image/webp"}
    config = HandlerConfig(default_output="json")
    assert call(body(output_format="jpg"), webp, config).output_format == "jpeg"
    assert call(body(), webp, config).output_format == "webp"
    assert call(body(output_format="png"), {"accept": "text/html"}).output_format == "png"


def test_an_accept_header_that_nothing_meets() -> None:
    found = problems(body(), {"accept": "text/html"})
    assert found["Accept"].startswith("'text/html' allows none of image/png, image/jpeg")


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_several_pictures_do_not_fit_one_image(output_format: str) -> None:
    found = problems(body(n=2, output_format=output_format))
    assert "Accept: application/json" in found["num_images"]


@pytest.mark.parametrize("output_format", ["json", "npy", "array"])
def test_several_pictures_fit_the_other_formats(output_format: str) -> None:
    assert call(body(n=2, output_format=output_format)).requests[0].num_images == 2


def test_several_pictures_of_a_kserve_instance() -> None:
    found = call({"body": {"instances": [{"prompt": "a", "n": 2}]}})
    assert found.output_format == "png"
    assert found.requests[0].num_images == 2


@pytest.mark.parametrize(("sent", "inside"), [("json", "png"), ("jpeg", "jpeg"), ("npy", "npy")])
def test_kserve_pictures_are_encoded_inside_the_reply(sent: str, inside: str) -> None:
    row: dict[str, object] = {"body": {"instances": ["a"], "output_format": sent}}
    assert call(row, {"accept": "text/html"}).output_format == inside
    config = HandlerConfig(default_output="array")
    assert call({"body": {"instances": ["a"]}}, config=config).output_format == "png"


def test_kserve_has_neither_array_nor_stream() -> None:
    found = problems({"body": {"instances": ["a"], "output_format": "array", "stream": True}})
    assert set(found) == {"output_format", "stream"}
    assert not call({"body": {"instances": ["a"]}}, {"accept": "text/event-stream"}).stream


@pytest.mark.parametrize("request_id", ["a", "A.b_c:d-9", "x" * 128])
def test_request_ids(request_id: str) -> None:
    assert call(body(request_id=request_id)).request_id == request_id
    assert call(body(), {"x-request-id": request_id}).request_id == request_id
    assert call(body(request_id="own"), {"x-request-id": request_id}).request_id == "own"
    assert read({"body": {"cancel": request_id}}) == CancelCall(request_id)
    assert read({"cancel": request_id.encode()}) == CancelCall(request_id)


@pytest.mark.parametrize("request_id", ["", "x" * 129, "a b", "ä", "a\n", "a/b", 5, ["a"]])
def test_what_is_no_request_id(request_id: object) -> None:
    assert "request_id" in problems(body(request_id=request_id))
    assert "cancel" in problems({"body": {"cancel": request_id}})
    if isinstance(request_id, str):
        assert "X-Request-Id" in problems(body(), {"x-request-id": request_id})


def test_describing_goes_alone() -> None:
    assert read({"body": {"describe": True}}) == DescribeCall()
    assert read({"describe": b"true"}) == DescribeCall()
    assert "'prompt'" in problems(body(describe=True))["describe"]
    assert "describe" in problems({"body": {"describe": "yes"}})
    assert call(body(describe=False)).requests


def test_cancelling_goes_alone() -> None:
    assert "'prompt'" in problems(body(cancel="a"))["cancel"]
    assert "'instances'" in problems({"body": {"instances": ["a"], "cancel": "a"}})["cancel"]
    assert call(body(cancel=None)).requests


@pytest.mark.parametrize("deadline_s", [0.001, 5, 86400])
def test_deadlines(deadline_s: float) -> None:
    assert call(body(deadline_s=deadline_s)).deadline_s == deadline_s
    assert call({"prompt": "a", "deadline_s": str(deadline_s)}).deadline_s == deadline_s


@pytest.mark.parametrize("deadline_s", [0, -1, 86401, float("nan"), float("inf"), True, "5"])
def test_what_is_no_deadline(deadline_s: object) -> None:
    assert "deadline_s" in problems(body(deadline_s=deadline_s))


def test_the_configured_deadline_is_the_longest() -> None:
    config = HandlerConfig(deadline_s=30.0)
    assert call(body(), config=config).deadline_s == 30.0
    assert call(body(deadline_s=10), config=config).deadline_s == 10.0
    assert "allowed: 0.001 to 30" in problems(body(deadline_s=31), config=config)["deadline_s"]


def test_streams() -> None:
    events = {"accept": "text/event-stream"}
    assert call(body(stream=True)).stream
    assert call({"prompt": "a", "stream": "true"}).stream
    assert call(body(), events).stream
    assert call(body(), events).output_format == "png"
    assert not call(body(stream=False), events).stream
    assert call(body(previews=5), events).preview_every == 5
    assert call(body(previews=0)).preview_every == 0


def test_what_is_left_out_has_the_default_of_the_table() -> None:
    config = HandlerConfig(deadline_s=30.0, jpeg_quality=7)
    found = call(body(), config=config)
    for name, counts in (
        ("deadline_s", found.deadline_s),
        ("jpeg_quality", found.jpeg_quality),
        ("previews", found.preview_every),
        ("stream", found.stream),
    ):
        assert counts == default_of(REPLY_FIELDS[name], config), name


def test_jpeg_quality() -> None:
    assert call(body()).jpeg_quality == CONFIG.jpeg_quality
    assert call(body(), config=HandlerConfig(jpeg_quality=5)).jpeg_quality == 5
    assert call(body(jpeg_quality=1)).jpeg_quality == 1
    with pytest.raises(InvalidRequest) as caught:
        call(body(jpeg_quality=0))
    assert caught.value.fields == {"jpeg_quality": "0 is out of range; allowed: 1 to 100"}


def test_grpc_has_no_streams() -> None:
    row: dict[str, object] = {"prompt": b"a", "stream": b"true"}
    assert problems(row, {}) == {"stream": "only over HTTP, not over gRPC"}
    assert not call({"prompt": b"a"}, {}).stream
    assert call(row).stream


def test_previews_need_a_stream() -> None:
    assert "text/event-stream" in problems(body(previews=5))["previews"]
    assert "previews" in problems(body(previews=-1, stream=True))
    assert "stream" in problems(body(stream="true"))
