"""What one call of a pipeline occupies while in flight, and the minimum of its forwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from PIL import Image

from handler.pipelines.signature import call_defaults

__all__ = ["Cost", "estimate_cost", "least_forwards"]

# Arguments that leave steps out, or say in another way how many there are.
_SHORTENING = ("denoising_end", "denoising_start", "sigmas", "timesteps")
# How many times as high and wide as the picture that they are given these classes draw.
_ENLARGING = {
    "IFSuperResolutionPipeline": 4,
    "LDMSuperResolutionPipeline": 4,
    "StableDiffusionLatentUpscalePipeline": 2,
    "StableDiffusionUpscalePipeline": 4,
}


@dataclass(frozen=True, slots=True)
class Cost:
    """What one request occupies while it is in flight."""

    rows: int
    """Rows of the denoiser's batch: images, doubled by classifier-free guidance."""
    pixels: int
    """Pixels of all its images together."""
    image_pixels: int = 0
    """Pixels of its largest image; a row takes the longer the more there are."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.rows + other.rows,
            self.pixels + other.pixels,
            max(self.image_pixels, other.image_pixels),
        )


def estimate_cost(pipeline: Any, kwargs: Mapping[str, Any]) -> Cost:
    """What a call with `kwargs` will occupy, as far as its arguments tell.

    Read from the names that diffusers uses throughout; the engine corrects the rows when the
    denoiser is first called. Guidance above 1 counts double, also where a model takes it embedded.

    Raises:
        ValueError: a size or a number of pictures is below one.
    """
    given = {**call_defaults(pipeline), **{k: v for k, v in kwargs.items() if v is not None}}

    def number(name: str, default: float) -> float:
        value = given.get(name)
        if not isinstance(value, (int, float)):
            return default
        if value < 1 and name != "guidance_scale":
            raise ValueError(f"{name} is {value}; it is at least 1")
        return value

    prompts = max(
        (_batch_size(given.get(name)) for name in ("prompt", "prompt_embeds", "image_embeds")),
        default=1,
    )
    images = max(1, prompts) * int(number("num_images_per_prompt", 1))
    native = _native_size_px(pipeline)
    drawn_on = _image_size_px(given.get("image")) or (native, native)
    height, width = number("height", drawn_on[0]), number("width", drawn_on[1])
    guided = 2 if number("guidance_scale", 1.0) > 1.0 else 1
    image_pixels = int(height * width) * _ENLARGING.get(type(pipeline).__name__, 1) ** 2
    return Cost(images * guided, images * image_pixels, image_pixels)


def least_forwards(pipeline: Any, kwargs: Mapping[str, Any]) -> int:
    """The minimum number of denoiser calls of a call with `kwargs`; 0 if unknown.

    A picture to start from leaves out the first steps; `strength` says how many are done.
    """
    given = {**call_defaults(pipeline), **{k: v for k, v in kwargs.items() if v is not None}}
    num_steps, strength = given.get("num_inference_steps"), given.get("strength")
    if not isinstance(num_steps, int) or any(given.get(name) is not None for name in _SHORTENING):
        return 0
    if not isinstance(strength, (int, float)):
        return num_steps
    # As diffusers rounds it; its newer pipelines do a step more.
    return max(0, min(int(num_steps * strength), num_steps))


def _batch_size(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return int(value.shape[0]) if value.ndim else 1
    if isinstance(value, Sequence) and not isinstance(value, str):
        return len(value)
    return 1


def _image_size_px(image: Any) -> tuple[int, int] | None:
    """Height and width of a picture that a call starts from; of the first of several."""
    if isinstance(image, (list, tuple)) and image:
        return _image_size_px(image[0])
    if isinstance(image, Image.Image):
        return image.height, image.width
    if isinstance(image, torch.Tensor) and image.ndim >= 2:
        return int(image.shape[-2]), int(image.shape[-1])
    if isinstance(image, numpy.ndarray) and image.ndim >= 3:
        return int(image.shape[-3]), int(image.shape[-2])
    return None


def _native_size_px(pipeline: Any) -> int:
    """The side of the square picture that the pipeline draws when asked for no size."""
    for name in ("unet", "transformer", "prior"):
        config = getattr(getattr(pipeline, name, None), "config", None)
        sample_size = getattr(config, "sample_size", None)
        if isinstance(sample_size, int):
            return sample_size * int(getattr(pipeline, "vae_scale_factor", 8))
    default = getattr(pipeline, "default_sample_size", 64)
    return int(default) * int(getattr(pipeline, "vae_scale_factor", 8))
