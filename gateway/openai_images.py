"""POST /v1/images/generations: a request of OpenAI's images API is drawn by instances."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from gateway.body import read_sent
from gateway.door import Call
from gateway.errors import error_body
from gateway.event_replies import reply_with_events
from gateway.events import DONE, encode_event
from gateway.forwarding import Order
from gateway.gateway import Gateway
from gateway.image_replies import (
    Picture,
    completed_event,
    images_json,
    in_the_clients_words,
    partial_event,
    picture_of,
    picture_of_event,
)
from gateway.image_request import ImageRequest, read_image_request
from gateway.json_replies import MEDIA_TYPE, json_response
from gateway.picture_urls import picture_url
from handler.errors import RequestError

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
        return json_response({"cancelled": request_id})

    return [
        gateway.door.route("/v1/images/generations", generate, ["POST"]),
        gateway.door.route("/v1/requests/{id}", cancel, ["DELETE"], takes_place=False),
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
    content = images_json(request, pictures, urls)
    return Response(content, media_type=MEDIA_TYPE)


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
    num_partial = [0] * request.num_images

    def encode(index: int, name: str, data: Mapping[str, Any]) -> bytes:
        if name == "preview" and num_partial[index] < request.num_partial_images:
            event = partial_event(request, data, num_partial[index])
            num_partial[index] += 1
            kind = "partial_image"
        elif name == "image":
            event, kind = completed_event(request, picture_of_event(data)), "completed"
        else:
            return b""
        if request.num_images > 1:
            event["image_index"] = index
        return encode_event(f"{events}.{kind}", event)

    def encode_error(error: RequestError) -> bytes:
        return encode_event("error", error_body(in_the_clients_words(error, request)))

    orders = [_order(request, index, call.key_name) for index in range(request.num_images)]
    try:
        return await reply_with_events(
            gateway.door, call, gateway.forwarder, orders, encode, encode_error, DONE
        )
    except RequestError as error:
        raise in_the_clients_words(error, request) from None


def _order(request: ImageRequest, index: int, key_name: str) -> Order:
    content = partial(request.content, index)
    return Order(request.model.name, content, request.work, key_name)


async def _end(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
