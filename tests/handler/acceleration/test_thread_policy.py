"""How many threads forwards get, for invented seconds."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from handler.acceleration.thread_policy import MAX_COST, ThreadPolicy, counts_to_try

ALONE = {1: 1.8, 2: 1.0}
BESIDE = {1: 1.8, 2: 2.9}


def drive(
    policy: ThreadPolicy,
    num_forwards: int,
    seconds: Callable[[int], float],
    kinds: Sequence[object] = ("a",),
) -> list[tuple[int, float]]:
    """The threads and the seconds of forwards that take what `seconds` says of their threads."""
    done = []
    for i in range(num_forwards):
        kind = kinds[i % len(kinds)]
        threads = policy.choose(kind)
        took_s = seconds(threads)
        policy.note(kind, threads, took_s)
        done.append((threads, took_s))
    return done


def noisy(seconds: dict[int, float], seed: int, by: float = 0.15) -> Callable[[int], float]:
    draw = random.Random(seed)
    return lambda threads: seconds[threads] * draw.uniform(1 - by, 1 + by)


@pytest.mark.parametrize(
    ("most", "counts"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (3, (1, 2, 3)),
        (4, (1, 2, 3, 4)),
        (16, (1, 2, 3, 4, 6, 9, 12, 16)),
    ],
)
def test_numbers_of_threads(most: int, counts: tuple[int, ...]) -> None:
    assert counts_to_try(most) == counts


@pytest.mark.parametrize("seed", range(20))
def test_where_nobody_else_is_all_threads_stay_and_trials_cost_next_to_nothing(seed: int) -> None:
    done = drive(ThreadPolicy(2), 5000, noisy(ALONE, seed))
    cost_s = sum(took_s - 1.0 for threads, took_s in done if threads == 1)
    assert 0 < cost_s <= MAX_COST * sum(took_s for _, took_s in done) + 2.5
    assert [threads for threads, _ in done[-16:]].count(2) >= 15


@pytest.mark.parametrize("seed", range(20))
def test_a_neighbour_that_comes_and_goes(seed: int) -> None:
    policy = ThreadPolicy(2)
    drive(policy, 1000, noisy(ALONE, seed))
    assert policy.present == 2
    drive(policy, 60, noisy(BESIDE, seed, 0.4))
    assert policy.present == 1
    # It stays so while the neighbour does, and is quick again when it has gone.
    beside = drive(policy, 1000, noisy(BESIDE, seed, 0.4))
    assert sum(threads == 1 for threads, _ in beside) >= 970
    drive(policy, 200, noisy(ALONE, seed))
    assert policy.present == 2


def test_a_neighbour_that_was_there_first_is_noticed_at_the_start() -> None:
    policy = ThreadPolicy(2)
    drive(policy, 40, noisy(BESIDE, 0))
    assert policy.present == 1


def test_of_many_threads_as_many_are_taken_as_are_quickest() -> None:
    quickest_at_six = {n: 1 + abs(n - 6) / 4 for n in counts_to_try(16)}
    policy = ThreadPolicy(16)
    drive(policy, 3000, noisy(quickest_at_six, 1, 0.05))
    assert policy.present == 6


@pytest.mark.parametrize("seconds", [{1: 1.0, 2: 1.0}, {1: 0.95, 2: 1.0}])
def test_what_is_hardly_quicker_changes_nothing(seconds: dict[int, float]) -> None:
    policy = ThreadPolicy(2)
    done = drive(policy, 2000, noisy(seconds, 3, 0.02))
    assert policy.present == 2
    assert any(threads == 1 for threads, _ in done)


def test_one_slow_forward_changes_nothing() -> None:
    policy = ThreadPolicy(2)
    drive(policy, 300, noisy(ALONE, 4, 0.02))
    drive(policy, 1, lambda threads: 30.0)
    done = drive(policy, 300, noisy(ALONE, 5, 0.02))
    assert policy.present == 2
    assert sum(threads == 1 for threads, _ in done) <= 8


def test_forwards_are_compared_with_those_of_their_own_kind() -> None:
    """Kinds that differ ten times in length, in an order that would look like a gain."""
    policy = ThreadPolicy(2)
    draw = random.Random(6)
    tried = 0
    for _ in range(4000):
        kind = draw.choice([1, 10])
        threads = policy.choose(kind)
        tried += threads == 1
        policy.note(kind, threads, kind * ALONE[threads])
    assert policy.present == 2
    assert tried


def test_a_kind_that_was_never_seen_is_no_trial() -> None:
    policy = ThreadPolicy(2)
    done = drive(policy, 500, lambda threads: BESIDE[threads], kinds=range(500))
    assert {threads for threads, _ in done} == {2}


def test_the_first_forward_of_a_kind_does_not_count() -> None:
    """It may be one that compiles for minutes; what trials may cost is not made of it."""
    policy = ThreadPolicy(2)
    drive(policy, 1, lambda threads: 1000.0)
    done = drive(policy, 1000, noisy(ALONE, 7, 0.02))
    assert sum(threads == 1 for threads, _ in done) <= 0.01 * 1000 / 0.8 + 4


def test_one_thread_is_all_there_is() -> None:
    assert {threads for threads, _ in drive(ThreadPolicy(1), 100, lambda threads: 1.0)} == {1}
