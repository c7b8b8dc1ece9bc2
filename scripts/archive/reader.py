"""Reads archives of every form in place.

A ``.mar`` of ours (stored), one of torch-model-archiver (deflated), an archive folder, a zipped
pipeline and a pipeline folder all become one `ArchiveView`.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

from handler.errors import ArchiveError
from handler.loading.contents import MODEL_INDEX, MODEL_ZIP, WEIGHTS_SUFFIX, pipeline_prefix
from handler.loading.model_index import ModelIndex
from handler.loading.safetensors_map import Header, parse_header
from handler.zips.reader import CHUNK_BYTES, ZipReader
from scripts.archive.manifest import TORCHSERVE_MANIFEST_NAME
from scripts.disk import check_space
from scripts.hints import to_run

__all__ = ["ArchiveView", "FolderReader", "Reader", "open_archive"]


class Reader(Protocol):
    """Named files, in a zip or in a folder."""

    @property
    def sizes(self) -> dict[str, int]:
        """Unpacked sizes by name."""
        ...

    def read(self, name: str) -> bytes:
        """Return a whole small file."""
        ...

    def head(self, name: str, num_bytes: int) -> bytes:
        """Return the first bytes of a file."""
        ...

    def stream(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Yield the bytes of a file, checked where there is a checksum."""
        ...


