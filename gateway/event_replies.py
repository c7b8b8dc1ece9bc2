"""A reply of events: those of several drawings, as they come, for as long as the client listens.

It begins once an instance has taken a drawing, so that what is refused has its status and not an
event. What counts for a request (its id, its key's limits, its body) counts until its last event.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gateway.door import Call, Door
from gateway.forwarding import Forwarder, Order
from handler.errors import Cancelled, EngineFault, RequestError

__all__ = ["Encode", "EncodeError", "reply_with_events"]

logger = logging.getLogger(__name__)

Encode = Callable[[int, str, Mapping[str, Any]], bytes]
"""From a drawing's index and an event of its instance's to what the client gets, or nothing."""
EncodeError = Callable[[RequestError], bytes]
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
# That a client has left shows when something is written to it, and there may be minutes between
# two previews. Whoever reads events skips a comment.
_COMMENT, _COMMENT_AFTER_S = b": drawing\n\n", 2.0


async def reply_with_events(
    door: Door,
    call: Call,
    forwarder: Forwarder,
    orders: Sequence[Order],
    encode: Encode,
    encode_error: EncodeError,
    end: bytes = b"",
) -> Response:
    """Send `orders` and reply with what `encode` makes of their events, then with `end`.

    Raises:
        RequestError: the first that is taken or refused is refused.
        ClientGone: the client left before.
    """
    drawings = _Drawings(call.request_id, forwarder, orders, encode, encode_error, end)
    try:
        call.until_over.enter_context(door.cancellable(call, drawings.cancel))
        await door.unless_gone(call, drawings.until_accepted())
    except BaseException:
        await drawings.close()
        raise
    call.is_streaming = True
    return _EventReply(drawings, call)


class _EventReply(StreamingResponse):
    def __init__(self, drawings: _Drawings, call: Call) -> None:
        super().__init__(drawings.chunks(), media_type="text/event-stream", headers=_HEADERS)
        self._drawings = drawings
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; whatever ends this ends the drawings too."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._call.facts.has_left = not self._drawings.is_over
            self._call.facts.code = self._drawings.code
            self._call.until_over.close()
            await self._drawings.close()


class _Drawings:
    """Orders under way, each in a task of its own, and their events in one queue."""

    def __init__(
        self,
        request_id: str,
        forwarder: Forwarder,
        orders: Sequence[Order],
        encode: Encode,
        encode_error: EncodeError,
        end: bytes,
    ) -> None:
        self._request_id = request_id
        self._encode_error = encode_error
        self._end = end
        self.is_over = False
        """Whether every event has been taken."""
        self.code = ""
        """Of the error that ended it."""
        self._new: asyncio.Queue[bytes | RequestError | None] = asyncio.Queue()
        self._tasks = [
            asyncio.create_task(self._draw(forwarder.stream, order, index, encode))
            for index, order in enumerate(orders)
        ]

    async def until_accepted(self) -> None:
        """Return when an instance has taken an order. Raises: RequestError."""
        first = await self._new.get()
        if isinstance(first, RequestError):
            raise first

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield every event, and comments where none comes; an error is the last event."""
        num_left, now_s = len(self._tasks), asyncio.get_running_loop().time
        comment_at_s = now_s() + _COMMENT_AFTER_S
        while num_left:
            try:
                async with asyncio.timeout_at(comment_at_s):
                    new = await self._new.get()
            except TimeoutError:
                yield _COMMENT
                comment_at_s = now_s() + _COMMENT_AFTER_S
                continue
            if isinstance(new, RequestError):
                self.code = new.code
                yield self._encode_error(new)
                break
            if new is None:
                num_left -= 1
            elif new:
                yield new
                comment_at_s = now_s() + _COMMENT_AFTER_S
        if self._end:
            yield self._end
        self.is_over = True

    def cancel(self) -> None:
        """End the reply with an error that says so."""
        self._new.put_nowait(Cancelled("the request was cancelled"))

    async def close(self) -> None:
        """End what is still being drawn."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _draw(
        self, stream: Callable[..., Awaitable[None]], order: Order, index: int, encode: Encode
    ) -> None:
        def on_event(name: str, data: Mapping[str, Any]) -> None:
            self._new.put_nowait(b"" if name == "accepted" else encode(index, name, data))

        try:
            await stream(order, on_event)
            self._new.put_nowait(None)
        except RequestError as error:
            self._new.put_nowait(error)
        except Exception:
            logger.exception("request %s", self._request_id)
            self._new.put_nowait(EngineFault("the gateway failed; its log says why"))
