"""Opens a body as TorchServe delivers it: which kind it is, and the fields in it.

{}                      a form without any field, as `curl -d 'a prompt'` sends
{'body': …}             text, bytes, or JSON that the frontend has parsed (bytes if broken)
{name: …, name: …}      a form (urlencoded or multipart) or gRPC; values are text or bytes
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from handler.api.foreign_names import FOREIGN_NAMES, HOW_PICTURES_ARE_SENT, is_picture_input
from handler.api.picture_headers import identify
from handler.api.schema import KNOWN_NAMES, PICTURE_NAMES
from handler.api.translation import holds_picture
from handler.errors import InvalidRequest, TooLarge
from handler.messages import show, shown_name

__all__ = [
    "ALONE",
    "HOW_TO_SEND",
    "MAX_FIELDS",
    "Payload",
    "check_number_of_fields",
    "media_type",
    "open_body",
]

HOW_TO_SEND = (
    "is missing; send it as JSON (curl -H 'Content-Type: application/json'"
    " -d '{\"prompt\": \"a prompt\"}'), as text (curl -H 'Content-Type: text/plain'"
    " -d 'a prompt') or as a form (curl --data-urlencode 'prompt=a prompt');"
    " a bare curl -d 'a prompt' sends a form in which the prompt has no name"
)
ALONE = (
    "is missing: the body is a picture; send both as a multipart form (curl -F 'prompt=a prompt'"
    " -F image=@in.png), or the picture in base64 as the field image of JSON"
)
MAX_FIELDS = 256
"""More than there are fields, under every name that anybody gives them."""
_FIELDS_OF_JSON = PICTURE_NAMES | {"instances", "parameters"}
# What says nothing about what a body is.
_UNNAMED = ("", "application/octet-stream")
_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")
_READABLE = "application/json, text/plain, a form, or no Content-Type at all"
# Clients that post JSON without saying so are common, prompts that begin like this are not.
_LOOKS_LIKE_JSON_OBJECT = re.compile(r'\s*\{\s*(["}]|\Z)')


@dataclass(frozen=True, slots=True)
class Payload:
    """The fields of a body; a bare prompt is the field ``prompt``, a bare picture ``image``."""

    fields: Mapping[str, object]
    is_form: bool
    """Values are text whatever they mean, or the bytes of pictures: a form, or gRPC."""
    problems: Mapping[str, str] = field(default_factory=dict)
    is_picture: bool = False
    """The body has no fields: it is the file of a picture."""


def media_type(headers: Mapping[str, str]) -> str:
    """The Content-Type without its parameters, in lower case; empty when there is none."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def open_body(
    body: Mapping[str, object], headers: Mapping[str, str], *, max_body_bytes: int
) -> Payload:
    """The fields of a body; `headers` have lower-cased names.

    Raises:
        TooLarge: the body is larger than `max_body_bytes`.
        InvalidRequest: the body cannot be read at all.
    """
    size_bytes = _size_bytes(body, headers)
    if size_bytes > max_body_bytes:
        raise TooLarge(f"the body has {size_bytes} bytes; allowed are {max_body_bytes}")
    if not body:
        raise _unreadable("prompt", HOW_TO_SEND)
    encoding = headers.get("content-encoding", "").strip().lower()
    content = body.get("body") if body.keys() == {"body"} else None
    is_bytes = isinstance(content, (bytes, bytearray, memoryview))
    if is_bytes and encoding not in ("", "identity"):
        problem = f"{show(encoding)} cannot be read; send the body as it is"
        raise _unreadable("Content-Encoding", problem)
    if body.keys() == {"body"} and media_type(headers) not in _FORMS:
        payload = _open_content(body["body"], media_type(headers))
    else:
        payload = _open_form(body)
    check_number_of_fields(payload.fields, "body")
    return payload


def check_number_of_fields(fields: Mapping[str, object], name: str) -> None:
    """Refuse more fields than any request has: reading each of them would hold up everybody.

    Raises:
        InvalidRequest: of the field `name`.
    """
    if len(fields) > MAX_FIELDS:
        raise _unreadable(name, f"has {len(fields)} fields; allowed are {MAX_FIELDS}")


