"""The pace of recent ticks, so that a request that cannot meet its deadline is refused at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

from handler.pipelines.cost import Cost

__all__ = ["Pace"]

_MIN_TICKS = 16
_MAX_TICKS = 64


class Pace:
    """The seconds of the last ticks of denoisers, since the engine was last idle."""

    def __init__(self) -> None:
        self._ticks: deque[tuple[float, Cost, frozenset[int]]] = deque(maxlen=_MAX_TICKS)

    def note(self, seconds: float, served: Sequence[Cost], denoisers: Collection[int] = ()) -> None:
        """A tick in which `denoisers` served requests of these costs took `seconds`."""
        self._ticks.append((seconds, sum(served, Cost(0, 0)), frozenset(denoisers)))

    def forget(self) -> None:
        """Nothing is in flight any more: what comes next may be faster."""
        self._ticks.clear()

    def least_s(self, num_steps: int, cost: Cost, denoisers: Collection[int] = ()) -> float:
        """What `num_steps` of a request will surely take; 0 while too little was seen.

        The fastest tick counts, less the rows that may leave. Ticks in which a larger image was
        drawn than this request's, or another denoiser ran than its own, do not count.
        """
        own = frozenset(denoisers)
        ticks = [(seconds, of) for seconds, of, ran in self._ticks if ran <= own]
        if len(ticks) < _MIN_TICKS:
            return 0.0
        shares = [
            seconds * min(1.0, cost.rows / max(1, of.rows))
            for seconds, of in ticks
            if of.image_pixels <= cost.image_pixels
        ]
        return num_steps * min(shares, default=0.0)
