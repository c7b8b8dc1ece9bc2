"""Reads a request of OpenAI's images API: its fields become one body an instance, a picture each.

n pictures are n requests of one picture, with the seeds that one request of n would give them: each
goes where there is least to do, has its own format, and n may be more than an instance allows.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from gateway.body import Sent
from gateway.keys import Key
from gateway.limits import check_model
from gateway.measuring import measure
from gateway.openai_fields import OPENAI_FIELDS, WITHOUT_MEANING
from gateway.routing import Fleet, Model
from gateway.settings import Settings
from handler.api.fields import FieldReader
from handler.api.images import SentPicture
from handler.api.schema import MAX_SEED, PICTURE_FIELDS, REPLY_FIELDS, Field, Kind, Value
from handler.config import HandlerConfig
from handler.errors import InvalidRequest
from handler.messages import show, summarise

__all__ = ["ImageRequest", "num_previews", "read_image_request"]

# Drawn seeds are short enough to be typed again.
_MAX_DRAWN_SEED = 2**32
_SIZE = re.compile(r"([0-9]{1,5})\s*[xX×]\s*([0-9]{1,5})", re.ASCII)
_SEED = re.compile(r"-1|[0-9]{1,20}", re.ASCII)
_BOUNDS = HandlerConfig()
# Of the model's own number of steps; config/gateway.yaml's quality_steps beat them.
_STEP_SHARES = {"low": 0.5, "medium": 1.0, "high": 1.5, "xhigh": 2.0, "max": 3.0}
_SYNONYMS = {"standard": "medium", "hd": "high"}
_STEPS = PICTURE_FIELDS["num_inference_steps"].names


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """What a client asks for, checked as far as the gateway knows."""

    model: Model
    fields: Mapping[str, object]
    """What every picture's body has, without its seed."""
    seed: object
    """Of the first picture; what is not an integer is the instance's to refuse."""
    num_images: int
    height_px: int
    width_px: int
    num_steps: int
    size: str
    """As the client said it: ``512x768`` or ``auto``."""
    quality: str
    output_format: str
    background: str
    response_format: str
    safety_identifier: str | None
    is_stream: bool
    num_partial_images: int
    renamed: Mapping[str, str] = field(default_factory=dict)
    """What the client called a field that the instance knows by another name."""

    @property
    def work(self) -> float:
        """Steps × pixels of one picture."""
        return float(self.num_steps * self.height_px * self.width_px)

    def content(self, index: int) -> bytes:
        """The body that an instance gets for picture `index`."""
        seed = self.seed + index if isinstance(self.seed, int) else self.seed
        body = {**self.fields, "seed": seed}
        if self.is_stream:
            body["stream"] = True
            if self.num_partial_images:
                body["previews"] = math.ceil(self.num_steps / (self.num_partial_images + 1))
        return json.dumps(body).encode("ascii")


def read_image_request(
    sent: Sent,
    fleet: Fleet,
    settings: Settings,
    key: Key | None,
    *,
    fields: Mapping[str, Field] = OPENAI_FIELDS,
    pictures: Mapping[str, str] | None = None,
    picture: SentPicture | None = None,
) -> ImageRequest:
    """Read what a client sent.

    Args:
        sent: the fields.
        fleet: knows the models.
        settings: say what a quality is.
        key: may use some of them.
        fields: OpenAI's, of this route.
        pictures: in base64, by the fields of the instance; they beat those in `sent`.
        picture: the one to begin with, where it is read already.

    Raises:
        InvalidRequest: with every problem, by field.
        ModelNotFound: no instance has this model, or the key may not use it.
        Forbidden: the key may not have so large a picture.
    """
    reader = FieldReader(sent.fields, allow_text=sent.is_form)
    values: dict[str, Value] = {}
    for name, each in fields.items():
        is_sent = any(each_name in sent.fields for each_name in each.names)
        read = reader.read(each, _BOUNDS) if is_sent else None
        values[name] = cast(Value, each.default) if read is None else read
    for name in WITHOUT_MEANING.keys() & sent.fields.keys():
        if reader.take(name) is not None:
            reader.report(name, f"cannot be sent here: {WITHOUT_MEANING[name]}")
    rest = {name: value for name, value in reader.rest().items() if value is not None}
    if sent.is_form:
        rest = {name: _from_form(name, value) for name, value in rest.items()}
    rest.update(pictures or {})
    # Before the model is looked up: what is wrong is told first.
    size = _read_size(str(values["size"]), rest, reader)
    _check_stream(values, reader)
    if reader.problems:
        raise InvalidRequest(summarise(reader.problems), reader.problems)
    model = fleet.model(cast("str | None", values["model"]))
    check_model(key, model.name)
    config = model.config.handler
    renamed: dict[str, str] = {}
    if size is not None:
        rest["width"], rest["height"] = size
        renamed.update(width="size", height="size")
    quality = _SYNONYMS.get(str(values["quality"]), str(values["quality"]))
    if quality != "auto" and not rest.keys() & set(_STEPS):
        rest["num_inference_steps"] = _steps_of(str(values["quality"]), config, settings)
        renamed["num_inference_steps"] = "quality"
    output_format = str(values["output_format"])
    rest["output_format"] = output_format
    if values["output_compression"] is not None and output_format != "png":
        rest["jpeg_quality"] = max(1, int(cast(int, values["output_compression"])))
        renamed["jpeg_quality"] = "output_compression"
    extent = measure(rest, config, key, picture=picture)
    seed, num_images = _take_seed(rest), int(cast(int, values["n"]))
    _check_seeds(seed, num_images)
    return ImageRequest(
        model=model,
        fields=rest,
        seed=seed,
        num_images=num_images,
        height_px=extent.height_px,
        width_px=extent.width_px,
        num_steps=extent.num_steps,
        size="auto" if size is None else f"{size[0]}x{size[1]}",
        quality=quality,
        output_format=output_format,
        background=str(values["background"]),
        response_format=str(values["response_format"]),
        safety_identifier=cast("str | None", values["safety_identifier"] or values["user"]),
        is_stream=bool(values["stream"]),
        num_partial_images=num_previews(int(cast(int, values["partial_images"])), config),
        renamed={**renamed, "num_images": "n", "previews": "partial_images", "mask_image": "mask"},
    )


