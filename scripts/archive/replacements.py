"""Finds what replaces a component: another folder, a component of another pipeline, a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from handler.errors import ArchiveError
from handler.loading.contents import MODEL_INDEX, PICKLE_SUFFIXES, WEIGHTS_SUFFIX
from handler.loading.model_index import ModelIndex
from handler.loading.variants import variant_of
from scripts.archive.pipeline_source import PipelineFile, file_at, walk
from scripts.documents import parse_json
from scripts.hints import to_run

__all__ = ["Replacement", "check_droppable", "find_replacement", "without_files"]

_CLASS_KEYS = (
    ("config.json", "_class_name"),
    ("scheduler_config.json", "_class_name"),
    ("config.json", "architectures"),
    ("tokenizer_config.json", "tokenizer_class"),
)


@dataclass(frozen=True, slots=True)
class Replacement:
    """The files of a component by their names in the pipeline.

    `named_class` is library and class where the files say them; `notes` are lines for the user.
    """

    files: Mapping[str, PipelineFile]
    named_class: tuple[str, str] | None = None
    notes: Sequence[str] = ()


def find_replacement(
    component: str, path: Path, own: Mapping[str, PipelineFile], index: ModelIndex
) -> Replacement:
    """Return what `path` gives the `component` of the pipeline `index`, which had the files `own`.

    A file of weights, already in diffusers' layout, keeps the component's own configuration.
    Raises: ArchiveError.
    """
    if path.is_file():
        return _file(component, path, own, index)
    if not (path / MODEL_INDEX).is_file():
        return Replacement(_folder_files(component, path), _named_class(path))
    other = ModelIndex.read(path / MODEL_INDEX, str(path))
    if component not in other.components:
        raise ArchiveError(
            f"{path} is a whole pipeline and has no {component}; it has: "
            f"{', '.join(other.components)}; give the folder of one of them"
        )
    files = {
        name: replace(file, root=path)  # the hub's cache links from there
        for name, file in _folder_files(component, path / component).items()
    }
    note = f"{component}: {path} is a whole pipeline; its {component} is taken"
    return Replacement(files, other.components[component], [note])


def _weights_name(component: str, library: str) -> str:
    stem = "model" if library == "transformers" else "diffusion_pytorch_model"
    return f"{component}/{stem}{WEIGHTS_SUFFIX}"


def without_files(components: Mapping[str, Path], index: ModelIndex) -> ArchiveError:
    """Return the error about `components` that have no files in their folders, and the way out."""
    places = ", ".join(str(path) for path in components.values())
    has = "has" if len(components) == 1 else "have"
    noun = "component" if len(components) == 1 else "components"
    message = f"the {noun} {' and '.join(components)} {has} no files in {places}"
    if any(path.is_symlink() for path in components.values()):
        return ArchiveError(f"{message}: links to folders are not followed")
    if components.keys() <= _optional_components(index):
        flags = " ".join(f"--component {name}=none" for name in components)
        message += f"; the pipeline works without: {flags} ({to_run('pack', flags)})"
    return ArchiveError(message)


def check_droppable(component: str, index: ModelIndex) -> None:
    """Refuse to leave out a component that the pipeline's class needs. Raises: ArchiveError."""
    optional = _optional_components(index)
    if component not in optional:
        having = ", ".join(sorted(optional & index.components.keys())) or "nothing"
        raise ArchiveError(
            f"{component} cannot be left out: {index.class_name} needs it; it can do without: "
            f"{having} (a folder called none is given as ./none)"
        )


def _optional_components(index: ModelIndex) -> frozenset[str]:
    from handler.library_logs import quiet_libraries

    with quiet_libraries():
        import diffusers

        cls: Any = getattr(diffusers, index.class_name, None)
    return frozenset(getattr(cls, "_optional_components", ()))


def _folder_files(component: str, folder: Path) -> dict[str, PipelineFile]:
    names = [f"{component}/{name}" for name in walk(folder)]
    prefix = len(component) + 1
    return {name: file_at(name, folder / name[prefix:], folder) for name in names}


def _file(
    component: str, path: Path, own: Mapping[str, PipelineFile], index: ModelIndex
) -> Replacement:
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise ArchiveError(
            f"{path} is a file of pickled weights, which can run code when loaded: "
            f"look for the same weights as {WEIGHTS_SUFFIX}"
        )
    if path.suffix != WEIGHTS_SUFFIX:
        raise ArchiveError(f"{path}: a component is wanted as a folder or a {WEIGHTS_SUFFIX} file")
    kept = {
        name: file
        for name, file in own.items()
        if not file.is_weights and variant_of(name) is None  # which the old weights' index has
    }
    name = _weights_name(component, index.components[component][0])
    return Replacement({**kept, name: file_at(name, path)})


def _named_class(folder: Path) -> tuple[str, str] | None:
    """Return the class that a component's folder says it is of, where it does."""
    for name, key in _CLASS_KEYS:
        found = _read_object(folder / name).get(key)
        if isinstance(found, list) and found:
            found = found[0]
        if isinstance(found, str):
            return "diffusers" if key == "_class_name" else "transformers", found
    return None


def _read_object(path: Path) -> dict[str, object]:
    """Return the JSON object in the file `path`; an empty one where there is no such file."""
    if not path.is_file():
        return {}
    found = parse_json(path.read_bytes(), str(path))
    if not isinstance(found, dict):
        raise ArchiveError(
            f"{path} does not hold a JSON object: it is not a component's configuration"
        )
    return found
