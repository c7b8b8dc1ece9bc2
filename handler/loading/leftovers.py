"""Weights that a model has no use for: which of them are harmless, and which change pictures."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

__all__ = ["leftover_problem", "scaling_problem"]

_SCALES = re.compile(
    r"(.*[._])?(scale_weight|scale_input|weight_scale(_2)?|input_scale|scaled_fp8)|"
    r".*\.weight\.(absmax|quant_map|quant_state\..+|nested_.+)"
)
# Names that are left over in good files, and why nothing is lost without them.
_HARMLESS = {
    r".*\.position_ids": "older transformers saved this buffer, which is computed",
    r".*\.num_batches_tracked": "training's own counter",
    r".*\.attn\d?\.processor\.to_[kv]_ip\..*": "an IP-Adapter, which diffusers loads apart",
    r"encoder_hid_proj\.image_projection_layers\..*": "an IP-Adapter, as above",
}


def leftover_problem(name: str, model: Any, unexpected: Iterable[str]) -> str | None:
    """Say what is wrong with the `unexpected` weights of the component `name`; None: nothing."""
    keys = sorted(key for key in unexpected if not _is_harmless(key, model))
    if not keys:
        return None
    return scaling_problem(name, keys) or (
        f"{name}: {len(keys)} weights are left over, such as {keys[0]}: they are of another model "
        "than its configuration"
    )


def scaling_problem(name: str, keys: Iterable[str]) -> str | None:
    """Say so where `keys` hold scales of other weights, which diffusers would leave out."""
    scales = sorted(key for key in keys if _SCALES.fullmatch(key))
    if not scales:
        return None
    return (
        f"{name}: its weights are scaled (there are {len(scales)} such as {scales[0]}), which "
        "diffusers does not read: pictures would be of one flat colour; get the weights in "
        "float16 or bfloat16"
    )


def _is_harmless(key: str, model: Any) -> bool:
    patterns: Collection[str] = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    if any(re.search(pattern, key) for pattern in patterns):
        return True
    if any(re.fullmatch(pattern, key) for pattern in _HARMLESS):
        return True
    return _is_another_half(key, model)


def _is_another_half(key: str, model: Any) -> bool:
    """Say whether `key` is of a part that this class has nothing of.

    A text encoder's files may hold the whole model: the vision half of CLIP, a language model's
    head.
    """
    import transformers

    if not isinstance(model, transformers.PreTrainedModel) or _SCALES.fullmatch(key):
        return False
    prefix = f"{model.base_model_prefix}."
    tops = {name.removeprefix(prefix).partition(".")[0] for name in model.state_dict()}
    return key.removeprefix(prefix).partition(".")[0] not in tops | {model.base_model_prefix}
