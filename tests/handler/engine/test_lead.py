"""The host stays two ticks ahead of its device, and no more."""

from __future__ import annotations

from handler.engine.lead import Lead, cuda_marker
from tests.support.toy_pipeline import toy


class Device:
    """Notes which ticks the host queued and which it waited for."""

    def __init__(self) -> None:
        self.num_queued = 0
        self.waited_for: list[int] = []

    def mark(self) -> Mark:
        self.num_queued += 1
        return Mark(self, self.num_queued)


class Mark:
    def __init__(self, device: Device, tick: int) -> None:
        self._device, self._tick = device, tick

    def synchronize(self) -> None:
        self._device.waited_for.append(self._tick)


def test_a_tick_is_queued_when_the_one_before_the_last_is_done() -> None:
    device = Device()
    lead = Lead(device.mark)
    waited_for = []
    for _ in range(5):
        lead.wait()
        waited_for.append(list(device.waited_for))
        lead.note()
    assert waited_for == [[], [], [1], [1, 2], [1, 2, 3]]


def test_where_forwards_are_done_when_they_return_nobody_waits() -> None:
    assert cuda_marker([toy()]) is None
    lead = Lead(None)
    for _ in range(5):
        lead.note()
        lead.wait()
