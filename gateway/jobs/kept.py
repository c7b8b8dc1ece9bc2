"""What is kept of a job's request as JSON: what is drawn, and what its replies need."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

from gateway.image_request import ImageRequest
from gateway.model_config import ModelConfig
from gateway.routing import Model

__all__ = ["Summary", "keep_request", "keep_summary", "read_summary", "to_draw"]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a job's replies need to say of its request."""

    num_images: int
    seed: object
    output_format: str
    response_format: str
    base_url: str
    """How its client reached the gateway, for links."""


def keep_summary(summary: Summary) -> str:
    """What `read_summary` reads."""
    return json.dumps({each.name: getattr(summary, each.name) for each in fields(summary)})


def read_summary(text: str) -> Summary:
    """The summary of a job that is kept."""
    return Summary(**json.loads(text))


def to_draw(kept: bytes) -> ImageRequest:
    """What a job asks for, its seed included."""
    content: dict[str, Any] = json.loads(kept)
    model = Model(content.pop("model"), ModelConfig(), is_ready=False, created_s=0)
    return ImageRequest(model=model, **content)


def keep_request(request: ImageRequest) -> bytes:
    """What `to_draw` reads."""
    content = {each.name: getattr(request, each.name) for each in fields(request)}
    content["model"] = request.model.name
    return json.dumps(content).encode("ascii")
