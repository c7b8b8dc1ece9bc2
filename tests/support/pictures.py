"""Pictures as clients send them: small files of every format, and ways to break them."""

from __future__ import annotations

import base64
import io
import random
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

__all__ = [
    "as_base64",
    "encoded",
    "header_only_png",
    "mutated",
    "png_chunk",
    "scans_bomb",
    "with_orientation",
]


def encoded(
    size: tuple[int, int] = (64, 48),
    kind: str = "PNG",
    mode: str = "RGB",
    colour: Any = None,
    **options: Any,
) -> bytes:
    """A file of `size` (width, height): one colour, or a gradient that no two sizes share."""
    if colour is None:
        width, height = size
        across = np.linspace(0, 255, width)[None, :].repeat(height, 0)
        down = np.linspace(0, 255, height)[:, None].repeat(width, 1)
        grey = np.full((height, width), 90.0)
        image = Image.fromarray(np.stack([across, down, grey], -1).astype(np.uint8)).convert(mode)
    else:
        image = Image.new(mode, size, colour)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def with_orientation(size: tuple[int, int], kind: str, orientation: int) -> bytes:
    """A file whose EXIF data say how it is to be turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(size, kind, exif=exif, **({} if kind == "JPEG" else {"lossless": True}))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header_only_png(width: int, height: int, *, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG that says what size it is and has a row or two of pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(bytes(3 * 2000)))
        + png_chunk(b"IEND", b"")
    )


def scans_bomb(num_scans: int) -> bytes:
    """A progressive JPEG with its last scan again and again: a few bytes, much work."""
    content = encoded((256, 256), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * num_scans + content[-2:]


def mutated(content: bytes, chance: random.Random) -> bytes:
    """`content` with bytes changed, cut out, doubled or cut off."""
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 4, 16])):
        if not data:
            break
        # Headers are where most can go wrong.
        end = len(data) if chance.random() < 0.5 else min(len(data), 64)
        at = chance.randrange(end)
        match chance.randrange(6):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                data[at] = chance.choice([0, 1, 0x7F, 0x80, 0xFE, 0xFF])
            case 2:
                del data[at : at + chance.randrange(1, 64)]
            case 3:
                data[at:at] = data[at : at + chance.randrange(1, 64)]
            case 4:
                del data[at:]
            case 5:
                number = chance.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, chance.getrandbits(32)])
                data[at : at + 4] = struct.pack(">I", number)
    return bytes(data)
