"""Reads the headers of untrusted PNG, JPEG and WebP files: format, size and EXIF orientation.

Nothing is decoded here, and nothing that a file says makes it read far: this is what decides
whether a picture may be decoded at all.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["FORMATS", "PictureHeader", "identify", "read_header"]

FORMATS = ("PNG", "JPEG", "WEBP")
"""What is decoded; the names are Pillow's."""

_NAMES = {"PNG": "PNG", "JPEG": "JPEG", "WEBP": "WebP"}
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# Formats that people send and that are not decoded: named in the refusal.
_OTHER_MAGIC = {
    b"GIF8": "a GIF",
    b"BM": "a BMP",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"8BPS": "a Photoshop file",
    b"%PDF": "a PDF",
    b"<svg": "an SVG",
    b"\0\0\x01\0": "an icon",
    b"\xff\x0a": "a JPEG XL",
    b"\0\0\0\x0cJXL ": "a JPEG XL",
    b"\0\0\0\x0cjP  ": "a JPEG 2000",
}
_MEDIA_BRANDS = {b"avif": "an AVIF", b"avis": "an AVIF", b"heic": "a HEIC", b"mif1": "a HEIC"}
# More than encoders write (8 KiB of pixels each at the least). A file of nothing but empty parts
# would keep Pillow busy for seconds.
_MAX_PARTS = 10_000
_TOO_MANY = f"is a {{}} of more than {_MAX_PARTS} parts"
_MAX_EXIF_ENTRIES = 200
_ORIENTATION = 0x0112
# Markers of JPEG that stand alone, and the frame headers, which hold the size.
_JPEG_ALONE = frozenset([0x01, *range(0xD0, 0xD9)])
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_SCAN, _JPEG_END, _JPEG_APP1 = 0xDA, 0xD9, 0xE1


@dataclass(frozen=True, slots=True)
class PictureHeader:
    """What a file says of its picture before it is decoded."""

    format: str
    """One of `FORMATS`."""
    stored_width_px: int
    stored_height_px: int
    orientation: int = 1
    """EXIF's, 1 to 8: how the stored picture is to be turned."""

    @property
    def size_px(self) -> tuple[int, int]:
        """Width and height as the picture is looked at, that is, turned."""
        sides = (self.stored_width_px, self.stored_height_px)
        return (sides[1], sides[0]) if self.orientation >= 5 else sides


def identify(content: bytes) -> str | None:
    """Return the format that `content` begins like; None for any other than `FORMATS`."""
    if content.startswith(_PNG_MAGIC):
        return "PNG"
    if content.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "WEBP"
    return None


def read_header(content: bytes) -> PictureHeader:
    """Read the header of a picture.

    Raises:
        ValueError: it is no PNG, JPEG or WebP, or its header is broken; the text says so.
    """
    found = identify(content)
    if found is None:
        raise ValueError(f"is {_other_format(content)}; allowed are PNG, JPEG and WebP")
    try:
        header = _READERS[found](content)
    except (struct.error, IndexError) as error:
        raise ValueError(f"is a {_NAMES[found]} whose header is cut short") from error
    if not (header.stored_width_px and header.stored_height_px):
        raise ValueError(f"is a {_NAMES[found]} without pixels")
    return header


def _other_format(content: bytes) -> str:
    if not content:
        return "empty"
    if content[4:8] == b"ftyp" and content[8:12] in _MEDIA_BRANDS:
        return _MEDIA_BRANDS[content[8:12]]
    start = content[:16].lstrip() if content[:1] in b" \t\r\n<" else content[:16]
    named = (name for magic, name in _OTHER_MAGIC.items() if start.startswith(magic))
    return next(named, "no picture")


def _read_png(content: bytes) -> PictureHeader:
    length, kind, width, height = struct.unpack_from(">I4sII", content, 8)
    if kind != b"IHDR" or length != 13:
        raise ValueError("is a PNG whose header is broken")
    for kind, start, length in _png_chunks(content):
        if kind == b"eXIf":
            return PictureHeader(
                "PNG", width, height, _orientation(content[start : start + length])
            )
    return PictureHeader("PNG", width, height)


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Type, start and length of each chunk, as far as they are whole."""
    position = len(_PNG_MAGIC)
    for _ in range(_MAX_PARTS):
        if position + 12 > len(content):
            return
        length, kind = struct.unpack_from(">I4s", content, position)
        yield kind, position + 8, length
        position += 12 + length
    raise ValueError(_TOO_MANY.format("PNG"))


def _read_jpeg(content: bytes) -> PictureHeader:
    orientation = 1
    for marker, start, length in _jpeg_segments(content):
        if marker == _JPEG_APP1 and content[start : start + 6] == b"Exif\0\0":
            orientation = _orientation(content[start + 6 : start + length])
        elif marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", content, start + 1)
            return PictureHeader("JPEG", width, height, orientation)
    raise ValueError("is a JPEG without a size")


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and length of each segment before the first scan."""
    position = 2
    for _ in range(_MAX_PARTS):
        if content[position] != 0xFF:
            raise ValueError("is a JPEG whose header is broken")
        marker = content[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
        elif marker in _JPEG_ALONE:
            position += 2
        elif marker in (_JPEG_SCAN, _JPEG_END):
            return
        else:
            (length,) = struct.unpack_from(">H", content, position + 2)
            yield marker, position + 4, length - 2
            position += 2 + max(length, 2)
    raise ValueError(_TOO_MANY.format("JPEG"))


def _read_webp(content: bytes) -> PictureHeader:
    kind, start = content[12:16], 20
    if kind == b"VP8X":
        sides = [
            1 + int.from_bytes(content[at : at + 3], "little") for at in (start + 4, start + 7)
        ]
        if len(content) < start + 10:
            raise IndexError
        return PictureHeader("WEBP", sides[0], sides[1], _webp_orientation(content))
    if kind == b"VP8L":
        signature, packed = struct.unpack_from("<BI", content, start)
        if signature == 0x2F:
            return PictureHeader("WEBP", 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF))
    elif kind == b"VP8 ":
        code, width, height = struct.unpack_from("<3sHH", content, start + 3)
        if code == b"\x9d\x01\x2a":
            return PictureHeader("WEBP", width & 0x3FFF, height & 0x3FFF)
    raise ValueError("is a WebP whose header is broken")


def _webp_orientation(content: bytes) -> int:
    position = 12
    for _ in range(_MAX_PARTS):
        if position + 8 > len(content):
            return 1
        kind, length = struct.unpack_from("<4sI", content, position)
        if kind == b"EXIF":
            exif = content[position + 8 : position + 8 + length]
            return _orientation(exif.removeprefix(b"Exif\0\0"))
        position += 8 + length + length % 2
    raise ValueError(_TOO_MANY.format("WebP"))


def _orientation(exif: bytes) -> int:
    """The orientation in EXIF data (a TIFF header and its first directory); 1 if there is none."""
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(f"{order}I", exif, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", exif, directory)
        for index in range(min(num_entries, _MAX_EXIF_ENTRIES)):
            tag, kind, _, value = struct.unpack_from(
                f"{order}HHIH", exif, directory + 2 + 12 * index
            )
            if tag == _ORIENTATION:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        return 1  # as broken as that of many cameras; the picture itself may be whole
    return 1


_READERS = {"PNG": _read_png, "JPEG": _read_jpeg, "WEBP": _read_webp}
