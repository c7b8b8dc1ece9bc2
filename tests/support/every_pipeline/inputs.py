"""What a call of a pipeline is given: seeded pictures, videos and numbers, by argument name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy
import torch
from PIL import Image

from tests.support.tiny_models import MAX_TOKENS, SIDE_PX

__all__ = ["USUAL", "Inputs", "Value"]

NUM_FRAMES = 5  # one and a multiple of four, as video autoencoders want

_T = TypeVar("_T")


@dataclass
class Inputs:
    """The source of one request's arguments.

    `index` chooses prompt, steps, guidance and pictures, `seed` the noise.
    """

    index: int
    seed: int
    _numbers: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._numbers = torch.Generator().manual_seed(2000 + self.index)

    def generator(self) -> torch.Generator:
        """A fresh generator of the request's noise."""
        return torch.Generator().manual_seed(self.seed)

    def pick(self, *values: _T) -> _T:
        """One of `values`, by the request's index."""
        return values[self.index % len(values)]

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._numbers)

    def rand(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self._numbers)

    def picture(self, side_px: int = SIDE_PX) -> Image.Image:
        pixels = (self.rand(side_px, side_px, 3) * 255).to(torch.uint8)
        return Image.fromarray(pixels.numpy())

    def mask(self, side_px: int = SIDE_PX) -> Image.Image:
        """A black and white picture whose left half, about, is white."""
        pixels = numpy.zeros((side_px, side_px), dtype=numpy.uint8)
        pixels[:, : side_px // 2 + 2 * self.pick(-2, 0, 2)] = 255
        return Image.fromarray(pixels)

    def video(self, num_frames: int = NUM_FRAMES, side_px: int = SIDE_PX) -> list[Image.Image]:
        return [self.picture(side_px) for _ in range(num_frames)]


Value = Any | Callable[[Inputs], Any]

# The first two are of one length, for pipelines that pad a prompt no further than it is.
PROMPTS = ("a red boat", "a cat, hat", "a blue house by the sea", "fog")
NEGATIVE_PROMPTS = ("dog", "sky", "", "dog")

# Given to every pipeline that has such an argument, unless its recipe says otherwise.
USUAL: Mapping[str, Callable[[Inputs], Any]] = {
    "prompt": lambda inputs: inputs.pick(*PROMPTS),
    "negative_prompt": lambda inputs: inputs.pick(*NEGATIVE_PROMPTS),
    "num_inference_steps": lambda inputs: inputs.pick(2, 3, 3),
    "guidance_scale": lambda inputs: inputs.pick(3.0, 5.0, 1.0),
    "true_cfg_scale": lambda inputs: inputs.pick(3.0, 5.0, 1.0),
    "height": lambda inputs: SIDE_PX,
    "width": lambda inputs: SIDE_PX,
    "num_frames": lambda inputs: NUM_FRAMES,
    "generator": Inputs.generator,
    "output_type": lambda inputs: "np",
    "max_sequence_length": lambda inputs: MAX_TOKENS,
    "image": Inputs.picture,
    "mask_image": Inputs.mask,
    "control_image": Inputs.picture,
    "control_mask": Inputs.mask,
    "video": Inputs.video,
    "strength": lambda inputs: 0.9,
    "clean_caption": lambda inputs: False,
    "use_resolution_binning": lambda inputs: False,
}
