"""Looks at the instances all the time: which are there, READY, or have fallen silent."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence

from gateway.addresses import Address
from gateway.asking import WorkerCheck
from gateway.instance import Instance
from gateway.settings import Settings

__all__ = ["Watch"]

logger = logging.getLogger(__name__)

_SILENT_CHECKS = 3


class Watch:
    """Looks at `instances`, and calls `looked` whenever it has looked at all that answer at once.

    One that does not keeps nobody from seeing what becomes of the others.
    """

    def __init__(
        self,
        instances: Sequence[Instance],
        settings: Settings,
        check: WorkerCheck,
        looked: Callable[[], None],
    ) -> None:
        self._instances = instances
        self._settings = settings
        self._check = check
        self._looked = looked
        self._look = asyncio.Event()
        self._looking: dict[Instance, asyncio.Task[None]] = {}
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Look at every instance once, then go on looking in the background."""
        await self._look_at_all(None)
        self._watcher = asyncio.create_task(self._run(), name="watch")

    async def close(self) -> None:
        """Stop looking."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        probes = [each.probe for each in self._instances if each.probe is not None]
        begun = [*self._looking.values(), *probes]
        for task in begun:
            task.cancel()
        await asyncio.gather(*begun, return_exceptions=True)
        await self._check.close()

    def look_now(self) -> None:
        """Look at the instances at once: something has happened to one of them."""
        self._look.set()

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.poll_s):
                    await self._look.wait()
            self._look.clear()
            try:
                await self._look_at_all(self._settings.poll_s)
            except Exception:  # nothing that comes of it may end the watching
                logger.exception("the instances could not be looked at")

    async def _look_at_all(self, timeout_s: float | None) -> None:
        """Look at all; those that have not answered after `timeout_s` are still being looked at."""
        for each in self._instances:
            if each not in self._looking:
                self._looking[each] = asyncio.create_task(self._look_at(each), name="look")
        if self._looking:
            await asyncio.wait(self._looking.values(), timeout=timeout_s)
        for each in [each for each, task in self._looking.items() if task.done()]:
            if (error := self._looking.pop(each).exception()) is not None:
                logger.error("%s could not be looked at", each.source.name, exc_info=error)
        self._looked()

    async def _look_at(self, instance: Instance) -> None:
        address = instance.source.read()
        if address is None:
            self._note(instance, is_ready=False)
            return
        if instance.address is None or address.started != instance.address.started:
            instance.seen_s, instance.is_silent = int(time.time()), False
        has_just_drawn = time.monotonic() - instance.drew_s < self._settings.poll_s
        if instance.is_ready and has_just_drawn and address == instance.address:
            return
        instance.address = address
        if self._is_silent(instance, address):
            self._note(instance, is_ready=False)
            return
        is_ready = await self._check.is_ready(address)
        if is_ready is None:
            instance.silent_checks += 1
            if instance.silent_checks >= _SILENT_CHECKS:
                instance.is_ready = False
            return
        self._note(instance, is_ready=is_ready)

    def _is_silent(self, instance: Instance, address: Address) -> bool:
        """Whether the worker has stood still for too long: it takes requests and never answers."""
        limit_s, silent_s = self._settings.silence_s, time.monotonic() - instance.heard_s
        if silent_s > limit_s / 2 and (instance.leases or instance.is_silent):
            self._ask(instance, address)
        is_silent = silent_s > limit_s and bool(instance.leases or instance.is_silent)
        if is_silent != instance.is_silent:
            said = f"said nothing for {limit_s:g} s" if is_silent else "answers again"
            logger.warning("%s %s", instance.source.name, said)
        instance.is_silent = is_silent
        return is_silent

    def _ask(self, instance: Instance, address: Address) -> None:
        """Ask the worker in the background whether it lives, unless it is being asked."""

        async def probe() -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.silence_s):
                    if await self._check.hears(address):
                        instance.heard_s = time.monotonic()
                        self.look_now()

        if instance.probe is None or instance.probe.done():
            instance.probe = asyncio.create_task(probe(), name="probe")

    def _note(self, instance: Instance, *, is_ready: bool) -> None:
        if is_ready != instance.is_ready:
            logger.info("%s is %s", instance.source.name, "READY" if is_ready else "not READY")
            instance.num_starts += is_ready
            # What refused requests for a while, as one that is drained, is another one since.
            instance.paused_until_s = 0.0
        instance.silent_checks = 0
        instance.is_ready, instance.is_down = is_ready, not is_ready
