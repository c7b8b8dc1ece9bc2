"""Which denoising steps are computed and which are predicted: pure functions of plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from handler.engine.shortcuts import NUM_FIRST, NUM_LAST

__all__ = [
    "MAX_ERROR",
    "ORDER",
    "Measured",
    "allowed_error",
    "estimated_error",
    "is_close",
    "weights",
]

MAX_ERROR = 0.05
"""Of a predicted output, relative to its length; a step that would exceed it is computed.

With twice as much, one of twelve pictures of the demo became another one where most steps are
predicted. Ancestral schedulers' noise makes ten times as much: their steps are computed.
"""

ORDER = 1
"""The degree of the polynomial that is laid through the last computed outputs.

With parabolas pictures of the demo were a little closer where every second of 50 steps is predicted
(0.73 for 0.85 of 255), and about twice as far off where two of three are, or every second of 20.
"""


@dataclass(frozen=True, slots=True)
class Measured:
    """How far the last computed output was from its own prediction.

    `points` are the times of the outputs that it was predicted from, the latest last; `at` is its
    own.
    """

    points: tuple[float, ...]
    at: float
    error: float


def weights(points: Sequence[float], at: float) -> list[float]:
    """What to multiply outputs at the times `points` with, to predict the one at `at`.

    Lagrange's polynomial through all of them. Where two times are equal, the last output counts.
    """
    if len(set(points)) < len(points):
        return [0.0] * (len(points) - 1) + [1.0]
    found = []
    for i, own in enumerate(points):
        weight = 1.0
        for j, other in enumerate(points):
            if j != i:
                weight *= (at - other) / (own - other)
        found.append(weight)
    return found


def allowed_error(step: int, num_steps: int, share: float, num_predicted: int) -> float:
    """The error with which a step, counted from 0, may be predicted; 0: it has to be computed.

    The first steps and the last are computed. Of the others `share` are predicted, spread evenly.
    Where fewer have been, `num_predicted`, because some were not close enough, others may be in
    their place, if they are closer still.
    """
    place = step - NUM_FIRST
    if place < 0 or step >= num_steps - NUM_LAST:
        return 0.0
    due = int((place + 1) * share)
    if num_predicted >= due:
        return 0.0
    return MAX_ERROR if due > int(place * share) else MAX_ERROR / 2


def estimated_error(measured: Measured, points: Sequence[float], at: float) -> float:
    """The error to expect of a prediction of the output at `at` from those at `points`.

    Interpolation's remainder: a derivative of the output, which `measured` tells, times the
    distances to all points.
    """
    then = _distances(measured.points, measured.at)
    return measured.error * _distances(points, at) / then if then else float("inf")


def is_close(measured: Measured, points: Sequence[float], at: float, allowed: float) -> bool:
    """Whether the output at `at` would be predicted from those at `points` with no more error."""
    return estimated_error(measured, points, at) <= allowed  # a NaN is not


def _distances(points: Sequence[float], at: float) -> float:
    product = 1.0
    for each in points:
        product *= abs(at - each)
    return product
