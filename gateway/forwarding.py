"""Sends a request to an instance: once, and once more where the instance dies before it replies.

    Order ─▶ Fleet.lease ─▶ POST ─▶ Reply                 drawn, or refused: the client's
                │             ├───▶ 503                   not taken: another instance, or later
                └─────────────┴───▶ died ─▶ once more ─▶ 502

Who waits for the reply and is cancelled (its client left) cancels the request on the instance.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
from yarl import URL

from gateway.asking import ask_worker
from gateway.descriptions import Description, ask_for_description
from gateway.errors import InstanceDied, Refused
from gateway.events import read_events
from gateway.instance import Lease
from gateway.routing import Fleet
from gateway.telemetry.attempts import Attempts, trace_headers
from handler.api.accept import EVENT_STREAM
from handler.errors import RequestError

__all__ = ["Forwarder", "Order", "Reply"]

logger = logging.getLogger(__name__)

_MAX_SENT = 2
_CANCEL_TIMEOUT_S = 30.0
# The frontend's own words for a request whose worker has died with it.
_WORKER_DIED = ("Worker died", "Worker has died")
# 507 where the frontend saw that SIGKILL ended it, which it takes for a lack of memory.
_DEATHS = (500, 507)
_TRY_LATER_S = 1.0
_KEPT_HEADERS = ("x-seed", "warning", "server-timing", "retry-after")
OnEvent = Callable[[str, dict[str, Any]], None]
_Send = Callable[[Lease, str], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class Order:
    """One request to an instance; the id that it is cancelled by goes into a header."""

    model: str
    content: Callable[[], bytes]
    """Writes the body, once there is a place for it: what waits holds no copy of its own."""
    work: float
    key: str = ""
    """Whose place in line it takes."""
    content_type: str = "application/json"
    accept: str | None = None
    route: str | None = None
    """The path to post to; None: the model's predictions."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What an instance replied."""

    status: int
    content_type: str
    body: bytes
    headers: Mapping[str, str]
    """Those that say something of the picture; names are lower-cased."""


class _Died(Exception):
    """The instance ended before its reply did."""

    outcome = "died"


class _NotTaken(Exception):
    """The instance takes nothing now."""

    outcome = "not_taken"

    def __init__(self, error: Refused) -> None:
        super().__init__(error.message)
        self.error = error


