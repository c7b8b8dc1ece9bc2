"""GET /openapi.json and /docs: the API as a document, written from the tables of fields."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from gateway.door import Call
from gateway.gateway import Gateway
from gateway.jobs.requests import JOB_FIELDS
from gateway.json_replies import json_response
from gateway.openai_fields import EDIT_FIELDS, OPENAI_FIELDS
from handler.api.schema import PICTURE_FIELDS, REPLY_FIELDS, Field, Kind, bounds_of, default_of
from handler.config import HandlerConfig

__all__ = ["document", "routes"]

# Said in OpenAI's words, or not by a body.
_NOT_IN_BODY = frozenset(
    {"num_images", "output_format", "request_id", "stream", "previews", "cancel"}
)
_DRAW = "Draw pictures of a prompt"
_NOT_IN_JOB = frozenset({"stream", "partial_images"})
_ERRORS = {
    400: "a field is wrong; `fields` has every problem",
    401: "the key is missing or wrong",
    403: "the key may not have so large a picture or so many steps",
    404: "no such model",
    408: "the body did not arrive in time",
    409: "the id in X-Request-Id belongs to a request that is still running",
    413: "the body is too large",
    429: "this key sends too much; Retry-After says when to try again",
    499: "the request was cancelled",
    500: "the pipeline failed",
    502: "the instance died over the request, twice",
    503: "too much is waiting, or no instance is ready; Retry-After says when to try again",
    504: "past deadline_s",
    507: "the picture does not fit into memory",
}
_TYPES = {
    Kind.TEXT: "string",
    Kind.INTEGER: "integer",
    Kind.NUMBER: "number",
    Kind.BOOLEAN: "boolean",
    Kind.CHOICE: "string",
    Kind.ID: "string",
}


def routes(gateway: Gateway) -> list[Route]:
    """The routes of this module."""

    def current() -> dict[str, Any]:
        models = gateway.fleet.models()
        config = next((each.config.handler for each in models.values()), HandlerConfig())
        return document(config, list(models))

    async def as_json(call: Call) -> Response:
        return json_response(current())

    async def as_page(call: Call) -> Response:
        headers = {"Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'"}
        return Response("\n".join(_page(current())), headers=headers, media_type="text/html")

    return [
        gateway.door.route("/openapi.json", as_json, keyless=True),
        gateway.door.route("/docs", as_page, keyless=True),
    ]


def document(config: HandlerConfig, models: Iterable[str] = ()) -> dict[str, Any]:
    """The OpenAPI document for instances with the limits and defaults of `config`."""
    ours = [
        each
        for each in (*PICTURE_FIELDS.values(), *REPLY_FIELDS.values())
        if each.name not in _NOT_IN_BODY
    ]
    generation = _body_schema([*OPENAI_FIELDS.values(), *ours], config)
    generation["properties"]["model"]["enum"] = list(models) or None
    if generation["properties"]["model"]["enum"] is None:
        del generation["properties"]["model"]["enum"]
    edit = _body_schema([*OPENAI_FIELDS.values(), *EDIT_FIELDS.values(), *ours], config)
    picture = {"type": "string", "format": "binary"}
    edit["properties"].update(image=picture, mask=picture)
    edit["required"] = ["prompt", "image"]
    not_streamed = [each for each in OPENAI_FIELDS.values() if each.name not in _NOT_IN_JOB]
    job = _body_schema([*not_streamed, *JOB_FIELDS.values(), *ours], config)
    return {
        "openapi": "3.1.0",
        "info": {"title": "diffusers on TorchServe", "version": "1"},
        "paths": dict(_paths()),
        "components": {
            "schemas": {
                "Generation": generation,
                "Edit": edit,
                "NewJob": job,
                "Job": _JOB,
                "Images": _IMAGES,
                "Error": _ERROR,
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _body_schema(fields: Iterable[Field], config: HandlerConfig) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for each in fields:
        properties[each.name] = field_schema(each, config)
    return {
        "type": "object",
        "required": ["prompt"],
        "properties": properties,
        # An instance with a newer table knows more, and refuses what it does not know.
        "additionalProperties": True,
    }


def field_schema(each: Field, config: HandlerConfig) -> dict[str, Any]:
    """The JSON schema of one field of a table."""
    schema: dict[str, Any] = {"type": _TYPES.get(each.kind, "string"), "description": each.meaning}
    if each.kind is Kind.PICTURE:
        schema["contentEncoding"] = "base64"
    elif each.kind is Kind.CHOICE:
        schema["enum"] = list(each.choices)
    elif each.kind in (Kind.TEXT, Kind.INTEGER, Kind.NUMBER):
        low, high = bounds_of(each, config)
        if each.kind is Kind.TEXT:
            schema.update(minLength=int(low), maxLength=int(high))
        else:
            schema.update(minimum=low, maximum=high)
    default = default_of(each, config)
    if default is not None:
        schema["default"] = default
    elif each.default_note:
        schema["description"] += f" (default: {each.default_note})"
    if len(each.names) > 1:
        schema["description"] += f"; also called {', '.join(each.aliases)}"
    return schema


_IMAGES = {
    "type": "object",
    "properties": {
        "created": {"type": "integer"},
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "b64_json": {"type": "string"},
                    "url": {"type": "string"},
                    "seed": {"type": "integer"},
                },
            },
        },
        "size": {"type": "string"},
        "quality": {"type": "string"},
        "output_format": {"type": "string"},
        "background": {"type": "string"},
        "usage": {"type": "object", "description": "an estimate: nothing here counts tokens"},
        "warnings": {"type": "array", "items": {"type": "string"}},
    },
}
_JOB = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "state": {"enum": ["queued", "running", "succeeded", "failed", "cancelled"]},
        "seed": {"type": "integer", "description": "of the first picture"},
        "picture": {"type": "integer", "description": "which one is being drawn, from 0"},
        "step": {"type": "integer"},
        "num_steps": {"type": "integer"},
        "preview": {"type": ["string", "null"], "description": "a small JPEG in base64"},
        "result": {"description": "the reply of the images API", "type": ["object", "null"]},
        "error": {"description": "the error, with its status", "type": ["object", "null"]},
        "expires_at": {"type": ["integer", "null"]},
    },
}
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
                "fields": {"type": "object", "additionalProperties": {"type": "string"}},
            },
        }
    },
}


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _paths() -> Iterator[tuple[str, dict[str, Any]]]:
    images = {
        "application/json": {"schema": _reference("Images")},
        "text/event-stream": {"schema": {"type": "string"}},
    }
    job = {"application/json": {"schema": _reference("Job")}}
    for path, schema, media_type, summary, replies, status in (
        ("/v1/images/generations", "Generation", "application/json", _DRAW, images, 200),
        ("/v1/images/edits", "Edit", "multipart/form-data", "Draw over a picture", images, 200),
        ("/v1/jobs", "NewJob", "application/json", "Draw without waiting for it", job, 202),
    ):
        body = {"required": True, "content": {media_type: {"schema": _reference(schema)}}}
        yield path, {"post": _operation(summary, replies, body, status)}
    of_job = {
        "get": _with_parameter("id", _operation("How far a job is, and its pictures", job)),
        "delete": _with_parameter("id", _operation("Cancel a job", job)),
    }
    yield "/v1/jobs/{id}", of_job
    described = {"application/json": {"schema": {"type": "object"}}}
    for path, method, summary in (
        ("/v1/models", "get", "The models that are served"),
        ("/v1/models/{name}", "get", "One model, in OpenAI's words and KServe's"),
        ("/v1/models/{name}:predict", "post", "KServe v1, passed on to an instance"),
        ("/v2/models/{name}", "get", "KServe v2: what a model takes and gives"),
        ("/v2/models/{name}/infer", "post", "KServe v2, passed on to an instance"),
        ("/v2/models/{name}/ready", "get", "KServe v2: whether a model is ready"),
        ("/v2/health/live", "get", "KServe v2: whether the gateway lives"),
        ("/v2/health/ready", "get", "KServe v2: whether anything can be drawn"),
        ("/predictions/{name}", "post", "TorchServe's own path, passed on to an instance"),
        ("/hf/{name}", "post", "The same, for Hugging Face's client"),
        ("/v1/fields", "get", "The fields of a model's requests, for a form: ?model=NAME"),
        ("/v1/requests/{id}", "delete", "Cancel a running request by its X-Request-Id"),
        ("/pictures/{name}", "get", "A picture that was asked for as a URL"),
        ("/", "get", "The page to draw on"),
        ("/healthz", "get", "Whether the gateway lives"),
        ("/metrics", "get", "For Prometheus: what the gateway counts"),
        ("/metrics/instances", "get", "For Prometheus: what TorchServe and its workers count"),
        ("/readyz", "get", "Whether anything can be drawn"),
    ):
        operation = _operation(summary, described)
        if (start := path.find("{")) >= 0:
            name = path[start + 1 : path.index("}")]
            operation = _with_parameter(name, operation)
        yield path, {method: operation}


def _with_parameter(name: str, operation: dict[str, Any]) -> dict[str, Any]:
    parameter = {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
    return {**operation, "parameters": [parameter]}


def _operation(
    summary: str,
    replies: Mapping[str, Any],
    body: Mapping[str, Any] | None = None,
    status: int = 200,
) -> dict[str, Any]:
    error = {"application/json": {"schema": _reference("Error")}}
    responses: dict[str, Any] = {str(status): {"description": "done", "content": dict(replies)}}
    for error_status, meaning in _ERRORS.items():
        responses[str(error_status)] = {"description": meaning, "content": error}
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if body is not None:
        operation["requestBody"] = dict(body)
    return operation


def _page(content: Mapping[str, Any]) -> Iterator[str]:
    """The document as HTML, without a script and without anything from elsewhere."""
    yield "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
    yield "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    yield f"<title>{html.escape(content['info']['title'])}</title></head><body>"
    yield f"<h1>{html.escape(content['info']['title'])}</h1>"
    yield "<p>For machines: <a href='/openapi.json'>/openapi.json</a> (OpenAPI 3.1).</p>"
    yield "<h2>Paths</h2><table><tr><th>method</th><th>path</th><th></th></tr>"
    for path, operations in content["paths"].items():
        for method, operation in operations.items():
            cells = (method.upper(), path, operation["summary"])
            yield _row(cells)
    yield "</table>"
    for name in ("Generation", "Edit", "NewJob"):
        yield f"<h2>Fields: {name}</h2><table>"
        yield "<tr><th>field</th><th>type</th><th>allowed</th><th>default</th><th>meaning</th></tr>"
        for field, schema in content["components"]["schemas"][name]["properties"].items():
            default = json.dumps(schema["default"]) if "default" in schema else ""
            kind = schema.get("format") or schema["type"]
            yield _row((field, kind, _allowed(schema), default, schema.get("description", "")))
        yield "</table>"
    yield "<h2>Errors</h2><table><tr><th>status</th><th>meaning</th></tr>"
    for status, meaning in _ERRORS.items():
        yield _row((str(status), meaning))
    yield "</table></body></html>"


def _row(cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def _allowed(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(schema["enum"])
    if "minLength" in schema:
        return f"{schema['minLength']} to {schema['maxLength']} characters"
    if "minimum" in schema:
        return f"{schema['minimum']:g} to {schema['maximum']:.17g}"
    return ""
