"""An archive as an OCI image: what its layers hold, and how they become the archive again.

The image's root has the archive unpacked in ``models/``, its pipeline in ``models/model/``, as a
worker opens it too: mounted as a volume it is served as it is. Each weights file is a layer, the
pipeline's other files are one, the handler is one, everything else is the last. That one also has
in ``archive/`` what the archive is made of besides these files: zip headers and directories
(``skeleton``), and the order of all pieces (``recipe.json``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from handler.errors import ArchiveError
from handler.loading.contents import MANIFEST_NAME, MODEL_ZIP, WEIGHTS_SUFFIX
from handler.loading.model_dir import Extent
from handler.zips.reader import ZipReader
from scripts.archive.reader import FolderReader
from scripts.archive.tar_layer import TarLayer

__all__ = ["FORMAT", "RECIPE_NAME", "SKELETON_NAME", "ArchiveImage", "Piece", "read_archive"]

FORMAT = 1
ROOT = "models"
MODEL_ROOT = f"{ROOT}/model"
RECIPE_NAME = "archive/recipe.json"
SKELETON_NAME = "archive/skeleton"
_MOST_WEIGHTS_LAYERS = 100  # overlayfs mounts 127 layers at most
# A run of an archive's bytes: a whole file of the image, or what comes next of the skeleton.
Piece = tuple[str | None, int]


@dataclass(frozen=True, slots=True)
class ArchiveImage:
    """An archive taken to pieces.

    `files` are the image's, and `outputs` say of which pieces the archive's files consist: of a
    .mar the only one is called "".
    """

    name: str
    is_folder: bool
    files: Mapping[str, Extent]
    outputs: Mapping[str, Sequence[Piece]]
    skeleton: bytes

    def layers(self) -> list[TarLayer]:
        """Return the layers, the one with the recipe last."""
        weights = sorted(name for name in self.files if name.endswith(WEIGHTS_SUFFIX))
        small = sorted(
            name
            for name in self.files
            if name.startswith(f"{MODEL_ROOT}/") and not name.endswith(WEIGHTS_SUFFIX)
        )
        handler = sorted(name for name in self.files if name.startswith(f"{ROOT}/handler/"))
        groups = [[name] for name in weights[:_MOST_WEIGHTS_LAYERS]]
        groups += [group for group in (weights[_MOST_WEIGHTS_LAYERS:], small, handler) if group]
        taken = {name for group in groups for name in group}
        rest = {name: self.files[name] for name in sorted(self.files) if name not in taken}
        last: dict[str, bytes | Extent] = {
            RECIPE_NAME: self._recipe(groups),
            SKELETON_NAME: self.skeleton,
            **rest,
        }
        return [
            *(TarLayer({name: self.files[name] for name in each}) for each in groups),
            TarLayer(last),
        ]

    def _recipe(self, groups: Sequence[Sequence[str]]) -> bytes:
        recipe: dict[str, Any] = {
            "format": FORMAT,
            "name": self.name,
            "is_folder": self.is_folder,
            "layers": [{name: self.files[name].size_bytes for name in group} for group in groups],
            "outputs": self.outputs,
        }
        return json.dumps(recipe, separators=(",", ":")).encode()


def read_archive(path: Path) -> ArchiveImage:
    """Take the archive `path`, a .mar or a folder of ours, to pieces.

    Raises: ArchiveError, where it was not packed by this tool.
    """
    if path.is_dir():
        return _read_folder(path)
    parts = _Parts()
    with path.open("rb") as file:
        reader = ZipReader(file, label=str(path))
        _check_ours(reader.members, path)
        parts.add_zip(path, reader, ROOT)
    parts.finish("", path.stat().st_size)
    return ArchiveImage(path.stem, False, parts.files, parts.outputs, bytes(parts.skeleton))


def _read_folder(path: Path) -> ArchiveImage:
    parts = _Parts()
    reader = FolderReader.of_archive(path)
    _check_ours(reader.sizes, path)
    for name, size_bytes in reader.sizes.items():
        if name == MODEL_ZIP:
            with (path / name).open("rb") as file:
                parts.add_zip(path / name, ZipReader(file, label=str(path / name)), MODEL_ROOT)
        else:
            parts.add_file(f"{ROOT}/{name}", Extent(path / name, 0, size_bytes))
        parts.finish(name, size_bytes)
    return ArchiveImage(path.name, True, parts.files, parts.outputs, bytes(parts.skeleton))


def _check_ours(names: Mapping[str, object], path: Path) -> None:
    if MANIFEST_NAME not in names or MODEL_ZIP not in names:
        raise ArchiveError(
            f"{path} was not packed by this tool: it lacks {MANIFEST_NAME} or {MODEL_ZIP}; "
            "pack its pipeline, then push that"
        )


@dataclass(slots=True)
class _Parts:
    """The files that were found so far, and the extents of the output that is being read."""

    files: dict[str, Extent] = field(default_factory=dict)
    outputs: dict[str, list[Piece]] = field(default_factory=dict)
    skeleton: bytearray = field(default_factory=bytearray)
    _extents: list[tuple[int, str]] = field(default_factory=list)
    _path: Path = field(default_factory=Path)

    def add_file(self, name: str, extent: Extent) -> None:
        if name in self.files:
            raise ArchiveError(f"{extent.path}: {name} would be in the image twice")
        self.files[name] = extent
        self._path = extent.path
        if extent.size_bytes:
            self._extents.append((extent.offset, name))

    def add_zip(self, path: Path, reader: ZipReader, root: str) -> None:
        """Add the members of a zip, and those of the model.zip in it."""
        self._path = path
        for name, member in reader.members.items():
            if not member.is_stored:
                raise ArchiveError(f"{reader.label}: {name} is deflated: pack it again, then push")
            if name == MODEL_ZIP and root == ROOT:
                with path.open("rb") as file:
                    inner = ZipReader(
                        file,
                        start=member.offset,
                        size_bytes=member.size_bytes,
                        label=f"{path}: {MODEL_ZIP}",
                    )
                self.add_zip(path, inner, MODEL_ROOT)
            else:
                self.add_file(f"{root}/{name}", Extent(path, member.offset, member.size_bytes))

    def finish(self, output: str, size_bytes: int) -> None:
        """End the archive's file `output`: what is in none of the image's files is skeleton."""
        pieces: list[Piece] = []
        at = 0
        with self._path.open("rb") as file:
            for offset, name in [*sorted(self._extents), (size_bytes, "")]:
                if offset > at:
                    file.seek(at)
                    gap = file.read(offset - at)
                    self.skeleton += gap
                    pieces.append((None, len(gap)))
                if name:
                    pieces.append((name, self.files[name].size_bytes))
                    at = offset + self.files[name].size_bytes
        self.outputs[output] = pieces
        self._extents.clear()
