"""The parts of a running gateway, put together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from gateway.addresses import FixedSource, RunDirSource, Source
from gateway.asking import WorkerCheck
from gateway.body import BodyBudget
from gateway.connections import open_session
from gateway.door import Door
from gateway.forwarding import Forwarder
from gateway.jobs.service import Jobs
from gateway.keys import KeyRing
from gateway.limits import Limiter
from gateway.picture_store import PictureStore
from gateway.routing import Fleet
from gateway.settings import Settings
from gateway.telemetry.attempts import Attempts
from gateway.telemetry.fleet_metrics import FleetCollector
from gateway.telemetry.logs import log_request
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.tracing import make_tracing
from handler.errors import ConfigError

__all__ = ["Gateway"]

logger = logging.getLogger(__name__)

_SWEEP_S = 2.0


@dataclass(slots=True)
class Gateway:
    """Everything that a route may need."""

    settings: Settings
    keys: KeyRing
    door: Door
    fleet: Fleet
    forwarder: Forwarder
    pictures: PictureStore
    jobs: Jobs
    metrics: Metrics
    session: aiohttp.ClientSession

    @classmethod
    @asynccontextmanager
    async def running(cls, settings: Settings, state_dir: Path) -> AsyncIterator[Gateway]:
        """A gateway that watches its instances, for as long as the block runs."""
        keys = KeyRing(Path(settings.keys_file))
        sources: list[Source] = [RunDirSource(Path(each)) for each in settings.run_dirs]
        sources += [FixedSource(each) for each in settings.instances]
        fleet = Fleet(sources, settings, WorkerCheck())
        session = open_session()
        metrics, tracing = Metrics(), make_tracing(settings.trace_endpoint)
        forwarder = Forwarder(fleet, session, settings.max_wait_s, Attempts(metrics, tracing))
        pictures = PictureStore(
            state_dir / "pictures", settings.url_expires_s, settings.url_store_bytes
        )
        bodies = BodyBudget(
            settings.max_body_bytes, settings.max_bodies_bytes, settings.body_timeout_s
        )
        metrics.registry.register(FleetCollector(fleet, bodies, settings.max_waiting))
        door = Door(
            keys,
            Limiter(),
            bodies,
            keys_required=settings.keys_required,
            on_begin=[metrics.begun, *([] if tracing is None else [tracing.begun])],
            on_end=[metrics.ended, log_request, *([] if tracing is None else [tracing.ended])],
        )
        await fleet.start()
        try:
            async with Jobs.running(settings, state_dir, fleet, forwarder) as jobs:
                gateway = cls(
                    settings, keys, door, fleet, forwarder, pictures, jobs, metrics, session
                )
                housekeeping = asyncio.create_task(gateway._keep_house(), name="housekeeping")
                try:
                    yield gateway
                finally:
                    housekeeping.cancel()
                    await asyncio.gather(housekeeping, return_exceptions=True)
        finally:
            await forwarder.close()
            await fleet.close()
            await session.close()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            with contextlib.suppress(OSError):
                self.pictures.sweep()
            try:
                self.keys.refresh()
            except ConfigError as error:
                logger.error("the keys stay as they were: %s", error)
