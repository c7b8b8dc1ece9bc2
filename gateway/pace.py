"""How fast each model was drawn in the last minute."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable

__all__ = ["Pace"]

_WINDOW_S = 60.0
_PART_S = 1.0


class Pace:
    """Sums up what is drawn, a second at a time: a minute is as small whatever it drew."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        # When each part of the minute began, and the work of every model in it.
        self._parts: deque[tuple[float, defaultdict[str, float]]] = deque()

    def drew(self, model: str, work: float) -> None:
        """Count work that is done."""
        now_s = self._clock_s()
        self._forget(now_s)
        if not self._parts or now_s - self._parts[-1][0] >= _PART_S:
            self._parts.append((now_s, defaultdict(float)))
        self._parts[-1][1][model] += work

    def of(self, model: str) -> float:
        """Work a second; 0 where nothing of `model` was drawn."""
        now_s = self._clock_s()
        self._forget(now_s)
        done = [(begun_s, work[model]) for begun_s, work in self._parts if model in work]
        if not done:
            return 0.0
        return sum(work for _, work in done) / max(_PART_S, now_s - done[0][0])

    def _forget(self, now_s: float) -> None:
        while self._parts and self._parts[0][0] < now_s - _WINDOW_S:
            self._parts.popleft()
