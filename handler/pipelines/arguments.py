"""The keyword arguments that a request becomes for the pipeline's ``__call__``."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image

from handler.api.request import GenerationRequest
from handler.api.schema import PICTURE_FIELDS

__all__ = ["name_control_picture", "pipeline_arguments"]


def pipeline_arguments(
    request: GenerationRequest,
    parameters: frozenset[str],
    pictures: Mapping[str, Image.Image] = MappingProxyType({}),
) -> dict[str, Any]:
    """The keyword arguments of the pipeline's ``__call__``, those it has of `parameters`.

    `pictures` are the decoded ones, by field. What was neither sent nor configured is left out:
    the pipeline's own default is not always None.
    Every picture has a generator of its own, on the CPU: the same seed gives the same noise on any
    device, and in company as alone.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in request.seeds]
    arguments: dict[str, Any] = {
        argument: value
        for name, value in request.values().items()
        if value is not None and (argument := PICTURE_FIELDS[name].argument) is not None
    }
    arguments["generator"] = generators if request.num_images > 1 else generators[0]
    arguments["output_type"] = "pil"
    arguments |= name_control_picture(pictures, parameters)
    return {name: value for name, value in arguments.items() if name in parameters}


def name_control_picture(
    pictures: Mapping[str, Image.Image], parameters: frozenset[str]
) -> Mapping[str, Image.Image]:
    """`pictures` by the parameters' names: a ControlNet's is `image` where there is no other."""
    if "control_image" in pictures and "control_image" not in parameters:
        return {"image": pictures["control_image"]}
    return pictures
