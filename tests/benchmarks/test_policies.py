"""The played ticks are the engine's own, and orders do what they say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from benchmarks.policies import ORDERS, Costs, Job, Order, make_jobs, measure, play
from benchmarks.traffic import Wish
from handler.engine import ForwardWrapper, InFlightEngine
from handler.engine.ticket import Ticket
from tests.support.clock import Clock
from tests.support.engine_tools import opened
from tests.support.toy_pipeline import toy, toy_kwargs

# Encoders and decoders of the toy take no time on the tests' clock.
COSTS = Costs(encode_s=0.0, decode_s=0.0)
FIRST_COME = ORDERS[0]


class Taking(ForwardWrapper):
    """Forwards that take what `COSTS` says, on a clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def wrap_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def taking(sample: Any, *args: Any, **kwargs: Any) -> Any:
            size_px = 8 * sample.shape[-1]
            wish = Wish("", size_px, 1, 1.0, 0)
            jobs = [Job(wish, 0.0, None, stage=1) for _ in range(len(sample))]
            self.clock.now_s += COSTS.tick_s(jobs)
            return forward(sample, *args, **kwargs)

        return taking


def test_the_engine_itself_takes_as_long() -> None:
    wishes = [
        Wish("a", size_px, num_steps, guidance, seed)
        for seed, (size_px, num_steps, guidance) in enumerate(
            [(64, 5, 7.5), (128, 9, 1.0), (64, 3, 7.5), (64, 12, 1.0), (128, 4, 7.5), (64, 6, 7.5)]
        )
    ]
    arrivals_s = [0.0, 0.001, 0.03, 0.031, 0.1, 0.5]
    jobs = [Job(wish, at_s, None) for wish, at_s in zip(wishes, arrivals_s, strict=True)]
    play(jobs, FIRST_COME, COSTS)

    clock = Clock(0.0)
    with opened(toy(), max_rows=32, wrappers=[Taking(clock)], clock=clock) as engine:
        # At the first time the engine looks whether rows are kept apart, in forwards of its own.
        for _ in range(2):
            clock.now_s = 0.0
            ended = _served(engine, clock, wishes, arrivals_s)
    assert ended == pytest.approx([job.ended_s for job in jobs])


def _served(
    engine: InFlightEngine, clock: Clock, wishes: Sequence[Wish], arrivals_s: Sequence[float]
) -> list[float]:
    """How long each took in the engine."""
    coming = list(enumerate(wishes))
    tickets: dict[Ticket, int] = {}
    ended: dict[int, float] = {}
    while coming or engine.has_work:
        if not engine.has_work:
            clock.now_s = max(clock.now_s, arrivals_s[coming[0][0]])
        while coming and arrivals_s[coming[0][0]] <= clock.now_s:
            i, wish = coming.pop(0)
            changes = {"num_inference_steps": wish.num_steps, "guidance_scale": wish.guidance}
            sides = {"height": wish.size_px, "width": wish.size_px}
            tickets[engine.submit(toy_kwargs(i, **changes, **sides))] = i
        for ticket in engine.step():
            ticket.result()
            ended[tickets[ticket]] = clock.now_s - arrivals_s[tickets[ticket]]
    return [ended[i] for i in range(len(wishes))]


def named(name: str) -> Order:
    return next(order for order in ORDERS if order.name == name)


def test_the_shortest_run_first_where_not_all_do() -> None:
    def times(order: Order) -> list[float]:
        long = [Job(Wish("", 768, 50, 7.5, 0), 0.0, None) for _ in range(4)]
        jobs = [*long, Job(Wish("", 512, 5, 7.5, 0), 0.1, None)]
        play(jobs, order, COSTS)
        return [job.ended_s for job in jobs]

    in_order, shortest = times(FIRST_COME), times(named("shortest, 8 rows"))
    assert shortest[-1] < in_order[-1]
    assert max(shortest[:4]) > max(in_order[:4])


def test_what_is_surely_late_is_given_up_before_its_deadline() -> None:
    """So that what it would have taken is left to the others."""

    def sum_of_ends(order: Order) -> float:
        late = [Job(Wish("", 768, 50, 7.5, 0), 0.0, 2.0) for _ in range(8)]
        jobs = [*late, Job(Wish("", 768, 50, 7.5, 0), 0.0, None)]
        play(jobs, order, COSTS)
        assert all(job.ended_s == float("inf") for job in late)
        return jobs[-1].ended_s

    assert sum_of_ends(named("first come, gives up")) < sum_of_ends(FIRST_COME)


def test_arrivals_are_the_same_for_every_order() -> None:
    first, again = (make_jobs(50, 3.0, seed=1, costs=COSTS) for _ in range(2))
    assert [job.arrival_s for job in first] == [job.arrival_s for job in again]
    assert [job.deadline for job in first] == [job.deadline for job in again]


def test_each_order_is_compared_with_the_first() -> None:
    figures = measure(30, 1, COSTS, ORDERS[:2])
    ratios = {f.name: f.value.median for f in figures if f.unit == "x"}
    assert len(ratios) == 4
    assert [ratio for name, ratio in ratios.items() if ": first come" in name] == [1.0, 1.0]
