"""Pipelines and requests for tests that run on any device, and how far pictures are apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from handler.engine import InFlightEngine
from handler.engine.ticket import Ticket
from scripts.repository import REPOSITORY
from tests.support.pipelines import build, example_kwargs, image_of

__all__ = [
    "BOUNDS",
    "PIPELINES",
    "difference",
    "draw_alone",
    "draw_together",
    "kwargs_of",
    "pipeline_of",
]

DEMO = "demo"
PIPELINES = ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", DEMO)

# Of pixels in [0, 1], between a request in flight and the same alone on the same device.
BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2}


def pipeline_of(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    if name != DEMO:
        return build(name).to(device, dtype)
    pipeline = DiffusionPipeline.from_pretrained(REPOSITORY / "demo" / "pipeline", dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def kwargs_of(name: str, index: int, **changes: Any) -> dict[str, Any]:
    """Arguments of request `index`; five of them differ in steps, guidance and prompt."""
    if name != DEMO:
        return {**example_kwargs(name, index), **changes}
    colour, background = (
        ("red", "cyan"),
        ("blue", "white"),
        ("green", "yellow"),
        ("pink", "black"),
        ("black", "pink"),
    )[index % 5]
    return {
        "prompt": f"a large {colour} circle on a {background} background",
        "num_inference_steps": (6, 9, 5, 8, 7)[index % 5],
        "guidance_scale": (7.5, 1.0, 4.0, 1.0, 2.5)[index % 5],
        "height": 256,
        "width": 256,
        "generator": torch.Generator().manual_seed(1000 + index),
        "output_type": "np",
        **changes,
    }


def draw_alone(pipeline: Any, requests: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
    """The pictures of the pipeline called directly, with no engine on it."""
    return [image_of(pipeline(**request)) for request in requests]


def draw_together(engine: InFlightEngine, requests: Sequence[dict[str, Any]]) -> list[Ticket]:
    """Submit two, then one every other tick; step until all have ended."""
    tickets = [engine.submit(request) for request in requests[:2]]
    for request in requests[2:]:
        engine.step()
        engine.step()
        tickets.append(engine.submit(request))
    engine.run()
    return tickets


def difference(ours: Any, theirs: torch.Tensor) -> float:
    image = image_of(ours.result()) if isinstance(ours, Ticket) else ours
    assert image.shape == theirs.shape
    return float((image - theirs).abs().max())
