"""How many threads a forward gets on a CPU that others may use too: decided from seconds alone.

Threads of one forward wait for each other at every operation, so where another process keeps a core
busy fewer of them are quicker. Nothing tells that but a try: now and then a forward gets the next
smaller, or larger, number of threads, and is compared with others of its kind::

    2 threads   ● ● ● ●   ●   ●   ●   ●                another process comes: a forward of one
    1 thread            ○   ○   ○   ○   ○ ● ● ● ● …    thread is quicker, five times on average

Forwards are of one kind where they have the same shapes, rows included.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from statistics import fmean

__all__ = ["MAX_COST", "ThreadPolicy", "counts_to_try"]

MAX_COST = 0.01
"""The share of all forwards' seconds that trials may cost, beyond `_GIVEN` forwards at first."""

_GIVEN = 2.0
# What may be saved for trials, in forwards.
_MOST_SAVED = 4.0
# Trials are so many forwards apart, and decide by so many.
_APART = 16
_NUM_SAMPLES = 5
# Of the seconds of the present number of threads: what another number has to be quicker than to be
# taken, and what it is given up for at once.
_TAKEN = 0.9
_HOPELESS = 1.25
# Forwards are slow when they take so much longer than the quickest of their kind did.
_SLOW = 1.3
_NUM_SLOW = 3
# With what a trial is compared: so many forwards of its kind, none more than so many ago.
_NUM_COMPARED = 4
_RECENT = 64
_NUM_KEPT = 16
_MAX_KINDS = 128


def counts_to_try(most: int) -> tuple[int, ...]:
    """Numbers of threads, ascending from 1 to `most`, each about three quarters of the next."""
    counts = [most]
    while counts[-1] > 1:
        counts.append(min(counts[-1] - 1, 3 * counts[-1] // 4 or 1))
    return tuple(reversed(counts))


@dataclass(slots=True)
class _Trial:
    """Forwards with another number of threads, as ratios to those with the present one."""

    place: int
    ratios: list[float] = field(default_factory=list)


class ThreadPolicy:
    """Chooses the number of threads of each forward, up to `most`, by how long others took."""

    def __init__(self, most: int) -> None:
        self._counts = counts_to_try(most)
        self._place = len(self._counts) - 1
        self._direction = -1
        self._trial: _Trial | None = None
        self._tried_last = False
        self._num_noted = 0
        self._last_trial = _NUM_COMPARED - _APART
        self._mean_s: float | None = None
        self._saved_s = 0.0
        # Of each kind and number of threads, when the last forwards were and how long they took.
        self._noted: OrderedDict[tuple[Hashable, int], deque[tuple[int, float]]] = OrderedDict()

    @property
    def present(self) -> int:
        """The number of threads of all forwards that are no trials."""
        return self._counts[self._place]

    def choose(self, kind: Hashable) -> int:
        """The number of threads of the next forward, which is of this kind."""
        usual_s = self._usual_s(kind)
        if usual_s is None or self._tried_last:
            return self.present
        if self._trial is None:
            self._begin(kind, usual_s)
        elif not self._can_pay(kind, usual_s):
            return self.present
        return self.present if self._trial is None else self._counts[self._trial.place]

    def note(self, kind: Hashable, threads: int, seconds: float) -> None:
        """A forward of this kind took `seconds` with as many threads as `choose` said."""
        self._num_noted += 1
        trial = self._trial
        self._tried_last = trial is not None and threads == self._counts[trial.place]
        if trial is not None and self._tried_last:
            self._compare(trial, kind, seconds)
        elif threads == self.present:
            self._remember(kind, seconds)

    def _remember(self, kind: Hashable, seconds: float) -> None:
        key = (kind, self.present)
        if key not in self._noted:
            # The first one of a kind prepares what the others find ready.
            self._noted[key] = deque(maxlen=_NUM_KEPT)
            if len(self._noted) > _MAX_KINDS:
                self._noted.popitem(last=False)
            return
        self._noted.move_to_end(key)
        self._noted[key].append((self._num_noted, seconds))
        if self._mean_s is None:
            self._mean_s, self._saved_s = seconds, _GIVEN * seconds
        self._mean_s += (seconds - self._mean_s) / _RECENT
        self._saved_s = min(self._saved_s + MAX_COST * seconds, _MOST_SAVED * self._mean_s)

    def _begin(self, kind: Hashable, usual_s: float) -> None:
        """Begin a trial, if it is time and can be paid for."""
        if self._num_noted - self._last_trial < _APART:
            return
        place = self._place + self._direction
        if not 0 <= place < len(self._counts):
            self._direction = -self._direction
            place = self._place + self._direction
        if not 0 <= place < len(self._counts):
            return
        self._trial = _Trial(place)
        if not self._can_pay(kind, usual_s):
            self._trial = None

    def _can_pay(self, kind: Hashable, usual_s: float) -> bool:
        """Whether the next forward of the trial may cost what it may cost."""
        assert self._trial is not None
        if self._trial.ratios:
            expected_s = (fmean(self._trial.ratios) - 1) * usual_s
            if expected_s <= 0:
                return True
        else:
            threads = self._counts[self._trial.place]
            expected_s = max(1.0, self.present / threads - 1) * usual_s
        # Where something has changed the trial comes at once, and is paid for later.
        debt_s = expected_s if self._is_slow(kind) else 0.0
        return self._saved_s + debt_s >= expected_s

    def _compare(self, trial: _Trial, kind: Hashable, seconds: float) -> None:
        """Take the outcome of a trial's forward, and decide when there are enough."""
        usual_s = self._usual_s(kind)
        if usual_s is None:
            return
        self._saved_s -= max(0.0, seconds - usual_s)
        trial.ratios.append(seconds / usual_s)
        ratio = fmean(trial.ratios)
        if ratio <= _HOPELESS and len(trial.ratios) < _NUM_SAMPLES:
            return
        if ratio <= _TAKEN:
            self._place = trial.place
        else:
            self._direction = -self._direction
        self._trial, self._last_trial = None, self._num_noted

    def _usual_s(self, kind: Hashable) -> float | None:
        """What a forward of this kind takes at present; None where too few were seen of late."""
        noted = self._noted.get((kind, self.present), ())
        recent = [s for at, s in noted if self._num_noted - at < _RECENT][-_NUM_COMPARED:]
        if len(recent) < 2:
            return None
        if len(recent) == _NUM_COMPARED:
            recent.remove(max(recent))
        return fmean(recent)

    def _is_slow(self, kind: Hashable) -> bool:
        noted = [seconds for _, seconds in self._noted[kind, self.present]]
        return len(noted) > _NUM_SLOW and min(noted[-_NUM_SLOW:]) > _SLOW * min(noted)
