"""Which denoising steps are computed and which are predicted: pure functions of plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "MAX_ERROR",
    "ORDER",
    "Measured",
    "estimated_error",
    "is_planned",
    "is_predicted",
    "num_computed",
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

# Enough for a prediction, and one more that says how good predictions are.
_NUM_FIRST = ORDER + 2
_NUM_LAST = 1


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


def is_planned(step: int, num_steps: int, share: float, num_predicted: int) -> bool:
    """Whether `share` of the steps allows that this one, counted from 0, is predicted.

    The first ones and the last are not. The others are predicted evenly; where one was not close
    enough, a later one may be in its place, when fewer than that, `num_predicted`, have been.
    """
    place = step - _NUM_FIRST
    return place >= 0 and step < num_steps - _NUM_LAST and num_predicted < int((place + 1) * share)


def num_computed(num_steps: int, share: float) -> int:
    """How many of the steps are computed at least."""
    return num_steps - int(max(0, num_steps - _NUM_FIRST - _NUM_LAST) * share)


def estimated_error(measured: Measured, points: Sequence[float], at: float) -> float:
    """The error to expect of a prediction of the output at `at` from those at `points`.

    Interpolation's remainder: a derivative of the output, which `measured` tells, times the
    distances to all points.
    """
    then = _distances(measured.points, measured.at)
    return measured.error * _distances(points, at) / then if then else float("inf")


def is_predicted(measured: Measured | None, points: Sequence[float], at: float) -> bool:
    """Whether the output at `at` may be predicted from those at `points`; no error is too large."""
    if measured is None:
        return False
    return estimated_error(measured, points, at) <= MAX_ERROR  # a NaN is not


def _distances(points: Sequence[float], at: float) -> float:
    product = 1.0
    for each in points:
        product *= abs(at - each)
    return product
