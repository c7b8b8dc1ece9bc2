"""Accept headers, as browsers, libraries and people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.api.accept import MEDIA_TYPES, Negotiated, negotiate
from handler.config import OUTPUT_FORMATS


@pytest.mark.parametrize(
    ("accept", "output_format"),
    [
        ("", "png"),
        ("*/*", "png"),
        ("image/*", "png"),
        ("image/jpeg", "jpeg"),
        ("image/jpg", "jpeg"),
        ("IMAGE/WebP", "webp"),
        ("application/json", "json"),
        ("application/json; charset=utf-8", "json"),
        ("application/x-npy", "npy"),
        ("application/*", "npy"),
        ("image/webp, image/jpeg", "webp"),
        ("image/webp;q=0.5, image/jpeg;q=0.9", "jpeg"),
        ("image/webp; Q=0.5 , image/jpeg;q=0.500", "webp"),
        ("*/*;q=0.1, application/json", "json"),
        ("*/*, image/png;q=0", "jpeg"),
        ("image/*;q=0.9, image/png;q=0.2, image/webp;q=0.95", "webp"),
        # A browser's address bar, and its image element.
        (
            "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8",
            "webp",
        ),
        ("image/avif,image/apng,image/svg+xml,image/*,*/*;q=0.8", "png"),
        # Malformed elements are passed over.
        ("garbage, ;;;, image/jpeg", "jpeg"),
        ("image", "png"),
        ("image/jpeg;q=7", "jpeg"),
        ("text/html", None),
        ("image/png;q=0", None),
        ("image/gif, audio/*", None),
    ],
)
def test_negotiation_with_png_as_the_default(accept: str, output_format: str | None) -> None:
    assert negotiate(accept, "png") == Negotiated(output_format)


@pytest.mark.parametrize(
    ("accept", "default", "output_format"),
    [
        ("*/*", "array", "array"),
        ("application/json", "array", "array"),
        ("application/json", "json", "json"),
        ("image/*", "webp", "webp"),
        ("image/*", "array", "png"),
        ("application/*", "json", "json"),
    ],
)
def test_the_default_is_taken_where_there_is_a_choice(
    accept: str, default: str, output_format: str
) -> None:
    assert negotiate(accept, default).output_format == output_format


@pytest.mark.parametrize(
    ("accept", "negotiated"),
    [
        ("text/event-stream", Negotiated("png", stream=True)),
        ("text/event-stream, image/webp", Negotiated("webp", stream=True)),
        ("text/event-stream, text/html", Negotiated("png", stream=True)),
        ("text/event-stream;q=0.5, image/webp", Negotiated("webp")),
        ("text/event-stream;q=0, */*", Negotiated("png")),
        ("text/*", Negotiated(None)),
    ],
)
def test_event_streams(accept: str, negotiated: Negotiated) -> None:
    assert negotiate(accept, "png") == negotiated


RANGES = st.sampled_from([*MEDIA_TYPES.values(), "*/*", "image/*", "text/event-stream", "text/x"])
HEADERS = st.text() | st.lists(
    st.tuples(RANGES, st.sampled_from(["", ";q=0", ";q=0.3", ";q=1.0", ";q=x", ";v=1"])).map(
        "".join
    )
).map(",".join)


@given(HEADERS, st.sampled_from(OUTPUT_FORMATS))
def test_any_header_gets_an_answer(accept: str, default: str) -> None:
    negotiated = negotiate(accept, default)
    assert negotiated.output_format in (None, *OUTPUT_FORMATS)
    if negotiated.output_format == "array":
        assert default == "array"
