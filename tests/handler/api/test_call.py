"""Whole calls: every form of request draws the same picture, and nothing gets past the checks."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from handler.api.body import HOW_TO_SEND
from handler.api.call import Call, CancelCall, DescribeCall, Envelope, read_call
from handler.api.schema import PICTURE_NAMES, REPLY_FIELDS
from handler.api.traits import PipelineTraits
from handler.config import OUTPUT_FORMATS, HandlerConfig
from handler.errors import InvalidRequest, RequestError

CONFIG = HandlerConfig()
TRAITS = PipelineTraits(
    schedulers=("PNDMScheduler", "DDIMScheduler"),
    size_multiple_px=8,
    parameters=frozenset(
        [
            "prompt",
            "negative_prompt",
            "num_inference_steps",
            "guidance_scale",
            "height",
            "width",
            "num_images_per_prompt",
        ]
    ),
)
# Over HTTP there are always some.
HTTP = {"host": "localhost"}
JSON = {"content-type": "application/json"}
TEXT = {"content-type": "text/plain"}
URLENCODED = {"content-type": "application/x-www-form-urlencoded"}
MULTIPART = {"content-type": "multipart/form-data; boundary=x"}


def read(
    row: dict[str, object],
    headers: dict[str, str] | None = None,
    config: HandlerConfig = CONFIG,
) -> Call | CancelCall:
    return read_call(
        row, HTTP if headers is None else headers, config, TRAITS, draw_seed=lambda: 99
    )


def call(
    row: dict[str, object],
    headers: dict[str, str] | None = None,
    config: HandlerConfig = CONFIG,
) -> Call:
    found = read(row, headers, config)
    assert isinstance(found, Call)
    return found


def problems(
    row: dict[str, object],
    headers: dict[str, str] | None = None,
    config: HandlerConfig = CONFIG,
) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        read(row, headers, config)
    return caught.value.fields


def body(**fields: object) -> dict[str, object]:
    return {"body": {"prompt": "a cat", **fields}}


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


def test_jpeg_quality() -> None:
    assert call(body()).jpeg_quality is None
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


# Behind a function, for Python refuses to write so many digits when hypothesis shows the strategy.
HUGE = st.builds(lambda digits: 10**digits, st.integers(400, 5000))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | HUGE
    | st.floats()
    | st.text()
    | st.sampled_from(["a cat", "png", "ddim", "50", "\ud800", "a\0b", *OUTPUT_FORMATS])
)
NAMES = st.sampled_from(
    [
        *sorted(PICTURE_NAMES | REPLY_FIELDS.keys()),
        *("parameters", "instances", "id", "name", "shape", "datatype", "outputs", "body"),
    ]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(NAMES | st.text(max_size=5), inner, max_size=5)
    ),
    max_leaves=12,
)
TENSORS = st.fixed_dictionaries(
    {},
    optional={
        "name": NAMES | VALUES,
        "shape": st.lists(st.integers(-1, 3), max_size=3) | VALUES,
        "datatype": st.sampled_from(["BYTES", "INT64", "FP32"]) | VALUES,
        "data": st.lists(SCALARS, max_size=3) | VALUES,
        "parameters": VALUES,
    },
)
BODIES = (
    VALUES
    | st.dictionaries(NAMES, VALUES, max_size=6)
    | st.fixed_dictionaries({"instances": st.lists(VALUES, max_size=4)}, optional={"steps": VALUES})
    | st.fixed_dictionaries(
        {"inputs": st.lists(TENSORS, max_size=3)}, optional={"id": VALUES, "parameters": VALUES}
    )
)
BYTES = (
    st.binary()
    | st.text().map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.sampled_from([b'{"', b"{", b"[" * 5000, b"\xef\xbb\xbf", b"9" * 5000])
)
RAW = BYTES | BYTES.map(bytearray) | BYTES.map(memoryview)
ROWS = (
    st.fixed_dictionaries({"body": BODIES | RAW})
    | st.dictionaries(NAMES | st.text(max_size=8), RAW | VALUES, max_size=6)
    | st.just({})
)
HEADER_NAMES = ["content-type", "content-length", "accept", "x-request-id"]
HEADER_VALUES = st.text() | st.sampled_from(
    [
        "application/json",
        "text/plain",
        "image/*;q=0.3, */*",
        "text/event-stream",
        "application/x-www-form-urlencoded",
        "²",
    ]
)


@settings(max_examples=1000)
@given(ROWS, st.dictionaries(st.sampled_from(HEADER_NAMES), HEADER_VALUES))
@example({"body": b'{"a":' * 100_000}, JSON)
@example({"body": {"prompt": {"a": [10**5000]}}}, {})
@example({"\ud800": "\ud800", "\0": b"\0"}, {"accept": "\ud800"})
def test_no_input_raises_anything_but_a_request_error(
    row: dict[str, object], headers: dict[str, str]
) -> None:
    found: Call | CancelCall | RequestError
    try:
        found = read(row, headers)
    except RequestError as error:
        found = error
    if isinstance(found, RequestError):
        assert 400 <= found.status < 500
        assert found.fields or found.status == 413
        # Names and values are cut short, so no error echoes a body of any size.
        assert len(json.dumps(found.body())) < 60_000
        return
    if isinstance(found, CancelCall):
        assert found.request_id
        return
    assert found.output_format in OUTPUT_FORMATS
    assert 1 <= len(found.requests) <= CONFIG.max_instances
    for request in found.requests:
        assert request.prompt.strip() == request.prompt != ""
        request.prompt.encode("utf-8")
        assert type(request.seed) is int
        assert type(request.guidance_scale) is float
        assert request.height * request.width <= CONFIG.max_pixels


PLAUSIBLE = st.fixed_dictionaries(
    {"prompt": st.text(max_size=2100)},
    optional={
        "seed": st.integers(-2, 2**53),
        "steps": st.integers(0, 151),
        "guidance": st.floats(-1, 31) | st.integers(0, 30),
        "height": st.integers(7, 195).map(lambda n: 8 * n),
        "width": st.integers(7, 195).map(lambda n: 8 * n),
        "n": st.integers(1, 5),
        "output_format": st.sampled_from(["json", "npy", "array"]),
    },
)


@given(PLAUSIBLE)
def test_a_call_is_accepted_if_and_only_if_it_is_within_the_limits(
    fields: dict[str, object],
) -> None:
    config = HandlerConfig(default_output="json")
    height, width = fields.get("height", 768), fields.get("width", 768)
    seed, num_images = fields.get("seed", 0), fields.get("n", 1)
    assert isinstance(height, int)
    assert isinstance(width, int)
    assert isinstance(seed, int)
    assert isinstance(num_images, int)
    wrong = {
        "prompt": not 1 <= len(str(fields["prompt"]).strip()) <= 2000
        or "\0" in str(fields["prompt"]),
        "seed": not -1 <= seed <= 2**53 - (num_images if num_images <= 4 else 1),
        "num_inference_steps": not 1 <= fields.get("steps", 1) <= 150,  # type: ignore[operator]
        "guidance_scale": not 0 <= fields.get("guidance", 1) <= 30,  # type: ignore[operator]
        "width": not 64 <= width <= 1536,
        "num_images": num_images > 4,
    }
    # A picture with too many pixels is reported at its height.
    is_too_large = height * width > 1024 * 1024 and not wrong["width"]
    wrong["height"] = not 64 <= height <= 1536 or is_too_large
    expected = {name for name, is_wrong in wrong.items() if is_wrong}
    if expected:
        assert set(problems({"body": fields}, config=config)) == expected
    else:
        request = call({"body": fields}, config=config).requests[0]
        assert (request.height, request.width, request.num_images) == (height, width, num_images)


@given(st.dictionaries(st.sampled_from(sorted(PICTURE_NAMES)), VALUES, max_size=6))
def test_a_json_body_is_read_alike_parsed_or_not(fields: dict[str, object]) -> None:
    """The frontend parses JSON itself only under one spelling of the content type."""

    def outcome(row: dict[str, object]) -> object:
        try:
            return read(row, {"content-type": "Application/JSON"})
        except RequestError as error:
            return error.body()

    try:
        text = json.dumps(fields)
    except ValueError:
        return  # an integer too long for Python's own writer
    if not fields:
        return
    assert outcome({"body": json.loads(text)}) == outcome({"body": text.encode()})
