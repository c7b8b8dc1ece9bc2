"""tests.chaos.report and blows: what counts as survived, and what is done."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.chaos.__main__ import main
from tests.chaos.blows import AN_HOUR, in_order, parse_parts
from tests.chaos.clients import Tally
from tests.chaos.report import Report


def report(**what: object) -> Report:
    return Report(Tally(num_requests=1000, num_ok=1000, **what))  # type: ignore[arg-type]


def test_few_documented_errors_are_good() -> None:
    assert report(errors=Counter({"images: 502 gateway_died": 5})).is_good
    assert not report(errors=Counter({"images: 502 gateway_died": 6})).is_good


@pytest.mark.parametrize(
    "what",
    [
        {"num_wrong": 1},
        {"num_hung": 1},
        {"num_unended": 1},
        {"errors": Counter({"images: 500 internal": 1})},
        {"errors": Counter({"images: ServerDisconnectedError": 1})},
        {"errors": Counter({"images: stream cut off": 1})},
    ],
)
def test_one_of_these_is_not(what: dict[str, object]) -> None:
    assert not report(**what).is_good


def test_a_leftover_is_not() -> None:
    left = report()
    left.leftovers.append("java")
    assert not left.is_good


def test_memory_that_grows_is_seen() -> None:
    steady, growing = report(), report()
    for at in range(21):
        steady.memory.append({"worker 0": 1000 + at % 2, "gateway": 100})
        growing.memory.append({"worker 0": 1000 + 10 * at, "gateway": 100})
    assert steady.is_good
    assert growing.growth()["worker 0"] > 0.1
    assert growing.problems == ["worker 0 grew by 15%"]


def test_every_blow_is_done_as_often_as_it_is_asked_for() -> None:
    assert Counter(in_order(AN_HOUR)) == AN_HOUR
    assert in_order(AN_HOUR) == in_order(AN_HOUR)
    assert parse_parts(["jvm=3", "restart"]) == {"jvm": 3, "restart": 1}
    with pytest.raises(ValueError, match="'flood' is not one of worker, jvm"):
        parse_parts(["flood"])
    with pytest.raises(SystemExit):
        main(["--parts", "flood"])
