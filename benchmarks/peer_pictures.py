"""Whether what a server drew is a picture, and the one that was asked for."""

from __future__ import annotations

import io
from collections.abc import Mapping

import httpx2
import numpy as np
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from benchmarks.peer_requests import DEFAULTS, PARAMETERS, Fields
from benchmarks.peer_systems import PIPELINE, Peer, PeerError, Serving

__all__ = [
    "CLOSE_LEVELS",
    "difference_of",
    "expected_pictures",
    "flaw_of",
    "is_same",
    "mean_levels",
    "parameters_of",
]

# Of 255: what rounding leaves between two ways to compute the same picture.
SAME_LEVELS = 2.0
# On average over a picture: bfloat16 leaves about one, another seed of this prompt fifteen.
CLOSE_LEVELS = 4.0
# The standard deviation of a picture's levels: black has 0, the demo's pictures have 30 and more.
FLAT_LEVELS = 2.0


def flaw_of(content: bytes, fields: Fields) -> str | None:
    """What is wrong with a reply to `fields`; None where it is a picture of the right size."""
    try:
        picture = Image.open(io.BytesIO(content)).convert("RGB")
    except (UnidentifiedImageError, OSError):
        return "no picture"
    if picture.size != (fields["width"], fields["height"]):
        return "another size"
    levels = np.asarray(picture, dtype=np.float32)
    return "one colour" if levels.std(axis=(0, 1)).max() < FLAT_LEVELS else None


def difference_of(peer: Peer, serving: Serving, expected: Mapping[str, Image.Image]) -> float:
    """How far a picture is from diffusers' own in float32, on average, of 255.

    Raises:
        PeerError: there is none, or it is another picture.
    """
    response = _ask(peer, serving, PARAMETERS["seed 7"])
    if response.status_code != 200:
        raise PeerError(f"it answers {response.status_code}: {response.text[:200]}")
    if flaw := flaw_of(response.content, DEFAULTS):
        raise PeerError(f"it draws {flaw}")
    picture = Image.open(io.BytesIO(response.content)).convert("RGB")
    levels = mean_levels(picture, expected["seed 7"])
    if levels > CLOSE_LEVELS:
        raise PeerError(f"it draws another picture: {levels:.1f} levels away on average")
    return levels


def parameters_of(
    peer: Peer, serving: Serving, expected: Mapping[str, Image.Image]
) -> dict[str, str]:
    """For each of `PARAMETERS`: ``honoured``, ``ignored`` or ``refused (status)``."""
    told = {}
    for name, fields in PARAMETERS.items():
        response = _ask(peer, serving, fields)
        if response.status_code != 200:
            told[name] = f"refused ({response.status_code})"
            continue
        picture = Image.open(io.BytesIO(response.content)).convert("RGB")
        told[name] = "honoured" if is_same(picture, expected[name]) else "ignored"
    return told


def _ask(peer: Peer, serving: Serving, fields: Fields) -> httpx2.Response:
    asked = peer.ask({**DEFAULTS, **fields})
    url = serving.url + asked.path
    # Nothing is encrypted here, and reading certificates takes longer than most of it.
    told = dict(asked.headers)
    return httpx2.post(url, json=asked.body, headers=told, timeout=600, verify=False)


def expected_pictures() -> dict[str, Image.Image]:
    """What diffusers itself draws for each of `PARAMETERS`."""
    pipeline = DiffusionPipeline.from_pretrained(PIPELINE)
    pipeline.set_progress_bar_config(disable=True)
    own = pipeline.scheduler
    drawn = {}
    for name, fields in PARAMETERS.items():
        arguments = {**DEFAULTS, **fields}
        generator = torch.Generator().manual_seed(arguments.pop("seed"))
        pipeline.scheduler = own
        if arguments.pop("scheduler", None):
            pipeline.scheduler = DPMSolverMultistepScheduler.from_config(own.config)
        drawn[name] = pipeline(**arguments, generator=generator).images[0].convert("RGB")
    for name, picture in drawn.items():
        if name != "seed 7" and is_same(picture, drawn["seed 7"]):
            raise ValueError(f"{name} changes nothing, so nobody could be seen to ignore it")
    return drawn


def is_same(ours: Image.Image, theirs: Image.Image) -> bool:
    """Whether two pictures are equal up to rounding."""
    return ours.size == theirs.size and bool(np.max(_levels(ours, theirs)) <= SAME_LEVELS)


def mean_levels(ours: Image.Image, theirs: Image.Image) -> float:
    """How far two pictures of one size are from each other on average, of 255."""
    return float(np.mean(_levels(ours, theirs)))


def _levels(ours: Image.Image, theirs: Image.Image) -> NDArray[np.float64]:
    first, second = (np.asarray(each, dtype=np.float64) for each in (ours, theirs))
    return np.absolute(first - second)
