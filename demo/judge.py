"""Say what a picture shows, by exact comparison with rendered truth: no learned judge.

The background's and the shape's colours are read off the picture, which gives each pixel's share of
the shape. That mask is compared with every template the renderer can make (shape, radius, centre);
the nearest one is the verdict, and its distance says how well it fits.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from demo.grammar import Wish
from demo.sprites import COLORS, MARGIN_PX, SHAPES, SIZE_PX, Array, coverage

# Finer than what is rendered, so that what lies between is read as what it is.
GRID_PX = 0.5
RADII_PX = tuple(4.5 + 0.5 * step for step in range(9))
# A colour further than this from every palette colour (RMS over RGB, of 255) has no name.
MAX_COLOR_DISTANCE = 40.0
# Misfit is the distance to the nearest template over the template's own norm. Beyond the first
# limit there is no shape; within the second it is clean, which 1 random blob in 8 is by chance.
MAX_MISFIT = 0.45
MAX_CLEAN_MISFIT = 0.22
MAX_SMALL_RADIUS_PX = 5.6
MIN_LARGE_RADIUS_PX = 6.6
# How far off the middle counts as a side: half of the least that training shows.
MIN_OFFSET_PX = 1.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the picture shows. `color` and `background` are None where no palette colour is near."""

    shape: str
    color: str | None
    background: str | None
    radius_px: float
    x_px: float
    y_px: float
    misfit: float


@dataclass(frozen=True, slots=True)
class Score:
    """Which of a wish's terms a picture fulfils; terms left open are fulfilled by anything."""

    shape: bool
    color: bool
    background: bool
    size: bool
    position: bool
    clean: bool

    @property
    def is_right(self) -> bool:
        """Every term is right; how cleanly it is drawn is another question."""
        return self.shape and self.color and self.background and self.size and self.position


def to_grid(image: Image.Image) -> Array:
    """Reduce a picture to 24×24 by averaging, RGB in 0..255, (24, 24, 3)."""
    reduced = image.convert("RGB").resize((SIZE_PX, SIZE_PX), Image.Resampling.BOX)
    return np.asarray(reduced, np.float32)


def judge(image: Image.Image) -> Verdict:
    """Find the template and the two palette colours nearest to `image`."""
    return judge_grid(to_grid(image))


def judge_grid(grid: Array) -> Verdict:
    """As `judge`, of RGB in 0..255, (24, 24, 3)."""
    border = np.concatenate([grid[0], grid[-1], grid[:, 0], grid[:, -1]])
    back = np.median(border, axis=0)
    front = _front_color(grid, back)
    axis = front - back
    alpha = np.clip((grid - back) @ axis / max(float(axis @ axis), 1.0), 0, 1)
    shape, radius, x, y, misfit = _nearest_template(alpha.astype(np.float32))
    return Verdict(shape, _name(front), _name(back), radius, x, y, misfit)


def score(wish: Wish, verdict: Verdict) -> Score:
    """Compare what was asked for with what is there."""
    return Score(
        shape=wish.shape in (None, verdict.shape) and verdict.misfit <= MAX_MISFIT,
        color=wish.color in (None, verdict.color),
        background=wish.background in (None, verdict.background),
        size=_is_size(wish.size, verdict.radius_px),
        position=_is_position(wish.position, verdict.x_px, verdict.y_px),
        clean=verdict.misfit <= MAX_CLEAN_MISFIT,
    )


def _front_color(grid: Array, back: NDArray[np.float32]) -> NDArray[np.float32]:
    """The median colour of the pixels that are clearly not background."""
    pixels = grid.reshape(-1, 3)
    distance = np.linalg.norm(pixels - back, axis=1)
    chosen = pixels[distance >= 0.75 * np.quantile(distance, 0.99)]
    median: Array = np.median(chosen, axis=0).astype(np.float32)
    return median


def _name(color: NDArray[np.float32]) -> str | None:
    names = list(COLORS)
    palette = np.array(list(COLORS.values()), np.float32)
    distances = np.sqrt(((palette - color) ** 2).mean(axis=1))
    best = int(distances.argmin())
    return names[best] if distances[best] <= MAX_COLOR_DISTANCE else None


@lru_cache(maxsize=1)
def _templates() -> tuple[list[tuple[str, float, float, float]], Array, Array]:
    """All the renderer can make: (shape, radius, centre), masks (N, 576), squared norms (N,)."""
    keys, masks = [], []
    for shape in SHAPES:
        for radius in RADII_PX:
            low, high = radius + MARGIN_PX, SIZE_PX - radius - MARGIN_PX
            centers = np.arange(low, high + GRID_PX / 2, GRID_PX)
            phases = {}
            for x in centers:
                for y in centers:
                    phase = (x % 1, y % 1)
                    if phase not in phases:
                        phases[phase] = (x, y, coverage(shape, radius, x, y))
                    x0, y0, mask = phases[phase]
                    keys.append((shape, radius, float(x), float(y)))
                    masks.append(_shift(mask, round(x - x0), round(y - y0)).ravel())
    stack = np.stack(masks)
    return keys, stack, (stack * stack).sum(axis=1)


def _shift(mask: Array, dx: int, dy: int) -> Array:
    return np.roll(mask, (dy, dx), axis=(0, 1))


def _nearest_template(alpha: Array) -> tuple[str, float, float, float, float]:
    """The template with the least squared difference, relative to its area."""
    keys, masks, squares = _templates()
    flat = alpha.ravel()
    errors = squares - 2 * (masks @ flat) + flat @ flat
    best = int(np.argmin(errors))
    misfit = float(np.sqrt(max(errors[best], 0.0) / squares[best]))
    shape, radius, x, y = keys[best]
    return shape, radius, x, y, misfit


def _is_size(size: str | None, radius_px: float) -> bool:
    if size == "small":
        return radius_px <= MAX_SMALL_RADIUS_PX
    if size == "large":
        return radius_px >= MIN_LARGE_RADIUS_PX
    return True


def _is_position(position: str | None, x_px: float, y_px: float) -> bool:
    """Every side that `position` names is on that side; "center" is off to none."""
    dx, dy = x_px - SIZE_PX / 2, y_px - SIZE_PX / 2
    is_on = {
        "left": dx <= -MIN_OFFSET_PX,
        "right": dx >= MIN_OFFSET_PX,
        "top": dy <= -MIN_OFFSET_PX,
        "bottom": dy >= MIN_OFFSET_PX,
        "center": max(abs(dx), abs(dy)) <= 2.5,
    }
    return position is None or all(is_on[side] for side in position.split())
