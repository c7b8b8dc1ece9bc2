"""The routes of all rooms as one application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from gateway import (
    health,
    models,
    openai_edits,
    openai_images,
    openapi,
    page,
    passing_on,
    picture_urls,
)
from gateway.errors import BadMethod, RouteNotFound, error_response
from gateway.gateway import Gateway
from gateway.jobs import routes as jobs
from gateway.settings import Settings
from gateway.telemetry import routes as telemetry
from handler.errors import RequestError
from handler.messages import show

__all__ = ["make_app"]

# In this order: `/v1/models/{name}:predict` before `/v1/models/{name}`.
_ROOMS = (
    openai_images,
    openai_edits,
    jobs,
    passing_on,
    models,
    picture_urls,
    health,
    telemetry,
    openapi,
    page,
)
_EXPOSED = ("x-request-id", "x-seed", "retry-after", "warning", "location")


def make_app(settings: Settings, state_dir: Path) -> Starlette:
    """The application; its lifespan starts and stops everything behind it."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[Mapping[str, Any]]:
        async with Gateway.running(settings, state_dir) as gateway:
            app.router.routes.extend(route for room in _ROOMS for route in room.routes(gateway))
            yield {}

    return Starlette(
        lifespan=lifespan,
        middleware=_cors(settings),
        exception_handlers={HTTPException: _on_http_exception},
    )


def _cors(settings: Settings) -> list[Middleware]:
    if not settings.cors_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST", "DELETE", "HEAD"),
            allow_headers=("Authorization", "X-Request-Id", "Idempotency-Key"),
            expose_headers=_EXPOSED,
        )
    ]


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = show(request.url.path)
    problem: RequestError
    if error.status_code == 404:
        problem = RouteNotFound(f"there is nothing at {path}; /docs lists what there is")
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        problem = BadMethod(f"{path} does not know {request.method}; allowed: {allowed}")
    else:
        problem = RequestError(error.detail)
        problem.status = error.status_code
    response = error_response(problem)
    response.headers.update(error.headers or {})
    return response
