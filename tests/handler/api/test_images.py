"""Pictures that clients send: every way to send one, and what the pipeline gets of it."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from handler.api.images import BadPicture, SentPicture, looks_like_base64_picture, read_picture
from tests.support.pictures import as_base64, encoded, with_orientation

PNG = encoded((40, 24))
JPEG = encoded((40, 24), "JPEG")
WEBP = encoded((40, 24), "WEBP")


def read(value: object, max_bytes: int = 10**6, max_pixels: int = 10**6) -> SentPicture:
    return read_picture(value, max_bytes=max_bytes, max_pixels=max_pixels)


def problem(value: object, **limits: int) -> str:
    with pytest.raises(BadPicture) as caught:
        read(value, **limits)
    return str(caught.value)


def pixels(content: bytes, size: tuple[int, int] | None = None, **options: Any) -> Any:
    sent = read(content)
    width, height = size or (sent.width_px, sent.height_px)
    return np.asarray(sent.decode(width, height, **options)).astype(int)


# How a picture is sent.


@pytest.mark.parametrize("content", [PNG, JPEG, WEBP], ids=["PNG", "JPEG", "WEBP"])
def test_ways_to_send_one(content: bytes) -> None:
    text = as_base64(content)
    kind = read(content).format.lower()
    ways: list[object] = [
        content,
        bytearray(content),
        memoryview(content),
        text,
        text.encode(),  # a file part with base64 in it
        f"data:image/{kind};base64,{text}",
        f" DATA:image/{kind};charset=utf-8;BASE64,{text}\n".encode(),
        f"data:;base64,{text}",
        base64.encodebytes(content).decode(),  # lines of 76, as the command line tool writes
        base64.urlsafe_b64encode(content).decode(),
        text.rstrip("="),
        {"b64": text},  # TensorFlow Serving's and KServe's bytes in JSON
    ]
    for value in ways:
        assert read(value) == read(content)
    assert read(content).header.size_px == (40, 24)
    assert all(looks_like_base64_picture(str(way)) for way in ways[3:4])


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/a.png",
        "HTTPS://example.org/a.png",
        "ftp://example.org/a.png",
        "file:///etc/passwd",
        "s3://bucket/a.png",
        "blob:https://example.org/1",
        b"https://example.org/a-rather-long-name-of-a-picture.png",
        b"http://x/y.png",
    ],
)
def test_urls_are_refused(url: object) -> None:
    assert "is a URL: no request makes the server fetch anything" in problem(url)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (7, "must be one picture, in base64, as a data: URI or as a file, not 7"),
        ([1, 2], "not a list of 2"),
        ({"url": "x"}, "not an object"),
        (True, "not true"),
        ("", "is empty"),
        ("data:image/png;base64,", "is empty"),
        ("in.png", "'in.png' is not base64 of a picture; no request makes the server fetch"),
        ("@in.png", "is not base64 of a picture"),
        ("/etc/passwd", "is no picture; allowed are PNG, JPEG and WebP"),
        ("YQ==YQ==", "is not base64"),
        ("\ud800" * 8, "is not base64"),
        ("data:image/svg+xml,<svg/>", "is a data: URI that is not in base64"),
        (as_base64(b"GIF89a" + bytes(40)), "is a GIF; allowed are PNG, JPEG and WebP"),
    ],
)
def test_what_is_no_picture(value: object, complaint: str) -> None:
    assert complaint in problem(value)


def test_a_form_that_made_spaces_of_plus_signs() -> None:
    content = next(c for s in range(40, 90) if "+" in as_base64(c := encoded((s, s), "JPEG")))
    assert read(as_base64(content)) == read(content)
    assert "--data-urlencode" in problem(as_base64(content).replace("+", " "))


def test_bounds() -> None:
    assert problem(PNG, max_bytes=len(PNG) - 1) == (
        f"has {len(PNG)} bytes; allowed are {len(PNG) - 1}"
    )
    assert read(as_base64(PNG), max_bytes=len(PNG)) == read(PNG)
    assert "allowed are 60" in problem(as_base64(PNG), max_bytes=60)
    assert "allowed are 60" in problem("A" * 5000, max_bytes=60)
    assert read(PNG, max_pixels=40 * 24).width_px == 40
    assert problem(PNG, max_pixels=40 * 24 - 1) == (
        "has 40x24 (width x height) pixels, 960 of them; allowed are 959"
    )


# What the pipeline gets.


def test_an_opaque_picture_is_as_diffusers_reads_it() -> None:
    for content in (PNG, JPEG, WEBP):
        with Image.open(io.BytesIO(content)) as opened:
            assert (pixels(content) == np.asarray(opened.convert("RGB"))).all()
            resized = opened.convert("RGB").resize((64, 32), Image.Resampling.LANCZOS)
            assert (pixels(content, (64, 32)) == np.asarray(resized)).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(kind: str, orientation: int) -> None:
    """Pillow's own turning is the reference."""
    from PIL import ImageOps

    content = with_orientation((40, 24), kind, orientation)
    with Image.open(io.BytesIO(content)) as opened:
        expected = ImageOps.exif_transpose(opened).convert("RGB")
    sent = read(content)
    assert sent.header.size_px == expected.size == ((40, 24) if orientation < 5 else (24, 40))
    assert (pixels(content) == np.asarray(expected)).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_of_an_image_is_laid_on_white(kind: str) -> None:
    lossless = {} if kind == "PNG" else {"lossless": True, "exact": True}
    half = encoded((16, 16), kind, "RGBA", (200, 0, 0, 128), **lossless)
    assert np.abs(pixels(half) - [227, 127, 127]).max() <= 1
    clear = encoded((16, 16), kind, "RGBA", (200, 0, 0, 0), **lossless)
    assert (pixels(clear) == 255).all()


