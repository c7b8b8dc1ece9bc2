"""How long a cycle draws before it replies: the longer, the more bytes the cycles carry.

Between two cycles TorchServe sends the bodies of all live requests, and nothing is drawn meanwhile.
Small bodies take less than a millisecond; sixteen of two megabytes take tens of them. Cycles then
last as many times longer, so that drawing keeps its share of the time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

__all__ = ["MIN_BYTES", "CyclePace"]

# Fewer take no time worth speaking of: what is measured then is chance.
MIN_BYTES = 100_000
"""The least that a message with large bodies has."""
# Drawing to waiting, in time: a cycle that nothing ends early, and one that a reply ends.
_DRAWN_PER_WAITED = 19.0
_DRAWN_PER_WAITED_BEFORE_REPLY = 9.0
# Whoever comes in the meantime is seen no later than this.
_MAX_BUDGET_S = 0.5
# The least of so many: a machine that is busy for a moment makes no cycle longer.
_NUM_REMEMBERED = 3


class CyclePace:
    """Measures what TorchServe takes between two cycles, and says how long the next one may draw.

    Args:
        cycle_s: what a cycle draws for where bodies are small.
        clock: in seconds.
    """

    def __init__(self, cycle_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._cycle_s = cycle_s
        self._clock = clock
        self._ended_s: float | None = None
        self._waited_s: deque[float] = deque(maxlen=_NUM_REMEMBERED)

    @property
    def budget_s(self) -> float:
        """What the next cycle draws for, if nobody can be answered."""
        return max(self._cycle_s, min(_MAX_BUDGET_S, _DRAWN_PER_WAITED * self._least_s))

    @property
    def hold_s(self) -> float:
        """What it draws for even if somebody can be answered."""
        return min(self.budget_s, _DRAWN_PER_WAITED_BEFORE_REPLY * self._least_s)

    @property
    def _least_s(self) -> float:
        return min(self._waited_s, default=0.0)

    def begin(self, num_bytes: int) -> None:
        """Note that a cycle begins, and how many bytes TorchServe sent for it."""
        if num_bytes < MIN_BYTES or self._ended_s is None:
            self._waited_s.clear()
        else:
            self._waited_s.append(self._clock() - self._ended_s)

    def end(self, *, is_live: bool) -> None:
        """Note that it ends, and whether requests are live: else nobody waits for the next one."""
        self._ended_s = self._clock() if is_live else None
