"""How fast each model was drawn in the last minute."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Callable

__all__ = ["Pace"]

_WINDOW_S = 60


class Pace:
    """Sums up what is drawn, a second at a time: a minute is as small whatever it drew."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._minutes: dict[str, _Minute] = {}

    def drew(self, model: str, work: float) -> None:
        """Count work that is done."""
        self._minutes.setdefault(model, _Minute()).add(self._clock_s(), work)

    def of(self, model: str) -> float:
        """Work a second; 0 where nothing of `model` was drawn."""
        minute = self._minutes.get(model)
        return 0.0 if minute is None else minute.mean(self._clock_s())


class _Minute:
    """The work of each of the last seconds, in places that are used again and again."""

    def __init__(self) -> None:
        self._work = array("d", [0.0]) * _WINDOW_S
        self._second = 0
        """The last one that is counted."""

    def add(self, now_s: float, work: float) -> None:
        self._go_to(now_s)
        self._work[self._second % _WINDOW_S] += work

    def mean(self, now_s: float) -> float:
        """Since the first of the seconds in which there was work, a second at least."""
        self._go_to(now_s)
        for ago in reversed(range(_WINDOW_S)):
            if self._work[(self._second - ago) % _WINDOW_S]:
                return sum(self._work) / max(1.0, now_s - (self._second - ago))
        return 0.0

    def _go_to(self, now_s: float) -> None:
        second = math.floor(now_s)
        for each in range(max(self._second + 1, second - _WINDOW_S + 1), second + 1):
            self._work[each % _WINDOW_S] = 0.0
        self._second = second
