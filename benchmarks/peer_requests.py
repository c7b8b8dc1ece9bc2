"""What `benchmarks.peers` asks the servers for."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from benchmarks.traffic import CLASSES, mixed_wishes

__all__ = ["DEFAULTS", "MIXES", "PARAMETERS", "SHORT_STEPS", "SIDES_PX", "Fields", "mixes"]

Fields = Mapping[str, Any]
"""A request, by the names of diffusers' arguments, beside `seed`."""

PROMPT = "a large red heart on a cyan background"
SHORT_STEPS = 20

PARAMETERS: Mapping[str, Fields] = {
    "seed 7": {"seed": 7},
    "seed 0": {"seed": 0},
    "size": {"seed": 7, "height": 640, "width": 512},
    "steps": {"seed": 7, "num_inference_steps": 9},
    "guidance": {"seed": 7, "guidance_scale": 1.5},
    "negative prompt": {"seed": 7, "negative_prompt": "a red heart"},
    "scheduler": {"seed": 7, "scheduler": "DPMSolverMultistepScheduler"},
}
"""What is asked beside the prompt, 12 steps, guidance 4 and 512 px where nothing else is said."""
DEFAULTS: Fields = {
    "prompt": PROMPT,
    "height": 512,
    "width": 512,
    "num_inference_steps": 12,
    "guidance_scale": 4.0,
}

MIXES = ("three classes", "all different")
_DIFFERENT_PX = (256, 384, 512, 640, 768)
SIDES_PX = tuple(sorted({*_DIFFERENT_PX, *(wish.size_px for wish in CLASSES)}))
"""The squares of both mixes."""


def mixes(count: int) -> dict[str, list[Fields]]:
    """The two kinds of traffic: our load test's, and one in which hardly two ask for the same."""
    ours: list[Fields] = [
        {
            "prompt": wish.prompt,
            "height": wish.size_px,
            "width": wish.size_px,
            "num_inference_steps": wish.num_steps,
            "guidance_scale": wish.guidance,
            "seed": wish.seed,
        }
        for wish in mixed_wishes(count)
    ]
    draw = random.Random(0)
    mixed: list[Fields] = []
    for number in range(count):
        side = draw.choice(_DIFFERENT_PX)
        fields = {"height": side, "width": side, "num_inference_steps": draw.randint(10, 50)}
        scale = draw.choice((1.5, 3.0, 5.0, 7.5))
        mixed.append({"prompt": PROMPT, **fields, "guidance_scale": scale, "seed": number})
    return dict(zip(MIXES, (ours, mixed), strict=True))
