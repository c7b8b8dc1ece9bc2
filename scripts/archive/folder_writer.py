"""Writes an archive as a plain folder, which TorchServe links instead of copying."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from handler.zips.central_directory import check_name
from scripts.archive.copying import Content, Copier, Place, copy_hashed
from scripts.archive.zip_writer import WrittenMember, ZipWriter

__all__ = ["FolderWriter"]


@dataclass(frozen=True, slots=True)
class FolderWriter:
    """Writes members as files below `folder`, which is made. A nested zip is large, files are not.

    `copier` is for the members of nested zips.
    """

    folder: Path
    copier: Copier | None = None
    _written: list[WrittenMember] = field(default_factory=list)

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
    ) -> None:
        """Write one file of exactly `size_bytes`; a file begins aligned by itself."""
        with self._new(name).open("xb") as file:
            sums = copy_hashed(content, Place(name, file.fileno(), 0, size_bytes))
        self._written.append(WrittenMember(name, size_bytes, sums.crc32, sums.blake3))

    @contextmanager
    def nested(self, name: str, most_bytes: int) -> Iterator[ZipWriter]:
        """Give a writer for the zip `name`."""
        with self._new(name).open("x+b") as file:
            writer = ZipWriter(file, self.copier)
            yield writer
            writer.close()

    def finish(self) -> list[WrittenMember]:
        """Return the files, nested zips left out."""
        return self._written

    def _new(self, name: str) -> Path:
        check_name(name)
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
