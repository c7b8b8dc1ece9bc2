"""Small pictures to send: of noise, so that what is done to them shows."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

__all__ = ["as_base64", "as_png", "drawing", "half_mask"]


def drawing(seed: int, width_px: int = 32, height_px: int = 32) -> Image.Image:
    """An RGB picture of its own for each `seed`."""
    values = np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), np.uint8)
    return Image.fromarray(values)


def half_mask(width_px: int = 32, height_px: int = 32) -> Image.Image:
    """White, to be drawn anew, on the left half."""
    mask = Image.new("L", (width_px, height_px), 0)
    mask.paste(255, (0, 0, width_px // 2, height_px))
    return mask


def as_png(image: Image.Image) -> bytes:
    """The file of a picture."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def as_base64(image: Image.Image) -> str:
    """The file of a picture, as JSON holds it."""
    return base64.b64encode(as_png(image)).decode()
