"""Pictures that clients send: read from what arrived, bounded by their headers, decoded later.

`read_picture` looks at the header alone and is quick. `SentPicture.decode` takes as long as the
picture is large, and is for a thread beside the engine's.

How a picture becomes what a pipeline takes:

- turned as its EXIF orientation says;
- ``image`` and ``control_image``: RGB, what is transparent on white;
- ``mask_image``: one channel, its luminance, as diffusers documents it: white is drawn anew, black
  is kept. What is transparent counts as black;
- resized with Lanczos and without keeping the ratio, which is what diffusers does itself.
"""

from __future__ import annotations

import binascii
import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from handler.api.picture_headers import PictureHeader, identify, read_header
from handler.messages import show

__all__ = ["NO_FETCHING", "BadPicture", "SentPicture", "looks_like_base64_picture", "read_picture"]

NO_FETCHING = (
    "no request makes the server fetch anything; send the picture itself: its file in base64, as a"
    " data: URI, or as a part of a multipart form"
)
_URL = re.compile(r"\s*(?!data:)[a-z][a-z0-9+.-]{1,20}:", re.IGNORECASE)
_DATA_URI = re.compile(r"data:([^,;]{0,100})((?:;[^,;]{0,100}){0,8}),", re.IGNORECASE)
# How bytes begin that are base64, a data: URI or a URL; forms deliver these as bytes too.
_TEXT = re.compile(rb"[\x20-\x7e\r\n\t]+")
_NUM_LOOKED_AT = 64
# Line breaks, and the letters of the alphabet that is safe in URLs.
_BASE64_VARIANTS = {"\r": "", "\n": "", "\t": "", "-": "+", "_": "/"}
# What the three formats' magic numbers are in base64.
_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "UklGR", "data:image/")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Encoders write about ten. Each one goes over the whole picture, and takes only a few bytes.
_MAX_JPEG_SCANS = 100
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


class BadPicture(ValueError):
    """A picture cannot be used; the text is what a client is told of its field."""


@dataclass(frozen=True, slots=True)
class SentPicture:
    """A picture that a client sent and whose header was checked; not decoded yet."""

    content: bytes = field(repr=False)
    """The file, empty once it is forgotten."""
    header: PictureHeader
    sha256: str = ""
    """Of the file, in hexadecimal; empty until it is forgotten."""

    @property
    def format(self) -> str:
        """``PNG``, ``JPEG`` or ``WEBP``."""
        return self.header.format

    @property
    def width_px(self) -> int:
        """The width of the picture once it is turned."""
        return self.header.size_px[0]

    @property
    def height_px(self) -> int:
        """The height of the picture once it is turned."""
        return self.header.size_px[1]

    def decode(self, width_px: int, height_px: int, *, as_mask: bool = False) -> Image.Image:
        """Return the picture in this size: RGB, or as a mask L.

        Raises:
            BadPicture: what follows the header is broken, or animated.
        """
        try:
            return self._decode(width_px, height_px, as_mask=as_mask)
        except BadPicture:
            raise
        # Pillow's plugins raise whatever a broken file leads them to.
        except Exception as error:
            raise BadPicture(
                f"is a {self.format} that cannot be decoded: {_said(error)}"
            ) from error

    def forget_content(self) -> SentPicture:
        """Return the same without the file's bytes, but with their hash."""
        return replace(self, content=b"", sha256=hashlib.sha256(self.content).hexdigest())

    def _decode(self, width_px: int, height_px: int, *, as_mask: bool) -> Image.Image:
        if self.format == "JPEG":
            _check_scans(self.content)
        with Image.open(io.BytesIO(self.content), formats=[self.format]) as opened:
            # MPO is a JPEG with more of them behind it, as phones write it: the first is meant.
            if getattr(opened, "is_animated", False) and opened.format != "MPO":
                raise BadPicture("is animated; send one picture")
            if opened.size != (self.header.stored_width_px, self.header.stored_height_px):
                raise BadPicture(f"is a {self.format} that has two sizes")
            opened.load()
            picture: Image.Image = opened
            if self.header.orientation in _TURNS:
                picture = picture.transpose(_TURNS[self.header.orientation])
            picture = _plain(picture, "L" if as_mask else "RGB")
        if picture.size != (width_px, height_px):
            picture = picture.resize((width_px, height_px), Image.Resampling.LANCZOS)
        # After the resizing, which weighs pixels by their opacity: this one holds up other threads.
        if picture.mode == "RGBA":
            background = Image.new("RGBA", picture.size, "black" if as_mask else "white")
            background.alpha_composite(picture)
            picture = background.convert("L" if as_mask else "RGB")
        picture.info = {}
        return picture


