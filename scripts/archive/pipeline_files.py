"""Chooses the files of a pipeline that are packed, out of all that its source holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from handler.errors import ArchiveError
from handler.loading.contents import MODEL_INDEX, WEIGHTS_SUFFIX, pickled
from handler.loading.model_index import ModelIndex
from handler.loading.variants import select_weights, variant_of
from scripts.archive.hub_cache import find_snapshot
from scripts.archive.left_out import describe_left_out, describe_variants
from scripts.archive.mistaken import mistaken_pipeline
from scripts.archive.pipeline_source import PipelineFile, PipelineSource, read_folder
from scripts.archive.replacements import check_droppable, find_replacement, without_files
from scripts.archive.source import read_source_note

__all__ = [
    "PipelineFiles",
    "check_finished",
    "check_link",
    "choose_names",
    "list_pipeline",
    "select_files",
]

_KEPT_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", WEIGHTS_SUFFIX)
_KEPT_AT_TOP = ("readme", "license", "licence", "notice")


@dataclass(frozen=True, slots=True)
class PipelineFiles:
    """A pipeline's own files, sorted by name, and what their model_index.json says.

    `notes` are lines for the user: what was left out, and which of several variants was taken.
    """

    files: Sequence[PipelineFile]
    index: ModelIndex
    notes: Sequence[str] = field(default=())


def list_pipeline(
    folder: Path,
    *,
    replaced: Mapping[str, Path | None] | None = None,
    dtype_name: str = "float16",
) -> PipelineFiles:
    """Choose the files of the pipeline in `folder`; see `select_files`. Raises: ServingError."""
    folder = find_snapshot(folder)
    if not (folder / MODEL_INDEX).is_file():
        raise mistaken_pipeline(folder)
    check_finished(folder)
    return select_files(read_folder(folder), replaced=replaced, dtype_name=dtype_name)


def check_finished(folder: Path) -> None:
    """Refuse the folder of a download that was interrupted. Raises: ArchiveError."""
    note = read_source_note(folder)
    if note is not None and note.get("is_complete") is not True:
        raise ArchiveError(f"the download into {folder} is not finished: run it again to go on")


def select_files(
    source: PipelineSource,
    *,
    replaced: Mapping[str, Path | None] | None = None,
    dtype_name: str = "float16",
) -> PipelineFiles:
    """Choose the pipeline's own files; one variant of the weights, the nearest to `dtype_name`.

    `replaced` gives components other folders or files of weights, or leaves them out by None.
    Raises: ArchiveError, naming every file refused.
    """
    replaced = replaced or {}
    index = ModelIndex.parse(source.files[MODEL_INDEX].read(), str(source.path))
    if unknown := sorted(replaced.keys() - index.components.keys()):
        raise ArchiveError(
            f"no component {', '.join(unknown)} in {source.path}: "
            f"it has {', '.join(index.components)}"
        )
    files, index, notes = _replace(source.files, index, replaced)
    notes = [*source.notes, *notes]
    components = index.components
    _refuse_only_pickled(files, components)
    chosen = choose_names(files, components, dtype_name)
    empty = [
        component
        for component in components
        if not any(name.startswith(f"{component}/") for name in chosen)
    ]
    if empty:
        paths = {name: replaced.get(name) or source.path / name for name in empty}
        raise without_files(paths, index)
    _check_chosen(chosen)
    for name in chosen:
        check_link(files[name])
    notes += [
        *describe_variants(files, components, dtype_name),
        *describe_left_out(files, chosen, components),
    ]
    return PipelineFiles([files[name] for name in chosen], index, notes)


def _replace(
    files: Mapping[str, PipelineFile], index: ModelIndex, replaced: Mapping[str, Path | None]
) -> tuple[dict[str, PipelineFile], ModelIndex, list[str]]:
    """Put the files and classes of `replaced` in the places of the components' own."""
    found = dict(files)
    changes: dict[str, object] = {}
    notes: list[str] = []
    for component, path in replaced.items():
        own = {name: found.pop(name) for name in files if name.startswith(f"{component}/")}
        if path is None:
            check_droppable(component, index)
            changes[component] = [None, None]
            if component == "safety_checker":
                changes["requires_safety_checker"] = False
                # It is there for the checker alone, and is absent together with it.
                is_empty = not any(name.startswith("feature_extractor/") for name in files)
                if is_empty and "feature_extractor" in index.components.keys() - replaced.keys():
                    changes["feature_extractor"] = [None, None]
            continue
        replacement = find_replacement(component, path, own, index)
        found.update(replacement.files)
        notes += replacement.notes
        if replacement.named_class is not None:
            changes[component] = [*replacement.named_class]
    if replaced:
        entries = {**index.entries, **changes}
        label = "the pipeline with its replaced components"
        index = ModelIndex.parse(json.dumps(entries).encode(), label)
        data = index.dump()
        found[MODEL_INDEX] = PipelineFile(
            MODEL_INDEX, files[MODEL_INDEX].path, len(data), data, root=files[MODEL_INDEX].root
        )
    return found, index, notes


