"""Layers of an OCI image: tar archives whose every byte follows from names and contents.

No times and no owners. The layer of a file that is pulled is therefore known before it is there:
what comes is compared with what must come, and no tar archive of others is parsed.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

from handler.errors import ArchiveError
from handler.loading.model_dir import Extent

__all__ = ["TarLayer"]

_CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 512


@dataclass(frozen=True)
class TarLayer:
    """A tar archive of `files`, each the bytes themselves or where they lie, in this order."""

    files: Mapping[str, bytes | Extent]

    @cached_property
    def segments(self) -> list[bytes | Extent]:
        """Its bytes: headers and padding, and between them the files."""
        segments: list[bytes | Extent] = [
            _header(folder, 0, tarfile.DIRTYPE) for folder in self._folders()
        ]
        for name, content in self.files.items():
            size_bytes = _size(content)
            segments += [_header(name, size_bytes, tarfile.REGTYPE), content]
            segments.append(bytes(-size_bytes % _BLOCK_BYTES))
        segments.append(bytes(2 * _BLOCK_BYTES))
        return [each for each in segments if _size(each)]

    @cached_property
    def size_bytes(self) -> int:
        """How many bytes it has."""
        return sum(_size(each) for each in self.segments)

    @cached_property
    def digest(self) -> str:
        """Its digest as OCI writes it; everything is read for it."""
        sha256 = hashlib.sha256()
        for chunk in self.chunks():
            sha256.update(chunk)
        return f"sha256:{sha256.hexdigest()}"

    def chunks(self, start: int = 0) -> Iterator[bytes]:
        """Yield its bytes from `start` on. Raises: ArchiveError, where a file is too short now."""
        for segment in self.segments:
            size_bytes = _size(segment)
            if start >= size_bytes:
                start -= size_bytes
                continue
            if isinstance(segment, bytes):
                yield segment[start:]
            else:
                yield from _read(segment, start)
            start = 0

    def _folders(self) -> list[str]:
        """Return the folders of all files, those above before those below."""
        parents = {str(each) for name in self.files for each in PurePosixPath(name).parents}
        return sorted(parents - {"."})


def _size(content: bytes | Extent) -> int:
    return len(content) if isinstance(content, bytes) else content.size_bytes


def _header(name: str, size_bytes: int, kind: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size_bytes, kind
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def _read(extent: Extent, start: int) -> Iterator[bytes]:
    left = extent.size_bytes - start
    with extent.path.open("rb", buffering=0) as file:
        file.seek(extent.offset + start)
        while left:
            chunk = file.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise ArchiveError(f"{extent.path} is cut off: it has changed meanwhile")
            left -= len(chunk)
            yield chunk
