"""Scheduling policy: which requests join, which run and which are out of time; pure functions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from handler.pipelines.cost import Cost

__all__ = ["Admission", "Candidate", "Limits", "admit", "choose", "expired"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one tick may hold, and how often a waiting request may be overtaken."""

    max_rows: int = 16
    max_pixels: int | None = None
    max_overtakes: int = 16

    def hold(self, cost: Cost) -> bool:
        """Whether requests that cost this much together may be in flight."""
        return cost.rows <= self.max_rows and (
            self.max_pixels is None or cost.pixels <= self.max_pixels
        )

    def refusal(self, cost: Cost) -> str:
        """What to tell a request that these limits will never hold."""
        pixels = "any number of" if self.max_pixels is None else str(self.max_pixels)
        return (
            f"the request needs {cost.rows} rows and {cost.pixels} pixels at once; "
            f"this server takes up to {self.max_rows} rows and {pixels} pixels: "
            "ask for fewer or smaller pictures"
        )


class Candidate(Protocol):
    """What the policy looks at in a request."""

    @property
    def cost(self) -> Cost:
        """What it occupies."""
        ...

    @property
    def overtaken(self) -> int:
        """How often others that came later have joined before it."""
        ...

    @property
    def deadline(self) -> float | None:
        """When it expires, on the engine's clock; None: never."""
        ...

    @property
    def last_tick(self) -> int:
        """The last tick that served it."""
        ...

    @property
    def is_exclusive(self) -> bool:
        """Whether nothing may run beside it."""
        ...


AnyCandidate = TypeVar("AnyCandidate", bound=Candidate)


@dataclass(frozen=True, slots=True)
class Admission:
    """Places in the waiting line: who joins, and how many of them passed each who does not."""

    joining: tuple[int, ...]
    overtaken: dict[int, int]


def admit(
    waiting: Sequence[Candidate], running: Collection[Candidate], limits: Limits
) -> Admission:
    """First come, first served; who fits may pass who does not yet fit, a bounded number of times.

    An exclusive request fits where nothing else is in flight, and nothing fits beside it.

    Once a request has been passed `limits.max_overtakes` times, no other joins before it. So it
    waits at most as many ticks as those ahead of it and those that passed it run, one by one: in
    every tick that it waits, one of them is in flight.
    """
    joining: list[int] = []
    passed: list[int] = []
    overtaken: dict[int, int] = {}
    if any(ticket.is_exclusive for ticket in running):
        return Admission((), {})
    in_flight = sum((ticket.cost for ticket in running), Cost(0, 0))
    for place, candidate in enumerate(waiting):
        together = in_flight + candidate.cost
        has_company = candidate.is_exclusive and bool(running or joining)
        if limits.hold(together) and not has_company:
            joining.append(place)
            in_flight = together
            for other in passed:
                overtaken[other] = overtaken.get(other, 0) + 1
            if candidate.is_exclusive:
                break
        else:
            passed.append(place)
        if any(
            waiting[other].overtaken + overtaken.get(other, 0) >= limits.max_overtakes
            for other in passed
        ):
            break
    return Admission(tuple(joining), overtaken)


def choose(parked: Sequence[AnyCandidate], limits: Limits) -> list[AnyCandidate]:
    """Whose calls this tick serves: all of them, while they are as large as they said.

    When calls turn out larger than was known at admission, those served longest ago go first, the
    first of them always. Who joins counts as served in the tick before, so that a call is left out
    of at most as many ticks as there were others in flight when it parked.
    """
    if limits.hold(sum((p.cost for p in parked), Cost(0, 0))):
        return list(parked)
    chosen: list[AnyCandidate] = []
    total = Cost(0, 0)
    for candidate in sorted(parked, key=lambda p: p.last_tick):
        if not chosen or limits.hold(total + candidate.cost):
            chosen.append(candidate)
            total += candidate.cost
    return chosen


def expired(requests: Iterable[AnyCandidate], now_s: float) -> list[AnyCandidate]:
    """The requests whose deadline (a time of the same clock) has passed."""
    return [r for r in requests if r.deadline is not None and now_s >= r.deadline]
