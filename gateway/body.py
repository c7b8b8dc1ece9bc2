"""Reads what a client sends: bounded in size and time, as JSON or as a form."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from gateway.errors import TooSlow
from handler.api.body import media_type
from handler.errors import InvalidRequest, QueueFull, TooLarge
from handler.messages import show

__all__ = [
    "FORM",
    "MULTIPART",
    "BodyBudget",
    "ClientGone",
    "Sent",
    "read_body",
    "read_form",
    "read_sent",
]

FORM, MULTIPART = "application/x-www-form-urlencoded", "multipart/form-data"
_JSON = re.compile(r"application/json|text/json|.*\+json")
_MAX_FIELDS = 200
_MAX_FILES = 32


class ClientGone(Exception):
    """The client has closed its connection."""


@dataclass(frozen=True, slots=True)
class Sent:
    """The fields of a request; in a form every value is text."""

    fields: Mapping[str, object]
    is_form: bool = False
    files: Mapping[str, tuple[bytes, ...]] = field(default_factory=dict)
    """The contents of uploaded files, by the name of their field."""


async def read_body(request: Request, budget: BodyBudget) -> bytes:
    """Return the body, which counts as held until the request is over.

    Raises:
        TooLarge: it says that it is larger than it may be, or is; no more than that is read.
        QueueFull: too much is held already.
        TooSlow: it takes too long.
        ClientGone: the client left before its end.
    """
    length = request.headers.get("content-length")
    if length is not None and (not length.isdigit() or int(length) > budget.max_bytes):
        raise _too_large(budget.max_bytes)
    budget.hold(request, budget.max_bytes if length is None else int(length))
    body = bytearray()
    try:
        async with asyncio.timeout(budget.timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > budget.max_bytes:
                    raise _too_large(budget.max_bytes)
    except TimeoutError:
        raise TooSlow(f"the body did not arrive within {budget.timeout_s:g} s") from None
    except ClientDisconnect:
        raise ClientGone from None
    return bytes(body)


class BodyBudget:
    """How large a body may be, how long it may take, and how many bytes of all are held."""

    def __init__(self, max_bytes: int, max_total_bytes: int, timeout_s: float) -> None:
        self.max_bytes = max_bytes
        self.timeout_s = timeout_s
        self.max_total_bytes = max_total_bytes
        self._held: dict[int, int] = {}

    @property
    def num_bytes(self) -> int:
        """How many are held now."""
        return sum(self._held.values())

    def hold(self, request: Request, num_bytes: int) -> None:
        """Count the body of `request`. Raises: QueueFull."""
        if self.num_bytes + num_bytes > self.max_total_bytes:
            raise QueueFull("too many large requests are being served; try again a little later")
        self._held[id(request)] = num_bytes

    def release(self, request: Request) -> None:
        """Count it no more, if it was counted."""
        self._held.pop(id(request), None)


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"the body is larger than {max_bytes} bytes, which are allowed")


async def read_sent(body: bytes, headers: Headers) -> Sent:
    """Return the fields of a body.

    Raises:
        InvalidRequest: it is neither a JSON object nor a form that can be read.
    """
    encoding = headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise _unreadable(
            "Content-Encoding", f"{show(encoding)} cannot be read; send the body as it is"
        )
    kind = media_type(headers)
    if kind == MULTIPART:
        return await _read_multipart(body, headers)
    # curl -d '{…}' calls JSON a form.
    is_form = kind == FORM
    if is_form and not body.lstrip().startswith(b"{"):
        return Sent(dict(read_form(body)), is_form=True)
    try:
        return Sent(_parse_json(body))
    except InvalidRequest as error:
        if kind in ("", "application/octet-stream", FORM) or _JSON.fullmatch(kind):
            raise
        problem = f"{show(kind)} is neither application/json nor a form, and {error}"
        raise _unreadable("Content-Type", problem) from None


def _unreadable(header: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"{header}: {problem}", {header: problem})


def read_form(body: bytes) -> list[tuple[str, str]]:
    """Read a form as it was meant: a percent sign that encodes nothing is a percent sign.

    Raises:
        InvalidRequest: it has too many fields.
    """
    try:
        return parse_qsl(
            body.decode("utf-8", "replace"),
            keep_blank_values=True,
            errors="replace",
            max_num_fields=_MAX_FIELDS,
        )
    except ValueError:
        raise InvalidRequest(f"the form has more than {_MAX_FIELDS} fields") from None


def _parse_json(body: bytes) -> dict[str, object]:
    try:
        content = json.loads(body)
    except RecursionError:
        raise InvalidRequest("the body's JSON is nested too deeply") from None
    except ValueError as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {show(content)}")
    return content


async def _read_multipart(body: bytes, headers: Headers) -> Sent:
    async def chunks() -> AsyncIterator[bytes]:
        yield body

    # An unknown charset is read as Latin-1 by the parser; all clients of this API send UTF-8.
    parser = MultiPartParser(
        headers,
        chunks(),  # type: ignore[arg-type]
        max_files=_MAX_FILES,
        max_fields=_MAX_FIELDS,
        max_part_size=len(body) + 1,
    )
    # In memory all the time: the body is, and its size is bounded.
    parser.spool_max_size = len(body) + 1
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError, KeyError) as error:
        message = getattr(error, "message", None) or "it is not multipart/form-data"
        raise InvalidRequest(f"the form cannot be read: {message}") from None
    return await _sent(form)


async def _sent(form: FormData) -> Sent:
    fields: dict[str, object] = {}
    files: dict[str, list[bytes]] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            files.setdefault(name, []).append(await value.read())
            await value.close()
        else:
            fields[name] = value
    return Sent(fields, is_form=True, files={name: tuple(each) for name, each in files.items()})
