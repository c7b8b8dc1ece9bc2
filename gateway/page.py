"""GET /: the page to draw on, and GET /v1/fields, which its form is made of."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.descriptions import Description
from gateway.door import Call
from gateway.gateway import Gateway
from gateway.json_replies import json_response
from gateway.limits import check_model
from gateway.openai_fields import OPENAI_FIELDS
from gateway.routing import Model
from handler.api.schema import PICTURE_FIELDS, REPLY_FIELDS, Field, Kind, bounds_of, default_of
from handler.config import HandlerConfig
from handler.errors import NotFound

__all__ = ["fields_of", "routes"]

_FOLDER = Path(__file__).with_name("page")
_INDEX = "index.html"
_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing inline, nothing from elsewhere, no text that becomes HTML; pictures are blobs.
_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ]
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    # Asked for each time, and not sent again: a gateway that was updated has a new page at once.
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
# Pictures are asked for as n, in the words of the gateway.
_FORM_FIELDS = (
    *(each for name, each in PICTURE_FIELDS.items() if name != "num_images"),
    *(OPENAI_FIELDS[name] for name in ("n", "output_format", "output_compression")),
    REPLY_FIELDS["deadline_s"],
)


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    etag: str


def routes(gateway: Gateway) -> list[Route]:
    """The routes of this module."""
    files = {path.name: _read(path) for path in sorted(_FOLDER.iterdir()) if path.is_file()}

    async def index(call: Call) -> Response:
        return _reply(files[_INDEX], call.request)

    async def file(call: Call) -> Response:
        name = call.request.path_params["name"]
        if name not in files:
            raise NotFound("the page has no such file")
        return _reply(files[name], call.request)

    async def fields(call: Call) -> Response:
        model = gateway.fleet.model(call.request.query_params.get("model"))
        check_model(call.key, model.name)
        description = await gateway.forwarder.describe(model.name)
        return json_response(_form(model, description), headers={"Cache-Control": "no-store"})

    return [
        gateway.door.route("/", index, keyless=True),
        gateway.door.route("/page/{name}", file, keyless=True),
        gateway.door.route("/v1/fields", fields, takes_place=False),
    ]


def fields_of(
    config: HandlerConfig, description: Description | None = None
) -> list[dict[str, Any]]:
    """What a form needs to know of each field.

    Args:
        config: the model's limits.
        description: says what the model has; None: every field that any model has.
    """
    if description is None:
        return [_described(each, config) for each in _FORM_FIELDS]
    lacking = PICTURE_FIELDS.keys() - description.fields
    described = []
    for each in _FORM_FIELDS:
        if each.name in lacking:
            continue
        described.append(_described(each, config))
        if names := description.suggestions.get(each.name):
            described[-1]["suggestions"] = names
    return described


def _form(model: Model, description: Description | None) -> dict[str, Any]:
    config = model.config.handler
    return {
        "model": model.name,
        "ready": model.is_ready,
        "limits": {
            "max_pixels": config.max_pixels,
            "max_picture_bytes": config.max_picture_bytes,
            "max_picture_pixels": config.max_picture_pixels,
        },
        "fields": fields_of(config, description),
    }


def _described(each: Field, config: HandlerConfig) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": each.name,
        "kind": each.kind.name.lower(),
        "help": each.meaning,
        "default": default_of(each, config),
        "default_note": each.default_note,
    }
    if each.kind is Kind.CHOICE:
        described["choices"] = list(dict.fromkeys(each.choices.values()))
    elif each.kind not in (Kind.BOOLEAN, Kind.ID):
        described["minimum"], described["maximum"] = bounds_of(each, config)
    return described


def _read(path: Path) -> _File:
    content = path.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return _File(content, _MEDIA_TYPES[path.suffix], etag)


def _reply(file: _File, request: Request) -> Response:
    headers = {**_HEADERS, "ETag": file.etag}
    known = request.headers.get("if-none-match", "")
    # A cache on the way may have made it a weak one.
    if file.etag in {each.strip().removeprefix("W/") for each in known.split(",")}:
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)
