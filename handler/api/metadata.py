"""The metadata embedded in a picture: its request, in the forms that image tools read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from handler.api.request import GenerationRequest
from handler.api.sampler_table import SCHEDULES
from handler.api.schema import PICTURE_FIELDS

__all__ = ["ImageMetadata", "parameters_line", "request_parameters", "to_json"]


@dataclass(frozen=True, slots=True)
class ImageMetadata:
    """The request behind one picture, the seed of that picture, and the model's name."""

    request: GenerationRequest
    seed: int
    model_name: str
    is_flagged: bool = False
    """Whether the safety checker flags the picture."""


def request_parameters(request: GenerationRequest) -> dict[str, object]:
    """The request as JSON values, without its seed: that differs from picture to picture.

    The pictures that it was drawn from are not among them.
    """
    values = request.values()
    if not request.pictures:
        del values["task"]  # it says nothing
    return {name: value for name, value in values.items() if PICTURE_FIELDS[name].is_recorded}


def parameters_line(metadata: ImageMetadata) -> str:
    """Prompt, negative prompt and settings, laid out as AUTOMATIC1111's web UI does."""
    request = metadata.request
    sigmas = request.extra.get("sigmas")
    written = {
        "sigmas": SCHEDULES[sigmas].name if isinstance(sigmas, str) else None,
        "seed": metadata.seed,
        "height": f"{request.width}x{request.height}",
    }
    settings = {
        label: written.get(name, value)
        for name, value in request.values().items()
        if (label := PICTURE_FIELDS[name].label)
    }
    if isinstance(loras := settings.get("Lora"), Mapping):
        settings["Lora"] = ", ".join(f"{k}: {_text(v)}" for k, v in loras.items()) or None
    settings["Model"] = metadata.model_name or None
    settings["Content flagged"] = "true" if metadata.is_flagged else None
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(", ".join(f"{k}: {_text(v)}" for k, v in settings.items() if v is not None))
    return "\n".join(lines)


def to_json(metadata: ImageMetadata) -> str:
    """Everything, as one line of ASCII; of pictures that were sent, their hashes."""
    hashes = {f"{n}_sha256": sent.sha256 for n, sent in metadata.request.pictures.items()}
    return json.dumps(
        {
            **request_parameters(metadata.request),
            **hashes,
            "seed": metadata.seed,
            "model": metadata.model_name,
            **({"content_flagged": True} if metadata.is_flagged else {}),
        }
    )


def _text(value: object) -> str:
    """Write a setting; text is quoted where the line's own punctuation would break it."""
    if isinstance(value, str) and set(value) & set(',:\n"'):
        return json.dumps(value, ensure_ascii=False)
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)
