"""The pace of ticks, and who is refused for it: only those that will surely be late."""

from __future__ import annotations

from handler.engine.tick_times import Pace
from handler.pipelines.cost import Cost

REQUEST = Cost(2, 64 * 64, 64 * 64)


def paced(*ticks: tuple[float, list[Cost]]) -> Pace:
    pace = Pace()
    for seconds, served in ticks:
        pace.note(seconds, served)
    return pace


def test_nothing_is_known_before_enough_ticks_were_seen() -> None:
    pace = paced(*[(1.0, [REQUEST])] * 15)
    assert pace.least_s(50, REQUEST) == 0
    pace.note(1.0, [REQUEST])
    assert pace.least_s(50, REQUEST) == 50
    pace.forget()
    assert pace.least_s(50, REQUEST) == 0


def test_the_fastest_recent_tick_counts() -> None:
    pace = paced((0.1, [REQUEST]), *[(1.0, [REQUEST])] * 20)
    assert pace.least_s(10, REQUEST) == 1
    for _ in range(64):
        pace.note(2.0, [REQUEST])
    assert pace.least_s(10, REQUEST) == 20


def test_rows_that_may_leave_do_not_count() -> None:
    pace = paced(*[(1.0, [REQUEST] * 4)] * 16)
    assert pace.least_s(10, REQUEST) == 2.5
    assert pace.least_s(10, Cost(4, 2 * 64 * 64, 64 * 64)) == 5
    assert pace.least_s(10, Cost(16, 8 * 64 * 64, 64 * 64)) == 10, "nor those that come"


def test_larger_pictures_tell_nothing_of_smaller_ones() -> None:
    large = Cost(2, 128 * 128, 128 * 128)
    pace = paced(*[(1.0, [REQUEST, large])] * 16)
    assert pace.least_s(10, REQUEST) == 0
    assert pace.least_s(10, large) == 5
    as_many_pixels = Cost(8, 4 * 64 * 64, 64 * 64)
    assert pace.least_s(10, as_many_pixels) == 0, "of four small images each row is quick"


def test_calls_without_rows_are_no_division_by_zero() -> None:
    pace = paced(*[(1.0, [Cost(0, 64 * 64, 64 * 64)])] * 16)
    assert pace.least_s(10, REQUEST) == 10
