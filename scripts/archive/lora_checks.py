"""Checks LoRAs against the pipeline that they are packed with, by names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from handler.library_logs import quiet_libraries
from handler.loading.safetensors_map import Header
from handler.messages import first_lines

if TYPE_CHECKING:
    import torch

__all__ = ["check_loras"]

_NUM_SHOWN = 3
# The first matrix of a pair, in the names of peft, diffusers and kohya.
_PAIR = re.compile(r"(?P<layer>.+?)[._]lora(?:_linear_layer)?[._](?:down|A)(?:\.\w+)?\.weight")
_KINDS = {
    "hada_": "a LoHa of LyCORIS",
    "lokr_": "a LoKr of LyCORIS",
    "oft_": "an OFT of LyCORIS",
}
_ADAPTER = "checked"


def check_loras(pipeline: Any, loras: Mapping[str, Header]) -> Iterator[str]:
    """Yield the LoRAs, by name, that `pipeline` (a skeleton) does not take, or not whole."""
    for name, header in loras.items():
        problem = _problem(pipeline, header)
        if problem is not None:
            yield f"the LoRA {name}: {problem}"


def _problem(pipeline: Any, header: Header) -> str | None:
    keys = sorted(header.tensors)
    if kind := _other_kind(header):
        return f"it is {kind}, which is not applied; such as {keys[0]}"
    if not hasattr(pipeline, "load_lora_weights"):
        return f"{type(pipeline).__name__} takes no LoRAs"
    layers = [match["layer"] for match in map(_PAIR.fullmatch, keys) if match is not None]
    try:
        with quiet_libraries(are_errors_logged=False):
            pipeline.load_lora_weights(_tensors(header), adapter_name=_ADAPTER)
            found = _adapted(pipeline)
    except Exception as error:
        # What the libraries raise about a wrong LoRA is of any kind.
        if "not found in the base model" in str(error):
            return f"it is of another model: the pipeline has none of its layers {_shown(layers)}"
        reason = first_lines(error, num_chars=200)
        return f"it does not fit the pipeline: {reason}; its keys are {_shown(keys)}"
    finally:
        _unload(pipeline)
    if len(found) < len(layers):
        lost = [layer for layer in layers if not _is_among(layer, found)] or layers
        return (
            f"it is of another model: {len(layers) - len(found)} of its {len(layers)} layers are "
            f"not in the pipeline, such as {_shown(lost)}"
        )
    return None


def _other_kind(header: Header) -> str | None:
    """Say what the file is, where it is known not to be a LoRA."""
    keys = header.tensors
    for part, kind in _KINDS.items():
        if any(part in key for key in keys):
            return kind
    sizes = [info.shape for info in keys.values()]
    if not any("lora" in key for key in keys) and len(keys) <= 4 and all(len(s) < 3 for s in sizes):
        return "a textual inversion (an embedding of the prompt)"
    return None


def _tensors(header: Header) -> dict[str, torch.Tensor]:
    import torch

    one = torch.ones(())
    return {name: one.expand(info.shape) for name, info in header.tensors.items()}


def _adapted(pipeline: Any) -> list[str]:
    """Name the layers that the adapter changes, with their component."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [
        f"{component}.{name}"
        for component, module in pipeline.components.items()
        if isinstance(module, torch.nn.Module)
        for name, layer in module.named_modules()
        if isinstance(layer, BaseTunerLayer) and _ADAPTER in getattr(layer, "lora_A", {})
    ]


def _is_among(layer: str, found: list[str]) -> bool:
    """Say whether `layer`, as the file names it, is one of those `found`."""
    plain = layer.replace(".", "_")
    return any(plain.endswith(each.partition(".")[2].replace(".", "_")) for each in found)


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return ", ".join(names[:_NUM_SHOWN]) + more


def _unload(pipeline: Any) -> None:
    try:
        pipeline.unload_lora_weights()
    except Exception:  # nothing was loaded
        return
