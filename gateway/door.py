"""What every request passes: id, key, limits; errors become replies here."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.body import BodyBudget, ClientGone, read_body
from gateway.errors import Refused, Unauthorized, error_response
from gateway.keys import Key, KeyRing
from gateway.limits import Limiter
from gateway.telemetry.facts import CURRENT, Facts
from gateway.telemetry.tracing import sent_traceparent
from handler.errors import (
    Cancelled,
    Conflict,
    EngineFault,
    InvalidRequest,
    NotFound,
    RequestError,
)

__all__ = ["Call", "Door", "Endpoint"]

logger = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_T = TypeVar("_T")


@dataclass(slots=True)
class Call:
    """One request of a client's, on its way through."""

    request: Request
    facts: Facts
    key: Key | None
    until_over: ExitStack = field(default_factory=ExitStack)
    """What counts until the reply is sent: limits, the id, the bytes of the body."""
    is_streaming: bool = False
    """Whether the reply closes `until_over` itself, when its last event is sent."""

    @property
    def request_id(self) -> str:
        """What the client calls it, or is told to call it."""
        return self.facts.request_id

    @property
    def key_name(self) -> str:
        """Whose limits count; empty for everybody without a key."""
        return "" if self.key is None else self.key.name


Endpoint = Callable[[Call], Awaitable[Response]]


