"""The exact answer to what the UNet learns: the expected picture, given prompt and noisy picture.

The pictures that a prompt allows are finite in number once its shape and colours are known, so the
posterior mean is a sum over all of them. As a training target in place of the one picture that the
noise was added to, it has the same expectation and no variance (Rao-Blackwell).
"""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from demo.grammar import ANYWHERE, POSITIONS, SIZES, Wish
from demo.sprites import COLORS, GRID_PX, MARGIN_PX, RADII_PX, SIZE_PX, coverage

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
def templates(shape: str, size: str | None, position: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """All masks (N, 576) that the terms allow, their log prior (N,) and squared norms (N,)."""
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
    return stack, torch.tensor(priors).log(), stack.square().sum(dim=1)


def posterior_mean(wish: Wish, noisy: Tensor, alpha: Tensor) -> Tensor:
    """E[x0 | noisy, wish] for latents (3, 24, 24) at cumulative `alpha`.

    The wish names a shape and both colours; size and position may be open.
    """
    assert wish.shape is not None
    assert wish.color is not None
    assert wish.background is not None
    masks, log_prior, squares = templates(wish.shape, wish.size, wish.position)
    front, back = (torch.tensor(COLORS[name]) / 127.5 - 1 for name in (wish.color, wish.background))
    step = front - back
    signal = alpha.sqrt()
    # |noisy - signal (back + mask step)|^2, less what does not depend on the mask.
    along = torch.einsum("chw,c->hw", noisy - signal * back[:, None, None], step).flatten()
    match = signal * (masks @ along) - alpha * (step @ step) * squares / 2
    mask = torch.softmax(log_prior + match / (1 - alpha), dim=0) @ masks
    return back[:, None, None] + step[:, None, None] * mask.view(1, SIZE_PX, SIZE_PX)
