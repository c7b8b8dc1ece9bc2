"""ControlNets that are packed with a pipeline: their files, and whether they go with it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from handler.errors import ArchiveError
from handler.library_logs import quiet_libraries
from handler.loading.contents import CONTROLNET_FOLDER, controlnet_names, pickled
from handler.loading.safetensors_map import Header
from handler.messages import first_lines
from scripts.archive.hub_cache import find_snapshot
from scripts.archive.pipeline_files import check_link, choose_names
from scripts.archive.pipeline_source import PipelineFile, file_at, walk
from scripts.archive.skeleton import SmallFiles, shapes_of
from scripts.errors import UsageError

__all__ = ["check_controlnets", "controlnet_files"]

_CONFIG = "config.json"
# What a ControlNet must have in common with the denoiser whose steps it steers.
_COMMON = {
    "unet": ("in_channels", "cross_attention_dim", "block_out_channels"),
    "transformer": ("in_channels", "joint_attention_dim", "attention_head_dim"),
}


def controlnet_files(
    given: Mapping[str, Path | None],
    kept: Mapping[str, PipelineFile],
    dtype_name: str,
) -> dict[str, PipelineFile]:
    """Return the files of all ControlNets by their names in the pipeline.

    `given` are folders by name, None to leave one out of those whose files are `kept`.
    Raises: ArchiveError, UsageError.
    """
    files = dict(kept)
    for name, path in given.items():
        prefix = f"{CONTROLNET_FOLDER}/{name}/"
        before = [each for each in files if each.startswith(prefix)]
        if path is None and not before:
            raise UsageError(f"--controlnet {name}=none: there is no ControlNet of that name")
        for each in before:
            del files[each]
        if path is not None:
            files |= _read(name, find_snapshot(path), dtype_name)
    return files


def _read(name: str, folder: Path, dtype_name: str) -> dict[str, PipelineFile]:
    component = f"{CONTROLNET_FOLDER}/{name}"
    flag = f"--controlnet {name}={folder}"
    if not (folder / _CONFIG).is_file():
        raise ArchiveError(f"{flag}: a ControlNet is wanted as its folder, with {_CONFIG} in it")
    found = {f"{component}/{each}": each for each in walk(folder)}
    chosen = choose_names(found, [component], dtype_name)
    files = {each: file_at(each, folder / found[each], folder) for each in chosen}
    if not any(file.is_weights for file in files.values()):
        refused = pickled(found.values())
        what = f"pickled weights are refused: {', '.join(refused)}" if refused else "no weights"
        raise ArchiveError(f"{flag}: {what}; wanted are safetensors files")
    for file in files.values():
        check_link(file)
    return files


def check_controlnets(
    pipeline: Any, files: SmallFiles, headers: Mapping[str, Header]
) -> Iterator[str]:
    """Yield what keeps the ControlNets among `files` from steering `pipeline`, a skeleton."""
    for name in controlnet_names(files.sizes):
        try:
            problem = _problem(name, pipeline, files, headers)
        except ArchiveError as error:
            problem = str(error)
        except Exception as error:  # what a library raises about a wrong configuration
            problem = f"its weights do not fit its configuration: {first_lines(error)}"
        if problem is not None:
            yield f"the ControlNet {name}: {problem}"


def _problem(
    name: str, pipeline: Any, files: SmallFiles, headers: Mapping[str, Header]
) -> str | None:
    import torch

    from handler.loading.components import build_model
    from handler.loading.controlnets import controlnet_class
    from handler.loading.leftovers import leftover_problem
    from handler.loading.variants import select_weights
    from handler.pipelines.tasks import task_classes

    component = f"{CONTROLNET_FOLDER}/{name}"
    config = files.read(f"{component}/{_CONFIG}")
    cls = controlnet_class(config, component)
    kind = type(pipeline)
    if task_classes(kind, cls).keys() == task_classes(kind).keys():
        return f"{kind.__name__} takes no {cls.__name__}"
    own = {path: each for path, each in headers.items() if path.startswith(f"{component}/")}
    paths, _ = select_weights(component, own, "float16")
    with tempfile.TemporaryDirectory(prefix="verify-") as folder, quiet_libraries():
        Path(folder, _CONFIG).write_bytes(config)
        model, unexpected = build_model(cls, Path(folder), shapes_of(own, paths), torch.float32)
    return leftover_problem(component, model, unexpected) or _mismatch(model, pipeline)


def _mismatch(controlnet: Any, pipeline: Any) -> str | None:
    for component, names in _COMMON.items():
        denoiser: Mapping[str, Any] = getattr(getattr(pipeline, component, None), "config", {})
        for name in names:
            theirs, ours = denoiser.get(name), controlnet.config.get(name)
            if name in denoiser and name in controlnet.config and theirs != ours:
                return (
                    f"it is of another model: its {name} is {ours}, and that of the {component} "
                    f"is {theirs}"
                )
    return None