class Door:
    """Lets requests in, and remembers those that draw, to cancel them by their id."""

    def __init__(
        self,
        keys: KeyRing,
        limiter: Limiter,
        bodies: BodyBudget,
        *,
        keys_required: bool,
        on_begin: Sequence[Callable[[Facts], object]] = (),
        on_end: Sequence[Callable[[Facts], object]] = (),
    ) -> None:
        self._keys = keys
        self._limiter = limiter
        self._bodies = bodies
        self._keys_required = keys_required
        self._on_begin = on_begin
        self._on_end = on_end
        # By the key's name and the request's id: two clients may have chosen the same one.
        self._running: dict[tuple[str, str], Callable[[], object]] = {}

    def route(
        self,
        path: str,
        endpoint: Endpoint,
        methods: Sequence[str] = ("GET",),
        *,
        keyless: bool = False,
        takes_place: bool = True,
    ) -> Route:
        """A route to `endpoint`.

        Args:
            path: may have parameters.
            endpoint: replies.
            methods: that it knows.
            keyless: for everybody, even where others need a key.
            takes_place: counts as one of the requests that a key may have open. What asks about a
                request, or cancels it, does not: it is there for a key that has all of them open.
        """

        async def enter(request: Request) -> Response:
            return await self._enter(
                request, endpoint, path, keyless=keyless, takes_place=takes_place
            )

        return Route(path, enter, methods=list(methods))

    async def read_body(self, call: Call) -> bytes:
        """Return the body, bounded in size and time. Raises: RequestError, ClientGone."""
        return await read_body(call.request, self._bodies)

    @contextmanager
    def cancellable(self, call: Call, cancel: Callable[[], object]) -> Iterator[None]:
        """Let the request be cancelled by its id inside the block.

        Raises:
            Conflict: the id belongs to a request that is still running.
        """
        own = call.key_name, call.request_id
        if own in self._running:
            raise Conflict(
                f"the id {call.request_id!r} belongs to a request that is still running",
                {"X-Request-Id": "is taken"},
            )
        self._running[own] = cancel
        try:
            yield
        finally:
            del self._running[own]

    async def running(self, call: Call, work: Coroutine[Any, Any, _T]) -> _T:
        """Do `work` until it is done, its client has gone or somebody cancels it.

        Raises:
            Conflict: the id belongs to a request that is still running.
            Cancelled: somebody cancelled it.
            ClientGone: the client has left.
        """
        task = asyncio.create_task(work)
        try:
            with self.cancellable(call, task.cancel):
                return await _unless_gone(call.request, task)
        finally:
            task.cancel()

    async def unless_gone(self, call: Call, work: Coroutine[Any, Any, _T]) -> _T:
        """Do `work`, unless the client leaves before it is done. Raises: ClientGone."""
        return await _unless_gone(call.request, asyncio.create_task(work))

    def cancel(self, call: Call, request_id: str) -> None:
        """End a running request of the same key. Raises: NotFound."""
        end = self._running.get((call.key_name, request_id))
        if end is None:
            raise NotFound(f"no request with the id {request_id!r} is running", {"id": "unknown"})
        end()

    async def _enter(
        self,
        request: Request,
        endpoint: Endpoint,
        route: str,
        *,
        keyless: bool,
        takes_place: bool,
    ) -> Response:
        request_id, path = f"req_{secrets.token_hex(12)}", request.url.path
        facts = Facts(request_id, request.method, path, route, is_keyless=keyless)
        CURRENT.set(facts)  # of the task of this request alone
        facts.traceparent = sent_traceparent(request.headers)
        for tell in self._on_begin:
            tell(facts)
        call: Call | None = None
        try:
            call = self._admit(request, facts, takes_place=takes_place)
            response = await endpoint(call)
        except RequestError as error:
            facts.code = error.code
            response = error_response(error)
        except ClientGone:
            facts.has_left = True
            response = Response(status_code=499)
        except Exception:
            logger.exception("request %s", facts.request_id)
            fault = EngineFault("the gateway failed; its log says why")
            facts.code = fault.code
            response = error_response(fault)
        except BaseException:
            facts.has_left = True
            self._end(call, facts)
            raise
        facts.status = response.status_code
        if facts.status >= 400 and not (facts.code or facts.has_left):
            # An instance's reply, passed on.
            facts.code = Refused.from_reply(facts.status, bytes(response.body)).code
        if call is not None and call.is_streaming:
            call.until_over.callback(self._end, None, facts)
        else:
            self._end(call, facts)
        response.headers["x-request-id"] = facts.request_id
        response.headers["openai-processing-ms"] = str(round(1000 * facts.seconds))
        return response

    def _admit(self, request: Request, facts: Facts, *, takes_place: bool) -> Call:
        """Let a request in. Raises: RequestError."""
        sent_id = request.headers.get("x-request-id")
        if sent_id is not None:
            if not _ID.fullmatch(sent_id):
                problem = "is not 1 to 128 of the characters A-Z a-z 0-9 . _ : -"
                raise InvalidRequest(f"X-Request-Id {problem}", {"X-Request-Id": problem})
            facts.request_id = sent_id
        key = None if facts.is_keyless else self._identify(request)
        facts.key_name = "" if key is None else key.name
        call = Call(request, facts, key)
        with ExitStack() as until_over:
            until_over.callback(self._bodies.release, request)
            until_over.enter_context(self._limiter.admit(key, takes_place=takes_place))
            call.until_over = until_over.pop_all()
        return call

    def _end(self, call: Call | None, facts: Facts) -> None:
        if call is not None:
            call.until_over.close()
        facts.ended_s = time.monotonic()
        for tell in self._on_end:
            tell(facts)

    def _identify(self, request: Request) -> Key | None:
        """The key that a request sent; None where none is asked for."""
        scheme, _, sent = request.headers.get("authorization", "").partition(" ")
        sent = sent.strip() if scheme.lower() == "bearer" else ""
        # Where no key is needed, whatever is sent is no error: OpenAI's clients always send one.
        key = self._keys.find(sent) if sent else None
        if key is None and self._keys_required:
            raise Unauthorized(
                "this key is not one of the gateway's"
                if sent
                else "a key is needed: send it as the header Authorization: Bearer KEY"
            )
        return key


async def _unless_gone(request: Request, task: asyncio.Task[_T]) -> _T:
    """Wait for `task`; where the client leaves first, cancel it.

    Raises:
        ClientGone: the client has left, and the task has ended.
    """
    gone = asyncio.create_task(_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        if task.cancelled():
            raise Cancelled("the request was cancelled")
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
