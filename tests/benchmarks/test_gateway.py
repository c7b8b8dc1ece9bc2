"""The logic of benchmarks.gateway."""

from __future__ import annotations

import pytest

from benchmarks.gateway import DIRECT, THROUGH, Clients, way_of


def test_half_of_the_requests_go_each_way_the_same_in_every_run() -> None:
    ways = [way_of(1, client, index) for client in range(24) for index in range(100)]
    assert ways == [way_of(1, client, index) for client in range(24) for index in range(100)]
    assert ways.count(THROUGH) / len(ways) == pytest.approx(0.5, abs=0.05)
    assert {way_of(1, client, 0) for client in range(24)} == {DIRECT, THROUGH}


def test_the_ratio_is_of_medians() -> None:
    clients = Clients()
    clients.seconds[DIRECT] += [1.0, 2.0, 30.0]
    clients.seconds[THROUGH] += [2.1, 2.1, 2.1]
    assert clients.p50_ratio == pytest.approx(1.05)
