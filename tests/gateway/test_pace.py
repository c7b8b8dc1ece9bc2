"""gateway.pace: how fast models were drawn in the last minute."""

from __future__ import annotations

import pytest

from gateway.pace import Pace
from tests.support.clock import Clock


def test_what_was_drawn_so_far_over_the_seconds_that_it_took() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.of("toy") == 0
    for _ in range(20):
        pace.drew("toy", 30.0)
        pace.drew("other", 5.0)
        clock.now_s += 0.5
    assert pace.of("toy") == pytest.approx(60.0)
    assert pace.of("other") == pytest.approx(10.0)
    assert pace.of("third") == 0


def test_what_is_drawn_at_once_took_a_second() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.drew("toy", 30.0)
    clock.now_s += 0.01
    pace.drew("toy", 30.0)
    assert pace.of("toy") == 60.0


def test_only_the_last_minute_counts() -> None:
    clock = Clock()
    pace = Pace(clock)
    for _ in range(600):
        pace.drew("toy", 100.0)
        clock.now_s += 0.25
    for _ in range(600):
        pace.drew("toy", 10.0)
        clock.now_s += 0.25
    assert pace.of("toy") == pytest.approx(40.0, rel=0.05)
    clock.now_s += 70
    assert pace.of("toy") == 0
