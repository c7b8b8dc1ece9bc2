"""The step cache's policy: which steps are predicted, from what, and when not."""

from __future__ import annotations

import math
from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handler.acceleration.step_policy import (
    MAX_ERROR,
    ORDER,
    Measured,
    allowed_error,
    estimated_error,
    is_close,
    weights,
)
from handler.engine.shortcuts import NUM_FIRST, Shortcuts

shares = st.floats(0, 1)
steps = st.integers(1, 1000)


def planned(num_steps: int, share: float, rough: Collection[int] = ()) -> list[int]:
    """The steps that are predicted, when predictions of `rough` ones are not close."""
    found: list[int] = []
    for step in range(num_steps):
        if allowed_error(step, num_steps, share, len(found)) and step not in rough:
            found.append(step)
    return found


@given(steps, shares)
def test_the_first_steps_and_the_last_are_computed(num_steps: int, share: float) -> None:
    found = planned(num_steps, share)
    assert not {0, 1, 2, num_steps - 1} & set(found)


@given(steps, shares)
def test_no_more_than_the_share_is_predicted(num_steps: int, share: float) -> None:
    found = planned(num_steps, share)
    assert len(found) <= share * num_steps
    assert Shortcuts(step_cache=share).least_forwards(num_steps) == num_steps - len(found)


def test_the_first_steps_are_enough_to_predict_from_and_to_see_how_good_that_is() -> None:
    assert NUM_FIRST == (ORDER + 1) + 1


@given(steps, shares, shares)
def test_a_larger_share_predicts_no_fewer(num_steps: int, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert len(planned(num_steps, low)) <= len(planned(num_steps, high))


def test_predicted_steps_are_spread_evenly() -> None:
    assert planned(12, 0.5) == [4, 6, 8, 10]
    assert planned(13, 2 / 3) == [4, 5, 7, 8, 10, 11]
    assert planned(13, 0.25) == [6, 10]
    assert planned(8, 1) == [3, 4, 5, 6]
    assert planned(50, 0) == []


def test_what_could_not_be_predicted_is_made_up_for() -> None:
    assert planned(14, 0.5, rough={4, 5, 6}) == [7, 8, 9, 10, 12]
    assert len(planned(14, 0.5, rough={4, 5, 6})) == len(planned(14, 0.5))


@given(steps, shares, st.sets(st.integers(0, 60)))
def test_no_more_is_made_up_for_than_was_missed(
    num_steps: int, share: float, rough: set[int]
) -> None:
    assert len(planned(num_steps, share, rough)) <= len(planned(num_steps, share))


# Prediction


times = st.lists(st.floats(0, 1000), min_size=2, max_size=3, unique_by=lambda t: round(t, 1))


@given(times, st.floats(0, 1000), st.floats(-5, 5), st.floats(-5, 5))
def test_a_straight_line_is_predicted_exactly(
    points: list[float], at: float, slope: float, start: float
) -> None:
    found = sum(w * (slope * t + start) for w, t in zip(weights(points, at), points, strict=True))
    spread = sum(abs(w) for w in weights(points, at))
    assert found == pytest.approx(slope * at + start, abs=1e-9 * (spread + 1) * 6000)


def test_equal_times_repeat_the_last_output() -> None:
    """As PNDM has them, whose second and third steps are at one time."""
    assert weights([961.0, 961.0], 941.0) == [0.0, 1.0]


def test_the_error_of_a_parabola_is_estimated_exactly() -> None:
    def parabola(time: float) -> float:
        return 0.01 * time**2 - time + 3

    def error(points: tuple[float, float], at: float) -> float:
        mixed = sum(w * parabola(t) for w, t in zip(weights(points, at), points, strict=True))
        return abs(mixed - parabola(at))

    seen = Measured((100.0, 80.0), 60.0, error((100.0, 80.0), 60.0))
    for at in (50.0, 30.0):
        expected = error((80.0, 60.0), at)
        assert estimated_error(seen, (80.0, 60.0), at) == pytest.approx(expected)


def test_what_is_made_up_for_is_closer_still() -> None:
    assert allowed_error(4, 14, 0.5, num_predicted=0) == MAX_ERROR
    assert allowed_error(5, 14, 0.5, num_predicted=0) == MAX_ERROR / 2
    assert allowed_error(5, 14, 0.5, num_predicted=1) == 0
    assert allowed_error(5, 14, 1.0, num_predicted=1) == MAX_ERROR


@pytest.mark.parametrize(
    ("measured", "is_taken"),
    [
        (Measured((3.0, 2.0), 1.0, 0.0), True),
        (Measured((3.0, 2.0), 1.0, 0.099), True),
        (Measured((3.0, 2.0), 1.0, 0.101), False),
        (Measured((3.0, 2.0), 1.0, math.nan), False),
        (Measured((3.0, 2.0), 1.0, math.inf), False),
        (Measured((3.0, 3.0), 3.0, 0.0), False),
    ],
)
def test_only_close_predictions_are_taken(measured: Measured, is_taken: bool) -> None:
    assert is_close(measured, (2.0, 1.0), 0.0, allowed=0.1) is is_taken


def test_a_far_prediction_is_held_to_the_same_error() -> None:
    seen = Measured((4.0, 3.0), 2.0, 0.05)
    assert is_close(seen, (3.0, 2.0), 1.0, allowed=0.1)
    assert not is_close(seen, (3.0, 2.0), 0.0, allowed=0.1)