def test_transparency_that_has_no_channel() -> None:
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    for transparent, expected in ((0, [10, 20, 30]), (1, [255, 255, 255])):
        buffer = io.BytesIO()
        palette.save(buffer, "PNG", transparency=transparent)
        assert (pixels(buffer.getvalue()) == expected).all()
    for mode, colour in (("RGB", (9, 8, 7)), ("L", 9)):
        assert (pixels(encoded((16, 16), "PNG", mode, colour, transparency=colour)) == 255).all()
    grey = encoded((16, 16), "PNG", "LA", (0, 128))
    assert np.abs(pixels(grey) - 127).max() <= 1


def test_a_mask_is_its_luminance_and_black_where_it_is_transparent() -> None:
    def mask(mode: str, colour: Any) -> int:
        found = pixels(encoded((16, 16), "PNG", mode, colour), as_mask=True)
        assert found.shape == (16, 16)
        assert found.min() == found.max()
        return int(found[0, 0])

    assert mask("RGB", (255, 255, 255)) == mask("1", 1) == mask("LA", (255, 255)) == 255
    assert mask("RGB", (0, 0, 0)) == mask("RGBA", (255, 255, 255, 0)) == 0
    # As diffusers makes a mask of a picture.
    red = Image.new("RGB", (1, 1), (255, 0, 0)).convert("L").getpixel((0, 0))
    assert mask("RGB", (255, 0, 0)) == mask("RGBA", (255, 0, 0, 255)) == red


def test_other_kinds_of_pixels() -> None:
    assert (pixels(encoded((16, 16), "PNG", "L", 77)) == 77).all()
    assert (pixels(encoded((16, 16), "PNG", "1", 1)) == 255).all()
    for value in (0, 77, 255):
        deep = Image.fromarray(np.full((16, 16), 256 * value + 5, np.uint16))
        buffer = io.BytesIO()
        deep.save(buffer, "PNG")
        assert (pixels(buffer.getvalue()) == value).all()
        assert (pixels(buffer.getvalue(), as_mask=True) == value).all()
    printed = encoded((16, 16), "JPEG", "CMYK", (0, 0, 0, 0))
    assert pixels(printed).min() > 250
    inked = encoded((16, 16), "JPEG", "CMYK", (0, 255, 255, 0))
    assert np.abs(pixels(inked) - [255, 0, 0]).max() < 10


def test_nothing_of_the_file_goes_along() -> None:
    sent = read(with_orientation((40, 24), "PNG", 3))
    assert sent.decode(40, 24).info == {}
    forgotten = sent.forget_content()
    assert (forgotten.content, forgotten.header) == (b"", sent.header)
    assert len(forgotten.sha256) == 64
    assert forgotten.sha256 != read(PNG).forget_content().sha256
    assert len(repr(sent)) < 200
