"""Chooses the weights files of a component that are loaded, by the names that the hub uses."""

from __future__ import annotations

import re
from collections.abc import Iterable

from handler.errors import ArchiveError

__all__ = ["select_weights", "variant_of"]

_NEAREST = {
    "float16": ("fp16", "", "bf16"),
    "bfloat16": ("bf16", "", "fp16"),
    "float32": ("", "bf16", "fp16"),
}
_STEM = r"(?P<stem>diffusion_pytorch_model|model|pytorch_model)"
_SHARD = r"(?:-\d{5}-of-(?P<shards>\d{5}))?"
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
    return next(
        (match[place] for place in ("first", "second", "third", "last") if match[place]), ""
    )


def select_weights(
    component: str, paths: Iterable[str], dtype_name: str
) -> tuple[list[str], str | None]:
    """Choose one variant out of a component's weights: its files, and its name for diffusers.

    The one nearest to the wanted precision, where there are several. Files in folders of the
    component's folder are none of its weights, as for diffusers. No files where none has a usual
    name. Raises: ArchiveError, where the variant's files are of several sets or not all there.
    """
    variants: dict[str, list[str]] = {}
    for path in sorted(paths):
        variant = variant_of(path)
        if variant is not None and path.rpartition("/")[0] == component:
            variants.setdefault(variant, []).append(path)
    for variant in (*_NEAREST[dtype_name], *sorted(variants)):
        if variant in variants:
            _check_set(component, variants[variant])
            return variants[variant], variant or None
    return [], None


def _check_set(component: str, paths: list[str]) -> None:
    """Libraries differ in which of two sets they load, and old files are easily left behind."""
    sets: dict[tuple[str, int], list[str]] = {}
    for path in paths:
        match = _NAME.fullmatch(path.rpartition("/")[2])
        assert match is not None
        sets.setdefault((match["stem"], int(match["shards"] or 0)), []).append(path)
    if len(sets) > 1:
        firsts = " and ".join(files[0] for files in sets.values())
        raise ArchiveError(
            f"{component} has its weights more than once, as {firsts}: remove those that are old"
        )
    ((_, num_shards),) = sets
    if num_shards and len(paths) != num_shards:
        raise ArchiveError(
            f"{component} has {len(paths)} of its {num_shards} weights files, such as {paths[0]}: "
            "get the others"
        )
