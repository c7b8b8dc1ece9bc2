"""Which instance gets a request: the READY one with the least outstanding work, or a place in line.

Work is steps × pixels × pictures that are not drawn yet. Everything here runs in one thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from gateway.addresses import Address, Source
from gateway.asking import WorkerCheck
from gateway.errors import ModelNotFound, NoInstance, RateLimited
from gateway.instance import Instance, Lease
from gateway.model_config import ModelConfig
from gateway.pace import Pace
from gateway.settings import Settings
from gateway.watching import Watch
from handler.errors import QueueFull
from handler.messages import nearest, show

__all__ = ["Fleet", "InstanceState", "Model"]

# Cancelling is a request too, and must get through where all places of a batch are taken.
_ROOM_FOR_CANCELS = 16
_RETRY_AFTER_S = 5


@dataclass(frozen=True, slots=True)
class Model:
    """A model that some instance serves, or served when it was last seen."""

    name: str
    config: ModelConfig
    is_ready: bool
    created_s: int


@dataclass(frozen=True, slots=True)
class InstanceState:
    """One instance, as an operator sees it."""

    name: str
    model: str
    is_ready: bool
    num_requests: int
    max_requests: int
    max_rows: int
    num_starts: int
    """How often its worker became READY."""


@dataclass(eq=False, slots=True)
class _Waiter:
    model: str
    work: float
    key: str
    place: asyncio.Future[Lease] = field(init=False)

    def __post_init__(self) -> None:
        self.place = asyncio.get_running_loop().create_future()


class Fleet:
    """All instances, and the line of those that wait for one."""

    def __init__(self, sources: Iterable[Source], settings: Settings, check: WorkerCheck) -> None:
        self._instances = [Instance(source) for source in sources]
        self._settings = settings
        self._watch = Watch(self._instances, settings, check, self._looked)
        self._line: deque[_Waiter] = deque()
        self._num_waiting_by_key: Counter[str] = Counter()
        self._pace = Pace()

    # What there is.

    def models(self) -> dict[str, Model]:
        """Every model by its name, in the order of the configuration."""
        found: dict[str, Model] = {}
        for each in self._instances:
            if each.address is None:
                continue
            name, before = each.address.model, found.get(each.address.model)
            if before is None or (each.is_ready and not before.is_ready):
                found[name] = Model(name, each.address.config, each.is_ready, each.seen_s)
        return found

    def model(self, name: str | None) -> Model:
        """The model that a request means.

        Raises:
            ModelNotFound: there is none of this name.
            NoInstance: no instance has been seen yet.
        """
        models, settings = self.models(), self._settings
        if not models:
            raise NoInstance("no instance has been started yet", retry_after_s=_RETRY_AFTER_S)
        wanted = name or settings.default_model or next(iter(models))
        wanted = wanted if wanted in models else settings.aliases.get(wanted, wanted)
        if wanted not in models:
            names = [*models, *settings.aliases]
            match = nearest(wanted, names)
            hint = f"did you mean {match}? " if match else ""
            raise ModelNotFound(
                f"the model {show(wanted)} does not exist; {hint}there are {', '.join(names)}",
                {"model": f"{show(wanted)} is not one of {', '.join(names)}"},
            )
        return models[wanted]

    def address(self, model: str) -> Address | None:
        """Where an instance that serves `model` is reached; None while none is READY."""
        return next((each.address for each in self._serving(model)), None)

    @property
    def is_ready(self) -> bool:
        """Whether any instance can take requests."""
        return any(each.is_ready for each in self._instances)

    @property
    def num_waiting(self) -> int:
        """Requests that have no instance yet."""
        return len(self._line)

    def num_waiting_by_model(self) -> dict[str, int]:
        """The same by model, those included for which nobody waits."""
        counts = Counter(waiter.model for waiter in self._line)
        return {model: counts[model] for model in [*self.models(), *counts]}

    def instances(self) -> list[InstanceState]:
        """Every instance that has been seen."""
        return [
            InstanceState(
                each.source.name,
                each.address.model,
                each.is_ready,
                len(each.leases),
                self._max_requests(each.address),
                each.address.config.handler.max_rows,
                each.num_starts,
            )
            for each in self._instances
            if each.address is not None
        ]

    def addresses(self) -> list[tuple[str, Address]]:
        """Every instance that has been seen, by its name."""
        return [
            (each.source.name, each.address) for each in self._instances if each.address is not None
        ]

    def retry_after_s(self, model: str) -> int:
        """How long the work that there is takes at the present pace."""
        pace = self._pace.of(model)
        backlog = sum(waiter.work for waiter in self._line if waiter.model == model)
        backlog += sum(each.work for each in self._serving(model))
        return max(1, math.ceil(backlog / pace)) if pace > 0 else _RETRY_AFTER_S

    # Places.

    @asynccontextmanager
    async def lease(
        self, model: str, work: float, key: str, until_s: float, *, is_again: bool = False
    ) -> AsyncIterator[Lease]:
        """Give a place on an instance of `model`, waiting for one until `until_s` at most.

        What has lost its place before (`is_again`) was let in then: it is first in line, however
        many wait.

        Raises:
            RateLimited: too many of this key wait already.
            QueueFull: too many wait already.
            NoInstance: none was ready and free in time.
        """
        lease = None if self._has_line(model) else self._take(model, work)
        if lease is None:
            if not is_again:
                self._check_line(model, key)
            lease = await self._wait(_Waiter(model, work, key), until_s, is_first=is_again)
        try:
            yield lease
            if lease.has_drawn:
                self._pace.drew(model, work)
        finally:
            lease.instance.leases.discard(lease)
            self._serve_line()

    def _has_line(self, model: str) -> bool:
        return any(waiter.model == model for waiter in self._line)

    def _take(self, model: str, work: float) -> Lease | None:
        free = [each for each in self._serving(model) if self._has_room(each)]
        if not free:
            return None
        chosen = min(free, key=lambda each: each.work)
        assert chosen.address is not None
        if not chosen.leases:
            chosen.heard_s = time.monotonic()
        lease = Lease(chosen, chosen.address, work)
        chosen.leases.add(lease)
        return lease

    def _serving(self, model: str) -> list[Instance]:
        return [
            each
            for each in self._instances
            if each.is_ready and each.address is not None and each.address.model == model
        ]

    def _has_room(self, instance: Instance) -> bool:
        assert instance.address is not None
        limit = self._max_requests(instance.address)
        return len(instance.leases) < limit and time.monotonic() >= instance.paused_until_s

    def _max_requests(self, address: Address) -> int:
        room = address.config.batch_size - _ROOM_FOR_CANCELS
        return self._settings.max_in_flight or max(1, room)

    def _check_line(self, model: str, key: str) -> None:
        """Raise RateLimited or QueueFull, where nobody more may wait."""
        settings = self._settings
        if self._num_waiting_by_key[key] >= settings.max_waiting_per_key:
            raise RateLimited(
                f"{self._num_waiting_by_key[key]} of your pictures are waiting already;"
                f" allowed are {settings.max_waiting_per_key}",
                retry_after_s=self.retry_after_s(model),
            )
        if len(self._line) >= settings.max_waiting:
            raise QueueFull(
                f"{len(self._line)} pictures are waiting already; allowed are"
                f" {settings.max_waiting}; try again a little later",
                self.retry_after_s(model),
            )

    async def _wait(self, waiter: _Waiter, until_s: float, *, is_first: bool) -> Lease:
        key = waiter.key
        (self._line.appendleft if is_first else self._line.append)(waiter)
        self._num_waiting_by_key[key] += 1
        lease = None
        try:
            async with asyncio.timeout(max(0.0, until_s - time.monotonic())):
                lease = await waiter.place
                return lease
        except TimeoutError:
            raise NoInstance(
                f"no instance of {waiter.model} was ready and free within"
                f" {self._settings.max_wait_s:g} s",
                retry_after_s=self.retry_after_s(waiter.model),
            ) from None
        finally:
            self._num_waiting_by_key[key] -= 1
            if lease is None:
                self._leave_line(waiter)

    def _leave_line(self, waiter: _Waiter) -> None:
        """A place that came in the moment in which its waiter left is somebody else's."""
        with contextlib.suppress(ValueError):
            self._line.remove(waiter)
        if waiter.place.done() and not waiter.place.cancelled():
            lease = waiter.place.result()
            lease.instance.leases.discard(lease)
            self._serve_line()

    def _serve_line(self) -> None:
        """Give every place that is free to the first in line that it suits."""
        without: set[str] = set()
        for waiter in list(self._line):
            if waiter.model in without or waiter.place.done():
                continue
            lease = self._take(waiter.model, waiter.work)
            if lease is None:
                without.add(waiter.model)
            else:
                self._line.remove(waiter)
                waiter.place.set_result(lease)

    async def start(self) -> None:
        """Look at every instance once, then go on looking in the background."""
        await self._watch.start()

    async def close(self) -> None:
        """Stop looking."""
        await self._watch.close()

    def look_now(self) -> None:
        """Look at the instances at once: something has happened to one of them."""
        self._watch.look_now()

    def _looked(self) -> None:
        self._move_from_the_dead()
        self._serve_line()

    def _move_from_the_dead(self) -> None:
        """Take requests from instances that draw nothing, where another one can draw them."""
        for instance in self._instances:
            if not instance.is_down or instance.address is None:
                continue
            if instance.leases and self._serving(instance.address.model):
                for lease in list(instance.leases):
                    lease.lose()
