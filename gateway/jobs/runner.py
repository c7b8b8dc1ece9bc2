"""Draws the jobs of the store through the gateway's routing, some of them at a time."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from gateway.errors import InstanceDied
from gateway.forwarding import Forwarder, Order
from gateway.image_replies import Picture, images_json, in_the_clients_words, picture_of_event
from gateway.image_request import ImageRequest
from gateway.jobs.database import StoreUnavailable
from gateway.jobs.job import Claim, Drawn, Progress
from gateway.jobs.kept import to_draw
from gateway.jobs.settings import JobSettings
from gateway.jobs.store import JobStore
from gateway.picture_store import StoreFull
from gateway.routing import Fleet
from handler.errors import DeviceLost, EngineFault, RequestError

__all__ = ["JobRunner"]

logger = logging.getLogger(__name__)

_POLL_S = 1.0
_SWEEP_S = 1.0
_RENEWALS_A_LEASE = 5
# Each is two instances that died, or a device: a third time it is the job that fells them.
_MAX_DEATHS = 3
_LATER_S, _MAX_LATER_S = 2.0, 60.0


class JobRunner:
    """Takes jobs while it has room for one more."""

    def __init__(
        self,
        store: JobStore,
        fleet: Fleet,
        forwarder: Forwarder,
        settings: JobSettings,
        on_end: Callable[[], None],
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._forwarder = forwarder
        self._settings = settings
        self._on_end = on_end
        self._room = asyncio.Semaphore(settings.concurrency)
        self._new = asyncio.Event()
        # By claim: a job whose lease ended may be claimed here again while it still ends here.
        self._progress: dict[Claim, Progress] = {}
        self._drawing: dict[Claim, asyncio.Task[None]] = {}
        self._loops: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to take jobs."""
        self._loops = [
            asyncio.create_task(self._take_jobs(), name="jobs"),
            asyncio.create_task(self._sweep(), name="sweeping jobs"),
        ]

    async def close(self) -> None:
        """Take no more, and put back what is being drawn."""
        tasks = [*self._loops, *self._drawing.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def wake(self) -> None:
        """Look for jobs at once: there is a new one."""
        self._new.set()

    def progress(self, job_id: str) -> Progress | None:
        """How far a job is, where it is drawn here."""
        newest_first = reversed(self._progress.items())
        return next((each for claim, each in newest_first if claim.id == job_id), None)

    def stop(self, job_id: str) -> None:
        """Draw a job no more, where it is drawn here: it was cancelled."""
        for claim, task in self._drawing.items():
            if claim.id == job_id:
                task.cancel()

    async def _take_jobs(self) -> None:
        while True:
            await self._room.acquire()
            self._new.clear()
            claim = None
            try:
                claim = await self._take()
            finally:
                if claim is None:
                    self._room.release()
            if claim is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_POLL_S):
                        await self._new.wait()
                continue
            task = asyncio.create_task(self._draw_or_put_back(claim), name=claim.id)
            self._drawing[claim] = task
            task.add_done_callback(partial(self._over, claim))

    async def _take(self) -> Claim | None:
        models = [each.name for each in self._fleet.models().values() if each.is_ready]
        if not models:
            return None
        try:
            return await self._store.take(models)
        except StoreUnavailable as error:
            logger.error("%s", error)
        except Exception:  # jobs go on when whatever it was is over
            logger.exception("no job could be taken")
        return None

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            try:
                await self._store.sweep()
            except StoreUnavailable as error:
                logger.error("%s", error)
            except Exception:  # as above
                logger.exception("the jobs could not be looked through")

    def _over(self, claim: Claim, task: asyncio.Task[None]) -> None:
        del self._drawing[claim]
        self._progress.pop(claim, None)
        self._room.release()
        self._on_end()

    async def _draw_or_put_back(self, claim: Claim) -> None:
        """Draw a job to its end; what cannot be told to the store ends with its lease."""
        try:
            await self._draw_while_ours(claim)
        except asyncio.CancelledError:
            # Either it was cancelled, and this changes nothing, or the gateway stops.
            await asyncio.shield(self._store.put_back(claim))
            raise
        except StoreUnavailable as error:
            logger.error("%s: %s", claim.id, error)
        except Exception:
            logger.exception("%s", claim.id)
            with contextlib.suppress(StoreUnavailable):
                await self._store.fail(claim, EngineFault("the gateway failed; its log says why"))

    async def _draw_while_ours(self, claim: Claim) -> None:
        self._progress[claim] = Progress()
        request = to_draw(claim.request)
        drawing = asyncio.create_task(self._draw(claim, request))
        renewing = asyncio.create_task(self._renew_until_lost(claim))
        try:
            await asyncio.wait({drawing, renewing}, return_when=asyncio.FIRST_COMPLETED)
            if not drawing.done():
                logger.info("%s is drawn no more: it was cancelled, or taken over", claim.id)
                return
            try:
                pictures = drawing.result()
            except RequestError as error:
                await self._end_with(claim, in_the_clients_words(error, request))
                return
            await self._succeed(claim, request, pictures)
        finally:
            for task in (drawing, renewing):
                task.cancel()
            await asyncio.gather(drawing, renewing, return_exceptions=True)

    async def _succeed(
        self, claim: Claim, request: ImageRequest, pictures: Sequence[Picture]
    ) -> None:
        names = [f"{secrets.token_urlsafe(24)}.{request.output_format}" for _ in pictures]
        drawn = [
            Drawn(name, picture.content) for name, picture in zip(names, pictures, strict=True)
        ]
        result = images_json(request, pictures, names).decode("ascii")
        try:
            await self._store.succeed(claim, result, drawn)
        except StoreFull as error:
            await self._store.fail(claim, error)

    async def _end_with(self, claim: Claim, error: RequestError) -> None:
        """Let a job fail, or be drawn later where it can do nothing for it."""
        # A device that has failed ends its worker too; whose request it was, nobody knows.
        has_died = isinstance(error, InstanceDied) or error.code == DeviceLost.code
        if has_died and claim.num_deaths + 1 < _MAX_DEATHS:
            logger.warning("%s: instances died over it; it is drawn once more", claim.id)
            await self._store.put_back(claim, _LATER_S, has_died=True)
        elif error.status in (429, 503) and not has_died:
            await self._store.put_back(
                claim, min(float(error.retry_after_s or _LATER_S), _MAX_LATER_S)
            )
        else:
            await self._store.fail(claim, error)

    async def _renew_until_lost(self, claim: Claim) -> None:
        """Return when the job is not ours any more."""
        lease_s = self._settings.lease_s
        loop = asyncio.get_running_loop()
        until_s = loop.time() + lease_s
        while True:
            await asyncio.sleep(lease_s / _RENEWALS_A_LEASE)
            try:
                now_s = loop.time()
                if not await self._store.renew(claim, self._progress[claim]):
                    return
                until_s = now_s + lease_s
            except StoreUnavailable as error:
                logger.error("%s: %s", claim.id, error)
                if loop.time() >= until_s:
                    return

    async def _draw(self, claim: Claim, request: ImageRequest) -> list[Picture]:
        """Draw the pictures one after the other: jobs take no more places than they may."""
        pictures = []
        for index in range(request.num_images):
            pictures.append(await self._draw_one(claim, request, index))
        return pictures

    async def _draw_one(self, claim: Claim, request: ImageRequest, index: int) -> Picture:
        drawn: list[Picture] = []
        self._progress[claim] = Progress(picture=index)

        def on_event(name: str, data: Mapping[str, Any]) -> None:
            before = self._progress[claim]
            if name == "step":
                self._progress[claim] = replace(
                    before, step=int(data["step"]), num_steps=int(data["num_steps"] or 0)
                )
            elif name == "preview":
                preview = base64.b64decode(data["image"])
                self._progress[claim] = replace(before, preview=preview)
            elif name == "image":
                drawn.append(picture_of_event(data))

        # Its own place in line: what its key waits for itself does not keep it out.
        order = Order(
            request.model.name,
            partial(request.content, index),
            request.work,
            f"{claim.key_name} jobs",
        )
        await self._forwarder.stream(order, on_event)
        return drawn[-1]
