"""What a finished request hands to the reply: plain values, no tensors, no TorchServe."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from handler.api.request import GenerationRequest

__all__ = ["Result", "Timings"]


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds a request spent: waiting for admission, denoising, and decoding its latents."""

    queue_s: float
    denoise_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class Result:
    """The pictures of one request; picture k was drawn with the seed ``request.seed + k``."""

    request: GenerationRequest
    images: tuple[Image.Image, ...]
    timings: Timings
    warnings: tuple[str, ...] = ()
    flagged: tuple[bool, ...] = ()
    """Whether the safety checker flags each picture; empty where none looked at them."""
