"""GET /metrics, and /metrics/instances: for whom `metrics_for` names.

Where nothing is named they are for everybody where the gateway asks nobody for a key, else for
nobody.
"""

from __future__ import annotations

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, choose_encoder
from starlette.responses import Response
from starlette.routing import Route

from gateway.door import Call
from gateway.errors import Forbidden, Unauthorized
from gateway.gateway import Gateway
from gateway.settings import EVERYBODY, NOBODY, Settings
from gateway.telemetry.instance_metrics import collect_from

__all__ = ["routes"]


def routes(gateway: Gateway) -> list[Route]:
    """The routes of this module."""
    readers = _readers(gateway.settings)

    async def own(call: Call) -> Response:
        _check_reader(readers, call)
        encode, content_type = choose_encoder(call.request.headers.get("accept", ""))
        return _reply(encode(gateway.metrics.registry), content_type)

    async def of_instances(call: Call) -> Response:
        _check_reader(readers, call)
        content = await collect_from(gateway.session, gateway.fleet.addresses())
        return _reply(content, CONTENT_TYPE_PLAIN_0_0_4)

    is_keyless = readers == EVERYBODY
    return [
        gateway.door.route("/metrics", own, keyless=is_keyless),
        gateway.door.route("/metrics/instances", of_instances, keyless=is_keyless),
    ]


def _readers(settings: Settings) -> str:
    """Who may read them where nothing is said: whoever needs no key for anything else."""
    if settings.metrics_for is not None:
        return settings.metrics_for
    return NOBODY if settings.keys_required else EVERYBODY


def _check_reader(readers: str, call: Call) -> None:
    if readers == EVERYBODY:
        return
    if readers != NOBODY and call.key is None:
        raise Unauthorized("the metrics need a key: metrics_for says whose")
    if readers == NOBODY or call.key_name != readers:
        raise Forbidden("the metrics are not for this key: metrics_for says whose they are")


def _reply(content: bytes, content_type: str) -> Response:
    headers = {"Content-Type": content_type, "Cache-Control": "no-store"}
    return Response(content, headers=headers)
