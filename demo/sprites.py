"""Render the demo's pictures: one flat shape on one flat background, 24×24, anti-aliased.

The outline of every shape is a test on points in the unit box (x right, y down), so that training,
judging and tests all share one definition of what a heart is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

SIZE_PX = 24
SUPERSAMPLING = 4

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (230, 30, 40),
    "orange": (255, 140, 0),
    "yellow": (255, 225, 30),
    "green": (30, 160, 60),
    "cyan": (40, 215, 230),
    "blue": (35, 70, 225),
    "purple": (130, 40, 190),
    "pink": (255, 150, 200),
    "brown": (125, 75, 30),
    "white": (255, 255, 255),
    "gray": (135, 135, 135),
    "black": (10, 10, 15),
}

# Three sizes and whole-pixel places make few distinct sprites, which a small model draws crisply.
GRID_PX = 1.0
MARGIN_PX = 0.5
SMALL_RADII_PX = (5.0,)
LARGE_RADII_PX = (8.0,)
RADII_PX = (5.0, 6.5, 8.0)


@dataclass(frozen=True, slots=True)
class Sprite:
    """One picture's truth. The centre is in pixels from the top left corner."""

    shape: str
    color: str
    background: str
    radius_px: float
    x_px: float
    y_px: float


def _circle(x: Array, y: Array) -> Mask:
    return x * x + y * y < 1


def _square(x: Array, y: Array) -> Mask:
    return np.maximum(abs(x), abs(y)) < 0.86


def _triangle(x: Array, y: Array) -> Mask:
    return (y < 0.86) & (2 * abs(x) < (y + 0.95) * 1.08)


def _diamond(x: Array, y: Array) -> Mask:
    inside: Mask = abs(x) / 0.86 + abs(y) < 1.04
    return inside


def _hexagon(x: Array, y: Array) -> Mask:
    inside: Mask = (abs(y) < 0.88) & (abs(x) + abs(y) / np.sqrt(3) < 1.02)
    return inside


def _ring(x: Array, y: Array) -> Mask:
    r2 = x * x + y * y
    return (r2 < 1) & (r2 > 0.3)


def _star(x: Array, y: Array) -> Mask:
    """A five-pointed star: a point is inside when it is inside its sector's straight edge."""
    inner, outer = 0.44, 1.08
    sector = 2 * np.pi / 5
    angle = np.arctan2(x, -y)
    angle = abs(angle - sector * np.round(angle / sector))
    r = np.hypot(x, y - np.float32(0.04))
    px, py = r * np.sin(angle), r * np.cos(angle)
    ix, iy = inner * np.sin(sector / 2), inner * np.cos(sector / 2)
    inside: Mask = (outer - iy) * px + ix * (py - outer) < 0
    return inside


def _heart(x: Array, y: Array) -> Mask:
    u, v = x * 1.18, -(y * 1.15) + 0.12
    q = u * u + v * v - 1
    inside: Mask = q * q * q - u * u * v * v * v < 0
    return inside


def _cross(x: Array, y: Array) -> Mask:
    a, b = abs(x), abs(y)
    return (np.minimum(a, b) < 0.32) & (np.maximum(a, b) < 0.96)


def _moon(x: Array, y: Array) -> Mask:
    """A crescent that opens to the right."""
    return (x * x + y * y < 1) & ((x - 0.5) ** 2 + y * y > 0.62)


SHAPES: dict[str, Callable[[Array, Array], Mask]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "diamond": _diamond,
    "hexagon": _hexagon,
    "ring": _ring,
    "cross": _cross,
    "moon": _moon,
}


def coverage(shape: str, radius_px: float, x_px: float, y_px: float) -> Array:
    """How much of each pixel the shape covers, 0 to 1, (24, 24)."""
    num = SIZE_PX * SUPERSAMPLING
    axis = (np.arange(num, dtype=np.float32) + 0.5) / SUPERSAMPLING
    x, y = np.meshgrid((axis - x_px) / radius_px, (axis - y_px) / radius_px)
    inside = SHAPES[shape](x.astype(np.float32), y.astype(np.float32)).astype(np.float32)
    blocks = inside.reshape(SIZE_PX, SUPERSAMPLING, SIZE_PX, SUPERSAMPLING)
    covered: Array = blocks.mean(axis=(1, 3), dtype=np.float32)
    return covered


def paint(alpha: Array, color: str, background: str) -> Array:
    """Blend two named colours by `alpha` (…, 24, 24) into RGB in [-1, 1], (…, 24, 24, 3)."""
    front, back = (np.array(COLORS[name], np.float32) for name in (color, background))
    picture: Array = (back + alpha[..., None] * (front - back)) / 127.5 - 1
    return picture


def render(sprite: Sprite) -> Array:
    """The picture of `sprite`: RGB in [-1, 1], (24, 24, 3)."""
    alpha = coverage(sprite.shape, sprite.radius_px, sprite.x_px, sprite.y_px)
    return paint(alpha, sprite.color, sprite.background)
