"""What a pipeline folder may hold: names of its files, and the classes that its index names."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path, PurePosixPath

from handler.errors import ArchiveError
from handler.messages import show, shown_name

__all__ = [
    "LORA_FOLDER",
    "MANIFEST_NAME",
    "MODEL_INDEX",
    "MODEL_ZIP",
    "PICKLE_SUFFIXES",
    "WEIGHTS_SUFFIX",
    "check_model_index",
    "check_names",
    "pickled",
    "pipeline_prefix",
]

MODEL_ZIP = "model.zip"
LORA_FOLDER = "lora"
MANIFEST_NAME = "MAR-INF/PIPELINE.json"
MODEL_INDEX = "model_index.json"
WEIGHTS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
CODE_SUFFIXES = (".py", ".pyc", ".so", ".pyd", ".dll", ".dylib")
LIBRARIES = ("diffusers", "transformers")
_CLASS_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def pickled(names: Iterable[str]) -> list[str]:
    """Return those of `names` that hold, or may hold, pickles."""
    return sorted(name for name in names if name.lower().endswith(PICKLE_SUFFIXES))


def check_model_index(index: object, label: str) -> dict[str, object]:
    """Check that `index` (a parsed model_index.json) names nothing but known libraries' classes.

    Raises: ArchiveError, naming every entry that is refused.
    """
    if not isinstance(index, dict):
        raise ArchiveError(f"{label}: {MODEL_INDEX} holds no JSON object")
    class_name = index.get("_class_name")
    problems = []
    if not isinstance(class_name, str) or not _CLASS_NAME.fullmatch(class_name):
        problems.append(
            f"_class_name is {show(class_name)}: the name of a diffusers pipeline is wanted"
        )
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list):
            continue
        if not _is_known_class(value) or not _CLASS_NAME.fullmatch(name):
            problems.append(
                f"{shown_name(name)} is {show(value)}: "
                "only classes of diffusers and transformers load"
            )
    if problems:
        raise ArchiveError(f"{label}: {MODEL_INDEX} is refused: {'; '.join(problems)}")
    return index


def _is_known_class(value: list[object]) -> bool:
    """Say whether `value` is ``[library, class]`` of a library that we load from.

    Pipelines' own modules are diffusers' too: the safety checker is of ``stable_diffusion``.
    """
    if value in ([None, None], [None, None, None]):
        return True
    if len(value) != 2 or not all(isinstance(part, str) for part in value):
        return False
    library, class_name = str(value[0]), str(value[1])
    is_library = library in LIBRARIES or library in _pipeline_modules()
    return is_library and _CLASS_NAME.fullmatch(class_name) is not None


@cache
def _pipeline_modules() -> frozenset[str]:
    """Name the packages in ``diffusers.pipelines`` without paying for the import of diffusers."""
    spec = importlib.util.find_spec("diffusers")
    roots = spec.submodule_search_locations if spec else None
    folders = [Path(root, "pipelines") for root in roots or ()]
    return frozenset(
        child.parent.name for folder in folders for child in folder.glob("*/__init__.py")
    )


def pipeline_prefix(names: Iterable[str], label: str) -> str:
    """Return what stands before every file of the pipeline: nothing, or its folder and a slash.

    Raises: ArchiveError, where `names` hold no pipeline, or several.
    """
    found = [name for name in names if PurePosixPath(name).name == MODEL_INDEX]
    roots = [name for name in found if name.count("/") <= 1]
    if len(roots) != 1:
        raise ArchiveError(f"{label}: holds {len(roots)} pipelines ({MODEL_INDEX}), not one")
    return roots[0].removesuffix(MODEL_INDEX)


def check_names(names: Iterable[str], label: str) -> None:
    """Refuse pickles and code among the names of a pipeline's files. Raises: ArchiveError."""
    names = list(names)
    if found := pickled(names):
        raise ArchiveError(
            f"{label}: pickled weights are refused, they can run code when loaded: "
            f"{', '.join(found)}; save the pipeline with safe_serialization=True"
        )
    if code := sorted(name for name in names if name.lower().endswith(CODE_SUFFIXES)):
        raise ArchiveError(f"{label}: code in a pipeline is refused: {', '.join(code)}")
