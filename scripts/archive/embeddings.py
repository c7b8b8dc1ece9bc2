"""Textual inversions that are packed with a pipeline: their files, and whether they go with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from handler.errors import ArchiveError
from handler.loading.contents import EMBEDDING_FOLDER, WEIGHTS_SUFFIX
from handler.loading.embeddings import embedding_names, read_inversion
from handler.loading.safetensors_map import Header
from scripts.archive.checkpoint import Kind, kind_of, read_checkpoint
from scripts.archive.pipeline_source import PipelineFile, file_at
from scripts.errors import UsageError

__all__ = ["check_embeddings", "embedding_files"]


def embedding_files(
    given: Mapping[str, Path | None], kept: Mapping[str, PipelineFile]
) -> dict[str, PipelineFile]:
    """Return the files of all embeddings by their names in the pipeline.

    `given` are files by name, None to leave one out of those that are `kept`.
    Raises: ArchiveError, UsageError.
    """
    files = dict(kept)
    for name, path in given.items():
        member = f"{EMBEDDING_FOLDER}/{name}{WEIGHTS_SUFFIX}"
        if path is not None:
            files[member] = _read(name, path, member)
        elif files.pop(member, None) is None:
            raise UsageError(f"--embedding {name}=none: there is no embedding of that name")
    return files


def _read(name: str, path: Path, member: str) -> PipelineFile:
    if path.suffix != WEIGHTS_SUFFIX or not path.is_file():
        raise ArchiveError(f"{path}: an embedding is wanted as one {WEIGHTS_SUFFIX} file")
    kind = kind_of(read_checkpoint(path).tensors)
    if kind is Kind.LORA:
        raise ArchiveError(
            f"--embedding {name}={path}: it is a LoRA, not an embedding; pack it with --lora"
        )
    if kind not in (Kind.EMBEDDING, Kind.OTHER):
        raise ArchiveError(f"--embedding {name}={path}: it is {kind.value}, not an embedding")
    return file_at(member, path)


def check_embeddings(pipeline: Any, headers: Mapping[str, Header]) -> Iterator[str]:
    """Yield what keeps the embeddings among `headers` from `pipeline`, a skeleton."""
    for name, path in embedding_names(headers).items():
        shapes = {key: tuple(info.shape) for key, info in headers[path].tensors.items()}
        try:
            read_inversion(name, shapes, pipeline)
        except ArchiveError as error:
            yield f"the embedding {name}: {error}"
