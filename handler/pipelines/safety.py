"""The safety checker of a pipeline, run on finished pictures instead of within a request's call.

A pipeline runs its checker after decoding, where every other request in flight would wait for it.
So it is taken off the pipelines that the engine serves, and run in the threads that encode, by the
pipeline's own ``run_safety_checker`` on the same pixels: what is flagged, and what is drawn in its
place, is what diffusers gives.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

__all__ = ["SafetyChecker", "has_safety_checker", "verdicts_of"]

_COMPONENT = "safety_checker"
# What outputs of pipelines that check pictures themselves call their verdicts.
_VERDICTS = ("nsfw_content_detected", "nsfw_detected", "watermark_detected")


class SafetyChecker:
    """The checker of pipelines that share one; they have none until `give_back`.

    Safe to call from several threads: a check changes nothing that they share.
    """

    def __init__(self, pipelines: Sequence[Any]) -> None:
        self._owners = [(each, each.safety_checker) for each in pipelines]
        # Of its own, with the checker that the served pipelines are about to lose.
        self._pipeline = copy.copy(pipelines[0])
        self._module: torch.nn.Module = pipelines[0].safety_checker
        for pipeline in pipelines:
            _set(pipeline, None)

    @classmethod
    def take_from(cls, pipelines: Iterable[Any]) -> SafetyChecker | None:
        """The checker of those of `pipelines` that work without it; None where there is none.

        Mutates them: their own calls check nothing any more.
        """
        able = [pipeline for pipeline in pipelines if _can_check_afterwards(pipeline)]
        return cls(able) if able else None

    def check(self, images: Sequence[Image.Image]) -> tuple[list[Image.Image], tuple[bool, ...]]:
        """The pictures as diffusers returns them, and which of them the checker flags.

        Those that it does not flag are the very objects of `images`.
        """
        verdicts: list[bool] = []
        checked: list[Image.Image] = []
        for image in images:  # of different sizes, where they are of several requests
            pixels = np.asarray(image.convert("RGB"), np.float32)[None] / 255
            parameter = next(self._module.parameters())
            with torch.no_grad():
                drawn, *lists = self._pipeline.run_safety_checker(
                    pixels, parameter.device, parameter.dtype
                )
            is_flagged = any(bool(each) for verdict in lists for each in verdict or ())
            verdicts.append(is_flagged)
            checked.append(self._pipeline.numpy_to_pil(drawn)[0] if is_flagged else image)
        return checked, tuple(verdicts)

    def give_back(self) -> None:
        """Let the pipelines check their pictures themselves again."""
        for pipeline, module in self._owners:
            _set(pipeline, module)


def has_safety_checker(pipeline: Any) -> bool:
    """Whether `pipeline` has a checker at present."""
    return getattr(pipeline, _COMPONENT, None) is not None


def verdicts_of(output: Any) -> tuple[bool, ...]:
    """What a pipeline that checked its own pictures says of each; empty where it did not."""
    lists = [verdicts for name in _VERDICTS if (verdicts := getattr(output, name, None))]
    return tuple(any(map(bool, each)) for each in zip(*lists, strict=True))


def _set(pipeline: Any, module: torch.nn.Module | None) -> None:
    """Set the component alone: the pipeline's own way also forgets of which class it was."""
    vars(pipeline)[_COMPONENT] = module


def _can_check_afterwards(pipeline: Any) -> bool:
    """Whether a checker that runs on the finished pictures gives what the pipeline's call would.

    Not where the call has uses of its own for the verdict, nor where it marks pictures after the
    check: DeepFloyd's checker looks for such marks.
    """
    run = getattr(pipeline, "run_safety_checker", None)
    return (
        has_safety_checker(pipeline)
        and isinstance(pipeline.safety_checker, torch.nn.Module)
        and run is not None
        and list(inspect.signature(run).parameters) == ["image", "device", "dtype"]
        and getattr(pipeline, "watermarker", None) is None
        and getattr(pipeline, "feature_extractor", None) is not None
    )
