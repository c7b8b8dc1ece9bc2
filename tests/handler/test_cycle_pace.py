"""How long a cycle draws, by what TorchServe took and brought before it."""

from __future__ import annotations

import pytest

from handler.cycle_pace import MIN_BYTES, CyclePace
from tests.support.clock import Clock

CYCLE_S = 0.02


@pytest.fixture
def clock() -> Clock:
    return Clock()


def waits(pace: CyclePace, clock: Clock, waited_s: list[float], num_bytes: int) -> None:
    """Cycles, before each of which TorchServe takes so long."""
    for seconds in waited_s:
        pace.end(is_live=True)
        clock.now_s += seconds
        pace.begin(num_bytes)


def test_small_messages_change_nothing_however_late_they_are(clock: Clock) -> None:
    pace = CyclePace(CYCLE_S, clock)
    assert (pace.budget_s, pace.hold_s) == (CYCLE_S, 0.0)
    waits(pace, clock, [0.3, 0.4, 0.5], MIN_BYTES - 1)
    assert (pace.budget_s, pace.hold_s) == (CYCLE_S, 0.0)


def test_drawing_keeps_its_share_of_the_time(clock: Clock) -> None:
    pace = CyclePace(CYCLE_S, clock)
    waits(pace, clock, [0.01] * 3, MIN_BYTES)
    assert pace.budget_s == pytest.approx(0.19)
    assert pace.hold_s == pytest.approx(0.09)
    # As soon as messages are small again all is as before.
    waits(pace, clock, [0.001], 100)
    assert (pace.budget_s, pace.hold_s) == (CYCLE_S, 0.0)


def test_a_busy_moment_makes_no_cycle_longer(clock: Clock) -> None:
    pace = CyclePace(CYCLE_S, clock)
    waits(pace, clock, [0.01, 0.4], MIN_BYTES)
    assert pace.budget_s == pytest.approx(0.19)
    waits(pace, clock, [0.02, 0.02, 0.02], MIN_BYTES)
    assert pace.budget_s == pytest.approx(0.38)


def test_no_cycle_is_shorter_than_configured_or_very_long(clock: Clock) -> None:
    pace = CyclePace(CYCLE_S, clock)
    waits(pace, clock, [0.0001], MIN_BYTES)
    assert pace.budget_s == CYCLE_S
    pace = CyclePace(CYCLE_S, clock)
    waits(pace, clock, [5.0], MIN_BYTES)
    assert pace.budget_s == pace.hold_s == 0.5
    pace = CyclePace(2.0, clock)
    waits(pace, clock, [5.0], MIN_BYTES)
    assert pace.budget_s == 2.0


def test_waiting_for_clients_is_not_waiting_for_torchserve(clock: Clock) -> None:
    pace = CyclePace(CYCLE_S, clock)
    pace.end(is_live=False)
    clock.now_s += 60
    pace.begin(10 * MIN_BYTES)
    assert pace.budget_s == CYCLE_S
