"""Decodes the pictures of a request; slow, and for a thread beside the engine's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from PIL import Image

from handler.api.images import BadPicture
from handler.api.picture_sizes import within_limits
from handler.api.request import GenerationRequest
from handler.config import HandlerConfig
from handler.errors import InvalidRequest
from handler.messages import summarise

__all__ = ["Pictures", "decode_all", "decode_pictures", "forget_contents"]

Pictures = Mapping[str, Image.Image]
"""Decoded pictures by the fields that they were sent as."""


def decode_pictures(
    request: GenerationRequest,
    config: HandlerConfig,
    path: str = "",
    known: dict[object, Image.Image] | None = None,
) -> dict[str, Image.Image]:
    """Return the pictures of `request`, of one size: that of the request.

    With ``padding_mask_crop`` image and mask keep the image's own size, for what is drawn is laid
    into it. What is `known` already is not decoded again. Mutates `known`.

    Raises:
        InvalidRequest: with every picture that is broken, by field; `path` goes before its name.
    """
    known = {} if known is None else known
    decoded: dict[str, Image.Image] = {}
    problems: dict[str, str] = {}
    is_cropped = request.extra.get("padding_mask_crop") is not None
    for name, picture in request.pictures.items():
        size = request.width, request.height
        if is_cropped and name != "control_image":
            size = within_limits(request.pictures["image"], config)
        as_mask = name == "mask_image"
        key = (id(picture), size, as_mask)
        try:
            if key not in known:
                known[key] = picture.decode(*size, as_mask=as_mask)
            decoded[name] = known[key]
            if is_cropped and name == "mask_image" and decoded[name].getbbox() is None:
                raise BadPicture("is black: with padding_mask_crop it must mask something")
        except BadPicture as problem:
            problems[f"{path}{name}"] = str(problem)
    if problems:
        raise InvalidRequest(summarise(problems), problems)
    return decoded


def decode_all(
    requests: Sequence[GenerationRequest], config: HandlerConfig, paths: Sequence[str]
) -> list[Pictures]:
    """Return the pictures of each of `requests`, which stood at `paths` in their body.

    Raises:
        InvalidRequest: with every picture that is broken, by field.
    """
    decoded: list[Pictures] = []
    problems: dict[str, str] = {}
    # Prompts of one body may share a picture.
    known: dict[object, Image.Image] = {}
    for request, path in zip(requests, paths, strict=True):
        try:
            decoded.append(decode_pictures(request, config, path, known))
        except InvalidRequest as error:
            problems.update(error.fields)
    if problems:
        raise InvalidRequest(summarise(problems), problems)
    return decoded


def forget_contents(request: GenerationRequest) -> GenerationRequest:
    """Return `request` with the hashes of its pictures' files in place of their bytes."""
    pictures = {name: picture.forget_content() for name, picture in request.pictures.items()}
    return replace(request, pictures=pictures)
