"""Width and height of an encoded picture, from its header alone."""

from __future__ import annotations

import struct

__all__ = ["picture_size"]

_PNG = b"\x89PNG\r\n\x1a\n"
# JPEG's frame headers: SOF0 to SOF15 without DHT, JPG and DAC.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def picture_size(picture: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a PNG, JPEG or WebP; None where its header says none."""
    try:
        if picture.startswith(_PNG):
            width, height = struct.unpack_from(">II", picture, 16)
            return width, height
        if picture.startswith(b"\xff\xd8"):
            return _jpeg_size(picture)
        if picture.startswith(b"RIFF") and picture[8:12] == b"WEBP":
            return _webp_size(picture)
    except (struct.error, IndexError):
        return None
    return None


def _jpeg_size(picture: bytes) -> tuple[int, int] | None:
    at = 2
    while picture[at] == 0xFF:
        marker, length = picture[at + 1], struct.unpack_from(">H", picture, at + 2)[0]
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", picture, at + 5)
            return width, height
        at += 2 + length
    return None


def _webp_size(picture: bytes) -> tuple[int, int] | None:
    kind = picture[12:16]
    if kind == b"VP8X":
        width = int.from_bytes(picture[24:27], "little") + 1
        return width, int.from_bytes(picture[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(picture[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", picture, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None
