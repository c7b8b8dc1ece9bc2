"""POST /v1/images/edits: a picture, perhaps with a mask, and a prompt are drawn by instances."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import re
from collections.abc import Mapping

from PIL import Image
from starlette.responses import Response
from starlette.routing import Route

from gateway.body import Sent, read_sent
from gateway.door import Call
from gateway.gateway import Gateway
from gateway.image_request import ImageRequest, read_image_request
from gateway.keys import Key
from gateway.openai_fields import EDIT_FIELDS, OPENAI_FIELDS
from gateway.openai_images import reply_with_images
from gateway.routing import Fleet, Model
from handler.api.images import SentPicture
from handler.api.picture_headers import PictureHeader, read_header
from handler.config import HandlerConfig
from handler.errors import InvalidRequest
from handler.messages import show

__all__ = ["instance_mask", "is_edit", "read_edit", "routes"]

# What clients of OpenAI's call them, in the order in which they are looked for.
_IMAGE_NAMES = ("image", "image[]", "image[0]", "images")
_MASK_NAMES = ("mask",)
_ADDRESS = re.compile(r"\s*(?!data:)[A-Za-z][A-Za-z0-9+.-]*:")


def routes(gateway: Gateway) -> list[Route]:
    """The routes of this module."""

    async def edit(call: Call) -> Response:
        sent = await read_sent(await gateway.door.read_body(call), call.request.headers)
        request = await read_edit(gateway, sent, call.key)
        return await reply_with_images(gateway, call, request, "image_edit")

    return [gateway.door.route("/v1/images/edits", edit, ["POST"])]


async def read_edit(gateway: Gateway, sent: Sent, key: Key | None) -> ImageRequest:
    """Read what a client sent to have a picture drawn over. Raises: as `read_image_request`."""
    sent, image, mask = _take_pictures(sent)
    config = _model_of(sent, gateway.fleet).config.handler
    header = _check("image", image, config)
    pictures = {"image": _base64(image)}
    if mask is not None:
        _check("mask", mask, config)
        pictures["mask_image"] = _base64(await asyncio.to_thread(instance_mask, mask))
    return read_image_request(
        sent,
        gateway.fleet,
        gateway.settings,
        key,
        fields={**OPENAI_FIELDS, **EDIT_FIELDS},
        pictures=pictures,
        picture=SentPicture(image, header),
    )


def _model_of(sent: Sent, fleet: Fleet) -> Model:
    """The model whose limits count for the pictures; what is wrong with its name is told later."""
    name = sent.fields.get("model")
    return fleet.model(name.strip() or None if isinstance(name, str) else None)


def is_edit(sent: Sent) -> bool:
    """Tell whether a body has a picture to draw over."""
    names = {*_IMAGE_NAMES, *_MASK_NAMES}
    return bool(names & (sent.fields.keys() | sent.files.keys()))


def _take_pictures(sent: Sent) -> tuple[Sent, bytes, bytes | None]:
    """The other fields, the picture and the mask, from the files of a form or base64 in JSON.

    Raises:
        InvalidRequest: there is none, or more than one, or it is in no form that is read.
    """
    fields = dict(sent.fields)
    image = _take("image", _IMAGE_NAMES, fields, sent.files)
    mask = _take("mask", _MASK_NAMES, fields, sent.files)
    if unknown := sent.files.keys() - {*_IMAGE_NAMES, *_MASK_NAMES}:
        problems = dict.fromkeys(sorted(unknown), "is a file; files are image and mask")
        raise InvalidRequest("; ".join(f"{k} {v}" for k, v in problems.items()), problems)
    if image is None:
        problem = "is missing: send the picture to draw over as a file"
        raise InvalidRequest(f"image {problem}", {"image": problem})
    return Sent(fields, is_form=sent.is_form), image, mask


def _take(
    field: str,
    names: tuple[str, ...],
    fields: dict[str, object],
    files: Mapping[str, tuple[bytes, ...]],
) -> bytes | None:
    found = [content for name in names for content in files.get(name, ())]
    # In a form it may be text by mistake; in JSON it is one of the forms that `_decoded` reads.
    texts: list[object] = []
    for value in (fields.pop(name) for name in names if name in fields):
        texts += value if isinstance(value, list) else [value]
    texts = [text for text in texts if text is not None]
    if len(found) + len(texts) > 1:
        problem = f"{len(found) + len(texts)} pictures were sent; one can be drawn over"
        raise InvalidRequest(f"{field}: {problem}", {field: problem})
    return found[0] if found else _decoded(field, texts[0]) if texts else None


def _decoded(field: str, sent: object) -> bytes:
    """The picture in base64, in a ``data:`` URI, or in OpenAI's ``{"image_url": "data:..."}``."""
    text = sent.get("image_url") if isinstance(sent, dict) else sent
    problem = f"must be a file of a multipart form, its base64 or a data: URI, not {show(sent)}"
    if isinstance(text, str) and _ADDRESS.match(text):
        problem = "is an address, and nothing is fetched: send a file, its base64 or a data: URI"
    elif isinstance(text, str):
        try:
            if content := base64.b64decode(text.rpartition(",")[2], validate=True):
                return content
        except (binascii.Error, ValueError):
            pass
    elif isinstance(sent, dict) and "file_id" in sent:
        problem = "has a file_id, and no files are kept here: send image_url with a data: URI"
    raise InvalidRequest(f"{field} {problem}", {field: problem})


def _check(field: str, content: bytes, config: HandlerConfig) -> PictureHeader:
    """The header of a picture. Raises: InvalidRequest, where it is none or far too large."""
    try:
        header = read_header(content)
    except ValueError as error:
        raise InvalidRequest(f"{field} {error}", {field: str(error)}) from None
    width, height = header.size_px
    if width * height > config.max_picture_pixels:
        problem = f"is {width}x{height}; allowed are {config.max_picture_pixels} pixels"
        raise InvalidRequest(f"{field} {problem}", {field: problem})
    return header


def instance_mask(mask: bytes) -> bytes:
    """What is transparent in OpenAI's mask is drawn anew; an instance draws anew what is white.

    A mask that is opaque everywhere is one of ours, white where it is to be drawn anew.

    Raises:
        InvalidRequest: it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(mask), formats=["PNG", "WEBP", "JPEG"]) as opened:
            if not opened.has_transparency_data:
                return mask
            alpha = opened.convert("RGBA").getchannel("A")
    except Exception as error:  # Pillow's plugins raise whatever a broken file leads them to
        problem = "cannot be decoded"
        raise InvalidRequest(f"mask {problem}", {"mask": problem}) from error
    if alpha.getextrema()[0] == 255:
        return mask
    inverted = alpha.point([255 - value for value in range(256)])
    written = io.BytesIO()
    inverted.save(written, "PNG", compress_level=1)
    return written.getvalue()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
