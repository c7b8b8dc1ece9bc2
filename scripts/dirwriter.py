"""Writes an archive as a plain folder, which TorchServe links instead of copying."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from handler.errors import ArchiveError
from handler.zipread import check_name
from scripts.copying import Content, copy_hashed
from scripts.zipwriter import Written, ZipWriter

__all__ = ["DirWriter"]


@dataclass(frozen=True, slots=True)
class DirWriter:
    """Writes members as files below `folder`, which is made."""

    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir()

    def add(
        self,
        name: str,
        content: Content,
        size_bytes: int,
        *,
        align: int = 1,
        aligned_at: int = 0,
    ) -> Written:
        """Write one file of exactly `size_bytes`; a file begins aligned by itself."""
        with self._new(name).open("xb") as file:
            crc32, sha256, written = copy_hashed(content, file)
        if written != size_bytes:
            raise ArchiveError(
                f"{name} changed while it was packed: {size_bytes} → {written} bytes"
            )
        return Written(name, size_bytes, crc32, sha256)

    def add_bytes(self, name: str, data: bytes) -> Written:
        """Write one small file."""
        return self.add(name, [data], len(data))

    @contextmanager
    def nested(self, name: str, most_bytes: int) -> Iterator[ZipWriter]:
        """Give a writer for the zip `name`."""
        with self._new(name).open("x+b") as file:
            writer = ZipWriter(file)
            yield writer
            writer.close()

    def _new(self, name: str) -> Path:
        check_name(name)
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