def num_previews(asked: int, config: HandlerConfig) -> int:
    """How many previews a picture has: none where flagged pictures are refused.

    Nothing checks previews, so that an instance then refuses whoever asks for one.
    """
    return 0 if config.safety_checker == "refuse" else asked


def _read_size(
    sent: str, rest: Mapping[str, object], reader: FieldReader
) -> tuple[int, int] | None:
    """(width, height) of the field `size`; None for ``auto``."""
    if sent == "auto":
        return None
    match = _SIZE.fullmatch(sent)
    if match is None:
        reader.report(
            "size", f'{show(sent)} is not a size such as "512x768" (width x height), or auto'
        )
        return None
    if {"width", "height"} & rest.keys():
        reader.report("size", "given more than once: send either size or width and height")
    return int(match[1]), int(match[2])


def _check_stream(values: Mapping[str, Value], reader: FieldReader) -> None:
    if values["stream"] and values["response_format"] == "url":
        reader.report("response_format", "a stream holds the pictures: send b64_json, or no stream")
    if values["partial_images"] and not values["stream"]:
        reader.report("partial_images", 'needs "stream": true')


def _steps_of(quality: str, config: HandlerConfig, settings: Settings) -> int:
    if quality in settings.quality_steps:
        return settings.quality_steps[quality]
    share = _STEP_SHARES[_SYNONYMS.get(quality, quality)]
    return max(1, min(round(share * config.num_inference_steps), config.max_num_inference_steps))


def _take_seed(rest: dict[str, object]) -> object:
    """Take the seed out, under either name; where none was sent, draw one.

    It is fixed here, so that a request that is sent twice draws the same picture.
    """
    names = [name for name in ("seed", "generator") if name in rest]
    if len(names) > 1:
        return rest.pop("seed")  # the instance refuses both
    seed = rest.pop(names[0]) if names else None
    if isinstance(seed, str) and _SEED.fullmatch(seed.strip()):
        seed = int(seed)
    if seed is None or (seed == -1 and type(seed) is int):
        return secrets.randbelow(_MAX_DRAWN_SEED)
    return seed


def _check_seeds(seed: object, num_images: int) -> None:
    """Raise InvalidRequest where a picture would have a seed that an instance refuses.

    It would name another one than was sent, when some of the pictures are drawn already.
    """
    high = MAX_SEED - num_images + 1
    if type(seed) is int and not 0 <= seed <= high:
        problems = {"seed": f"{seed} is out of range; allowed: 0 to {high}"}
        raise InvalidRequest(summarise(problems), problems)


def _from_form(name: str, value: object) -> object:
    """A field of a form as JSON has it, by the kind that the table says; else as it was sent."""
    kind = _KINDS.get(name)
    if kind in (Kind.INTEGER, Kind.NUMBER, Kind.BOOLEAN) and isinstance(value, str):
        try:
            parsed = json.loads(value.strip().lower())
        except ValueError:
            return value
        return parsed if isinstance(parsed, int | float) else value
    return value


_KINDS = {
    name: each.kind
    for table in (PICTURE_FIELDS, REPLY_FIELDS)
    for each in table.values()
    for name in each.names
}
