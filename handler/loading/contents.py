"""Which files a pipeline folder may hold, by their names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath

from handler.errors import ArchiveError

__all__ = [
    "CODE_SUFFIXES",
    "CONTROLNET_FOLDER",
    "EMBEDDING_FOLDER",
    "LORA_FOLDER",
    "MANIFEST_NAME",
    "MODEL_INDEX",
    "MODEL_ZIP",
    "PICKLE_SUFFIXES",
    "WEIGHTS_SUFFIX",
    "check_names",
    "controlnet_names",
    "pickled",
    "pipeline_prefix",
]

MODEL_ZIP = "model.zip"
LORA_FOLDER = "lora"
EMBEDDING_FOLDER = "embeddings"
"""Of textual inversions, within a pipeline."""
CONTROLNET_FOLDER = "controlnets"
MANIFEST_NAME = "MAR-INF/PIPELINE.json"
MODEL_INDEX = "model_index.json"
WEIGHTS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
CODE_SUFFIXES = (".py", ".pyc", ".so", ".pyd", ".dll", ".dylib")


def pickled(names: Iterable[str]) -> list[str]:
    """Return those of `names` that hold, or may hold, pickles."""
    return sorted(name for name in names if name.lower().endswith(PICKLE_SUFFIXES))


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


def controlnet_names(paths: Iterable[str]) -> list[str]:
    """Return the names of the ControlNets among the `paths` of a pipeline's files, sorted."""
    split = (PurePosixPath(path).parts for path in paths)
    return sorted({p[1] for p in split if len(p) > 2 and p[0] == CONTROLNET_FOLDER})
