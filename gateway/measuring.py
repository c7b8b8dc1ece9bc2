"""How large a drawing is, read from its fields as an instance reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gateway.keys import Key
from gateway.limits import check_picture
from handler.api.fields import FieldReader
from handler.api.images import BadPicture, SentPicture, read_picture
from handler.api.picture_sizes import choose_size
from handler.api.schema import PICTURE_FIELDS
from handler.api.translation import translate
from handler.config import HandlerConfig

__all__ = ["Extent", "measure"]

# Beyond what any instance can be configured to take: an instance refuses it, and says why.
_MAX_COUNT = 10**6
_MAX_PICTURE_BYTES = 2**31
_MAX_PICTURE_PIXELS = 2**40
# Pipelines of two stages have a number of steps for each.
_STAGES = [name for name in PICTURE_FIELDS if name.endswith("_inference_steps")]


@dataclass(frozen=True, slots=True)
class Extent:
    """What a drawing takes; sizes in pixels."""

    height_px: int
    width_px: int
    num_steps: int
    num_images: int = 1

    @property
    def work(self) -> float:
        """Steps × pixels × pictures."""
        return float(self.height_px * self.width_px * self.num_steps * self.num_images)


def measure(
    fields: Mapping[str, object],
    config: HandlerConfig,
    key: Key | None,
    *,
    is_form: bool = False,
    picture: SentPicture | None = None,
) -> Extent:
    """Measure a drawing and check it against the limits of a key.

    What is wrong with a field is the instance's to say: the field counts as left out here.

    Args:
        fields: under any name that an instance knows.
        config: the model's, whose defaults count for what is left out.
        key: whose limits count.
        is_form: values are text whatever they mean.
        picture: to begin with, where it is read already.

    Raises:
        Forbidden: the key may not have so large a picture, or so many steps.
    """
    translated, _ = translate(fields)
    reader = FieldReader(translated, allow_text=is_form)
    height, width = _count(reader, "height"), _count(reader, "width")
    if height is None or width is None:
        height, width = _size(height, width, picture or _picture(reader), config)
    steps = {name: _count(reader, name) for name in _STAGES}
    steps["num_inference_steps"] = steps["num_inference_steps"] or config.num_inference_steps
    num_steps = max(count or 0 for count in steps.values())
    check_picture(key, height, width, num_steps)
    return Extent(height, width, num_steps, _count(reader, "num_images") or 1)


def _count(reader: FieldReader, name: str) -> int | None:
    return reader.integer(name, PICTURE_FIELDS[name].aliases, low=1, high=_MAX_COUNT)


def _size(
    height: int | None, width: int | None, picture: SentPicture | None, config: HandlerConfig
) -> tuple[int, int]:
    """Height and width of what is drawn, where one of them at least was not sent."""
    if picture is not None:
        # An instance rounds down to a multiple that depends on its pipeline.
        size = choose_size(
            FieldReader({}, allow_text=False), (height, width), "image", picture, config, 1
        )
        if size is not None:
            return size
    return height or config.height, width or config.width


def _picture(reader: FieldReader) -> SentPicture | None:
    """The picture whose size counts where none is sent; None where there is none to be read."""
    for name in ("image", "control_image"):
        value = reader.take(name, PICTURE_FIELDS[name].aliases)
        if value is None:
            continue
        try:
            return read_picture(value, max_bytes=_MAX_PICTURE_BYTES, max_pixels=_MAX_PICTURE_PIXELS)
        except BadPicture:
            return None
    return None
