"""Opens whatever was given as a pipeline, and makes a pipeline of it where it is none yet."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from handler.errors import ArchiveError
from handler.loading.contents import MODEL_INDEX, WEIGHTS_SUFFIX
from handler.loading.model_index import ModelIndex
from scripts.archive.checkpoint import Kind, kind_of, read_checkpoint, usual_pipeline
from scripts.archive.conversion import convert_checkpoint, convert_component, fits
from scripts.archive.hub import download
from scripts.archive.hub_cache import find_snapshot
from scripts.archive.manifest import MANIFEST_NAME
from scripts.archive.mistaken import mistaken_pipeline
from scripts.archive.pipeline_files import check_finished, choose_names
from scripts.archive.pipeline_source import PipelineFile, PipelineSource, read_folder
from scripts.archive.reader import open_archive
from scripts.archive.repacking import Kept, open_packed
from scripts.archive.source import find_source
from scripts.disk import check_space, staging_folder
from scripts.errors import UsageError
from scripts.hints import to_run

__all__ = ["Given", "Opened", "open_pipeline"]

_MODEL_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w.-]+))?")
_ARCHIVE_SUFFIXES = (".mar", ".zip")


@dataclass(frozen=True, slots=True)
class Given:
    """What the user gave: a pipeline in any form, and what it takes to read it.

    `revision` chooses in a hub cache; `config_from` has the configuration of a single file;
    `is_repacked` says that `path` is an archive of which the rest is kept too.
    """

    path: Path
    revision: str = "main"
    config_from: str | None = None
    dtype: str | None = None
    components: Mapping[str, Path | None] = field(default_factory=dict)
    is_repacked: bool = False


@dataclass(frozen=True, slots=True)
class Opened:
    """A pipeline that can be packed, the components that replace its own, and the precision."""

    source: PipelineSource
    components: Mapping[str, Path | None]
    dtype: str | None
    kept: Kept | None = None


@contextmanager
def open_pipeline(given: Given, out: Path) -> Iterator[Opened]:
    """Open a pipeline, to pack it as `out`; what has to be converted is written beside that.

    Raises: ArchiveError and UsageError, which say what `given.path` is and what packs it.
    """
    with ExitStack() as stack:
        make_folder = _Staging(out, stack)
        source, kept = _open(given, make_folder, stack)
        dtype = given.dtype or (kept.dtype if kept is not None else None)
        components = {
            name: _replaced(name, path, source, dtype, make_folder)
            for name, path in given.components.items()
        }
        yield Opened(source, components, dtype, kept)


class _Staging:
    """Makes hidden folders beside `out`, which are removed when `stack` is left."""

    def __init__(self, out: Path, stack: ExitStack) -> None:
        self._out, self._stack = out, stack
        self._made: Path | None = None

    def __call__(self, name: str, size_bytes: int) -> Path:
        """Return a path for the new folder `name`. Raises: ArchiveError, where it has no room."""
        check_space(self._out, size_bytes, "what is converted or unpacked for it")
        if self._made is None:
            self._made = self._stack.enter_context(staging_folder(self._out))
        return self._made / name


def _open(
    given: Given, make_folder: _Staging, stack: ExitStack
) -> tuple[PipelineSource, Kept | None]:
    path = find_snapshot(given.path, given.revision)
    if path == given.path and given.revision != "main":
        raise UsageError(
            f"--revision {given.revision}: {path} is not a hub cache, which would have revisions"
        )
    is_file = path.suffix == WEIGHTS_SUFFIX and path.is_file()
    if given.config_from is not None and not is_file:
        raise UsageError(f"--config-from is for a checkpoint in one file, which {path} is not")
    if given.is_repacked:
        source, kept = stack.enter_context(open_packed(path, make_folder))
        return source, kept
    if (path / MODEL_INDEX).is_file():
        check_finished(path)
        return read_folder(path), None
    if _is_foreign_archive(path):
        return stack.enter_context(open_packed(path, make_folder))[0], None
    if is_file and _is_convertible(given):
        return _convert(given, make_folder), None
    raise mistaken_pipeline(path)


def _is_convertible(given: Given) -> bool:
    """Say whether a file of weights is a whole checkpoint, or the user says what to make of it."""
    if given.config_from is not None:
        return True
    try:
        return kind_of(read_checkpoint(given.path).tensors) is Kind.CHECKPOINT
    except ArchiveError:
        return False


def _is_foreign_archive(path: Path) -> bool:
    """Say whether `path` is a zip with a pipeline, or an archive that another tool packed."""
    if not path.is_file() or path.suffix.lower() not in _ARCHIVE_SUFFIXES:
        return False
    with open_archive(path) as view:
        return view.outer is None or MANIFEST_NAME not in view.outer.sizes


def _convert(given: Given, make_folder: _Staging) -> PipelineSource:
    path = given.path
    size_bytes = path.stat().st_size
    if given.config_from is None:
        raise UsageError(_missing_configuration(path))
    configuration = _read_configuration(given.config_from, make_folder)
    index = ModelIndex.parse(configuration.files[MODEL_INDEX].read(), given.config_from)
    chosen = choose_names(configuration.files, index.components)
    out = make_folder("converted", size_bytes)
    notes = convert_checkpoint(
        path,
        {name: configuration.files[name] for name in chosen},
        out,
        dtype=given.dtype,
        replaced=given.components.keys(),
    )
    origin = {"kind": "single file", "file": path.name}
    origin |= {f"configuration_{key}": text for key, text in configuration.origin.items()}
    return PipelineSource(path, read_folder(out).files, origin, notes)


def _missing_configuration(path: Path) -> str:
    kind, model_id = usual_pipeline(read_checkpoint(path))
    folder, hub = (
        to_run("pack", f"--config-from {each}", pipeline=str(path)) for each in ("FOLDER", model_id)
    )
    return (
        f"{path} is a whole checkpoint (for diffusers: {kind}): it holds weights alone, no "
        "tokenizer, scheduler or configuration; --config-from names a pipeline of its kind that "
        f"has them: a folder ({folder}), or a model on the hub, of which then some "
        f"megabytes are fetched ({hub})"
    )


def _read_configuration(config_from: str, make_folder: _Staging) -> PipelineSource:
    folder = Path(config_from)
    if folder.exists():
        folder = find_snapshot(folder)
        if not (folder / MODEL_INDEX).is_file():
            raise ArchiveError(f"--config-from {config_from}: {mistaken_pipeline(folder)}")
        return read_folder(folder)
    match = _MODEL_ID.fullmatch(config_from)
    if match is None:
        raise UsageError(f"--config-from {config_from}: no such folder, nor a model id (org/name)")
    out = make_folder("configuration", 0)
    download(match[1], revision=match[2] or "main", out=out, is_configuration=True)
    return PipelineSource(folder, read_folder(out).files, find_source(out))


def _replaced(
    component: str,
    path: Path | None,
    source: PipelineSource,
    dtype: str | None,
    make_folder: _Staging,
) -> Path | None:
    """Return what replaces `component`: `path` itself, or its weights in diffusers' layout."""
    if path is None:
        return None
    if not path.exists():
        raise ArchiveError(f"--component {component}={path}: there is no such file or folder")
    path = find_snapshot(path)
    index = ModelIndex.parse(source.files[MODEL_INDEX].read(), str(source.path))
    if not path.is_file() or path.suffix != WEIGHTS_SUFFIX or component not in index.components:
        return path
    own = _own_files(component, source)
    if fits(path, own):
        return path
    out = make_folder(f"component-{component}", path.stat().st_size)
    return convert_component(component, path, index, own, out, dtype=dtype)


def _own_files(component: str, source: PipelineSource) -> dict[str, PipelineFile]:
    return {name: file for name, file in source.files.items() if name.startswith(f"{component}/")}
