"""Hostile pictures: each is a clear refusal or a picture, in bounded time, never anything else."""

from __future__ import annotations

import io
import random
import re
import struct
import time
import warnings
import zlib
from collections.abc import Iterator

import pytest
from PIL import Image

from handler.api.call import Call, read_call
from handler.api.decoding import decode_all
from handler.api.traits import PipelineTraits
from handler.config import HandlerConfig
from handler.errors import InvalidRequest
from tests.support.pictures import (
    as_base64,
    encoded,
    header_only_png,
    mutated,
    png_chunk,
    scans_bomb,
    with_orientation,
)

CONFIG = HandlerConfig(max_picture_pixels=512 * 512)
PARAMETERS = frozenset(["prompt", "image", "mask_image", "strength", "height", "width"])
TRAITS = PipelineTraits(
    ("DDIMScheduler",),
    8,
    frozenset({"prompt", "height", "width"}),
    tasks={
        "text-to-image": frozenset({"prompt", "height", "width"}),
        "image-to-image": PARAMETERS,
        "inpainting": PARAMETERS,
    },
)
# For one picture on a machine that others use too; ordinary ones take a few milliseconds.
LIMIT_S = 5.0


def outcome(content: bytes | str, field: str = "image") -> dict[str, str] | Image.Image:
    """What becomes of a picture: its problem by field, or the picture that the engine gets."""
    body: dict[str, object] = {"prompt": b"a", field: content}
    if field == "mask_image":
        body["image"] = encoded((64, 64))
    started_s = time.process_time()
    found = _outcome(body, field)
    assert time.process_time() - started_s < LIMIT_S
    if isinstance(found, dict):
        assert found.keys() == {field}
        assert 0 < len(found[field]) < 400
        assert not re.search(r"\b0x", found[field]), "an address is nothing to tell a client"
    return found


def _outcome(body: dict[str, object], field: str) -> dict[str, str] | Image.Image:
    try:
        call = read_call(body, {}, CONFIG, TRAITS, draw_seed=lambda: 1)
        assert isinstance(call, Call)
        (decoded,) = decode_all(call.requests, CONFIG, call.paths)
    except InvalidRequest as error:
        return error.fields
    (request,) = call.requests
    assert decoded[field].size == (request.width, request.height)
    assert decoded[field].mode == ("L" if field == "mask_image" else "RGB")
    return decoded[field]


def problem(content: bytes) -> str:
    found = outcome(content)
    assert isinstance(found, dict)
    return found["image"]


SEEDS = [
    encoded((40, 30)),
    encoded((30, 40), mode="P"),
    encoded((33, 17), mode="RGBA", colour=(1, 2, 3, 4)),
    encoded((40, 30), mode="L"),
    with_orientation((40, 30), "PNG", 6),
    encoded((40, 30), "JPEG"),
    encoded((64, 64), "JPEG", mode="CMYK"),
    encoded((64, 64), "JPEG", progressive=True),
    with_orientation((40, 30), "JPEG", 6),
    encoded((40, 30), "WEBP"),
    encoded((40, 30), "WEBP", lossless=True),
    encoded((40, 30), "WEBP", mode="RGBA", colour=(9, 9, 9, 99)),
    with_orientation((40, 30), "WEBP", 8),
]


