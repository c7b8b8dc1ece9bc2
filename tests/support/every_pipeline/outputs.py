"""The numbers in a pipeline's output, and how far two outputs are apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy
import torch
from PIL import Image

__all__ = ["arrays_of", "difference", "is_finite"]

Arrays = dict[str, numpy.ndarray]


def arrays_of(output: Any) -> Arrays:
    """Every array in `output`, by where it stands; pictures in [0, 1], text as its characters."""
    return dict(_walk(output, "output"))


def _walk(value: Any, path: str) -> Iterator[tuple[str, numpy.ndarray]]:
    if isinstance(value, torch.Tensor):
        yield path, value.detach().to(torch.float64).numpy(force=True)
    elif isinstance(value, numpy.ndarray) and value.dtype.kind in "biuf":
        scale = 255.0 if value.dtype == numpy.uint8 else 1.0
        yield path, value.astype(numpy.float64) / scale
    elif isinstance(value, Image.Image):
        yield path, numpy.asarray(value, dtype=numpy.float64) / 255.0
    elif isinstance(value, str):
        yield path, numpy.array([ord(character) for character in value], dtype=numpy.float64)
    elif isinstance(value, (bool, int, float)):
        yield path, numpy.array(float(value))
    elif isinstance(value, Mapping):
        for key, member in value.items():
            yield from _walk(member, f"{path}.{key}")
    elif isinstance(value, (list, tuple, numpy.ndarray)):
        for place, member in enumerate(value):
            yield from _walk(member, f"{path}[{place}]")
    elif dataclasses.is_dataclass(value):
        for member in dataclasses.fields(value):
            yield from _walk(getattr(value, member.name), f"{path}.{member.name}")
    elif value is not None:
        raise TypeError(f"{path} is a {type(value).__name__}, which has no numbers to compare")


def is_finite(arrays: Arrays) -> bool:
    return all(bool(numpy.isfinite(array).all()) for array in arrays.values())


def difference(left: Arrays, right: Arrays) -> float:
    """The largest difference of any two entries, in units of the array's largest entry or of one.

    Pictures are in [0, 1], so that theirs is of pixels; embeddings and latents may be of any
    scale. Infinite where shapes differ.
    """
    if left.keys() != right.keys():
        return float("inf")
    return max((_difference(left[path], right[path]) for path in left), default=float("inf"))


def _difference(left: numpy.ndarray, right: numpy.ndarray) -> float:
    if left.shape != right.shape:
        return float("inf")
    if not left.size:
        return 0.0
    gap = float(numpy.abs(left - right).max())
    scale = max(1.0, float(numpy.abs(right).max()))
    return float("inf") if numpy.isnan(gap) else gap / scale
