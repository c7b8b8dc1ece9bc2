"""What each pipeline class needs beside the usual parts and arguments, by the class's name."""

from __future__ import annotations

from collections.abc import Mapping

from tests.support.every_pipeline.families import (
    animate,
    audio,
    cascade,
    controlnets,
    cosmos,
    deepfloyd,
    flux,
    hunyuan,
    image_transformers,
    kandinsky,
    kolors,
    language_vision,
    ltx2,
    qwen,
    research,
    stable_diffusion,
    unconditional,
    video,
    xl,
)
from tests.support.every_pipeline.recipe import Recipe

__all__ = ["RECIPES"]

RECIPES: Mapping[str, Recipe] = {
    **stable_diffusion.RECIPES,
    **xl.RECIPES,
    **controlnets.RECIPES,
    **animate.RECIPES,
    **audio.RECIPES,
    **cascade.RECIPES,
    **hunyuan.RECIPES,
    **qwen.RECIPES,
    **research.RECIPES,
    **cosmos.RECIPES,
    **deepfloyd.RECIPES,
    **language_vision.RECIPES,
    **kolors.RECIPES,
    **ltx2.RECIPES,
    **flux.RECIPES,
    **image_transformers.RECIPES,
    **kandinsky.RECIPES,
    **unconditional.RECIPES,
    **video.RECIPES,
}
