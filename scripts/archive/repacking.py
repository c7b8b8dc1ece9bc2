"""Reads an archive as the source of another one: its pipeline's files where they are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from handler.errors import ArchiveError
from handler.loading.contents import LORA_FOLDER, MODEL_INDEX, WEIGHTS_SUFFIX, pipeline_prefix
from handler.zips.reader import ZipReader
from scripts.archive.checks import read_manifest
from scripts.archive.manifest import CONFIG_NAME, TORCHSERVE_MANIFEST_NAME
from scripts.archive.pipeline_source import PipelineFile, PipelineSource, file_at, read_folder
from scripts.archive.precision import PRECISIONS
from scripts.archive.reader import ArchiveView, Reader, open_archive
from scripts.documents import parse_json
from scripts.hints import to_run

__all__ = ["Kept", "open_packed", "read_identity"]

_RECOMPUTED = {
    *("format", "tool", "pipeline", "source", "licence", "made_with"),
    *("members", "model_members"),
}


MakeFolder = Callable[[str, int], Path]


@dataclass(frozen=True, slots=True)
class Kept:
    """What an archive of ours has besides its pipeline, and another one made of it keeps.

    `extras` are the entries of the manifest that say which options it was packed with.
    """

    config: bytes | None = None
    loras: Mapping[str, PipelineFile] = field(default_factory=dict)
    extras: Mapping[str, object] = field(default_factory=dict)

    @property
    def dtype(self) -> str | None:
        """The precision that the weights were converted to, None where they were not."""
        found = self.extras.get("converted_to")
        return found if isinstance(found, str) and found in PRECISIONS else None


def read_identity(path: Path) -> tuple[str, str]:
    """Return the name and the version of the archive `path`. Raises: ArchiveError."""
    with open_archive(path) as view:
        if view.outer is None:
            pack = to_run("pack", pipeline=str(path))
            raise ArchiveError(f"{path} is not an archive: {pack} packs it")
        text = view.outer.read(TORCHSERVE_MANIFEST_NAME)
    model = parse_json(text, f"{path}: {TORCHSERVE_MANIFEST_NAME}")
    try:
        return str(model["model"]["modelName"]), str(model["model"].get("modelVersion", "1.0"))
    except (KeyError, TypeError, AttributeError) as error:
        raise ArchiveError(
            f"{path}: {TORCHSERVE_MANIFEST_NAME} is not a manifest of TorchServe's"
        ) from error


@contextmanager
def open_packed(
    path: Path, make_folder: MakeFolder
) -> Iterator[tuple[PipelineSource, Kept | None]]:
    """Give the pipeline in the archive or zip `path`, and what an archive of ours has besides.

    Members that are stored are read where they are; others are unpacked into a folder that
    `make_folder` makes. Raises: ArchiveError.
    """
    with open_archive(path) as view:
        files = _model_files(view, make_folder)
        if MODEL_INDEX not in files:
            raise ArchiveError(f"{path} holds no diffusers pipeline ({MODEL_INDEX})")
        manifest = read_manifest(view)
        if manifest is None or view.outer is None:
            yield PipelineSource(path, files, {"kind": "archive"}), None
            return
        origin = manifest.get("source")
        names = [name for name in view.outer.sizes if name.startswith(f"{LORA_FOLDER}/")]
        config = view.outer.read(CONFIG_NAME) if CONFIG_NAME in view.outer.sizes else None
        extras = {key: value for key, value in manifest.items() if key not in _RECOMPUTED}
        yield (
            PipelineSource(
                path, files, origin if isinstance(origin, dict) else {"kind": "archive"}
            ),
            Kept(config, _loras(view, view.outer, names), extras),
        )


def _model_files(view: ArchiveView, make_folder: MakeFolder) -> dict[str, PipelineFile]:
    if view.place is None:
        prefix = pipeline_prefix(view.outer.sizes, str(view.path)) if view.outer else ""
        return dict(read_folder(view.path / prefix).files)
    path, start, size_bytes = view.place
    with path.open("rb") as file:
        reader = ZipReader(file, start=start, size_bytes=size_bytes, label=str(view.path))
        return _members(reader, path, pipeline_prefix(reader.sizes, str(view.path)), make_folder)


def _members(
    reader: ZipReader, path: Path, prefix: str, make_folder: MakeFolder
) -> dict[str, PipelineFile]:
    """Return the members of `reader`, the zip `path`, whose names begin with `prefix`."""
    mtime_ns = path.stat().st_mtime_ns
    files = {}
    packed_bytes = sum(m.size_bytes for m in reader.members.values() if not m.is_stored)
    folder = make_folder("unpacked", packed_bytes) if packed_bytes else path
    for full_name, member in reader.members.items():
        if not full_name.startswith(prefix):
            continue
        name = full_name.removeprefix(prefix)
        if member.is_stored:
            files[name] = PipelineFile(
                name,
                path,
                member.size_bytes,
                offset=member.offset,
                mtime_ns=mtime_ns,
                crc32=member.crc32,
            )
        else:
            reader.extract(member, folder / name)
            files[name] = file_at(name, folder / name, folder)
    return files


def _loras(view: ArchiveView, outer: Reader, names: list[str]) -> dict[str, PipelineFile]:
    found = {}
    for name in names:
        if isinstance(outer, ZipReader):
            member = outer.members[name]
            if not member.is_stored:
                raise ArchiveError(f"{view.path}: {name} is not stored: pack it from its folder")
            file = PipelineFile(
                name,
                view.path,
                member.size_bytes,
                offset=member.offset,
                mtime_ns=view.path.stat().st_mtime_ns,
                crc32=member.crc32,
            )
        else:
            file = file_at(name, view.path / name)
        found[Path(name).name.removesuffix(WEIGHTS_SUFFIX)] = file
    return found