class FolderReader:
    """Files below a folder, by their paths in it. Its `sizes` say which."""

    def __init__(self, folder: Path, sizes: dict[str, int]) -> None:
        self._folder = folder
        self.sizes = sizes

    @classmethod
    def of_pipeline(cls, folder: Path) -> FolderReader:
        """Take what may be a pipeline's: no hidden files; the hub's cache has links to files."""
        sizes = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        }
        return cls(folder, sizes)

    @classmethod
    def of_archive(cls, folder: Path) -> FolderReader:
        """Take all that Python could import or a worker could open once TorchServe links `folder`.

        Raises: ArchiveError, naming links and special files: what they lead to may change.
        """
        sizes: dict[str, int] = {}
        refused = []
        for parent, folders, files in os.walk(folder, onerror=_raise):
            for path in (Path(parent, name) for name in (*folders, *files)):
                name = path.relative_to(folder).as_posix()
                status = path.lstat()
                if stat.S_ISREG(status.st_mode):
                    sizes[name] = status.st_size
                elif not stat.S_ISDIR(status.st_mode):
                    refused.append(name)
        if refused:
            raise ArchiveError(
                f"{folder}: links and special files are refused in an archive: "
                f"{', '.join(sorted(refused))}; put the files themselves there, or pack it again"
            )
        return cls(folder, dict(sorted(sizes.items())))

    def read(self, name: str) -> bytes:
        """Return a whole small file."""
        return b"".join(self.stream(name))

    def head(self, name: str, num_bytes: int) -> bytes:
        """Return the first bytes of a file."""
        with self._path(name).open("rb") as file:
            return file.read(num_bytes)

    def stream(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Yield the bytes of a file."""
        with self._path(name).open("rb") as file:
            while chunk := file.read(chunk_bytes):
                yield chunk

    def _path(self, name: str) -> Path:
        if name not in self.sizes:
            raise ArchiveError(f"{self._folder}: {name} is missing")
        return self._folder / name


def _raise(error: OSError) -> None:
    raise ArchiveError(f"{error.filename}: it cannot be listed: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class _Below:
    """A reader of the files whose names begin with `prefix`, by the rest of their names."""

    reader: Reader
    prefix: str

    @property
    def sizes(self) -> dict[str, int]:
        return {
            name.removeprefix(self.prefix): size
            for name, size in self.reader.sizes.items()
            if name.startswith(self.prefix)
        }

    def read(self, name: str) -> bytes:
        return self.reader.read(self.prefix + name)

    def head(self, name: str, num_bytes: int) -> bytes:
        return self.reader.head(self.prefix + name, num_bytes)

    def stream(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        return self.reader.stream(self.prefix + name, chunk_bytes)


@dataclass(frozen=True)
class ArchiveView:
    """An opened archive.

    `outer` holds what TorchServe unpacks, None for a bare pipeline; `model` the pipeline's files.
    `place` is where a zip with the pipeline lies: a file, with the zip's offset and its size.
    What `index` and `headers` say is read once, when it is first asked for.
    """

    path: Path
    outer: Reader | None
    model: Reader
    place: tuple[Path, int, int] | None = None

    @cached_property
    def index(self) -> ModelIndex:
        """The pipeline's model_index.json. Raises: ArchiveError."""
        return ModelIndex.parse(self.model.read(MODEL_INDEX), "the pipeline")

    @cached_property
    def headers(self) -> dict[str, Header]:
        """The headers of all safetensors files of the pipeline. Raises: ArchiveError."""
        return {
            name: parse_header(partial(self.model.head, name), size_bytes, name)
            for name, size_bytes in self.model.sizes.items()
            if name.endswith(WEIGHTS_SUFFIX)
        }


@contextmanager
def open_archive(path: Path) -> Iterator[ArchiveView]:
    """Open an archive of any form. Raises: ArchiveError."""
    if not path.exists():
        raise ArchiveError(f"{path}: no such archive; `{to_run('pack')}` packs one")
    with ExitStack() as stack:
        yield _open_folder(path, stack) if path.is_dir() else _open_file(path, stack)


def _open_folder(path: Path, stack: ExitStack) -> ArchiveView:
    if not os.path.lexists(path / TORCHSERVE_MANIFEST_NAME):
        model = FolderReader.of_pipeline(path)
        if MODEL_INDEX in model.sizes:
            return ArchiveView(path, None, model)
    reader = FolderReader.of_archive(path)
    if MODEL_ZIP in reader.sizes:
        archive = path / MODEL_ZIP
        inner = ZipReader(stack.enter_context(archive.open("rb")), label=str(archive))
        place = (archive, 0, archive.stat().st_size)
        return ArchiveView(path, reader, _rooted(inner, str(archive)), place)
    _check_place(reader, str(path))
    return ArchiveView(path, reader, _rooted(reader, str(path)))


def _open_file(path: Path, stack: ExitStack) -> ArchiveView:
    reader = ZipReader(stack.enter_context(path.open("rb")), label=str(path))
    member = reader.members.get(MODEL_ZIP)
    if member is None:
        model = _rooted(reader, str(path))
        is_bare = TORCHSERVE_MANIFEST_NAME not in reader.members
        if not is_bare:
            _check_place(reader, str(path))
        return ArchiveView(path, None if is_bare else reader, model, (path, 0, path.stat().st_size))
    label = f"{path}: {MODEL_ZIP}"
    if member.is_stored:
        file = stack.enter_context(path.open("rb"))
        inner = ZipReader(file, start=member.offset, size_bytes=member.size_bytes, label=label)
        place = (path, member.offset, member.size_bytes)
        return ArchiveView(path, reader, _rooted(inner, label), place)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="inspect-")))
    target = folder / MODEL_ZIP
    check_space(target, member.size_bytes, f"{label}, which is deflated", "TMPDIR=")
    reader.extract(member, target)
    inner = ZipReader(stack.enter_context(target.open("rb")), label=label)
    return ArchiveView(path, reader, _rooted(inner, label), (target, 0, member.size_bytes))


def _check_place(reader: Reader, label: str) -> None:
    """Refuse an archive whose pipeline is unpacked where the worker does not look for it."""
    prefix = pipeline_prefix(reader.sizes, label)
    if prefix not in ("", "model/"):
        raise ArchiveError(
            f"{label}: its pipeline is in {prefix}, where no worker looks: it opens {MODEL_ZIP} "
            f"or model/; {to_run('pack', pipeline=label)} packs it"
        )


def _rooted(reader: Reader, label: str) -> Reader:
    """Return the pipeline in `reader`: at its root, or in the one folder that holds one."""
    prefix = pipeline_prefix(reader.sizes, label)
    return _Below(reader, prefix) if prefix else reader
