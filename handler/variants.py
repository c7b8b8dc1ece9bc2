"""Which weights files of a component are one variant; changes with the hub's naming."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["select_weights", "variant_of"]

_NEAREST = {
    "float16": ("fp16", "", "bf16"),
    "bfloat16": ("bf16", "", "fp16"),
    "float32": ("", "bf16", "fp16"),
}
_STEM = r"(?:diffusion_pytorch_model|model|pytorch_model)"
_SHARD = r"(?:-\d{5}-of-\d{5})?"
_INDEX = r"(?:\.index(?:\.(?P<last>[A-Za-z]\w*))?\.json)?"
_NAME = re.compile(
    rf"{_STEM}(?:\.(?P<first>(?!safetensors)[A-Za-z]\w*))?{_SHARD}"
    rf"(?:\.(?P<second>(?!safetensors)[A-Za-z]\w*))?\.safetensors"
    rf"(?:\.(?P<third>(?!index)[A-Za-z]\w*))?{_INDEX}"
)


def variant_of(path: str) -> str | None:
    """Return the variant in the name of a weights file or of its index of shards.

    "" for a plain one, None for unusual names. The hub has it in four places of the name, by age.
    """
    match = _NAME.fullmatch(path.rpartition("/")[2])
    if match is None:
        return None
    return next((variant for variant in match.groups() if variant), "")


def select_weights(paths: Iterable[str], dtype_name: str) -> tuple[list[str], str | None]:
    """Choose one variant out of a component's weights: its files, and its name for diffusers.

    The one nearest to the wanted precision, where there are several. No files where none has a
    usual name.
    """
    variants: dict[str, list[str]] = {}
    for path in sorted(paths):
        variant = variant_of(path)
        if variant is not None:
            variants.setdefault(variant, []).append(path)
    for variant in (*_NEAREST[dtype_name], *sorted(variants)):
        if variant in variants:
            return variants[variant], variant or None
    return [], None
