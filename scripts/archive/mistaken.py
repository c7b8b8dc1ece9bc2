"""Says what was given as a pipeline's folder and is not one, and which command packs it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from shlex import quote

from handler.errors import ArchiveError, ServingError
from handler.loading.contents import MODEL_INDEX, PICKLE_SUFFIXES, WEIGHTS_SUFFIX
from handler.loading.safetensors_map import read_header
from scripts.archive.manifest import TORCHSERVE_MANIFEST_NAME
from scripts.errors import UsageError

__all__ = ["has_lora_names", "mistaken_pipeline"]

_LORA_FILES = {"pytorch_lora_weights.safetensors", "adapter_config.json"}
_CACHE_PREFIX = "models--"
_MODEL_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_LORA_KEY = re.compile(r"\.lora_(A|B|up|down)\b|_lora\.(up|down)\b|\.(hada|lokr)_w1(_a)?\b")
_WANTED = "give a folder that save_pretrained or scripts.download_weights wrote"
_ADD_LORA = "pack the pipeline that it belongs to, with --lora"


def mistaken_pipeline(path: Path) -> ServingError:
    """Return the error that says what `path` is, which holds no model_index.json, and the remedy.

    A UsageError where there is no `path` at all, else an ArchiveError.
    """
    if not path.exists():
        return UsageError(f"{path} does not exist: {_model_id_hint(path) or _WANTED}")
    what = _file(path) if path.is_file() else _folder(path)
    return ArchiveError(f"{path} is not a diffusers pipeline: {what}")


def has_lora_names(names: Iterable[str]) -> bool:
    """Say whether files of these names, in the folder of a model, are those of a LoRA."""
    return not _LORA_FILES.isdisjoint(names)


def _model_id_hint(path: Path) -> str:
    if not _MODEL_ID.fullmatch(str(path)):
        return ""
    return (
        f"a model of that name on the hub is packed by --model-id {path} "
        f"(make archive MODEL_ID={path})"
    )


def _file(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix == ".mar":
        return _archive(path, path.stem)
    if suffix == ".zip":
        folder = quote(path.stem)
        return (
            "it is a zip; unpack it and give the folder: "
            f"python -m zipfile -e {quote(str(path))} {folder} && make archive PIPELINE={folder}"
        )
    if suffix == WEIGHTS_SUFFIX:
        return _weights_file(path)
    if suffix in PICKLE_SUFFIXES:
        return (
            "it is a file of pickled weights, which can run code when loaded; "
            "look for the same model as safetensors"
        )
    return f"it is a file; {_WANTED}"


def _weights_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            names = read_header(file, path.stat().st_size, str(path)).tensors
    except ArchiveError:
        return f"it is a damaged file of weights; {_WANTED}"
    if any(_LORA_KEY.search(name) for name in names):
        return f"it is a LoRA; {_ADD_LORA} {quote(str(path))}"
    return (
        "it is a file of weights, not a pipeline's folder; a whole checkpoint becomes one by "
        f"diffusers: StableDiffusionPipeline.from_single_file({str(path)!r})"
        f".save_pretrained({path.stem!r})"
    )


def _archive(path: Path, name: str) -> str:
    store = quote(str(path.parent))
    return f"it is a finished archive; make serve STORE={store} NAME={quote(name)} serves it"


def _folder(path: Path) -> str:
    if (path / TORCHSERVE_MANIFEST_NAME).exists():
        return _archive(path, path.name)
    if path.name.startswith(_CACHE_PREFIX) and (path / "snapshots").is_dir():
        return _cache(path)
    if path.name == "snapshots" and path.parent.name.startswith(_CACHE_PREFIX):
        return _cache(path.parent)
    names = sorted(each.name for each in path.iterdir())
    if has_lora_names(names):
        weights = [name for name in names if name.endswith(WEIGHTS_SUFFIX)]
        file = quote(str(path / weights[0])) if len(weights) == 1 else "its .safetensors file"
        return f"it is a LoRA; {_ADD_LORA} {file}"
    if "config.json" in names:
        return (
            "it is one component (it has a config.json); pack the pipeline that it belongs to, "
            f"with --component NAME={quote(str(path))}"
        )
    inner = sorted(found.parent for found in path.glob(f"*/{MODEL_INDEX}"))
    if len(inner) == 1:
        return f"one is in it: make archive PIPELINE={quote(str(inner[0]))}"
    return f"it has no {MODEL_INDEX}; {_WANTED}"


def _cache(root: Path) -> str:
    """Name the snapshot of a model in the hub's cache that a pipeline would be loaded from."""
    model_id = root.name.removeprefix(_CACHE_PREFIX).replace("--", "/")
    snapshots = list(_snapshots(root))
    if not snapshots:
        return (
            f"it is the hub's cache of {model_id}, which holds no whole snapshot; "
            f"make archive MODEL_ID={model_id} fetches it"
        )
    return (
        f"it is the hub's cache of {model_id}; give the snapshot: "
        f"make archive PIPELINE={quote(str(snapshots[0]))} NAME={model_id.rpartition('/')[2]}"
    )


def _snapshots(root: Path) -> Iterator[Path]:
    """Yield the snapshots that hold a pipeline, that of the branch main first."""
    main = root / "refs" / "main"
    first = main.read_text().strip() if main.is_file() else ""
    found = sorted(each.parent for each in root.glob(f"snapshots/*/{MODEL_INDEX}"))
    yield from sorted(found, key=lambda snapshot: snapshot.name != first)
