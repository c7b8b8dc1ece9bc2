"""A tiny instance of every component class, by the class's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tests.support.every_pipeline.parts import (
    autoencoders,
    image_transformers,
    language,
    schedulers,
    text,
    unets,
    video_autoencoders,
    video_transformers,
    vision_language,
)

__all__ = ["PARTS"]

PARTS: Mapping[str, Callable[[], Any]] = {
    **autoencoders.PARTS,
    **image_transformers.PARTS,
    **language.PARTS,
    **schedulers.PARTS,
    **text.PARTS,
    **unets.PARTS,
    **video_autoencoders.PARTS,
    **video_transformers.PARTS,
    **vision_language.PARTS,
}
