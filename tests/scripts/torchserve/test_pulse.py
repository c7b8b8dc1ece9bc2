"""scripts.torchserve.pulse: when a server that runs is to be started again."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from scripts.torchserve.management import ModelState
from scripts.torchserve.pulse import Pulse
from tests.support.clock import Clock

READY = ModelState([{"status": "READY", "pid": 1}], 0)
LOADING = ModelState([{"status": "UNLOADED", "pid": -1}], 0)


@dataclass
class Server:
    """A server that says what a test tells it."""

    pid: int | None = 1
    said: ModelState | None = field(default_factory=lambda: READY)
    is_still: bool = False
    has_worker: bool = True

    def model(self) -> ModelState | None:
        return self.said


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pulse(server: Server, clock: Clock) -> Pulse:
    return Pulse(
        server,
        lambda model: server.is_still,
        lambda: server.has_worker,
        clock=clock,
        worker_timeout_s=1000,
    )


def test_one_that_draws_is_left_alone(pulse: Pulse) -> None:
    assert [pulse.fault() for _ in range(20)] == [None] * 20
    assert pulse.state == "ready"


def test_one_that_has_ended_is_seen_at_once(pulse: Pulse, server: Server) -> None:
    server.pid = None
    assert "has ended" in (pulse.fault() or "")


def test_a_frontend_that_is_silent_three_times_in_a_row(pulse: Pulse, server: Server) -> None:
    server.said = None
    assert [pulse.fault(), pulse.fault()] == [None, None]
    assert pulse.state == "no answer"
    server.said = READY
    assert pulse.fault() is None
    server.said = None
    assert [pulse.fault(), pulse.fault()] == [None, None]
    assert "does not answer" in (pulse.fault() or "")


def test_one_that_stands_still_twice_in_a_row(pulse: Pulse, server: Server) -> None:
    server.is_still = True
    assert pulse.fault() is None
    server.is_still = False
    assert pulse.fault() is None
    server.is_still = True
    assert pulse.fault() is None
    assert "hands none of them" in (pulse.fault() or "")


def test_a_worker_may_be_started_again_for_a_while(
    pulse: Pulse, server: Server, clock: Clock
) -> None:
    server.said = LOADING
    for _ in range(10):
        assert pulse.fault() is None
        assert pulse.state == "worker down"
        clock.now_s += 90
    clock.now_s += 120
    assert "no worker was READY for" in (pulse.fault() or "")


def test_a_worker_that_nobody_starts_again(pulse: Pulse, server: Server, clock: Clock) -> None:
    server.said, server.has_worker = LOADING, False
    assert pulse.fault() is None
    clock.now_s += 100
    # One is being started.
    server.has_worker = True
    assert pulse.fault() is None
    server.has_worker = False
    assert pulse.fault() is None
    clock.now_s += 119
    assert pulse.fault() is None
    clock.now_s += 2
    assert "has had no worker" in (pulse.fault() or "")
