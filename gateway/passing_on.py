"""Requests in an instance's own words: KServe's, and /predictions/NAME as every client of it sends.

They are passed on as they are, to the instance with the least to do, and sent once more where it
dies. Forms are written anew, so that what TorchServe's frontend cannot decode arrives after all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

from starlette.responses import Response
from starlette.routing import Route

from gateway.body import read_form
from gateway.door import Call
from gateway.event_replies import reply_with_events
from gateway.forwarding import Order, Reply
from gateway.gateway import Gateway
from gateway.limits import check_model, check_picture
from gateway.routing import Model
from handler.api.schema import PICTURE_FIELDS
from handler.errors import InvalidRequest, RequestError

__all__ = ["routes"]

_MAX_COUNT = 16384
_NAMES = {name: PICTURE_FIELDS[name].names for name in ("num_inference_steps", "num_images")}


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
    body = await gateway.door.read_body(call)
    model = gateway.fleet.model(call.request.path_params["name"])
    check_model(call.key, model.name)
    content_type = headers.get("content-type", "application/octet-stream")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "application/x-www-form-urlencoded":
        body = urlencode(read_form(body)).encode("ascii")
    elif media_type == "application/json":
        content_type = media_type  # TorchServe compares it letter by letter
    order = Order(
        model.name,
        body,
        _measure(body, media_type, model, call),
        call.key_name,
        content_type=content_type,
        accept=headers.get("accept"),
        route=path.format(quote(model.name, safe="")),
    )
    if _wants_events(body, media_type, order.accept):
        return await reply_with_events(
            gateway.door, call, gateway.forwarder, [order], _as_it_is, _error_in_an_event
        )
    reply = await gateway.door.running(call, gateway.forwarder.send(order))
    return _response(reply)


def _wants_events(body: bytes, media_type: str, accept: str | None) -> bool:
    """Whether the reply is a stream, which is passed on as it comes."""
    if "text/event-stream" in (accept or ""):
        return True
    if media_type == "application/json":
        fields = json.loads(body)  # as it was checked before
        return isinstance(fields, Mapping) and fields.get("stream") is True
    if media_type == "application/x-www-form-urlencoded":
        return dict(read_form(body)).get("stream", "").strip().lower() in ("true", "1")
    return False


def _as_it_is(index: int, name: str, data: Mapping[str, Any]) -> bytes:
    text = json.dumps(data, separators=(",", ":"))
    return f"event: {name}\ndata: {text}\n\n".encode("ascii")


def _error_in_an_event(error: RequestError) -> bytes:
    return _as_it_is(0, "error", {"status": error.status, **error.body()})


def _response(reply: Reply) -> Response:
    headers = {name.title(): value for name, value in reply.headers.items() if value.isprintable()}
    return Response(reply.body, reply.status, headers, media_type=reply.content_type)


def _measure(body: bytes, media_type: str, model: Model, call: Call) -> float:
    """Steps × pixels × pictures, as far as they can be seen; checks them against the key's limits.

    Raises:
        InvalidRequest: JSON that cannot be read.
        Forbidden: the key may not have so large a picture.
    """
    fields: list[Mapping[str, Any]] = [{}]
    if media_type == "application/json":
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            raise InvalidRequest("the body is not JSON") from None
        fields = list(_requests_in(content)) or [{}]
    elif media_type == "application/x-www-form-urlencoded":
        fields = [dict(read_form(body))]
    return sum(_work_of(each, model, call) for each in fields)


def _requests_in(content: object) -> list[Mapping[str, Any]]:
    if not isinstance(content, Mapping):
        return []
    shared = content.get("parameters")
    common = {**content, **(shared if isinstance(shared, Mapping) else {})}
    instances = content.get("instances")
    if not isinstance(instances, list):
        return [common]
    return [{**common, **(each if isinstance(each, Mapping) else {})} for each in instances]


def _work_of(fields: Mapping[str, Any], model: Model, call: Call) -> float:
    config = model.config.handler
    height = _count(fields.get("height"), config.height)
    width = _count(fields.get("width"), config.width)
    num_steps = _count(_first(fields, "num_inference_steps"), config.num_inference_steps)
    check_picture(call.key, height, width, num_steps)
    return float(height * width * num_steps * _count(_first(fields, "num_images"), 1))


def _first(fields: Mapping[str, Any], name: str) -> object:
    return next((fields[each] for each in _NAMES[name] if each in fields), None)


def _count(sent: object, default: int) -> int:
    if isinstance(sent, str) and sent.isascii() and sent.isdigit() and len(sent) <= 6:
        sent = int(sent)
    is_count = isinstance(sent, int) and not isinstance(sent, bool) and 0 < sent <= _MAX_COUNT
    return sent if is_count else default  # type: ignore[return-value]
