"""Builds a pipeline without loading it: from configurations, and the names and shapes of weights.

Its tensors have shapes and no memory. What is found out on it, before anything is packed or
served, is what the loaded pipeline would say: classes, sizes, defaults, LoRAs that fit.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from handler.errors import ArchiveError
from handler.library_logs import quiet_libraries
from handler.loading.contents import MODEL_INDEX, WEIGHTS_SUFFIX
from handler.loading.model_index import ModelIndex
from handler.loading.safetensors_map import Header
from handler.messages import first_lines
from scripts.documents import parse_json

if TYPE_CHECKING:
    import torch

__all__ = ["Skeleton", "SmallFiles", "build_skeleton", "shapes_of"]

_MAX_FILE_BYTES = 256 << 20
# What `quant_method` in a component's configuration stands for: the package that reads it.
_QUANTIZERS = {
    "auto-round": "auto_round",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
    "gguf": "gguf",
    "gptq": "gptqmodel",
    "modelopt": "modelopt",
    "quanto": "optimum.quanto",
    "sdnq": "sdnq",
    "torchao": "torchao",
}


class SmallFiles(Protocol):
    """The pipeline's files, by their paths in it."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """The bytes of each."""
        ...

    def read(self, name: str) -> bytes:
        """Return a whole file."""
        ...


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A pipeline without weights, None where it cannot be built; `problems` say why.

    `unread` are components whose weights were not looked at, for diffusers alone can read them.
    """

    pipeline: Any | None
    problems: tuple[str, ...]
    unread: tuple[str, ...] = ()


def build_skeleton(index: ModelIndex, files: SmallFiles, headers: Mapping[str, Header]) -> Skeleton:
    """Build the pipeline of `index` out of its small `files` and the `headers` of its weights."""
    from handler.loading.pipeline import offline

    with tempfile.TemporaryDirectory(prefix="verify-") as folder, offline(), quiet_libraries():
        return _build_pipeline(Path(folder), index, files, headers)


def _build_pipeline(
    folder: Path, index: ModelIndex, files: SmallFiles, headers: Mapping[str, Header]
) -> Skeleton:
    from handler.loading.pipeline_class import absent_components, pipeline_class

    try:
        cls = pipeline_class(index)
    except ArchiveError as error:
        return Skeleton(None, (str(error), *_component_problems(index)))
    problems: list[str] = []
    unread: list[str] = []
    components: dict[str, Any] = dict.fromkeys(absent_components(cls, index))
    (folder / MODEL_INDEX).write_bytes(index.dump())
    for name in index.components:
        try:
            problems += _write_small(folder, name, files)
            component, is_read = _build(name, index, folder, files, headers)
        except ArchiveError as error:
            problems.append(str(error))
            continue
        except Exception as error:
            # What a library raises about a wrong configuration is of any kind.
            reason = first_lines(error)
            problems.append(f"{name}: its weights do not fit its configuration: {reason}")
            continue
        if component is not None:
            components[name] = component
        if not is_read:
            unread.append(name)
    if problems:
        return Skeleton(None, tuple(problems), tuple(unread))
    try:
        pipeline = cls.from_pretrained(
            os.fspath(folder), local_files_only=True, trust_remote_code=False, **components
        )
    except Exception as error:
        reason = first_lines(error)
        return Skeleton(None, (f"the pipeline does not load: {reason}",), tuple(unread))
    return Skeleton(pipeline, (), tuple(unread))


def _component_problems(index: ModelIndex) -> Iterator[str]:
    from handler.loading.pipeline_class import component_class

    for name in index.components:
        try:
            component_class(name, index)
        except ArchiveError as error:
            yield str(error)


def _write_small(folder: Path, name: str, files: SmallFiles) -> Iterator[str]:
    """Write the files of the component `name` other than weights, as a worker would."""
    for path, size_bytes in files.sizes.items():
        if not path.startswith(f"{name}/") or path.endswith(WEIGHTS_SUFFIX):
            continue
        if size_bytes > _MAX_FILE_BYTES:
            yield f"{path} has {size_bytes} bytes; a file other than weights may have 256 MiB"
            continue
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(files.read(path))


def _build(
    name: str,
    index: ModelIndex,
    folder: Path,
    files: SmallFiles,
    headers: Mapping[str, Header],
) -> tuple[Any, bool]:
    """Return the component if it is a model, and whether its weights were looked at."""
    import torch

    from handler.loading.components import (
        NotMappableError,
        build_empty,
        build_model,
        check_vocabulary,
    )
    from handler.loading.leftovers import leftover_problem
    from handler.loading.pipeline_class import component_class
    from handler.loading.variants import select_weights

    cls = component_class(name, index)
    prefix = f"{name}/"
    inside = [path.removeprefix(prefix) for path in files.sizes if path.startswith(prefix)]
    if not inside:
        raise ArchiveError(f"the component {name} of {MODEL_INDEX} has no files")
    check_vocabulary(name, cls, inside)
    if not issubclass(cls, torch.nn.Module):
        return None, True
    own = {path: header for path, header in headers.items() if path.startswith(prefix)}
    _check_quantizer(name, folder)
    paths, _ = select_weights(name, own, "float16")
    try:
        if not paths:
            raise NotMappableError("its weights have unusual names")
        model, unexpected = build_model(cls, folder / name, shapes_of(own, paths), torch.float32)
    except NotMappableError:
        return build_empty(cls, folder / name, torch.float32), False
    if problem := leftover_problem(name, model, unexpected):
        raise ArchiveError(problem)
    return model, True


def _check_quantizer(name: str, folder: Path) -> None:
    """Refuse a component that is quantized by a package that is not here. Raises: ArchiveError."""
    path = folder / name / "config.json"
    config = parse_json(path.read_bytes(), str(path.relative_to(folder))) if path.exists() else {}
    quantized = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(quantized, dict):
        return
    method = str(quantized.get("quant_method"))
    package = _QUANTIZERS.get(method, method)
    if not _is_installed(package):
        raise ArchiveError(
            f"{name}: its weights are quantized by {method}, and {package} is not installed here: "
            f"pip install {package.partition('.')[0]}, or take the weights that are not quantized"
        )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def shapes_of(headers: Mapping[str, Header], paths: list[str]) -> dict[str, torch.Tensor]:
    """Return tensors of the shapes in the files `paths`, all on one number."""
    import torch

    nothing = torch.empty((), dtype=torch.float32)
    return {
        name: nothing.expand(info.shape)
        for path in paths
        for name, info in headers[path].tensors.items()
    }