@pytest.fixture(autouse=True)
def _pillow_may_warn() -> Iterator[None]:
    """Of broken EXIF data and the like Pillow warns; in the worker that is no error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


def _mutations(number: int, seed: int) -> dict[str, int]:
    chance = random.Random(seed)
    counts = {"picture": 0, "refused": 0}
    for index in range(number):
        field = "mask_image" if index % 10 == 0 else "image"
        found = outcome(mutated(chance.choice(SEEDS), chance), field)
        counts["refused" if isinstance(found, dict) else "picture"] += 1
    return counts


@pytest.mark.parametrize("seed", range(10))
def test_ten_thousand_mutated_pictures(seed: int) -> None:
    # Both ends are reached, or the mutations would be too weak or too strong to find anything.
    assert min(_mutations(1000, seed).values()) > 50


def test_mutated_base64() -> None:
    chance = random.Random(11)
    for _ in range(1000):
        text = as_base64(chance.choice(SEEDS)).encode()
        outcome(mutated(text, chance).decode("latin-1"))


@pytest.mark.parametrize("content", SEEDS)
def test_every_beginning_of_a_picture(content: bytes) -> None:
    for length in range(0, len(content), max(1, len(content) // 60)):
        found = outcome(content[:length])
        # What is behind the pixels may be missing.
        assert isinstance(found, dict) or length > len(content) // 2


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b"GIF89a" + bytes(50), "is a GIF; allowed are PNG, JPEG and WebP"),
        (b"BM" + bytes(50), "is a BMP"),
        (b"II*\0" + bytes(50), "is a TIFF"),
        (b"\0\0\0\x20ftypavif" + bytes(50), "is an AVIF"),
        (b"\0\0\0\x20ftypheic" + bytes(50), "is a HEIC"),
        (b"%PDF-1.7" + b"\xff" * 50, "is a PDF"),
        (bytes(100), "is no picture"),
        (b"\x89PNG\r\n\x1a\n", "is a PNG whose header is cut short"),
        (encoded((40, 30), "JPEG")[:20], "is a JPEG whose header is cut short"),
        (encoded((40, 30), "WEBP")[:24], "is a WebP whose header is cut short"),
        (header_only_png(0, 9), "is a PNG without pixels"),
        (header_only_png(2**31, 2**31), "allowed are 262144"),
        (header_only_png(60_000, 60_000), "has 60000x60000 (width x height) pixels"),
        (header_only_png(500, 500), "is a PNG that cannot be decoded"),
        (encoded((256, 256), "JPEG")[:600], "is a JPEG that cannot be decoded"),
        (scans_bomb(200), "is a JPEG of more than 100 scans"),
    ],
)
def test_what_is_refused_says_why(content: bytes, complaint: str) -> None:
    assert complaint in problem(content)


def test_bytes_are_bounded_before_anything_is_read() -> None:
    content = encoded() + bytes(CONFIG.max_picture_bytes)
    assert problem(content) == (f"has {len(content)} bytes; allowed are {CONFIG.max_picture_bytes}")


def test_a_picture_of_nothing_but_parts_is_soon_given_up() -> None:
    empty = png_chunk(b"teSt", b"")
    many = encoded()[:33] + empty * ((CONFIG.max_picture_bytes - 100) // len(empty))
    assert problem(many) == "is a PNG of more than 10000 parts"
    segment = b"\xff\xe2\0\x02"
    many = b"\xff\xd8" + segment * ((CONFIG.max_picture_bytes - 100) // len(segment))
    assert problem(many) == "is a JPEG of more than 10000 parts"


def test_text_that_would_fill_the_memory() -> None:
    """A compressed comment of 50 MB in 50 kB, many times: Pillow stops at its own limit."""
    comment = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000)))
    plain = encoded()
    assert "cannot be decoded" in problem(plain[:33] + comment * 20 + plain[33:])


def test_compressed_pixels_that_go_on_for_ever() -> None:
    """More rows than the header says are not read."""
    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    content = (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(bytes(200_000_000)))
        + png_chunk(b"IEND", b"")
    )
    assert isinstance(outcome(content), Image.Image)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF"])
def test_animated_pictures_are_refused(kind: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    expected = "is a GIF; allowed" if kind == "GIF" else "is animated; send one picture"
    assert expected in problem(buffer.getvalue())


def test_a_phones_several_pictures_in_one_jpeg_are_its_first() -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "MPO", save_all=True, append_images=frames[1:])
    found = outcome(buffer.getvalue())
    assert isinstance(found, Image.Image)
    red, _, blue = found.getpixel((5, 5))  # type: ignore[misc]
    assert red > 200 > 50 > blue


def test_one_pixel() -> None:
    for kind in ("PNG", "JPEG", "WEBP"):
        assert isinstance(outcome(encoded((1, 1), kind, colour="red")), Image.Image)
    assert "no size of this ratio is allowed" in problem(encoded((1, 500), colour="red"))
