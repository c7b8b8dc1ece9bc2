"""Who is served first: what other orders than first come, first served would give.

    python -m benchmarks.policies     # some minutes, on any machine: time is computed, not measured

The engine's ticks are played on a clock of their own, with its own policy functions and what
forwards were measured to take: a + b x rows. Poisson arrivals of the mix of `benchmarks.traffic`.
Each request has a deadline of 1.5, 2, 3 or 5 times what it takes alone, and counts if it is met.

===================  ==============================================================================
first come           as the engine does: admitted in the order of arrival, all run in every tick
shortest, earliest   admitted by the work that remains, or by the deadline; all run in every tick
…, 8 rows            the same order in every tick: only the first 8 rows of the order run, those of
                     the others stand still
…, gives up          a request ends as soon as it is sure to be late, by what the engine knows when
                     it refuses one, and not when its deadline has passed
===================  ==============================================================================
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from benchmarks.report import Figure, Spread, write_report
from benchmarks.traffic import DEADLINES, Wish, mixed_wishes, poisson_times
from handler.engine import policy
from handler.engine.policy import Limits
from handler.engine.tick_times import Pace
from handler.pipelines.cost import Cost

__all__ = ["ORDERS", "Costs", "Job", "Order", "make_jobs", "play", "solo_s"]

LIMITS = Limits(max_rows=32)
FRACTIONS = (0.7, 1.1)
NEEDED = 1.1
_NATIVE_PX = 768


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds, of a forward of the demo's UNet on two cores, and of what comes before and after."""

    forward_s: float = 0.0107
    row_s: float = 0.0041
    encode_s: float = 0.0025
    decode_s: float = 0.035

    def tick_s(self, served: Sequence[Job]) -> float:
        """One forward for each size, encoders and decoders for whom they are due."""
        seconds = 0.0
        rows: dict[int, int] = {}
        for job in served:
            if job.is_encoding:
                seconds += self.encode_s
            elif not job.steps_left:
                seconds += self.decode_s * _share(job.wish)
            else:
                rows[job.wish.size_px] = rows.get(job.wish.size_px, 0) + job.cost.rows
        for size_px, count in rows.items():
            seconds += self.forward_s + self.row_s * count * (size_px / _NATIVE_PX) ** 2
        return seconds


def _share(wish: Wish) -> float:
    return (wish.size_px / _NATIVE_PX) ** 2


@dataclass(eq=False, slots=True)
class Job:
    """One request, as the policy looks at it."""

    wish: Wish
    arrival_s: float
    deadline: float | None
    is_exclusive: bool = False
    overtaken: int = 0
    last_tick: int = -1
    stage: int = 0
    """How many ticks have served it: prompts are encoded, then its steps, then it is decoded."""
    ended_s: float = math.inf

    @property
    def cost(self) -> Cost:
        pixels = self.wish.size_px**2
        return Cost(2 if self.wish.guidance > 1 else 1, pixels, pixels)

    @property
    def num_encodings(self) -> int:
        """With guidance pipelines encode the prompt, then the negative one."""
        return 2 if self.wish.guidance > 1 else 1

    @property
    def is_encoding(self) -> bool:
        return self.stage < self.num_encodings

    @property
    def steps_left(self) -> int:
        return self.wish.num_steps - max(0, self.stage - self.num_encodings)

    @property
    def is_done(self) -> bool:
        return self.stage > self.num_encodings + self.wish.num_steps

    @property
    def remaining(self) -> float:
        """Rows times pixels of all steps to come."""
        return self.steps_left * self.cost.rows * _share(self.wish)


@dataclass(frozen=True, slots=True)
class Order:
    """Who goes first; `rows` of them run in a tick, all where it is None."""

    name: str
    key: Callable[[Job], float]
    rows: int | None = None
    gives_up: bool = False
    """Whether a request ends as soon as it cannot meet its deadline, not when that has passed."""


def _deadline(job: Job) -> float:
    return math.inf if job.deadline is None else job.deadline


ORDERS = [
    Order(f"{name}{f', {rows} rows' if rows else ''}{', gives up' * ends}", key, rows, ends)
    for ends in (False, True)
    for rows in (None, 8)
    for name, key in (
        ("first come", lambda job: job.arrival_s),
        ("shortest", lambda job: job.remaining),
        ("earliest deadline", _deadline),
    )
]


def make_jobs(count: int, rate_per_s: float, seed: int, costs: Costs) -> list[Job]:
    """`count` requests of the mix, that arrive as they like and have all deadlines there are."""
    draw = random.Random(seed)
    times = poisson_times(rate_per_s, 2 * count / rate_per_s + 100, seed)[:count]
    wishes = mixed_wishes(count, seed)
    return [
        Job(wish, at_s, at_s + draw.choice(DEADLINES) * solo_s(wish, costs))
        for wish, at_s in zip(wishes, times, strict=True)
    ]


