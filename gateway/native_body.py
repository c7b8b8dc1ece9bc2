"""Bodies in an instance's own words, opened as the instance opens them: once, for all who look.

Forms are written anew: TorchServe's frontend cannot decode every one, and what it reads is then
what was measured here.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlencode

from starlette.datastructures import Headers

from gateway.body import FORM, MULTIPART, read_form, read_sent
from handler.api.body import media_type, open_body
from handler.api.fields import FieldReader
from handler.api.kserve import Envelope, open_message
from handler.config import HandlerConfig
from handler.errors import InvalidRequest
from handler.messages import show, summarise

__all__ = ["NativeBody", "read_native_body"]

_JSON = "application/json"
# Names of parts that can be written without escaping.
_UNWRITABLE = frozenset('"\\\r\n')


@dataclass(frozen=True, slots=True)
class NativeBody:
    """What an instance gets, and what of it the gateway looks at."""

    content: bytes
    content_type: str
    is_form: bool = False
    drawings: tuple[Mapping[str, object], ...] = field(default=({},))
    """The fields of each."""
    stream: bool | None = None
    """What it says of a stream; None: nothing, and then its Accept header counts."""
    can_stream: bool = False
    """Whether its reply can be one: KServe's cannot, nor those that draw nothing."""
    problem: InvalidRequest | None = None
    """Why the instance cannot read it, unless it is not one of ours."""


async def read_native_body(body: bytes, content_type: str, config: HandlerConfig) -> NativeBody:
    """Open a body.

    Raises:
        InvalidRequest: it is said to be JSON, or a form, and is none.
    """
    kind = media_type({"content-type": content_type})
    delivered: dict[str, object] = {"body": body}
    if kind == _JSON:
        content_type = kind  # TorchServe compares it letter by letter
        delivered = {"body": _parse_json(body)}
    elif kind == FORM:
        content_type = kind
        delivered = dict(read_form(body))
        body = urlencode(delivered).encode("ascii")
    elif kind == MULTIPART:
        delivered = await _read_multipart(body, content_type)
        body, content_type = _write_multipart(delivered)
    try:
        payload = open_body(delivered, {"content-type": content_type}, max_body_bytes=2**62)
        message = open_message(payload, max_instances=config.max_instances)
    except InvalidRequest as error:
        return NativeBody(body, content_type, problem=error)
    problems = message.problems
    reader = FieldReader(message.shared, allow_text=payload.is_form)
    draws = message.shared.get("cancel") is None and reader.boolean("describe") is not True
    return NativeBody(
        body,
        content_type,
        is_form=payload.is_form,
        drawings=tuple({**message.shared, **each.fields} for each in message.instances),
        stream=reader.boolean("stream"),
        can_stream=draws and message.envelope is Envelope.PLAIN,
        problem=InvalidRequest(summarise(problems), problems) if problems else None,
    )


def _parse_json(body: bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidRequest("the body is not JSON") from None


async def _read_multipart(body: bytes, content_type: str) -> dict[str, object]:
    sent = await read_sent(body, Headers({"content-type": content_type}))
    # Of several parts with one name TorchServe delivers the last.
    delivered = {**sent.fields, **{name: files[-1] for name, files in sent.files.items()}}
    if wrong := next((name for name in delivered if _UNWRITABLE & set(name)), None):
        raise InvalidRequest(f"{show(wrong)} is not the name of a field")
    return delivered


def _write_multipart(fields: Mapping[str, object]) -> tuple[bytes, str]:
    """A form, and its content type; bytes become files."""
    boundary, parts = secrets.token_hex(16), []
    for name, value in fields.items():
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"'
        if isinstance(value, bytes):
            head += f'; filename="{name}"\r\nContent-Type: application/octet-stream'
        content = value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")
        parts += [head.encode("utf-8", "replace"), b"\r\n\r\n", content, b"\r\n"]
    parts.append(f"--{boundary}--\r\n".encode("ascii"))
    return b"".join(parts), f"{MULTIPART}; boundary={boundary}"
