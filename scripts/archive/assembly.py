"""Puts an archive together from the layers of its OCI image, as they come.

Every byte of a layer goes straight to its place in the archive: there is no second copy. Nothing
in the recipe is trusted: names, sizes and order are checked before anything is written.
"""

from __future__ import annotations

import bisect
import io
import itertools
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from handler.errors import ArchiveError
from handler.loading.model_dir import Extent
from handler.messages import show
from handler.zips.central_directory import check_name
from scripts.archive.image import FORMAT, RECIPE_NAME, SKELETON_NAME, Piece
from scripts.archive.tar_layer import TarLayer
from scripts.documents import parse_json

__all__ = ["MAX_RECIPE_LAYER_BYTES", "LayerSink", "Recipe", "read_recipe"]

MAX_RECIPE_LAYER_BYTES = 64 << 20


@dataclass(frozen=True)
class Recipe:
    """What the last layer of an image says: which archive it is and of which pieces.

    `layers` are the files of the other layers with their sizes; `small` are those of the last.
    """

    name: str
    is_folder: bool
    layers: list[dict[str, int]]
    outputs: dict[str, list[Piece]]
    small: Mapping[str, bytes]

    @property
    def size_bytes(self) -> int:
        """How large the archive is."""
        return sum(size for pieces in self.outputs.values() for _, size in pieces)

    def make(self, stage: Path) -> None:
        """Make the archive's files in `stage`, with all that the last layer holds."""
        at = 0
        skeleton = self.small[SKELETON_NAME]
        for output, pieces in self.outputs.items():
            path = self._path(stage, output)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab"):
                pass  # what an earlier attempt wrote stays
            with path.open("r+b") as file:
                file.truncate(sum(size for _, size in pieces))
                for name, size_bytes in pieces:
                    if name is None:
                        file.write(skeleton[at : at + size_bytes])
                        at += size_bytes
                    elif name in self.small:
                        file.write(self.small[name])
                    else:
                        file.seek(size_bytes, os.SEEK_CUR)

    def tar_layers(self, stage: Path) -> list[TarLayer]:
        """Return all layers but the last, their files where they belong in `stage`."""
        places: dict[str, Extent] = {}
        for output, pieces in self.outputs.items():
            at = 0
            for name, size_bytes in pieces:
                if name is not None:
                    places[name] = Extent(self._path(stage, output), at, size_bytes)
                at += size_bytes
        return [
            TarLayer({name: places[name] if size else b"" for name, size in layer.items()})
            for layer in self.layers
        ]

    @staticmethod
    def _path(stage: Path, output: str) -> Path:
        return stage / "archive" / output if output else stage / "archive"


def read_recipe(layer: bytes, label: str) -> Recipe:
    """Read and check the recipe in the last `layer`. Raises: ArchiveError."""
    small = _untar(layer, label)
    try:
        recipe = parse_json(small[RECIPE_NAME], f"{label}: {RECIPE_NAME}", is_strict=True)
        version = recipe["format"]
        if version != FORMAT:
            raise ArchiveError(
                f"{label}: its recipe has the format {show(version)}; known is {FORMAT}"
            )
        found = Recipe(
            name=str(recipe["name"]),
            is_folder=recipe["is_folder"] is True,
            layers=[{str(k): _count(v) for k, v in each.items()} for each in recipe["layers"]],
            outputs={
                str(path): [
                    (None if name is None else str(name), _count(size)) for name, size in pieces
                ]
                for path, pieces in recipe["outputs"].items()
            },
            small=small,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArchiveError(f"{label}: its recipe is damaged: {error!r}") from error
    _check(found, label)
    return found


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise ValueError(f"{show(value)} is not a size")
    return value


def _untar(layer: bytes, label: str) -> dict[str, bytes]:
    """Return the files of a small tar archive."""
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(layer), mode="r:") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isreg() else None
                if content is not None and not member.issparse():
                    files[member.name] = content.read()
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise ArchiveError(f"{label}: its last layer is not a tar archive: {error}") from error
    if missing := {RECIPE_NAME, SKELETON_NAME} - files.keys():
        raise ArchiveError(f"{label}: its last layer lacks {', '.join(sorted(missing))}")
    return files


def _check(recipe: Recipe, label: str) -> None:
    """Refuse a recipe that names what is not there, anything twice, or a path that climbs out."""
    sizes = {name: len(data) for name, data in recipe.small.items()}
    for layer in recipe.layers:
        if twice := layer.keys() & sizes.keys():
            raise ArchiveError(f"{label}: {show(min(twice))} is in two layers")
        sizes |= layer
    for name in (recipe.name, *sizes, *filter(None, recipe.outputs)):
        check_name(name)
    if "/" in recipe.name or recipe.name.startswith(".") or not recipe.outputs:
        raise ArchiveError(f"{label}: {show(recipe.name)} is not an archive's name")
    if (recipe.outputs.keys() == {""}) == recipe.is_folder or (
        "" in recipe.outputs and len(recipe.outputs) > 1
    ):
        raise ArchiveError(f"{label}: its recipe is neither of a file nor of a folder")
    used: set[str] = set()
    skeleton_bytes = 0
    for piece, size_bytes in itertools.chain.from_iterable(recipe.outputs.values()):
        if piece is None:
            skeleton_bytes += size_bytes
        elif piece in used or sizes.get(piece) != size_bytes:
            raise ArchiveError(f"{label}: its recipe wants {show(piece)}, which is not in it so")
        else:
            used.add(piece)
    if skeleton_bytes != len(recipe.small[SKELETON_NAME]):
        raise ArchiveError(f"{label}: its skeleton is not as long as its recipe says")
    wanted = {name for layer in recipe.layers for name, size in layer.items() if size}
    if lost := wanted - used:
        raise ArchiveError(f"{label}: {show(min(lost))} has no place in the archive")


@dataclass(frozen=True)
class LayerSink:
    """Takes the bytes of a layer: those of files go to their places, all others are compared."""

    layer: TarLayer

    @cached_property
    def _starts(self) -> list[int]:
        sizes = (
            len(each) if isinstance(each, bytes) else each.size_bytes
            for each in self.layer.segments
        )
        return list(itertools.accumulate(sizes, initial=0))

    def write(self, chunk: bytes, at: int) -> None:
        """Take the layer's bytes from `at` on. Raises: ArchiveError, where others must come."""
        left = memoryview(chunk)
        while left:
            index = bisect.bisect_right(self._starts, at) - 1
            segment = self.layer.segments[index]
            count = min(len(left), self._starts[index + 1] - at)
            inside = at - self._starts[index]
            if isinstance(segment, bytes):
                if left[:count] != segment[inside : inside + count]:
                    raise ArchiveError("a layer is not as its recipe says: it was made otherwise")
            else:
                with segment.path.open("r+b", buffering=0) as file:
                    os.pwrite(file.fileno(), left[:count], segment.offset + inside)
            left, at = left[count:], at + count

    def written(self, num_bytes: int) -> Iterator[bytes]:
        """Yield the first `num_bytes` of the layer, as they are in the archive now."""
        for chunk in self.layer.chunks():
            yield chunk[:num_bytes]
            num_bytes -= len(chunk)
            if num_bytes <= 0:
                return