def _check_chosen(names: Sequence[str]) -> None:
    """Refuse names that are one name where file systems do not tell letters' cases apart."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise ArchiveError(
                f"{other} and {name} differ only in upper and lower case, and are one file on some "
                "machines: remove one of them"
            )


def check_link(file: PipelineFile) -> None:
    """Refuse a file that is a link out of its root, unless it is one of the hub's cache.

    The cache's snapshots are links to the blobs of the same model.
    """
    path, root = file.path, file.root
    if root is None or not path.is_symlink():
        return
    root, target = root.resolve(), path.resolve()
    caches = (each for each in (root, *root.parents) if each.name.startswith("models--"))
    allowed = [root, *((each / "blobs").resolve() for each in caches)]
    if not any(target.is_relative_to(each) for each in allowed):
        raise ArchiveError(
            f"{path} is a link to {target}, outside of the pipeline: put the file itself there"
        )


def choose_names(
    names: Iterable[str], components: Iterable[str], dtype_name: str = "float16"
) -> list[str]:
    """Choose the pipeline's own files among all `names` (paths in its folder), sorted.

    One variant of each component's weights; model card and licence; no pickles, no code.
    """
    names = sorted(names)
    chosen = [name for name in names if "/" not in name and is_kept_at_top(name)]
    for component in components:
        inside = [name for name in names if name.startswith(f"{component}/")]
        chosen += _component_names(component, inside, dtype_name)
    return sorted(chosen)


def is_kept_at_top(name: str) -> bool:
    """Say whether a file beside model_index.json travels with the pipeline."""
    return name == MODEL_INDEX or name.lower().startswith(_KEPT_AT_TOP)


def _component_names(component: str, names: Sequence[str], dtype_name: str) -> Iterator[str]:
    kept = [name for name in names if name.lower().endswith(_KEPT_SUFFIXES)]
    weights = [name for name in kept if name.endswith(WEIGHTS_SUFFIX)]
    chosen, variant = select_weights(component, weights, dtype_name)
    for name in kept:
        if name in weights:
            # Weights by unusual names are taken only where there are no others.
            if name in chosen or not chosen:
                yield name
        elif variant_of(name) in (None, variant or ""):
            yield name


def _refuse_only_pickled(files: Mapping[str, PipelineFile], components: Iterable[str]) -> None:
    """Refuse components whose weights are pickled only; beside safetensors they are left out."""
    found = []
    for component in components:
        inside = [name for name in files if name.startswith(f"{component}/")]
        if not any(name.endswith(WEIGHTS_SUFFIX) for name in inside):
            found += [str(files[name].path) for name in pickled(inside)]
    if found:
        raise ArchiveError(
            f"pickled weights are refused, they can run code when loaded: {', '.join(found)}; "
            "look for the same weights as safetensors, or save the pipeline again with "
            "safe_serialization=True"
        )
