"""Turns a pipeline's files into members of an archive, and writes those."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from handler.loading.safetensors_map import Header
from scripts.archive.checkpoint import header_of
from scripts.archive.copying import Content, FileContent
from scripts.archive.pipeline_source import PipelineFile
from scripts.archive.precision import PRECISIONS, ConvertedFile
from scripts.archive.zip_writer import Container
from scripts.console import Progress

__all__ = ["Member", "make_member", "most_zip_bytes", "write_member"]

ALIGN_BYTES = 64  # no tensor of a mapped file then straddles a cache line at its start
_HEADER_ROOM_BYTES = 8192


@dataclass(frozen=True, slots=True)
class Member:
    """A member to be written: `content` gives its bytes; `header` is there for weights.

    `crc32` is what the zip that it is copied from says, None for what has no such checksum.
    """

    name: str
    size_bytes: int
    content: Callable[[Progress], Content]
    header: Header | None = None
    crc32: int | None = None


def make_member(file: PipelineFile, dtype_name: str | None = None) -> Member:
    """Say how `file` is packed; its floats in `dtype_name` (a torch name), if one is given.

    Raises: ArchiveError, where a safetensors file is damaged.
    """
    data = file.data
    if data is not None:
        return Member(file.name, len(data), lambda progress: [data])
    if file.is_weights and dtype_name is not None:
        converted = ConvertedFile(
            file.path,
            PRECISIONS[dtype_name],
            offset=file.offset,
            size_bytes=file.size_bytes,
            mtime_ns=file.mtime_ns,
        )
        if converted.is_changed:
            return Member(file.name, converted.size_bytes, converted.chunks, converted.header)
    header = header_of(file) if file.is_weights else None
    # A whole file is read to its end, so that one that grew meanwhile is noticed.
    size_bytes = file.size_bytes if file.offset else None
    return Member(
        file.name,
        file.size_bytes,
        lambda progress: FileContent(file.path, progress, file.offset, size_bytes, file.mtime_ns),
        header,
        file.crc32,
    )


def most_zip_bytes(members: Sequence[Member]) -> int:
    """Return a bound on the size of a zip of `members`."""
    return sum(each.size_bytes for each in members) + _HEADER_ROOM_BYTES * (len(members) + 1)


def write_member(container: Container, each: Member, progress: Progress) -> None:
    """Write one member; the tensors of safetensors files are aligned."""
    content = each.content(progress)
    if each.header is None:
        container.add(each.name, content, each.size_bytes)
        return
    container.add(
        each.name,
        content,
        each.size_bytes,
        align=ALIGN_BYTES,
        aligned_at=each.header.data_offset,
    )
