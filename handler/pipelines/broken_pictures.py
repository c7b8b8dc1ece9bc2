"""Pictures that are not finite: found before they become pixels, where a NaN would turn black.

Pipelines hand what they decoded to their image processor, or to ``numpy_to_pil``. Both are watched
on a request's own view of the pipeline, so that a broken picture ends that request alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from handler.errors import PipelineFailed

__all__ = ["check_decoded", "watch_pictures"]


def watch_pictures(view: Any) -> None:
    """Make `view` raise `PipelineFailed` where a picture of its own is not finite.

    Mutates `view`; its image processor is replaced by a copy.
    """
    processor: Any = getattr(view, "image_processor", None)
    if hasattr(processor, "postprocess"):
        processor = copy.copy(processor)
        processor.postprocess = _checked(processor.postprocess)
        view.image_processor = processor
    if hasattr(view, "numpy_to_pil"):
        view.numpy_to_pil = _checked(view.numpy_to_pil)


def check_decoded(output: Any) -> None:
    """Check the output of a decoder, a tensor or an object that holds one.

    Raises:
        PipelineFailed: it holds a NaN or an infinite number.
    """
    for tensor in _tensors(output):
        if not _is_finite(tensor):
            raise PipelineFailed(_message(str(tensor.dtype).removeprefix("torch.")))


def _checked(convert: Callable[..., Any]) -> Callable[..., Any]:
    def checked(images: Any, *args: Any, **kwargs: Any) -> Any:
        check_decoded(images)
        return convert(images, *args, **kwargs)

    return checked


def _tensors(output: Any) -> Iterator[Any]:
    if isinstance(output, (torch.Tensor, np.ndarray)):
        yield output
    elif isinstance(output, (tuple, list)):
        yield from (each for each in output if isinstance(each, (torch.Tensor, np.ndarray)))
    elif hasattr(output, "sample"):
        yield from _tensors(output.sample)


def _is_finite(pixels: torch.Tensor | np.ndarray[Any, Any]) -> bool:
    if isinstance(pixels, torch.Tensor):
        return not pixels.is_floating_point() or bool(torch.isfinite(pixels).all())
    return bool(np.isfinite(pixels).all())


def _message(dtype: str) -> str:
    return (
        f"the picture is not finite: numbers overflowed in the pipeline ({dtype}). What the"
        " operator can do: draw in another precision (make archive DTYPE=float32 or"
        " DTYPE=bfloat16, or dtype in model-config.yaml), pack another VAE (--component vae=PATH),"
        ' or set "force_upcast": true in the config.json of the VAE'
    )
