"""One instance as the gateway sees it, and a place on it for one request."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gateway.addresses import Address, Source

__all__ = ["Instance", "Lease"]


class Instance:
    """One TorchServe as the fleet sees it."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.address: Address | None = None
        """The last that was known: a server that died may come back."""
        self.is_ready = False
        self.is_down = False
        """Known to have no worker: what was sent there is not being drawn."""
        self.paused_until_s = 0.0
        self.num_starts = 0
        self.silent_checks = 0
        self.heard_s = -math.inf
        """When its worker was last heard of, or got something to draw when it had nothing."""
        self.is_silent = False
        """Not heard of for too long: nothing is sent there until its worker answers a probe."""
        self.probe: asyncio.Task[None] | None = None
        self.drew_s = -math.inf
        """When it last sent a picture: then nobody need ask whether it can."""
        self.seen_s = int(time.time())
        self.leases: set[Lease] = set()

    @property
    def work(self) -> float:
        """What it has still to draw of what was sent to it."""
        return sum(lease.work_left for lease in self.leases)


class Lease:
    """A place on an instance, for one request."""

    def __init__(self, instance: Instance, address: Address, work: float) -> None:
        self.instance = instance
        self.address = address
        self.progress = 0.0
        self.is_lost = False
        self.has_drawn = False
        """Whether its picture came."""
        self._work = work
        self._scope: asyncio.Timeout | None = None

    @property
    def work_left(self) -> float:
        """Steps × pixels that are not drawn yet."""
        return self._work * (1.0 - self.progress)

    @asynccontextmanager
    async def guard(self) -> AsyncIterator[None]:
        """End the block by TimeoutError as soon as the instance is known to draw nothing."""
        now_s = asyncio.get_running_loop().time()
        async with asyncio.timeout_at(now_s if self.is_lost else None) as self._scope:
            yield

    def lose(self) -> None:
        """Give the place up: somebody else draws it."""
        # Once: a block that is being ended already takes no other end.
        if self._scope is not None and not self.is_lost:
            self._scope.reschedule(asyncio.get_running_loop().time())
        self.is_lost = True

    def heard(self) -> None:
        """Note that its worker has sent something."""
        self.instance.heard_s = time.monotonic()

    def drew(self) -> None:
        """Note that its worker has sent a picture."""
        self.heard()
        self.has_drawn = True
        self.instance.drew_s = time.monotonic()

    def instance_died(self) -> None:
        """Send nothing more there until its worker is READY again."""
        self.instance.is_ready = False

    def pause(self, seconds: float) -> None:
        """Send nothing more there for a while: it refuses requests."""
        self.instance.paused_until_s = time.monotonic() + seconds