def _open_content(content: object, media: str) -> Payload:
    if isinstance(content, (bytes, bytearray, memoryview)):
        content = bytes(content)
        if media.startswith("image/") or (media in _UNNAMED and identify(content)):
            return Payload({"image": content}, is_form=False, is_picture=True)
        content = _decode(content, media)
    if isinstance(content, str):
        _refuse_json_as_text(content)
        return Payload({"prompt": content}, is_form=False)
    if isinstance(content, Mapping):
        return Payload(content, is_form=False)
    if isinstance(content, (list, tuple)):
        example = '{"instances": [{"prompt": "a"}, {"prompt": "b"}]}'
        raise _unreadable("body", f"is {show(content)}; several prompts are sent as {example}")
    raise _unreadable("body", f"{show(content)} is neither text nor an object with a prompt")


def _decode(content: bytes, media: str) -> object:
    """Bytes to text or, where they were sent as JSON or look like a JSON object, its value."""
    is_json = media in ("application/json", "text/json") or media.endswith("+json")
    if not (is_json or media.startswith("text/") or media in _UNNAMED):
        raise _unreadable("Content-Type", f"{show(media)} cannot be read; send {_READABLE}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _unreadable("body", _not_utf8(error)) from error
    if not is_json and (media.startswith("text/") or not _LOOKS_LIKE_JSON_OBJECT.match(text)):
        return text
    try:
        return json.loads(text)
    except RecursionError as error:
        raise _unreadable("body", "is JSON nested too deeply") from error
    except ValueError as error:
        hint = "" if is_json else "; a prompt that begins like JSON is sent as text/plain"
        # What else is a ValueError is a number of more digits than Python reads.
        said = error if isinstance(error, json.JSONDecodeError) else "a number is too long"
        raise _unreadable("body", f"is not JSON: {said}{hint}") from error


def _refuse_json_as_text(text: str) -> None:
    """Refuse a JSON object with a field of ours as the text of a prompt.

    The default of a browser's ``fetch`` is text/plain; what is drawn then is the JSON itself.
    """
    if not _LOOKS_LIKE_JSON_OBJECT.match(text):
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return
    if isinstance(value, dict) and value.keys() & _FIELDS_OF_JSON:
        raise _unreadable(
            "Content-Type", "says text, but the body is JSON: send Content-Type: application/json"
        )


def _open_form(form: Mapping[str, object]) -> Payload:
    fields: dict[str, object] = {}
    problems: dict[str, str] = {}
    for name, value in form.items():
        if isinstance(value, (bytes, bytearray, memoryview)):
            value = bytes(value)
            try:
                # Whether it is the picture itself or base64 is seen where it is read.
                value = value if holds_picture(name) else value.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                is_known = name in KNOWN_NAMES or name in FOREIGN_NAMES
                is_picture = not is_known and identify(error.object) is not None
                is_alike = is_picture or is_picture_input(name)
                problems[shown_name(name)] = HOW_PICTURES_ARE_SENT if is_alike else _not_utf8(error)
                continue
        fields[name] = value
    return Payload(fields, is_form=True, problems=problems)


def _size_bytes(body: Mapping[str, object], headers: Mapping[str, str]) -> int:
    """The body's size; where it came parsed and without a length, what its values hold."""
    declared = headers.get("content-length", "")
    if re.fullmatch("[0-9]{1,18}", declared):
        return int(declared)
    size, pending = 0, list[object](body.values())
    while pending:
        value = pending.pop()
        if isinstance(value, memoryview):
            size += value.nbytes
        elif isinstance(value, (str, bytes, bytearray)):
            size += len(value)
        elif isinstance(value, Mapping):
            size += sum(len(name) for name in value)
            pending.extend(value.values())
        elif isinstance(value, (list, tuple)):
            size += len(value)
            pending.extend(value)
        elif isinstance(value, int):
            size += 1 + value.bit_length() // 4
        else:
            size += 1
    return size


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 text (byte 0x{error.object[error.start]:02x} at {error.start})"


def _unreadable(name: str, problem: str) -> InvalidRequest:
    return InvalidRequest(f"{name}: {problem}", {name: problem})
