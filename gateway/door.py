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
from gateway.errors import Unauthorized, error_response
from gateway.keys import Key, KeyRing
from gateway.limits import Limiter
from handler.errors import (
    Cancelled,
    Conflict,
    EngineFault,
    InvalidRequest,
    NotFound,
    RequestError,
)

__all__ = ["Call", "Door", "Endpoint"]

logger = logging.getLogger("gateway.access")
_problems = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_T = TypeVar("_T")


@dataclass(slots=True)
class Call:
    """One request of a client's, on its way through."""

    request: Request
    request_id: str
    key: Key | None
    until_over: ExitStack = field(default_factory=ExitStack)
    """What counts until the reply is sent: limits, the id, the bytes of the body."""
    is_streaming: bool = False
    """Whether the reply closes `until_over` itself, when its last event is sent."""

    @property
    def key_name(self) -> str:
        """Whose limits count; empty for everybody without a key."""
        return "" if self.key is None else self.key.name


Endpoint = Callable[[Call], Awaitable[Response]]


class Door:
    """Lets requests in, and remembers those that draw, to cancel them by their id."""

    def __init__(
        self, keys: KeyRing, limiter: Limiter, bodies: BodyBudget, *, keys_required: bool
    ) -> None:
        self._keys = keys
        self._limiter = limiter
        self._bodies = bodies
        self._keys_required = keys_required
        self._running: dict[str, tuple[str, Callable[[], object]]] = {}

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
            return await self._enter(request, endpoint, keyless=keyless, takes_place=takes_place)

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
        if call.request_id in self._running:
            raise Conflict(
                f"the id {call.request_id!r} belongs to a request that is still running",
                {"X-Request-Id": "is taken"},
            )
        self._running[call.request_id] = (call.key_name, cancel)
        try:
            yield
        finally:
            del self._running[call.request_id]

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
        key_name, end = self._running.get(request_id, ("", None))
        if end is None or key_name != call.key_name:
            raise NotFound(f"no request with the id {request_id!r} is running", {"id": "unknown"})
        end()

    async def _enter(
        self, request: Request, endpoint: Endpoint, *, keyless: bool, takes_place: bool
    ) -> Response:
        started_s = time.monotonic()
        request_id, key = f"req_{secrets.token_hex(12)}", None
        call: Call | None = None
        try:
            sent_id = request.headers.get("x-request-id")
            if sent_id is not None:
                if not _ID.fullmatch(sent_id):
                    problem = "is not 1 to 128 of the characters A-Z a-z 0-9 . _ : -"
                    raise InvalidRequest(f"X-Request-Id {problem}", {"X-Request-Id": problem})
                request_id = sent_id
            key = None if keyless else self._identify(request)
            call = Call(request, request_id, key)
            call.until_over.callback(self._bodies.release, request)
            call.until_over.enter_context(self._limiter.admit(key, takes_place=takes_place))
            response = await endpoint(call)
        except RequestError as error:
            response = error_response(error)
        except ClientGone:
            response = Response(status_code=499)
        except Exception:
            _problems.exception("request %s", request_id)
            response = error_response(EngineFault("the gateway failed; its log says why"))
        finally:
            if call is not None and not call.is_streaming:
                call.until_over.close()
        elapsed_ms = round(1000 * (time.monotonic() - started_s))
        response.headers["x-request-id"] = request_id
        response.headers["openai-processing-ms"] = str(elapsed_ms)
        if not keyless:
            name = "-" if key is None else key.name
            logger.info(
                "%s %s %s %d %d ms key %s",
                *(request_id, request.method, request.url.path),
                *(response.status_code, elapsed_ms, name),
            )
        return response

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
