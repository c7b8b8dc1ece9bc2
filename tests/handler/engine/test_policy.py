"""Who joins, who runs and who is out of time: orders, limits, and the bounds on waiting."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.engine.policy import Admission, Limits, admit, choose, expired
from handler.pipelines.cost import Cost

NOTHING = Cost(0, 0)


@dataclass(eq=False)
class Asked:
    """A request as the policy sees it, and what the simulations below keep of it."""

    cost: Cost
    overtaken: int = 0
    deadline: float | None = None
    last_tick: int = -1
    is_exclusive: bool = False

    runs: int = 1
    waited: int = 0
    left_out: int = 0
    others: int = 0
    passed_by: list[Asked] = field(default_factory=list)


def asked(*rows: int, pixels: int = 0) -> list[Asked]:
    return [Asked(Cost(n, pixels)) for n in rows]


# Limits


@pytest.mark.parametrize(
    ("cost", "fits"),
    [
        (Cost(0, 0), True),
        (Cost(4, 100), True),
        (Cost(5, 0), False),
        (Cost(0, 101), False),
        (Cost(5, 101), False),
    ],
)
def test_limits_hold_rows_and_pixels(cost: Cost, fits: bool) -> None:
    assert Limits(max_rows=4, max_pixels=100).hold(cost) is fits


def test_without_a_limit_any_number_of_pixels_is_held() -> None:
    assert Limits(max_rows=4).hold(Cost(4, 10**12))


def test_a_refusal_says_what_is_asked_and_what_is_allowed() -> None:
    said = "the request needs 5 rows and 9 pixels at once; this server takes up to 4 rows and "
    advice = "ask for fewer or smaller pictures"
    assert Limits(max_rows=4).refusal(Cost(5, 9)) == f"{said}any number of pixels: {advice}"
    assert Limits(max_rows=4, max_pixels=8).refusal(Cost(5, 9)) == f"{said}8 pixels: {advice}"


def test_costs_add_up() -> None:
    assert Cost(1, 20) + Cost(3, 4) == Cost(4, 24)


# Joining


def test_first_come_first_served_while_there_is_room() -> None:
    assert admit(asked(2, 2, 2), [], Limits(max_rows=4)) == Admission((0, 1), {})


def test_what_is_in_flight_counts() -> None:
    assert admit(asked(2, 2), asked(2), Limits(max_rows=4)) == Admission((0,), {})


def test_who_fits_passes_who_does_not() -> None:
    admission = admit(asked(4, 1, 4, 1), asked(2), Limits(max_rows=4))
    assert admission == Admission((1, 3), {0: 2, 2: 1})


def test_pixels_keep_a_request_waiting_as_rows_do() -> None:
    waiting = [Asked(Cost(1, 90)), Asked(Cost(1, 30))]
    admission = admit(waiting, asked(1, pixels=50), Limits(max_rows=16, max_pixels=100))
    assert admission == Admission((1,), {0: 1})


def test_nobody_passes_who_has_been_passed_often_enough() -> None:
    limits = Limits(max_rows=4, max_overtakes=3)
    waiting = asked(4, 1, 1)
    waiting[0].overtaken = 2
    assert admit(waiting, asked(2), limits) == Admission((1,), {0: 1})
    waiting[0].overtaken = 3
    assert admit(waiting, asked(2), limits) == Admission((), {})


def test_those_ahead_of_it_still_join() -> None:
    waiting = asked(1, 4, 1)
    waiting[1].overtaken = 3
    admission = admit(waiting, asked(2), Limits(max_rows=4, max_overtakes=3))
    assert admission == Admission((0,), {})


def test_without_overtaking_the_line_stands_behind_its_first() -> None:
    limits = Limits(max_rows=4, max_overtakes=0)
    assert admit(asked(4, 1), asked(1), limits) == Admission((), {})


def test_nobody_joins_an_overfull_tick() -> None:
    """Calls that turned out larger than they said may hold more than the limits for a while."""
    assert admit(asked(1), asked(6), Limits(max_rows=4)) == Admission((), {})


def test_an_exclusive_request_joins_alone() -> None:
    waiting = asked(1, 1, 1)
    waiting[0].is_exclusive = True
    limits = Limits(max_rows=4, max_overtakes=3)
    assert admit(waiting, [], limits) == Admission((0,), {})
    assert admit(waiting[1:], waiting[:1], limits) == Admission((), {})
    assert admit(waiting, asked(1), limits) == Admission((1, 2), {0: 2})
    waiting[0].overtaken = 2
    assert admit(waiting, asked(1), limits) == Admission((1,), {0: 1})
    waiting[0].overtaken = 3
    assert admit(waiting, asked(1), limits) == Admission((), {}), "so that it has its turn"


costs = st.builds(Cost, rows=st.integers(1, 6), pixels=st.integers(0, 60))
arrivals = st.lists(
    st.tuples(st.integers(0, 3), costs, st.integers(1, 5), st.booleans()), min_size=1, max_size=25
)


@given(arrivals, st.integers(0, 4))
def test_waiting_is_bounded_whatever_comes(
    plan: list[tuple[int, Cost, int, bool]], max_overtakes: int
) -> None:
    """`admit` in its loop: the bound that its docstring states, for every request of every plan."""
    limits = Limits(max_rows=6, max_pixels=60, max_overtakes=max_overtakes)
    line: list[tuple[int, Asked]] = []
    tick = 0
    for pause, cost, runs, is_exclusive in plan:
        tick += pause
        line.append((tick, Asked(cost, is_exclusive=is_exclusive, runs=runs)))
    everyone = [request for _, request in line]
    waiting: list[Asked] = []
    running: list[tuple[Asked, int]] = []  # and the tick after its last
    now = 0
    while line or waiting or running:
        while line and line[0][0] <= now:
            waiting.append(line.pop(0)[1])
        running = [(request, until) for request, until in running if until > now]
        admission = admit(waiting, [request for request, _ in running], limits)
        joining = [waiting[place] for place in admission.joining]
        for place, times in admission.overtaken.items():
            behind = [waiting[other] for other in admission.joining if other > place]
            assert len(behind) == times
            waiting[place].overtaken += times
            waiting[place].passed_by += behind
        waiting = [request for request in waiting if request not in joining]
        running += [(request, now + request.runs) for request in joining]
        assert limits.hold(sum((request.cost for request, _ in running), NOTHING))
        assert len(running) == 1 or not any(request.is_exclusive for request, _ in running)
        for request in waiting:
            request.waited += 1
        now += 1
    for place, request in enumerate(everyone):
        assert len(request.passed_by) <= max_overtakes
        assert request.waited <= sum(r.runs for r in [*everyone[:place], *request.passed_by])


# Running


def test_all_run_while_they_fit() -> None:
    parked = asked(2, 1, 1)
    assert choose(parked, Limits(max_rows=4)) == parked


def test_those_served_longest_ago_go_first() -> None:
    parked = asked(3, 3, 1)
    for request, tick in zip(parked, (7, 5, 6), strict=True):
        request.last_tick = tick
    assert choose(parked, Limits(max_rows=4)) == [parked[1], parked[2]]


def test_one_that_is_larger_than_the_limits_runs_alone() -> None:
    """Its rows were not known at admission; it must not wait for ever."""
    parked = asked(9, 1)
    assert choose(parked, Limits(max_rows=4)) == [parked[0]]


def test_nothing_parked_nothing_chosen() -> None:
    assert choose([], Limits(max_rows=4)) == []


@given(st.lists(st.lists(st.tuples(costs, st.integers(1, 4)), max_size=3), min_size=1, max_size=8))
def test_no_call_is_left_out_for_longer_than_there_are_others(
    joining: list[list[tuple[Cost, int]]],
) -> None:
    """`choose` in its loop, with newcomers of any size at any tick, which live a few calls."""
    limits = Limits(max_rows=6, max_pixels=60)
    parked: list[Asked] = []
    tick = 0
    while joining or parked:
        newcomers = [Asked(cost, runs=runs) for cost, runs in (joining.pop(0) if joining else [])]
        for request in newcomers:
            request.last_tick = tick
        parked += newcomers
        for request in newcomers:
            request.others = len(parked) - 1
        tick += 1
        chosen = choose(parked, limits)
        total = sum((request.cost for request in chosen), NOTHING)
        assert limits.hold(total) or len(chosen) == 1
        assert chosen or not parked
        for request in parked:
            request.left_out += 1
            if request in chosen:
                request.last_tick, request.left_out = tick, 0
                request.runs -= 1
            assert request.left_out <= request.others
        # ModuleCall anew, the served stand behind those that were left out.
        rest = [request for request in parked if request not in chosen]
        parked = rest + [request for request in chosen if request.runs]
        for request in chosen:
            request.others = len(parked) - 1


# Deadlines


def test_a_deadline_is_reached_at_its_time_and_not_before() -> None:
    never, later, now = Asked(NOTHING), Asked(NOTHING, deadline=2.5), Asked(NOTHING, deadline=2.0)
    assert expired([never, later, now], 1.999) == []
    assert expired([never, later, now], 2.0) == [now]
    assert expired([never, later, now], 9.0) == [later, now]
