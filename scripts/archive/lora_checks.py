"""Checks LoRAs and the pipeline that they are packed with: every tensor has to be applied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from handler.errors import ArchiveError
from handler.loading.lora_files import LoraReader
from handler.loading.lora_refusals import not_finite
from handler.loading.model_dir import Extent
from handler.loading.safetensors_map import Header, map_tensors
from scripts.archive.pipeline_source import PipelineFile

__all__ = ["check_finite", "check_loras"]


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


def check_finite(loras: Mapping[str, PipelineFile]) -> Iterator[str]:
    """Yield the LoRAs, by name, with weights that are not finite numbers."""
    for name, file in loras.items():
        tensors = map_tensors(Extent(file.path, file.offset, file.size_bytes), str(file.path))
        if problem := not_finite(tensors):
            yield f"the LoRA {name}: {problem}"