def read_picture(value: object, *, max_bytes: int, max_pixels: int) -> SentPicture:
    """Read a picture from what a client sent: bytes, base64 or a ``data:`` URI.

    Raises:
        BadPicture: with what is wrong with it, and what is allowed.
    """
    content = _content(value, max_bytes)
    if len(content) > max_bytes:
        raise BadPicture(f"has {len(content)} bytes; allowed are {max_bytes}")
    try:
        header = read_header(content)
    except ValueError as error:
        raise BadPicture(str(error)) from error
    width, height = header.size_px
    if width * height > max_pixels:
        raise BadPicture(
            f"has {width}x{height} (width x height) pixels, {width * height} of them;"
            f" allowed are {max_pixels}"
        )
    return SentPicture(content, header)


def looks_like_base64_picture(text: str) -> bool:
    """Whether a text begins as a picture in base64 does."""
    return text[:40].lstrip().startswith(_BASE64_STARTS)


def _content(value: object, max_bytes: int) -> bytes:
    # TensorFlow Serving's and KServe's way to write bytes in JSON.
    if isinstance(value, Mapping) and value.keys() == {"b64"}:
        value = value["b64"]
    if isinstance(value, (bytes, bytearray, memoryview)):
        content = bytes(value)
        is_text = _TEXT.fullmatch(content[:_NUM_LOOKED_AT])
        if len(content) > 2 * max_bytes or identify(content) or not is_text:
            return content
        value = content.decode("ascii", "replace")
    if not isinstance(value, str):
        raise BadPicture(
            f"must be one picture, in base64, as a data: URI or as a file, not {show(value)}"
        )
    return _from_text(value, max_bytes)


def _from_text(text: str, max_bytes: int) -> bytes:
    uri = _DATA_URI.match(text.lstrip()[:1000])
    if uri is not None:
        if not uri[2].lower().endswith(";base64"):
            raise BadPicture("is a data: URI that is not in base64: data:image/png;base64,…")
        text = text.lstrip()[uri.end() :]
    elif _URL.match(text[:40]):
        raise BadPicture(f"{show(text)} is a URL: {NO_FETCHING}")
    text = text.strip()
    for written, meant in _BASE64_VARIANTS.items():
        text = text.replace(written, meant)
    num_bytes = len(text) * 3 // 4
    if num_bytes > max_bytes + 3:
        raise BadPicture(f"has {num_bytes} bytes; allowed are {max_bytes}")
    if " " in text:
        raise BadPicture(
            "is base64 with spaces, as a form makes of +: send it with --data-urlencode, or the"
            " file itself as a part of a multipart form"
        )
    padding = "" if text.endswith("=") else "=" * (-len(text) % 4)
    try:
        return binascii.a2b_base64(text + padding, strict_mode=True)
    except ValueError as error:
        raise BadPicture(f"{show(text)} is not base64 of a picture; {NO_FETCHING}") from error


def _check_scans(content: bytes) -> None:
    """Refuse a JPEG whose many scans would take minutes: it is small, and its pixels are few."""
    num_scans = 0
    for match in _JPEG_MARKER.finditer(content):
        marker = match.group()[1]
        num_scans += marker == 0xDA
        if num_scans > _MAX_JPEG_SCANS:
            raise BadPicture(f"is a JPEG of more than {_MAX_JPEG_SCANS} scans")


def _plain(picture: Image.Image, mode: str) -> Image.Image:
    """The picture in `mode`, RGB or L; as RGBA where parts of it are transparent."""
    if picture.mode.startswith("I"):  # 16 bits of grey: Pillow would cut them off at 255
        values = np.asarray(picture).astype(np.int64).clip(0, 65535) >> 8
        picture = Image.fromarray(values.astype(np.uint8))
    return picture.convert("RGBA" if picture.has_transparency_data else mode)


def _said(error: Exception) -> str:
    """What Pillow says of a broken file, in one short line without addresses of objects."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return "it is no such file" if "<_io.BytesIO" in text else text[:120]
