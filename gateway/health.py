"""Whether the gateway lives, and whether anything can be drawn; for everybody, without a key."""

from __future__ import annotations

from starlette.responses import Response
from starlette.routing import Route

from gateway.door import Call
from gateway.gateway import Gateway
from gateway.json_replies import json_response

__all__ = ["routes"]

_HEADERS = {"Cache-Control": "no-store"}


def routes(gateway: Gateway) -> list[Route]:
    """The routes of this module."""

    async def alive(call: Call) -> Response:
        return json_response({"live": True}, 200, _HEADERS)

    async def ready(call: Call) -> Response:
        is_ready = gateway.fleet.is_ready
        return json_response({"ready": is_ready}, 200 if is_ready else 503, _HEADERS)

    route = gateway.door.route
    return [
        route("/healthz", alive, keyless=True),
        route("/v2/health/live", alive, keyless=True),
        route("/readyz", ready, keyless=True),
        route("/v2/health/ready", ready, keyless=True),
    ]
