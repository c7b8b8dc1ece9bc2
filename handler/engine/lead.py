"""How far the host may run ahead of a device that works through its queue by itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from typing import Any, Protocol

import torch

from handler.pipelines.placement import devices_of

__all__ = ["Lead", "Mark", "cuda_marker"]

# One tick runs while the next is being prepared: the device never waits for the host.
_MAX_TICKS = 2


class Mark(Protocol):
    """A place in a device's queue."""

    def synchronize(self) -> object:
        """Wait until the device has come there."""
        ...


class Lead:
    """Keeps the host at most two ticks ahead of the device.

    Forwards return before they are done. With captured graphs, all steps of a request could be
    queued in the time of one, and a request that comes then would join after the last of them.

    `mark` puts a mark at the end of the device's queue; None where forwards are done when they
    return.
    """

    def __init__(self, mark: Callable[[], Mark] | None) -> None:
        self._mark = mark
        self._marks: deque[Mark] = deque()

    def wait(self) -> None:
        """Before a tick: wait until the device is close enough."""
        while len(self._marks) >= _MAX_TICKS:
            self._marks.popleft().synchronize()

    def note(self) -> None:
        """After a tick: remember where it ends."""
        if self._mark is not None:
            self._marks.append(self._mark())


def cuda_marker(pipelines: Collection[Any]) -> Callable[[], Mark] | None:
    """What marks the queue of the CUDA device that `pipelines` are on; None if they are on none."""
    devices = {device for device in devices_of(pipelines) if device.type == "cuda"}
    if not devices:
        return None
    device = min(devices, key=str)

    def mark() -> Mark:
        # The thread sleeps while it waits: the cores are for encoding pictures.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event

    return mark
