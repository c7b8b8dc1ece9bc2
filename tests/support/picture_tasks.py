"""Tiny pipelines for every task of a family, and calls of them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from PIL import Image

from handler.pipelines.arguments import name_control_picture
from handler.pipelines.tasks import pictures_of, pipelines_of, split_name
from tests.support.drawings import drawing
from tests.support.pipelines import SIDE_PX, build, example_kwargs
from tests.support.tiny_models import make_every_parameter_count

__all__ = ["FAMILIES", "make_controlnet", "task_kwargs", "task_pipelines"]

FAMILIES = {
    "stable_diffusion": "stable_diffusion",
    "stable_diffusion_xl": "stable_diffusion_xl",
    # Inpainting takes no other number of channels.
    "stable_diffusion_3_16": "stable_diffusion_3",
    "flux": "flux",
}
"""Families by the name of their tiny pipeline, and what their calls are like."""

STRENGTHS = (0.8, 1.0, 0.5, 0.9)


def task_pipelines(name: str, controls: tuple[str, ...] = ("edges",)) -> dict[str, Any]:
    """The pipelines of all tasks of one tiny model, with ControlNets of these names."""
    pipeline = build(name)
    return pipelines_of(pipeline, {each: make_controlnet(pipeline, each) for each in controls})


def make_controlnet(pipeline: Any, name: str = "edges") -> Any:
    """A tiny ControlNet that goes with `pipeline`, its weights random by its `name`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(name.encode()))
        if hasattr(pipeline, "unet"):
            controlnet: Any = diffusers.ControlNetModel.from_unet(
                pipeline.unet,
                conditioning_embedding_out_channels=(4, 8),
                load_weights_from_unet=False,
            )
            with torch.no_grad():  # so that the picture counts for something
                controlnet.controlnet_cond_embedding.conv_in.weight.mul_(8)
        else:
            kind = {
                "SD3Transformer2DModel": diffusers.SD3ControlNetModel,
                "FluxTransformer2DModel": diffusers.FluxControlNetModel,
            }[type(pipeline.transformer).__name__]
            known = inspect.signature(kind.__init__).parameters.keys() - {"self"}
            config = {k: v for k, v in pipeline.transformer.config.items() if k in known}
            with warnings.catch_warnings():  # of their own imports (diffusers 0.42)
                warnings.simplefilter("ignore")
                controlnet = kind(**config)
        make_every_parameter_count(controlnet)
    return controlnet.eval()


def task_kwargs(
    pipelines: Mapping[str, Any], family: str, name: str, index: int, **changes: Any
) -> dict[str, Any]:
    """The arguments of example call `index` of the pipeline `name`; pictures differ by index."""
    drawings = {
        "image": drawing(100 + index),
        "mask_image": _mask(index),
        "control_image": drawing(200 + index),
    }
    pictures = {each: drawings[each] for each in pictures_of(split_name(name)[0])}
    parameters = frozenset(inspect.signature(type(pipelines[name]).__call__).parameters)
    kwargs = {
        **example_kwargs(family, index),
        "strength": STRENGTHS[index % len(STRENGTHS)],
        "controlnet_conditioning_scale": 0.5 + 0.25 * (index % 2),
        **name_control_picture(pictures, parameters),
        **changes,
    }
    return {key: value for key, value in kwargs.items() if key in parameters}


def _mask(index: int) -> Image.Image:
    """White where something is drawn anew: on another side for each `index`."""
    mask = Image.new("L", (SIDE_PX, SIDE_PX), 0)
    half = SIDE_PX // 2
    left, top = ((0, 0), (half, 0), (0, half), (half, half))[index % 4]
    mask.paste(255, (left, top, left + half, top + SIDE_PX - half))
    return mask
