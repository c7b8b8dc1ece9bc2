"""Whether the gateway lives, and whether anything can be drawn; for everybody, without a key."""

from __future__ import annotations

import json

from starlette.responses import Response
from starlette.routing import Route

from gateway.door import Call
from gateway.gateway import Gateway

__all__ = ["routes"]


def routes(gateway: Gateway) -> list[Route]:
    """The routes of this module."""

    async def alive(call: Call) -> Response:
        return _json({"live": True}, 200)

    async def ready(call: Call) -> Response:
        is_ready = gateway.fleet.is_ready
        return _json({"ready": is_ready}, 200 if is_ready else 503)

    route = gateway.door.route
    return [
        route("/healthz", alive, keyless=True),
        route("/v2/health/live", alive, keyless=True),
        route("/readyz", ready, keyless=True),
        route("/v2/health/ready", ready, keyless=True),
    ]


def _json(content: object, status: int) -> Response:
    headers = {"Cache-Control": "no-store"}
    return Response(json.dumps(content).encode(), status, headers, media_type="application/json")
