"""Errors as OpenAI's clients read them: ``{"error": {"message", "type", "param", "code"}}``.

What goes wrong in the gateway itself is one of the classes below, beside those of handler.errors;
what an instance replies becomes a `Refused`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.responses import Response

from gateway.json_replies import json_response
from handler.errors import RequestError

__all__ = [
    "BadMethod",
    "Forbidden",
    "InstanceDied",
    "ModelNotFound",
    "NoInstance",
    "RateLimited",
    "Refused",
    "RouteNotFound",
    "TooSlow",
    "Unauthorized",
    "error_body",
    "error_headers",
    "error_response",
]

# What must not be drawn again: OpenAI's clients send everything from 500 on, and 409, three times.
_NOT_AGAIN = frozenset({409, 499, 500, 502, 504, 507})
# Longer waits are not waited for by OpenAI's clients.
_MAX_RETRY_AFTER_S = 120
_TYPES = {429: "rate_limit_error"}


class Unauthorized(RequestError):
    """The key is missing or wrong."""

    status, phrase, code = 401, "Unauthorized", "invalid_api_key"


class Forbidden(RequestError):
    """The key does not allow it."""

    status, phrase, code = 403, "Forbidden", "not_allowed"


class ModelNotFound(RequestError):
    """No instance serves this model, or the key may not use it."""

    status, phrase, code = 404, "Not Found", "model_not_found"


class RouteNotFound(RequestError):
    """There is nothing at this path."""

    status, phrase, code = 404, "Not Found", "unknown_url"


class BadMethod(RequestError):
    """The path does not know this method."""

    status, phrase, code = 405, "Method Not Allowed", "method_not_supported"


class TooSlow(RequestError):
    """The body did not arrive in time."""

    status, phrase, code = 408, "Request Timeout", "body_timeout"


class RateLimited(RequestError):
    """This key has sent too much; try again after ``retry_after_s``."""

    status, phrase, code = 429, "Too Many Requests", "rate_limit_exceeded"


class InstanceDied(RequestError):
    """The request was sent twice, and both times the instance died before it replied."""

    status, phrase, code = 502, "Bad Gateway", "instance_died"


class NoInstance(RequestError):
    """No instance was ready and free in time; try again after ``retry_after_s``."""

    status, phrase, code = 503, "Service Unavailable", "no_instance"


class Refused(RequestError):
    """What an instance replied in place of a picture."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        fields: Mapping[str, str] | None = None,
        *,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message, fields, retry_after_s=retry_after_s)
        self.status, self.code = status, code

    @classmethod
    def from_reply(cls, status: int, body: bytes, retry_after: str | None = None) -> Refused:
        """Read a reply of our handler, or one of TorchServe's own."""
        try:
            content = json.loads(body)
        except ValueError:
            content = None
        return cls.from_object(status, content, retry_after)

    @classmethod
    def from_object(cls, status: int, content: object, retry_after: str | None = None) -> Refused:
        """Read the parsed body of such a reply; that of an event is the same."""
        error = content.get("error") if isinstance(content, Mapping) else None
        retry_after_s = int(retry_after) if retry_after and retry_after.isdigit() else None
        if isinstance(error, Mapping):
            fields = error.get("fields")
            return cls(
                status,
                str(error.get("code", "error")),
                str(error.get("message", "")),
                {str(k): str(v) for k, v in fields.items()}
                if isinstance(fields, Mapping)
                else None,
                retry_after_s=retry_after_s,
            )
        if isinstance(content, Mapping) and "message" in content:
            code, message = str(content.get("type", "error")), str(content["message"])
            return cls(status, code, message, retry_after_s=retry_after_s)
        messages = {413: "the body is larger than the instance is configured to take"}
        message = messages.get(status, f"the instance replied {status} without saying why")
        return cls(status, "error", message, retry_after_s=retry_after_s)


def error_body(error: RequestError) -> dict[str, object]:
    """The JSON of an error; `fields` has every problem, `param` names the first."""
    inner: dict[str, object] = {
        "message": error.message,
        "type": _TYPES.get(error.status)
        or ("invalid_request_error" if error.status < 500 else "server_error"),
        "param": next(iter(error.fields), None),
        "code": error.code,
    }
    if error.fields:
        inner["fields"] = error.fields
    return {"error": inner}


def error_headers(error: RequestError) -> dict[str, str]:
    """The headers of an error's reply."""
    headers = {}
    if error.status in _NOT_AGAIN:
        headers["x-should-retry"] = "false"
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(min(max(1, error.retry_after_s), _MAX_RETRY_AFTER_S))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def error_response(error: RequestError) -> Response:
    """The reply that an error stands for."""
    return json_response(error_body(error), error.status, error_headers(error))
