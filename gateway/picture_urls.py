"""GET /pictures/NAME: a kept picture, for whoever knows its unguessable name."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.door import Call
from gateway.gateway import Gateway
from gateway.picture_store import MEDIA_TYPES
from gateway.settings import Settings
from handler.errors import NotFound

__all__ = ["base_url", "picture_url", "routes"]


def base_url(settings: Settings, request: Request) -> str:
    """How the client of `request` reaches the gateway, without a slash at the end."""
    return (settings.public_url or str(request.base_url)).rstrip("/")


def picture_url(settings: Settings, request: Request, name: str) -> str:
    """Where a kept picture is fetched, as the client of `request` reaches the gateway."""
    return f"{base_url(settings, request)}/pictures/{name}"


def routes(gateway: Gateway) -> list[Route]:
    """The routes of this module."""

    async def picture(call: Call) -> Response:
        name = call.request.path_params["name"]
        content = await gateway.pictures.get(name)
        if content is None:
            raise NotFound("there is no such picture, or not any more")
        headers = {
            "Cache-Control": f"private, max-age={gateway.pictures.expires_s:.0f}",
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "default-src 'none'",
        }
        return Response(content, headers=headers, media_type=MEDIA_TYPES[name.rpartition(".")[2]])

    return [gateway.door.route("/pictures/{name}", picture, keyless=True)]
