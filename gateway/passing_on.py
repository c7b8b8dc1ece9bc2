"""Requests in an instance's own words: KServe's, and /predictions/NAME as every client of it sends.

They are passed on as they are, to the instance with the least to do, and sent once more where it
dies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from starlette.responses import Response
from starlette.routing import Route

from gateway.door import Call
from gateway.event_replies import reply_with_events
from gateway.forwarding import Order, Reply
from gateway.gateway import Gateway
from gateway.keys import Key
from gateway.limits import check_model
from gateway.measuring import measure
from gateway.native_body import NativeBody, read_native_body
from gateway.routing import Model
from handler.api.accept import negotiate
from handler.errors import RequestError

__all__ = ["routes"]


def routes(gateway: Gateway) -> list[Route]:
    """The routes of this module."""

    def passing(path: str) -> Any:
        async def endpoint(call: Call) -> Response:
            return await _pass_on(gateway, call, path)

        return endpoint

    route = gateway.door.route
    return [
        route("/v1/models/{name}:predict", passing("/v1/models/{}:predict"), ["POST"]),
        route("/v2/models/{name}/infer", passing("/v2/models/{}/infer"), ["POST"]),
        route("/predictions/{name}", passing("/predictions/{}"), ["POST", "PUT"]),
        route("/hf/{name}", passing("/predictions/{}"), ["POST"]),
    ]


async def _pass_on(gateway: Gateway, call: Call, path: str) -> Response:
    headers = call.request.headers
    sent = await gateway.door.read_body(call)
    model = gateway.fleet.model(call.request.path_params["name"])
    check_model(call.key, model.name)
    content_type = headers.get("content-type", "application/octet-stream")
    body = await read_native_body(sent, content_type, model.config.handler)
    order = Order(
        model.name,
        lambda: body.content,
        _measure(body, model, call.key),
        call.key_name,
        content_type=body.content_type,
        accept=headers.get("accept"),
        route=path.format(quote(model.name, safe="")),
    )
    if _is_streamed(body, order.accept or "", model):
        return await reply_with_events(
            gateway.door, call, gateway.forwarder, [order], _as_it_is, _error_in_an_event
        )
    reply = await gateway.door.running(call, gateway.forwarder.send(order))
    return _response(reply)


def _is_streamed(body: NativeBody, accept: str, model: Model) -> bool:
    """Whether the instance will reply with a stream, which is passed on as it comes."""
    if body.stream is not None:
        return body.can_stream and body.stream
    return body.can_stream and negotiate(accept, model.config.handler.default_output).stream


def _measure(body: NativeBody, model: Model, key: Key | None) -> float:
    """Steps × pixels × pictures of all drawings.

    Raises:
        InvalidRequest: the key has limits, and the body is not one that an instance reads.
        Forbidden: the key may not have so large a picture.
    """
    if body.problem is not None and key is not None and key.limits_pictures:
        raise body.problem
    extents = [
        measure(each, model.config.handler, key, is_form=body.is_form) for each in body.drawings
    ]
    return sum(each.work for each in extents)


def _as_it_is(index: int, name: str, data: Mapping[str, Any]) -> bytes:
    text = json.dumps(data, separators=(",", ":"))
    return f"event: {name}\ndata: {text}\n\n".encode("ascii")


def _error_in_an_event(error: RequestError) -> bytes:
    return _as_it_is(0, "error", {"status": error.status, **error.body()})


def _response(reply: Reply) -> Response:
    headers = {name.title(): value for name, value in reply.headers.items() if value.isprintable()}
    return Response(reply.body, reply.status, headers, media_type=reply.content_type)
