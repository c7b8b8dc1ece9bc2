"""The checks that packing ends with, so that what cannot be served is never packed.

What needs no archive is checked before the first byte is written; what is written is checked
before it takes its name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from handler.config import HandlerConfig
from handler.errors import ArchiveError, ServingError
from handler.loading.model_index import ModelIndex
from scripts.archive.checkpoint import header_of
from scripts.archive.checks import check_archive
from scripts.archive.controlnets import check_controlnets
from scripts.archive.embeddings import check_embeddings
from scripts.archive.lora_checks import check_finite
from scripts.archive.members import Member
from scripts.archive.model_checks import check_pipeline, check_settings
from scripts.archive.model_defaults import find_defaults
from scripts.archive.pipeline_source import PipelineFile
from scripts.archive.reader import open_archive
from scripts.archive.skeleton import Skeleton, build_skeleton

__all__ = ["Examined", "check_written", "examine"]


@dataclass(frozen=True, slots=True)
class Examined:
    """A pipeline that may be packed: `defaults` are its own, by keys of the configuration."""

    skeleton: Skeleton
    defaults: Mapping[str, int | float]
    loras: Collection[str] = ()
    """The names of those that are packed with it."""

    def check_settings(self, config: HandlerConfig) -> None:
        """Refuse a configuration that the pipeline does not do. Raises: ArchiveError."""
        _refuse([*check_settings(self.skeleton, config, self.loras)])


class _Files:
    """The files that are going to be packed, by their names in the pipeline."""

    def __init__(self, files: Sequence[PipelineFile]) -> None:
        self._files = {file.name: file for file in files}
        self.sizes = {file.name: file.size_bytes for file in files}

    def read(self, name: str) -> bytes:
        """Return a whole file."""
        return self._files[name].read()


def examine(
    index: ModelIndex,
    files: Sequence[PipelineFile],
    model: Sequence[Member],
    loras: Mapping[str, PipelineFile],
) -> Examined:
    """Check the pipeline of `files`, which become the members `model`, and its `loras` by name.

    Raises: ArchiveError, naming every problem.
    """
    headers = {each.name: each.header for each in model if each.header is not None}
    lora_headers = {name: header_of(file) for name, file in sorted(loras.items())}
    small = _Files(files)
    skeleton = build_skeleton(index, small, headers)
    names = [file.name for file in files]
    _refuse([*check_pipeline(index, names, skeleton, lora_headers)])
    _refuse([*check_finite(loras)])
    assert skeleton.pipeline is not None
    _refuse([*check_controlnets(skeleton.pipeline, small, headers)])
    _refuse([*check_embeddings(skeleton.pipeline, headers)])
    return Examined(skeleton, find_defaults(skeleton.pipeline), lora_headers.keys())


def check_written(archive: Path, *, is_smoke: bool = False) -> None:
    """Check a written archive all but its hashes, which are of the bytes just written.

    With `is_smoke`, draw a picture too. Raises: ArchiveError, naming every problem.
    """
    problems: list[str] = []
    try:
        with open_archive(archive) as view:
            problems += check_archive(view, lambda num_bytes: None, is_hashed=False)
            if is_smoke and not problems:
                from scripts.archive.smoke import smoke_problems

                problems += smoke_problems(view)
    except ServingError as error:
        problems.append(str(error))
    _refuse(problems)


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise ArchiveError(f"not packed: {'; '.join(problems)}")
