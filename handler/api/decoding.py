"""Decodes the pictures of a request; slow, and for a thread beside the engine's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from handler.api.images import BadPicture, SentPicture
from handler.api.picture_sizes import within_limits
from handler.api.request import GenerationRequest
from handler.config import HandlerConfig
from handler.errors import InvalidRequest
from handler.messages import summarise

__all__ = ["Pictures", "decode_all", "decode_pictures", "forget_contents", "to_decode"]

Pictures = Mapping[str, Image.Image]
"""Decoded pictures by the fields that they were sent as."""


@dataclass(frozen=True, slots=True, eq=False)
class ToDecode:
    """One picture as it is to be decoded; of equal `key` it is done once."""

    picture: SentPicture
    size: tuple[int, int]
    """Width and height to bring it to."""
    as_mask: bool

    @property
    def key(self) -> object:
        """What the result depends on."""
        return id(self.picture), self.size, self.as_mask

    def result(self) -> Image.Image:
        """Decode it. Raises: BadPicture."""
        return self.picture.decode(*self.size, as_mask=self.as_mask)


def to_decode(request: GenerationRequest, config: HandlerConfig) -> dict[str, ToDecode]:
    """Return how each picture of `request` is decoded, by its field.

    With ``padding_mask_crop`` image and mask keep the image's own size, for what is drawn is laid
    into it; all others get the size of the request.
    """
    is_cropped = request.extra.get("padding_mask_crop") is not None
    found = {}
    for name, picture in request.pictures.items():
        size = request.width, request.height
        if is_cropped and name != "control_image":
            size = within_limits(request.pictures["image"], config)
        found[name] = ToDecode(picture, size, name == "mask_image")
    return found


def decode_pictures(
    request: GenerationRequest,
    config: HandlerConfig,
    path: str = "",
    known: dict[object, Image.Image] | None = None,
) -> dict[str, Image.Image]:
    """Return the pictures of `request`, as `to_decode` says.

    What is `known` already is not decoded again. Mutates `known`.

    Raises:
        InvalidRequest: with every picture that is broken, by field; `path` goes before its name.
    """
    known = {} if known is None else known
    decoded: dict[str, Image.Image] = {}
    problems: dict[str, str] = {}
    is_cropped = request.extra.get("padding_mask_crop") is not None
    for name, each in to_decode(request, config).items():
        try:
            if each.key not in known:
                known[each.key] = each.result()
            decoded[name] = known[each.key]
            if is_cropped and each.as_mask and decoded[name].getbbox() is None:
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
