"""Lists the files of a pipeline folder that belong to the pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from handler.errors import ArchiveError
from handler.loading.contents import MODEL_INDEX, WEIGHTS_SUFFIX, pickled
from handler.loading.model_index import ModelIndex
from handler.loading.variants import select_weights, variant_of
from scripts.archive.mistaken import mistaken_pipeline
from scripts.archive.source import read_source_note
from scripts.documents import parse_json

__all__ = [
    "PipelineFile",
    "PipelineFiles",
    "choose_names",
    "list_pipeline",
]

_KEPT_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", WEIGHTS_SUFFIX)
_KEPT_AT_TOP = ("readme", "license", "licence", "notice")


@dataclass(frozen=True, slots=True)
class PipelineFile:
    """A file of the pipeline: its name in the pipeline, and where it is; `data` instead of that."""

    name: str
    path: Path
    size_bytes: int
    data: bytes | None = None

    @property
    def is_weights(self) -> bool:
        """Whether it is a safetensors file."""
        return self.name.endswith(WEIGHTS_SUFFIX)


@dataclass(frozen=True, slots=True)
class PipelineFiles:
    """A pipeline's own files, sorted by name, and what their model_index.json says."""

    files: Sequence[PipelineFile]
    index: ModelIndex


def _read_index(folder: Path) -> ModelIndex:
    path = folder / MODEL_INDEX
    if not path.is_file():
        raise mistaken_pipeline(folder)
    return ModelIndex.read(path, str(folder))


def list_pipeline(
    folder: Path, *, replaced: Mapping[str, Path] | None = None, dtype_name: str = "float16"
) -> PipelineFiles:
    """List the pipeline's own files; one variant of the weights.

    `replaced` gives components other folders. Raises: ArchiveError, naming every file refused.
    """
    replaced = replaced or {}
    index = _read_index(folder)
    components = index.components
    if unknown := sorted(replaced.keys() - components.keys()):
        raise ArchiveError(
            f"no component {', '.join(unknown)} in {folder}: it has {', '.join(components)}"
        )
    _refuse_unfinished(folder)
    _refuse_pickles(folder, replaced)
    paths = {
        name: folder / name for name in _walk(folder) if name.partition("/")[0] not in replaced
    }
    for component, source in replaced.items():
        paths.update({f"{component}/{name}": source / name for name in _walk(source)})
    chosen = choose_names(paths, components, dtype_name)
    for component in components:
        if not any(name.startswith(f"{component}/") for name in chosen):
            source = replaced.get(component, folder / component)
            hint = ": links to folders are not followed" if source.is_symlink() else ""
            raise ArchiveError(f"the component {component} has no files in {source}{hint}")
    _check_chosen(chosen)
    for name in chosen:
        _check_link(paths[name], replaced.get(name.partition("/")[0], folder))
    files = {name: PipelineFile(name, paths[name], paths[name].stat().st_size) for name in chosen}
    if replaced:
        index = index.replace(_classes(replaced), "the pipeline with its replaced components")
        data = index.dump()
        files[MODEL_INDEX] = PipelineFile(MODEL_INDEX, paths[MODEL_INDEX], len(data), data)
    return PipelineFiles(list(files.values()), index)


def _classes(replaced: Mapping[str, Path]) -> dict[str, tuple[str, str]]:
    """Return the classes that the replacing components say they are, where they do."""
    classes: dict[str, tuple[str, str]] = {}
    for component, source in replaced.items():
        for name, key in (
            ("config.json", "_class_name"),
            ("scheduler_config.json", "_class_name"),
            ("config.json", "architectures"),
            ("tokenizer_config.json", "tokenizer_class"),
        ):
            found = _read_object(source / name).get(key)
            if isinstance(found, list) and found:
                found = found[0]
            if isinstance(found, str):
                library = "diffusers" if key == "_class_name" else "transformers"
                classes[component] = (library, found)
                break
    return classes


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


def _check_link(path: Path, root: Path) -> None:
    """Refuse a file that is a link out of `root`, unless it is one of the hub's cache.

    The cache's snapshots are links to the blobs of the same model.
    """
    if not path.is_symlink():
        return
    root, target = root.resolve(), path.resolve()
    caches = (each for each in (root, *root.parents) if each.name.startswith("models--"))
    allowed = [root, *((each / "blobs").resolve() for each in caches)]
    if not any(target.is_relative_to(each) for each in allowed):
        raise ArchiveError(
            f"{path} is a link to {target}, outside of the pipeline: put the file itself there"
        )


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


def _refuse_unfinished(folder: Path) -> None:
    note = read_source_note(folder)
    if note is not None and note.get("is_complete") is not True:
        raise ArchiveError(f"the download into {folder} is not finished: run it again to go on")


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


def _refuse_pickles(folder: Path, replaced: Mapping[str, Path]) -> None:
    found = []
    for root, prefix in [(folder, ""), *((path, name) for name, path in replaced.items())]:
        found += [
            str(root / name)
            for name in pickled(_walk(root))
            if prefix or name.partition("/")[0] not in replaced
        ]
    if found:
        raise ArchiveError(
            f"pickled weights are refused, they can run code when loaded: {', '.join(found)}; "
            "save the pipeline with safe_serialization=True, or remove them if the same weights "
            "are there as safetensors"
        )


def _walk(folder: Path) -> Iterator[str]:
    """Yield the paths of files below `folder`, hidden ones left out."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_symlink() and not path.exists():
            raise ArchiveError(f"{path} is a link to nothing: download it again")
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix()
