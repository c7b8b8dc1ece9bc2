"""The table of OpenAI's own fields: what a request may say beside the fields of handler.api.schema.

Fields that are in neither are passed on: an instance refuses those that it does not know, and says
what they could have meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from gateway.settings import QUALITIES
from handler.api.schema import Field, Kind

__all__ = ["EDIT_FIELDS", "OPENAI_FIELDS", "WITHOUT_MEANING", "field_table"]

_IMAGE_FORMATS = ("png", "jpeg", "webp")
_MAX_IMAGES = 10
_MAX_PARTIAL_IMAGES = 3


def _choices(*names: str) -> Mapping[str, str]:
    return {name: name for name in names}


def field_table(*fields: Field) -> Mapping[str, Field]:
    """Fields by their names."""
    return MappingProxyType({each.name: each for each in fields})


OPENAI_FIELDS: Mapping[str, Field] = field_table(
    Field(
        name="model",
        kind=Kind.TEXT,
        minimum=1,
        maximum=200,
        default_note="the first instance's",
        meaning="which model draws: one of GET /v1/models",
    ),
    Field(
        name="n",
        # What other APIs call it: an instance is always asked for one picture.
        aliases=("num_images", "num_images_per_prompt", "batch_size", "samples", "num_outputs"),
        kind=Kind.INTEGER,
        minimum=1,
        maximum=_MAX_IMAGES,
        default=1,
        meaning="pictures of this prompt; picture k has the seed + k",
    ),
    Field(
        name="size",
        kind=Kind.TEXT,
        minimum=1,
        maximum=20,
        default="auto",
        meaning="`WIDTHxHEIGHT` in pixels, or `auto`: the model's own",
    ),
    Field(
        name="quality",
        kind=Kind.CHOICE,
        choices=_choices("auto", *QUALITIES),
        default="auto",
        meaning="how many steps are taken, where num_inference_steps does not say it",
    ),
    Field(
        name="output_format",
        kind=Kind.CHOICE,
        choices={**_choices(*_IMAGE_FORMATS), "jpg": "jpeg"},
        default="png",
        meaning="how the picture is encoded",
    ),
    Field(
        name="output_compression",
        kind=Kind.INTEGER,
        maximum=100,
        default_note="the instance's jpeg_quality",
        meaning="quality of JPEG and WebP",
    ),
    Field(
        name="response_format",
        kind=Kind.CHOICE,
        choices=_choices("b64_json", "url"),
        default="b64_json",
        meaning="the picture itself, or where it can be fetched for a while",
    ),
    Field(
        name="background",
        kind=Kind.CHOICE,
        choices=_choices("auto", "opaque"),
        default="auto",
        meaning="always opaque",
    ),
    Field(
        name="moderation",
        kind=Kind.CHOICE,
        choices=_choices("auto", "low"),
        default="auto",
        meaning="without effect",
    ),
    Field(name="user", kind=Kind.TEXT, maximum=512, meaning="without effect"),
    Field(name="safety_identifier", kind=Kind.TEXT, maximum=512, meaning="comes back in the reply"),
    Field(
        name="stream",
        kind=Kind.BOOLEAN,
        default=False,
        meaning="reply with events: partial images, then the picture",
    ),
    Field(
        name="partial_images",
        kind=Kind.INTEGER,
        maximum=_MAX_PARTIAL_IMAGES,
        default=0,
        meaning="how many small previews a stream has",
    ),
)
EDIT_FIELDS: Mapping[str, Field] = field_table(
    Field(
        name="input_fidelity",
        kind=Kind.CHOICE,
        choices=_choices("low"),
        default="low",
        meaning="without effect; strength says how far the picture may change",
    ),
)
WITHOUT_MEANING: Mapping[str, str] = {
    "request_id": "send it as the header X-Request-Id",
    "cancel": "a request is cancelled by DELETE /v1/requests/ID",
    "describe": "GET /v1/fields says what a model has",
    "previews": "send partial_images with stream",
    "instances": "it is KServe's, of /v1/models/NAME:predict; a request here has one prompt",
    "style": "say it in the prompt",
    "complexity": "diffusion models have none; leave it out",
    "frame_count": "pictures have one frame; leave it out",
    "frame_duration_ms": "pictures have one frame; leave it out",
    "svg": "pictures are png, jpeg or webp; leave it out",
    "markup": "send the area to change as mask",
}
"""Fields of OpenAI's, and of the instances', that cannot be sent here, and what to do instead."""