def solo_s(wish: Wish, costs: Costs) -> float:
    """What a request takes by itself."""
    job = Job(wish, 0.0, None)
    play([job], Order("", lambda job: 0.0), costs)
    return job.ended_s


def play(
    jobs: Sequence[Job], order: Order, costs: Costs, *, drops_late: bool = True
) -> Sequence[Job]:
    """Serve all `jobs`, which are in the order of their arrival; sets when each ended.

    With `drops_late` those whose deadline has passed are given up, as the engine does.
    """
    now_s, coming, pace = 0.0, 0, Pace()
    waiting: list[Job] = []
    running: list[Job] = []
    while coming < len(jobs) or waiting or running:
        if not waiting and not running:
            now_s = max(now_s, jobs[coming].arrival_s)
        while coming < len(jobs) and jobs[coming].arrival_s <= now_s:
            waiting.append(jobs[coming])
            coming += 1
        if drops_late:
            late = {*policy.expired(waiting, now_s), *policy.expired(running, now_s)}
            if order.gives_up:
                late |= {job for job in (*waiting, *running) if _is_hopeless(job, pace, now_s)}
            waiting = [job for job in waiting if job not in late]
            running = [job for job in running if job not in late]
        waiting.sort(key=order.key)
        admission = policy.admit(waiting, running, LIMITS)
        for place, times in admission.overtaken.items():
            waiting[place].overtaken += times
        running += [waiting[place] for place in admission.joining]
        waiting = [job for i, job in enumerate(waiting) if i not in admission.joining]
        served = _served(running, order)
        tick_s = costs.tick_s(served)
        now_s += tick_s
        if denoised := [j.cost for j in served if j.steps_left and not j.is_encoding]:
            pace.note(tick_s, denoised)
        for job in served:
            job.stage += 1
            if job.is_done:
                job.ended_s = now_s - job.arrival_s
        running = [job for job in running if math.isinf(job.ended_s)]
        if not running:
            pace.forget()
    return jobs


def _is_hopeless(job: Job, pace: Pace, now_s: float) -> bool:
    """Whether it would surely be late, by what the engine knows when it refuses a request."""
    return now_s + pace.least_s(job.steps_left, job.cost) > _deadline(job)


def _served(running: Sequence[Job], order: Order) -> list[Job]:
    if order.rows is None:
        return list(running)
    rows, served = 0, list[Job]()
    for job in sorted(running, key=order.key):
        if not served or rows + job.cost.rows <= order.rows:
            served.append(job)
            rows += job.cost.rows
    return served


def _is_met(job: Job) -> bool:
    assert job.deadline is not None
    return job.arrival_s + job.ended_s <= job.deadline


def measure(
    count: int, rounds: int, costs: Costs, orders: Sequence[Order] = ORDERS
) -> list[Figure]:
    """The share of requests in time under each order, against the first one's; by load."""
    capacity_per_s = _capacity_per_s(costs)
    figures = [Figure("capacity", Spread((capacity_per_s,)), "images/s")]
    for fraction in FRACTIONS:
        shares: dict[str, list[float]] = {}
        longest: dict[str, list[float]] = {}
        for order, seed in itertools.product(orders, range(rounds)):
            jobs = play(make_jobs(count, fraction * capacity_per_s, seed, costs), order, costs)
            shares.setdefault(order.name, []).append(sum(map(_is_met, jobs)) / count)
            drawn = [job.ended_s for job in jobs if math.isfinite(job.ended_s)]
            longest.setdefault(order.name, []).append(max(drawn))
        first = shares[orders[0].name]
        for name, met in shares.items():
            words = f"{fraction:g} of capacity: {name}"
            ratios = Spread(tuple(a / b for a, b in zip(met, first, strict=True)))
            figures += [
                Figure(f"{words}, in time / as it is", ratios, "x", NEEDED),
                Figure(f"{words}, in time", Spread(tuple(met)), "of all"),
                Figure(f"{words}, longest", Spread(tuple(longest[name])), "s"),
            ]
    return figures


def _capacity_per_s(costs: Costs) -> float:
    jobs = [Job(wish, 0.0, None) for wish in mixed_wishes(240)]
    play(jobs, ORDERS[0], costs)
    return len(jobs) / max(job.ended_s for job in jobs)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policies", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="of other arrivals (default: 3)")
    parser.add_argument("--requests", type=int, default=1000, help="a round (default: 1000)")
    arguments = parser.parse_args(argv)
    figures = measure(arguments.requests, arguments.rounds, Costs())
    print(f"\n{write_report('policies', figures, {'seconds': asdict(Costs())})}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
