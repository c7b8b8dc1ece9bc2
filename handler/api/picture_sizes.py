"""The size that a request with a picture is drawn in, and that its pictures are brought to.

Sizes that are sent count, and the pictures are stretched to them. One of height and width alone
makes the other by the picture's ratio. Without both the picture's own size counts, scaled with its
ratio kept into the operator's limits; then each side is rounded down to what the pipeline takes.
"""

from __future__ import annotations

import math

from handler.api.fields import FieldReader
from handler.api.images import SentPicture
from handler.api.schema import Value
from handler.config import HandlerConfig

__all__ = ["choose_size", "within_limits"]

# Keeps what is a whole number but for rounding from losing a step.
_EPSILON = 1e-6


def choose_size(
    reader: FieldReader,
    sent: tuple[Value, Value],
    name: str,
    picture: SentPicture,
    config: HandlerConfig,
    multiple: int,
) -> tuple[int, int] | None:
    """Height and width for a request whose field `name` is `picture`; None where none is found.

    `sent` are height and width as the request has them. What is wrong is reported.
    """
    height, width = sent
    if isinstance(height, int) and isinstance(width, int):
        return height, width
    if isinstance(height, int) or isinstance(width, int):
        return _by_ratio(reader, sent, picture, config, multiple)
    low = -(-config.min_size_px // multiple) * multiple
    high = config.max_size_px // multiple * multiple
    shorter, longer = sorted((picture.width_px, picture.height_px))
    scale = max(1.0, low / shorter)
    scale = min(scale, high / longer, math.sqrt(config.max_pixels / (shorter * longer)))
    found = [_floor(side * scale, multiple) for side in (picture.height_px, picture.width_px)]
    if min(found) < low:
        reader.report(
            name,
            f"is {picture.width_px}x{picture.height_px} (width x height): no size of this ratio is"
            f" allowed ({config.min_size_px} to {config.max_size_px} a side, {config.max_pixels}"
            " pixels); send height and width",
        )
        return None
    return found[0], found[1]


def within_limits(picture: SentPicture, config: HandlerConfig) -> tuple[int, int]:
    """Width and height of a picture in its own size, scaled down where that is too large."""
    width, height = picture.width_px, picture.height_px
    scale = min(
        1.0,
        config.max_size_px / max(width, height),
        math.sqrt(config.max_pixels / (width * height)),
    )
    return _floor(width * scale, 1) or 1, _floor(height * scale, 1) or 1


def _by_ratio(
    reader: FieldReader,
    sent: tuple[Value, Value],
    picture: SentPicture,
    config: HandlerConfig,
    multiple: int,
) -> tuple[int, int] | None:
    height, width = sent
    if isinstance(height, int):
        known, other, name = height, "width", "height"
        found = _floor(height * picture.width_px / picture.height_px, multiple)
        size = height, found
    else:
        assert isinstance(width, int)
        known, other, name = width, "height", "width"
        found = _floor(width * picture.height_px / picture.width_px, multiple)
        size = found, width
    if config.min_size_px <= found <= config.max_size_px:
        return size
    reader.report(
        name,
        f"{known} makes a {other} of {found} by the picture's ratio; allowed:"
        f" {config.min_size_px} to {config.max_size_px}; or send {other} too",
    )
    return None


def _floor(side: float, multiple: int) -> int:
    return int(side + _EPSILON) // multiple * multiple
