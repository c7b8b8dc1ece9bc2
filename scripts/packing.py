"""Streams a pipeline into model.zip; changes with what an archive's weights look like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from handler.safetensors_map import read_header
from scripts.console import Progress
from scripts.pipeline_files import PipelineFile
from scripts.zipwriter import Written, ZipWriter

__all__ = ["file_chunks", "most_zip_bytes", "write_pipeline"]

ALIGN_BYTES = 64  # no tensor of a mapped file then straddles a cache line at its begin
_CHUNK_BYTES = 4 << 20
_HEADER_ROOM_BYTES = 8192


def file_chunks(path: Path, progress: Progress) -> Iterator[memoryview]:
    """Yield the bytes of `path` in two buffers by turns: one is read while the other is hashed."""
    buffers = [memoryview(bytearray(_CHUNK_BYTES)) for _ in range(2)]
    with path.open("rb", buffering=0) as file:
        turn = 0
        while count := file.readinto(buffers[turn]):
            yield buffers[turn][:count]
            progress(count)
            turn = 1 - turn


def most_zip_bytes(files: Sequence[PipelineFile]) -> int:
    """Return a bound on the size of the zip that `write_pipeline` makes of `files`."""
    return sum(file.size_bytes for file in files) + _HEADER_ROOM_BYTES * (len(files) + 1)


def write_pipeline(
    writer: ZipWriter, files: Sequence[PipelineFile], progress: Progress
) -> list[Written]:
    """Write `files` as members; the tensors of safetensors files come to lie aligned.

    Raises: ArchiveError, where a safetensors file is damaged.
    """
    return [_write_file(writer, file, progress) for file in files]


def _write_file(writer: ZipWriter, file: PipelineFile, progress: Progress) -> Written:
    align, aligned_at = 1, 0
    if file.is_weights:
        with file.path.open("rb") as source:
            align = ALIGN_BYTES
            aligned_at = read_header(source, file.size_bytes, str(file.path)).data_offset
    chunks = file_chunks(file.path, progress)
    return writer.add(file.name, chunks, file.size_bytes, align=align, aligned_at=aligned_at)
