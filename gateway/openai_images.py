"""POST /v1/images/generations: a request of OpenAI's images API is drawn by instances."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from gateway.body import read_sent
from gateway.door import Call
from gateway.errors import error_body
from gateway.events import DONE, encode_event
from gateway.forwarding import Order
from gateway.gateway import Gateway
from gateway.image_replies import (
    Picture,
    completed_event,
    images_body,
    in_the_clients_words,
    partial_event,
    picture_of,
    picture_of_event,
)
from gateway.image_request import ImageRequest, read_image_request
from gateway.picture_urls import picture_url
from handler.errors import EngineFault, RequestError

__all__ = ["draw", "reply_with_images", "routes"]


def routes(gateway: Gateway) -> list[Route]:
    """The routes of this module."""

    async def generate(call: Call) -> Response:
        sent = await read_sent(await gateway.door.read_body(call), call.request.headers)
        request = read_image_request(sent, gateway.fleet, gateway.settings, call.key)
        return await reply_with_images(gateway, call, request, "image_generation")

    async def cancel(call: Call) -> Response:
        request_id = call.request.path_params["id"]
        gateway.door.cancel(call, request_id)
        return _json({"cancelled": request_id})

    return [
        gateway.door.route("/v1/images/generations", generate, ["POST"]),
        gateway.door.route("/v1/requests/{id}", cancel, ["DELETE"]),
    ]


async def reply_with_images(
    gateway: Gateway, call: Call, request: ImageRequest, events: str
) -> Response:
    """Draw what `request` asks for; `events` is the first part of the names of its events."""
    if request.is_stream:
        return await _reply_with_events(gateway, call, request, events)
    pictures = await gateway.door.running(call, draw(gateway, request, call.key_name))
    urls = None
    if request.response_format == "url":
        store = gateway.pictures
        names = [await store.add(each.content, request.output_format) for each in pictures]
        urls = [picture_url(gateway.settings, call.request, name) for name in names]
    return _json(images_body(request, pictures, urls))


async def draw(gateway: Gateway, request: ImageRequest, key_name: str) -> list[Picture]:
    """Draw all pictures of `request`; where one cannot be drawn, none of the others is drawn on.

    Raises:
        RequestError: the first that failed.
    """

    async def draw_one(index: int) -> Picture:
        order = _order(request, index, key_name)
        return picture_of(await gateway.forwarder.send(order), request)

    if request.num_images == 1:
        return [await draw_one(0)]
    tasks = [asyncio.create_task(draw_one(index)) for index in range(request.num_images)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _end(tasks)


async def _reply_with_events(
    gateway: Gateway, call: Call, request: ImageRequest, events: str
) -> Response:
    """Begin the reply once an instance has taken the request, so that a refusal has its status."""
    drawing = _StreamedDrawing(gateway, request, call.key_name, events)
    try:
        await gateway.door.running(call, drawing.until_accepted())
    except BaseException:
        await drawing.close()
        raise
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(drawing.chunks(), media_type="text/event-stream", headers=headers)


class _StreamedDrawing:
    """The pictures of one request while they are drawn, as OpenAI's events."""

    def __init__(self, gateway: Gateway, request: ImageRequest, key_name: str, events: str) -> None:
        self._request = request
        self._events = events
        self._new: asyncio.Queue[bytes | RequestError | None] = asyncio.Queue()
        self._num_left = request.num_images
        self._tasks = [
            asyncio.create_task(self._draw(gateway, index, key_name))
            for index in range(request.num_images)
        ]

    async def until_accepted(self) -> None:
        """Return when an instance has taken a picture. Raises: RequestError."""
        first = await self._new.get()
        if isinstance(first, RequestError):
            raise first

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield every event; an error ends the stream."""
        try:
            while self._num_left:
                new = await self._new.get()
                if isinstance(new, RequestError):
                    yield encode_event("error", error_body(new))
                    break
                if new is None:
                    self._num_left -= 1
                elif new:
                    yield new
            yield DONE
        finally:
            await self.close()

    async def close(self) -> None:
        """End what is still being drawn."""
        await _end(self._tasks)

    async def _draw(self, gateway: Gateway, index: int, key_name: str) -> None:
        request, num_partial = self._request, 0

        def on_event(name: str, data: Mapping[str, Any]) -> None:
            nonlocal num_partial
            if name == "accepted":
                self._new.put_nowait(b"")
            elif name == "preview" and num_partial < request.num_partial_images:
                self._add("partial_image", partial_event(request, data, num_partial), index)
                num_partial += 1
            elif name == "image":
                picture = picture_of_event(data)
                self._add("completed", completed_event(request, picture), index)

        try:
            await gateway.forwarder.stream(_order(request, index, key_name), on_event)
            self._new.put_nowait(None)
        except RequestError as error:
            self._new.put_nowait(in_the_clients_words(error, request))
        except Exception as error:
            fault = EngineFault("the gateway failed; its log says why")
            fault.__cause__ = error
            self._new.put_nowait(fault)

    def _add(self, name: str, data: dict[str, Any], index: int) -> None:
        if self._request.num_images > 1:
            data["image_index"] = index
        self._new.put_nowait(encode_event(f"{self._events}.{name}", data))


def _order(request: ImageRequest, index: int, key_name: str) -> Order:
    content = request.content(index)
    return Order(request.model.name, content, request.work, key_name)


async def _end(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _json(content: object) -> Response:
    return Response(json.dumps(content).encode("ascii"), media_type="application/json")