class Forwarder:
    """Sends orders to the instances of a fleet, through one pool of connections."""

    def __init__(
        self,
        fleet: Fleet,
        session: aiohttp.ClientSession,
        max_wait_s: float,
        attempts: Attempts,
    ) -> None:
        self._fleet = fleet
        self._session = session
        self._max_wait_s = max_wait_s
        self._attempts = attempts
        self._cancelling: set[asyncio.Task[None]] = set()

    async def send(self, order: Order) -> Reply:
        """Return the instance's reply, whatever its status.

        Raises:
            RequestError: no instance took it, or two died over it.
        """
        reply: list[Reply] = []

        async def attempt(lease: Lease, upstream_id: str) -> str:
            async with self._post(lease, order, upstream_id) as response:
                reply.append(await _read(response))
                lease.heard()
                if response.status != 200:
                    return "error"
                lease.drew()
                return "ok"

        await self._until_taken(order, attempt)
        return reply[-1]

    async def stream(self, order: Order, on_event: OnEvent) -> None:
        """Hand every event of the instance to `on_event`; first, once it is taken, "accepted".

        After a death the events begin anew, without another "accepted".

        Raises:
            RequestError: the instance refused it, no instance took it, or two died over it.
        """
        is_accepted = False

        async def attempt(lease: Lease, upstream_id: str) -> str:
            nonlocal is_accepted
            async with self._post(lease, order, upstream_id) as response:
                if response.status != 200:
                    reply = await _read(response)
                    raise Refused.from_reply(
                        reply.status, reply.body, reply.headers.get("retry-after")
                    )
                if response.content_type != EVENT_STREAM:
                    raise Refused(
                        502, "no_stream", f"the instance replied {response.content_type}, no events"
                    )
                if not is_accepted:
                    is_accepted = True
                    on_event("accepted", {})
                async for name, data in read_events(response.content):
                    lease.heard()
                    if name == "error":
                        raise _refused_in_stream(data)
                    if name == "step" and data.get("num_steps"):
                        lease.progress = min(1.0, data["step"] / data["num_steps"])
                    on_event(name, data)
                    if name == "image":
                        lease.drew()
                        return "ok"
                raise _Died("the stream ended before the picture came")

        await self._until_taken(order, attempt)

    async def describe(self, model: str) -> Description | None:
        """What a model has; None where no instance says."""
        address = self._fleet.address(model)
        return None if address is None else await ask_for_description(self._session, address)

    async def close(self) -> None:
        """Wait until instances have been told what was cancelled."""
        if self._cancelling:
            await asyncio.wait(self._cancelling, timeout=5)

    async def _until_taken(self, order: Order, attempt: _Send) -> None:
        num_died, until_s, is_again = 0, time.monotonic() + self._max_wait_s, False
        while True:
            async with self._lease(order, until_s, is_again=is_again) as lease:
                is_again = True
                try:
                    await self._try(order.model, lease, attempt)
                    return
                except _Died as died:
                    num_died += 1
                    if num_died < _MAX_SENT:
                        self._attempts.resent(order.model)
                    lease.is_lost = True
                    lease.instance_died()
                    self._fleet.look_now()
                    logger.warning("%s died over a request: %s", lease.address.url, died)
                except _NotTaken as refused:
                    lease.is_lost = True
                    lease.pause(refused.error.retry_after_s or _TRY_LATER_S)
                    self._fleet.look_now()
                    if time.monotonic() >= until_s:
                        raise refused.error from None
            if num_died == _MAX_SENT:
                raise InstanceDied(
                    "the request was sent to an instance twice, and both times the instance died"
                    " before it replied"
                )
            # What has died once may wait for its instance to come back as long as a new one.
            until_s = max(until_s, time.monotonic() + self._max_wait_s) if num_died else until_s

    @asynccontextmanager
    async def _lease(self, order: Order, until_s: float, *, is_again: bool) -> AsyncIterator[Lease]:
        async with AsyncExitStack() as stack:
            with self._attempts.waiting(order.model):
                place = self._fleet.lease(
                    order.model, order.work, order.key, until_s, is_again=is_again
                )
                lease = await stack.enter_async_context(place)
            yield lease

    async def _try(self, model: str, lease: Lease, send: _Send) -> None:
        """One attempt. Raises: _Died, _NotTaken, RequestError."""
        upstream_id = f"gateway-{secrets.token_hex(12)}"
        with self._attempts.attempt(model, lease.instance.source.name, upstream_id) as attempt:
            attempt.outcome = await self._send(lease, upstream_id, send)

    async def _send(self, lease: Lease, upstream_id: str, send: _Send) -> str:
        """What came of it: ok or error. Raises: _Died, _NotTaken, RequestError."""
        try:
            async with lease.guard():
                return await send(lease, upstream_id)
        except TimeoutError:
            self._cancel(lease, upstream_id)
            raise _Died("its worker is not READY any more") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _Died(str(error) or type(error).__name__) from error
        except Refused as error:
            _judge(error)
            raise
        except (_Died, _NotTaken):
            raise
        except BaseException:
            # Whoever waited for it has left, or failed over an event of it.
            self._cancel(lease, upstream_id)
            raise

    def _post(self, lease: Lease, order: Order, upstream_id: str) -> Any:
        address = lease.address
        headers = {
            **address.headers,
            "Content-Type": order.content_type,
            "X-Request-Id": upstream_id,
            **trace_headers(),
        }
        if order.accept is not None:
            headers["Accept"] = order.accept
        url = address.predictions
        if order.route is not None:
            url = URL(address.url + order.route, encoded=True)
        return self._session.post(url, data=order.content(), headers=headers)

    def _cancel(self, lease: Lease, upstream_id: str) -> None:
        """Tell the instance in the background that nobody waits for a request any more."""
        task = asyncio.create_task(self._post_cancel(lease, upstream_id))
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)

    async def _post_cancel(self, lease: Lease, upstream_id: str) -> None:
        message = {"cancel": upstream_id}
        try:
            await ask_worker(self._session, lease.address, message, _CANCEL_TIMEOUT_S)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            logger.warning(
                "%s could not be told of a cancelled request: %s", lease.address.url, error
            )


async def _read(response: aiohttp.ClientResponse) -> Reply:
    """Read a reply to its end. Raises: Refused, where the instance is to be judged by it."""
    body = await response.read()
    headers = {name: response.headers[name] for name in _KEPT_HEADERS if name in response.headers}
    if response.status in (*_DEATHS, 503):
        refused = Refused.from_reply(response.status, body, headers.get("retry-after"))
        _judge(refused)
    return Reply(response.status, response.content_type, body, headers)


def _judge(error: RequestError) -> None:
    """Raise _Died or _NotTaken, where an error says something of the instance alone."""
    is_torchserves = error.code.endswith("Exception")
    if error.status in _DEATHS and is_torchserves and error.message.startswith(_WORKER_DIED):
        raise _Died("its worker died")
    assert isinstance(error, Refused)
    if error.status == 503 and error.code == "interrupted":
        raise _Died("it was paused for too long")
    if error.status == 503 and (is_torchserves or error.code in ("queue_full", "draining")):
        raise _NotTaken(error)


def _refused_in_stream(data: Mapping[str, Any]) -> Refused:
    status = data.get("status")
    return Refused.from_object(status if isinstance(status, int) else 500, data)
