"""GET /metrics: for whom `metrics_for` names, else where the gateway asks nobody for a key."""

from __future__ import annotations

from prometheus_client.exposition import choose_encoder
from starlette.responses import Response
from starlette.routing import Route

from gateway.door import Call
from gateway.errors import Forbidden, Unauthorized
from gateway.gateway import Gateway
from gateway.settings import EVERYBODY, NOBODY, Settings

__all__ = ["routes"]


def routes(gateway: Gateway) -> list[Route]:
    """The routes of this module."""
    readers = _readers(gateway.settings)

    async def metrics(call: Call) -> Response:
        if readers not in (EVERYBODY, NOBODY) and call.key is None:
            raise Unauthorized("the metrics need a key: metrics_for says whose")
        if readers != EVERYBODY and (readers == NOBODY or call.key_name != readers):
            raise Forbidden("the metrics are not for this key: metrics_for says whose they are")
        encode, content_type = choose_encoder(call.request.headers.get("accept", ""))
        content = encode(gateway.metrics.registry)
        return Response(
            content, headers={"Content-Type": content_type, "Cache-Control": "no-store"}
        )

    return [gateway.door.route("/metrics", metrics, keyless=readers == EVERYBODY)]


def _readers(settings: Settings) -> str:
    """Who may read them where nothing is said: whoever needs no key for anything else."""
    if settings.metrics_for is not None:
        return settings.metrics_for
    return NOBODY if settings.keys_required else EVERYBODY
