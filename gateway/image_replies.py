"""Makes the replies of OpenAI's images API, JSON and events, of what instances drew."""

from __future__ import annotations

import base64
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.errors import Refused
from gateway.forwarding import Reply
from gateway.image_request import ImageRequest
from gateway.openai_fields import OPENAI_FIELDS, WITHOUT_MEANING
from handler.api.picture_headers import read_header
from handler.errors import RequestError

__all__ = [
    "Picture",
    "completed_event",
    "images_json",
    "in_the_clients_words",
    "partial_event",
    "picture_of",
    "picture_of_event",
]

# What an estimate of tokens counts: OpenAI's own rule of thumb for text, patches for pictures.
_BYTES_A_TOKEN, _PIXELS_A_PATCH_SIDE = 4, 16
# How an instance lists the fields that it has, see `FieldReader.refuse_rest`.
_KNOWN_NAMES = re.compile(r"(?P<before>unknown field; known are )(?P<names>\w+(?:, \w+)*)")


@dataclass(frozen=True, slots=True)
class Picture:
    """One finished picture."""

    content: bytes
    base64: bytes
    seed: int | None
    warning: str | None

    def size(self, request: ImageRequest) -> tuple[int, int]:
        """(width, height), from the picture itself where it says."""
        try:
            return read_header(self.content).size_px
        except ValueError:
            return request.width_px, request.height_px


def picture_of(reply: Reply, request: ImageRequest) -> Picture:
    """The picture of an instance's reply.

    Raises:
        Refused: the instance replied an error, in the client's words.
    """
    if reply.status != 200:
        error = Refused.from_reply(reply.status, reply.body, reply.headers.get("retry-after"))
        raise in_the_clients_words(error, request)
    encoded = base64.b64encode(reply.body)
    seed = reply.headers.get("x-seed", "")
    return Picture(
        reply.body, encoded, int(seed) if seed.isdigit() else None, reply.headers.get("warning")
    )


def picture_of_event(data: Mapping[str, Any]) -> Picture:
    """The picture of an instance's last event."""
    encoded, seeds = str(data["image"]), data.get("seeds") or [None]
    content = base64.b64decode(encoded)
    return Picture(content, encoded.encode("ascii"), seeds[0], data.get("warning"))


def in_the_clients_words(error: RequestError, request: ImageRequest) -> RequestError:
    """The same error, with its fields called what the client called them."""
    renamed: dict[str, str] = {}
    for name, problem in error.fields.items():
        renamed.setdefault(request.renamed.get(name, name), _with_names_of_here(problem))
    error.fields = renamed
    error.message = _with_names_of_here(error.message)
    error.args = (error.message,)
    return error


def _with_names_of_here(problem: str) -> str:
    """What an instance says of an unknown field, with the names that may be sent to this API."""

    def known_here(match: re.Match[str]) -> str:
        names = {*match["names"].split(", "), *OPENAI_FIELDS} - WITHOUT_MEANING.keys()
        return f"{match['before']}{', '.join(sorted(names))}"

    return _KNOWN_NAMES.sub(known_here, problem)


def images_json(
    request: ImageRequest,
    pictures: Sequence[Picture],
    urls: Sequence[str] | None,
) -> bytes:
    """The JSON of a reply with pictures, or with their URLs.

    Base64 is put in as it is: it would be looked through letter by letter, for what to escape.
    """
    data = []
    for index, picture in enumerate(pictures):
        seed = json.dumps({"seed": picture.seed}).encode("ascii")
        if urls is None:
            data.append(b'{"b64_json": "' + picture.base64 + b'", ' + seed[1:])
        else:
            url = json.dumps(urls[index]).encode("ascii")
            data.append(b'{"url": ' + url + b", " + seed[1:])
    body: dict[str, Any] = {
        "created": int(time.time()),
        "background": "opaque",
        "output_format": request.output_format,
        # `auto` is the model's own number of steps.
        "quality": "medium" if request.quality == "auto" else request.quality,
        "size": _size_text(pictures[0].size(request)),
        "usage": _usage(request, pictures),
    }
    if request.safety_identifier is not None:
        body["safety_identifier"] = request.safety_identifier
    if warnings := [picture.warning for picture in pictures if picture.warning]:
        body["warnings"] = warnings
    return json.dumps(body).encode("ascii")[:-1] + b', "data": [' + b", ".join(data) + b"]}"


def partial_event(request: ImageRequest, data: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A partial image: a small JPEG, whatever the picture itself will be."""
    return {
        "b64_json": data["image"],
        "background": request.background,
        "created_at": int(time.time()),
        "output_format": "jpeg",
        "partial_image_index": index,
        "quality": request.quality,
        "size": request.size,
    }


def completed_event(request: ImageRequest, picture: Picture) -> dict[str, Any]:
    """The last event of a picture."""
    event: dict[str, Any] = {
        "b64_json": picture.base64.decode("ascii"),
        "background": "opaque",
        "created_at": int(time.time()),
        "output_format": request.output_format,
        "quality": request.quality,
        "size": _size_text(picture.size(request)),
        "usage": _usage(request, [picture]),
        "seed": picture.seed,
    }
    if request.safety_identifier is not None:
        event["safety_identifier"] = request.safety_identifier
    if picture.warning:
        event["warning"] = picture.warning
    return event


def _usage(request: ImageRequest, pictures: Sequence[Picture]) -> dict[str, Any]:
    """An estimate in OpenAI's terms: nothing here counts tokens."""
    texts = [request.fields.get(name) for name in ("prompt", "negative_prompt")]
    num_bytes = sum(len(text.encode()) for text in texts if isinstance(text, str))
    num_text = math.ceil(num_bytes / _BYTES_A_TOKEN)
    num_image = 0
    for picture in pictures:
        width, height = picture.size(request)
        num_image += math.ceil(width / _PIXELS_A_PATCH_SIDE) * math.ceil(
            height / _PIXELS_A_PATCH_SIDE
        )
    return {
        "input_tokens": num_text,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": num_text},
        "output_tokens": num_image,
        "output_tokens_details": {"image_tokens": num_image, "text_tokens": 0},
        "total_tokens": num_text + num_image,
    }


def _size_text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
