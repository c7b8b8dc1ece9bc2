"""Says of a file of weights why it is not a LoRA, or is a broken one, by its keys."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["not_a_lora", "not_finite", "shown"]

_NUM_SHOWN = 3
_KINDS = {"hada_": "a LoHa of LyCORIS", "oft_": "an OFT of LyCORIS"}
_INVERSION = re.compile(r"<.+>|emb_params|clip_[lg]")
# Of more words than these the file of a textual inversion has seldom vectors.
_MAX_WORDS = 4


def not_a_lora(tensors: Mapping[str, torch.Tensor], widths: Collection[int]) -> str | None:
    """Say what a file is, where it is known not to be a LoRA.

    `widths` are those of the vectors that the pipeline's text encoders have for words.
    """
    if not tensors:
        return "it is empty"
    for part, kind in _KINDS.items():
        if any(part in key for key in tensors):
            return f"it is {kind}, which is not applied; such as {min(tensors)}"
    if len(tensors) <= _MAX_WORDS and all(
        _is_inversion(key, tuple(each.shape), widths) for key, each in tensors.items()
    ):
        return (
            "it is a textual inversion (an embedding of the prompt), not a LoRA; it is packed with"
            " --embedding"
        )
    return None


def _is_inversion(key: str, shape: tuple[int, ...], widths: Collection[int]) -> bool:
    is_vectors = len(shape) in (1, 2) and "lora" not in key and "lokr" not in key
    return is_vectors and (_INVERSION.fullmatch(key) is not None or shape[-1] in widths)


def not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Say which of a file's tensors hold what is not a finite number; None: none do."""
    import torch

    broken = []
    for name, each in tensors.items():
        if each.is_floating_point():
            # Types of one byte do not tell.
            values = each.float() if each.itemsize == 1 else each
            if not torch.isfinite(values).all():
                broken.append(name)
    if not broken:
        return None
    return (
        f"{len(broken)} of its {len(tensors)} tensors hold values that are not finite (NaN or"
        f" infinity), such as {shown(broken)}; get the file again, or another one"
    )


def shown(names: list[str]) -> str:
    """The first of `names`, and how many more there are."""
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return ", ".join(names[:_NUM_SHOWN]) + more
