"""Checks LoRAs against the pipeline that they are packed with: every tensor has to be applied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from handler.errors import ArchiveError
from handler.loading.lora_files import LoraReader
from handler.loading.safetensors_map import Header

__all__ = ["check_loras"]


def check_loras(pipeline: Any, loras: Mapping[str, Header]) -> Iterator[str]:
    """Yield the LoRAs, by name, that `pipeline` (a skeleton) does not take, or not whole."""
    if not loras:
        return
    reader = LoraReader(pipeline)
    for name, header in loras.items():
        try:
            reader.check(header)
        except ArchiveError as error:
            yield f"the LoRA {name}: {error}"
