"""The files of a pipeline, wherever they are: in a folder, or stored in a zip."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from handler.errors import ArchiveError
from handler.loading.contents import WEIGHTS_SUFFIX
from scripts.archive.source import find_source

__all__ = ["PipelineFile", "PipelineSource", "file_at", "read_folder", "walk"]


@dataclass(frozen=True, slots=True)
class PipelineFile:
    """A file of a pipeline: its name there, and its bytes, `size_bytes` from `offset` of `path`.

    `data` has them instead where they are made up. `mtime_ns` is when `path` was last changed,
    `crc32` the checksum by the zip that they are in. `path` may not be a link out of `root`.
    """

    name: str
    path: Path
    size_bytes: int
    data: bytes | None = None
    offset: int = 0
    mtime_ns: int | None = None
    crc32: int | None = None
    root: Path | None = None

    @property
    def is_weights(self) -> bool:
        """Whether it is a safetensors file."""
        return self.name.endswith(WEIGHTS_SUFFIX)

    def read(self, most_bytes: int | None = None) -> bytes:
        """Return its bytes, the first `most_bytes` of them where that is said."""
        if self.data is not None:
            return self.data[:most_bytes]
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(
                self.size_bytes if most_bytes is None else min(most_bytes, self.size_bytes)
            )


@dataclass(frozen=True, slots=True)
class PipelineSource:
    """What is packed: all files of a pipeline by their names in it, those left out later too.

    `origin` is what the manifest says of where they come from; `notes` are lines for the user.
    """

    path: Path
    files: Mapping[str, PipelineFile]
    origin: Mapping[str, str] = field(default_factory=lambda: {"kind": "folder"})
    notes: Sequence[str] = ()


def read_folder(folder: Path) -> PipelineSource:
    """Return the files below `folder`, hidden ones left out. Raises: ArchiveError."""
    files = {name: file_at(name, folder / name, folder) for name in walk(folder)}
    return PipelineSource(folder, files, find_source(folder))


def file_at(name: str, path: Path, root: Path | None = None) -> PipelineFile:
    """Return the file `path` as it is now, as the pipeline's `name`."""
    status = path.stat()
    return PipelineFile(name, path, status.st_size, mtime_ns=status.st_mtime_ns, root=root)


def walk(folder: Path) -> Iterator[str]:
    """Yield the paths of files below `folder`, sorted; hidden ones left out.

    Raises: ArchiveError, where a link leads to nothing.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_symlink() and not path.exists():
            raise ArchiveError(f"{path} is a link to nothing: download it again")
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix()
