"""The exact answer to what the UNet learns: the expected picture, given prompt and noisy picture.

The pictures that a prompt allows are finite in number, so the posterior mean is a sum over all of
them. As a training target in place of the one picture that the noise was added to, it has the same
expectation and no variance (Rao-Blackwell); and it is there for every noisy picture, also for
those that no noise made.
"""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demo.grammar import ANYWHERE, HELD_OUT, POSITIONS, SIZES, Wish
from demo.sprites import COLORS, GRID_PX, MARGIN_PX, RADII_PX, SHAPES, SIZE_PX, coverage

cached_coverage = cache(coverage)


def _axis(span: tuple[float, float], room_px: float) -> list[tuple[float, float]]:
    """The centres that rounding to the grid can give along one axis, with their probabilities."""
    middle = SIZE_PX / 2
    low, high = middle + span[0] * room_px, middle + span[1] * room_px
    centers = np.arange(round(low / GRID_PX), round(high / GRID_PX) + 1) * GRID_PX
    overlap = np.minimum(centers + GRID_PX / 2, high) - np.maximum(centers - GRID_PX / 2, low)
    shares = np.clip(overlap, 0, None) / (high - low)
    return [(float(c), float(p)) for c, p in zip(centers, shares, strict=True) if p > 0]


@cache
def templates(shape: str, size: str | None, position: str | None) -> tuple[Tensor, ...]:
    """All masks (N, 576) that the terms allow, their log prior, areas and squared norms (N,)."""
    radii = RADII_PX if size is None else SIZES[size]
    spans = ANYWHERE if position is None else POSITIONS[position]
    masks: list[NDArray[np.float32]] = []
    priors = []
    for radius in radii:
        room = SIZE_PX / 2 - radius - MARGIN_PX
        for x, x_share in _axis(spans[0], room):
            for y, y_share in _axis(spans[1], room):
                masks.append(cached_coverage(shape, radius, x, y).ravel())
                priors.append(x_share * y_share / len(radii))
    stack = torch.from_numpy(np.stack(masks))
    return stack, torch.tensor(priors).log(), stack.sum(dim=1), stack.square().sum(dim=1)


@cache
def _color_pairs(color: str | None, background: str | None) -> list[tuple[str, str]]:
    """The (colour, background) that a wish allows."""
    fronts = COLORS if color is None else (color,)
    backs = COLORS if background is None else (background,)
    return [(front, back) for front in fronts for back in backs if front != back]


@cache
def _shown(wish: Wish, shape: str) -> Tensor:
    """Log prior (P,) of the colour pairs: minus infinity for those that training never shows."""
    if wish.shape and wish.color and wish.background:
        return torch.zeros(1)  # A wish for one combination has no others to fall back on.
    pairs = _color_pairs(wish.color, wish.background)
    is_shown = [(front, shape, back) not in HELD_OUT for front, back in pairs]
    return torch.tensor([0.0 if shown else -torch.inf for shown in is_shown])


@cache
def _colors(color: str | None, background: str | None) -> tuple[Tensor, Tensor]:
    """Of every pair: the background (P, 3) in [-1, 1], and the step from it to the shape."""
    pairs = _color_pairs(color, background)
    fronts = torch.tensor([COLORS[front] for front, _ in pairs])
    backs = torch.tensor([COLORS[back] for _, back in pairs])
    return backs / 127.5 - 1, (fronts - backs) / 127.5


def posterior_mean(wish: Wish, noisy: Tensor, alpha: Tensor) -> Tensor:
    """E[x0 | noisy, wish] for latents (3, 24, 24) at cumulative `alpha`, below 1.

    What the wish leaves open is summed over, as far as training shows it.
    """
    backs, steps = _colors(wish.color, wish.background)
    pixels, signal = noisy.flatten(1), alpha.sqrt()
    # Of |noisy - signal (back + mask step)|^2 what depends on the colours alone, then the rest.
    # Masks meet the picture's three channels and never the pairs of colours, which are many.
    plain = signal * (backs @ pixels.sum(dim=1)) - alpha * SIZE_PX**2 * backs.square().sum(1) / 2
    overlaps = alpha * (backs * steps).sum(dim=1, keepdim=True)
    lengths = alpha * steps.square().sum(dim=1, keepdim=True) / 2
    logits, masks = [], []
    for shape in SHAPES if wish.shape is None else (wish.shape,):
        stack, log_prior, areas, squares = templates(shape, wish.size, wish.position)
        match = signal * steps @ (pixels @ stack.T) - overlaps * areas - lengths * squares
        prior = _shown(wish, shape)[:, None] + log_prior
        logits.append(prior + (plain[:, None] + match) / (1 - alpha))
        masks.append(stack)
    chances = torch.cat(logits, dim=1)
    chances = torch.softmax(chances.flatten(), dim=0).view_as(chances)
    mean = (chances.sum(dim=1) @ backs)[:, None] + (steps.T @ chances) @ torch.cat(masks)
    return mean.view(3, SIZE_PX, SIZE_PX)
