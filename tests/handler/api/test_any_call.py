"""Any call whatever is read, or refused as a client's error; nothing gets past the checks."""

from __future__ import annotations

import json

from hypothesis import example, given, settings
from hypothesis import strategies as st

from handler.api.call import Call, CancelCall
from handler.api.schema import PICTURE_NAMES, REPLY_FIELDS
from handler.config import OUTPUT_FORMATS, HandlerConfig
from handler.errors import RequestError
from tests.support.calls import CONFIG, JSON, call, problems, read

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
