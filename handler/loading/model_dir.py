"""Opens the pipeline that TorchServe unpacked, whatever form it has there.

``model_dir`` holds one of: ``model.zip`` (what our packer writes, or the upstream example's),
``model/`` (the pipeline's folder), or the pipeline's files themselves. Small files of a zip go to
a private folder that lives as long as the opening; weights stay where they are and are handed out
as extents of files, to be mapped. Two processes may open one archive at once: neither writes
beside it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from handler.errors import ArchiveError
from handler.loading.contents import (
    LORA_FOLDER,
    MANIFEST_NAME,
    MODEL_INDEX,
    MODEL_ZIP,
    WEIGHTS_SUFFIX,
    check_names,
    pipeline_prefix,
)
from handler.loading.digests import listed_digest
from handler.loading.documents import parse_json
from handler.loading.model_index import MAX_MODEL_INDEX_BYTES, ModelIndex
from handler.zips.central_directory import ZipMember
from handler.zips.reader import CHUNK_BYTES, ZipReader

__all__ = ["Extent", "OpenedPipeline", "check_loras", "open_pipeline", "open_zip"]

logger = logging.getLogger(__name__)

MAX_SMALL_FILE_BYTES = 256 << 20
MAX_SMALL_FILES_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Extent:
    """Where the bytes of a weights file lie: `size_bytes` from `offset` of the file `path`."""

    path: Path
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class OpenedPipeline:
    """A pipeline's small files in `folder`, and its weights by their path in the pipeline.

    `index` is its model_index.json. `is_whole` says that the weights lie in `folder` too.
    `slow_reason` is set where opening had to copy weights.
    """

    folder: Path
    index: ModelIndex
    weights: Mapping[str, Extent]
    is_whole: bool
    slow_reason: str | None = None

    def copy_weights(self, component: str) -> None:
        """Copy the weights of `component` into `folder`, for a loader that wants files."""
        for name, extent in self.weights.items():
            target = self.folder / name
            if not name.startswith(f"{component}/") or target.exists():
                continue
            with extent.path.open("rb") as source, target.open("xb") as out:
                source.seek(extent.offset)
                left = extent.size_bytes
                while left > 0:
                    chunk = source.read(min(left, CHUNK_BYTES))
                    if not chunk:
                        raise ArchiveError(f"{extent.path}: {name} is cut off")
                    out.write(chunk)
                    left -= len(chunk)


@contextmanager
def open_pipeline(model_dir: Path) -> Iterator[OpenedPipeline]:
    """Open the pipeline in TorchServe's `model_dir`; small copies vanish when the context ends.

    Raises: ArchiveError, where it is absent, damaged or refused.
    """
    archive = model_dir / MODEL_ZIP
    if archive.is_file():
        with open_zip(archive) as opened:
            yield opened
        return
    for folder in (model_dir / "model", model_dir):
        if (folder / MODEL_INDEX).is_file():
            yield _open_folder(folder)
            return
    raise ArchiveError(
        f"{model_dir}: holds neither {MODEL_ZIP} nor a pipeline folder model/: "
        "pack one with make archive, or diffusers-torchserve pack"
    )


@contextmanager
def open_zip(
    archive: Path, *, start: int = 0, size_bytes: int | None = None
) -> Iterator[OpenedPipeline]:
    """Open the zipped pipeline that fills `size_bytes` from `start` of `archive`.

    Raises: ArchiveError.
    """
    with archive.open("rb") as file, _private_folder() as folder:
        reader = ZipReader(file, start=start, size_bytes=size_bytes, label=str(archive))
        yield _open_zip(reader, archive, folder)


@contextmanager
def _private_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="pipeline-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _open_folder(folder: Path) -> OpenedPipeline:
    weights = {}
    names = []
    root = folder.resolve()
    for parent, _, files in os.walk(root):
        for file in files:
            path = Path(parent, file)
            name = path.relative_to(root).as_posix()
            if not path.is_file():
                raise ArchiveError(f"{path} is not a file: put the file itself there")
            names.append(name)
            if name.endswith(WEIGHTS_SUFFIX):
                weights[name] = Extent(path, 0, path.stat().st_size)
    check_names(names, str(folder))
    index = ModelIndex.read(root / MODEL_INDEX, str(folder))
    return OpenedPipeline(root, index, weights, is_whole=True)


def _open_zip(reader: ZipReader, archive: Path, folder: Path) -> OpenedPipeline:
    """Check the zip whole, then copy its small files (and packed weights) into `folder`."""
    members = _below_prefix(reader)
    check_names(members, reader.label)
    small = {name: each for name, each in members.items() if not name.endswith(WEIGHTS_SUFFIX)}
    big = {name: each for name, each in members.items() if name not in small}
    _check_small(small, reader.label)
    packed = {name: each for name, each in big.items() if not each.is_stored}
    if packed:
        _check_space(packed, folder, reader.label)
    stored = [each for each in big.values() if each.is_stored]
    reader.check_stored(stored)
    for name, member in {**small, **packed}.items():
        if not name.endswith(".md"):  # diffusers follows links to other models in a model card
            reader.extract(member, folder / name)
    index = ModelIndex.read(folder / MODEL_INDEX, reader.label)
    weights = {
        name: Extent(folder / name, 0, each.size_bytes)
        if name in packed
        else Extent(archive.resolve(), each.offset, each.size_bytes)
        for name, each in big.items()
    }
    reason = None
    if packed:
        reason = (
            f"{MODEL_ZIP} is deflated, so {len(packed)} weights files had to be unpacked first; "
            "pack it with make archive, or diffusers-torchserve pack, to have them mapped in place"
        )
        logger.warning("slow start: %s", reason)
    return OpenedPipeline(folder, index, weights, is_whole=not stored, slow_reason=reason)


def _below_prefix(reader: ZipReader) -> dict[str, ZipMember]:
    """Return members by their path in the pipeline: some zips hold its folder, not its files."""
    prefix = pipeline_prefix(reader.members, reader.label)
    return {
        name.removeprefix(prefix): member
        for name, member in reader.members.items()
        if name.startswith(prefix)
    }


def check_loras(model_dir: Path, paths: Iterable[Path]) -> None:
    """Compare LoRAs with our manifest, where it lists them: they lie outside of the zip.

    Raises: ArchiveError.
    """
    manifest = model_dir / MANIFEST_NAME
    members = {}
    try:
        if manifest.exists():
            members = parse_json(manifest.read_bytes(), str(manifest))["members"]
        listed = {name: listed_digest(name, each) for name, each in members.items()}
    except ArchiveError as error:
        raise ArchiveError(f"{manifest} is damaged: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ArchiveError(f"{manifest} is damaged: {error!r}") from error
    for path in paths:
        wanted = listed.get(f"{LORA_FOLDER}/{path.name}")
        if wanted is None:
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, wanted.start)  # type: ignore[arg-type]
        if digest.hexdigest() != wanted.value:
            raise ArchiveError(f"{path} is damaged: it does not match {MANIFEST_NAME}")


def _check_small(members: Mapping[str, ZipMember], label: str) -> None:
    for name, member in members.items():
        most_bytes = MAX_MODEL_INDEX_BYTES if name == MODEL_INDEX else MAX_SMALL_FILE_BYTES
        if member.size_bytes > most_bytes:
            raise ArchiveError(
                f"{label}: {name} claims {member.size_bytes} bytes; it may have {most_bytes}"
            )
    total = sum(member.size_bytes for member in members.values())
    if total > MAX_SMALL_FILES_BYTES:
        raise ArchiveError(
            f"{label}: its files other than weights claim {total} bytes; "
            f"at most {MAX_SMALL_FILES_BYTES}"
        )


def _check_space(members: Mapping[str, ZipMember], folder: Path, label: str) -> None:
    wanted = sum(member.size_bytes for member in members.values())
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise ArchiveError(
            f"{label}: its weights are deflated and need {wanted} bytes in {folder.parent}, "
            f"where {free} are free"
        )
