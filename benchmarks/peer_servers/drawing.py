"""What the rebuilt servers share: a pipeline, and a request's fields as its arguments."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

SETTINGS = ("height", "width", "num_inference_steps", "guidance_scale")


def open_pipeline(folder: str, precision: str) -> Any:
    """The pipeline in `folder`, as diffusers loads it in ``float32`` or ``bfloat16``."""
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, precision))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def arguments_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """All of a request but its prompt and its seed: what can be told to a call once."""
    return {name: fields[name] for name in SETTINGS if name in fields}


def generator_of(fields: Mapping[str, Any]) -> torch.Generator:
    """Noise by the request's seed."""
    return torch.Generator().manual_seed(int(fields.get("seed", 0)))


def draw_together(pipeline: Any, batch: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """Draw a batch: by one call where size, steps and guidance are the same: a call has one each.

    Returns: a PNG file for each, in their order.
    """
    together: dict[tuple[Any, ...], list[int]] = {}
    for index, fields in enumerate(batch):
        together.setdefault(tuple(sorted(arguments_of(fields).items())), []).append(index)
    pictures: dict[int, bytes] = {}
    for indices in together.values():
        members = [batch[index] for index in indices]
        drawn = pipeline(
            [fields["prompt"] for fields in members],
            generator=[generator_of(fields) for fields in members],
            **arguments_of(members[0]),
        ).images
        pictures |= {i: png_of(picture) for i, picture in zip(indices, drawn, strict=True)}
    return [pictures[index] for index in range(len(batch))]


def png_of(picture: Any) -> bytes:
    """A picture as a PNG file."""
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()
