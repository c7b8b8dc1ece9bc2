"""Converts weights in other layouts by diffusers' own ``from_single_file``.

A checkpoint in one file holds weights alone: its configurations, tokenizers and scheduler are those
of a pipeline of its kind, which the user names. Nothing is fetched here.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handler.errors import ArchiveError, ServingError
from handler.loading.contents import MODEL_INDEX
from handler.loading.model_index import ModelIndex
from handler.loading.safetensors_map import Header
from handler.loading.variants import variant_of
from handler.messages import first_lines
from scripts.archive.checkpoint import header_of, read_checkpoint
from scripts.archive.pipeline_source import PipelineFile
from scripts.documents import parse_json

if TYPE_CHECKING:
    import torch

__all__ = ["convert_checkpoint", "convert_component", "fits"]

_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float16", "F8_E5M2": "float16"}
_SCALES = ("scale_weight", "weight_scale", "scaled_fp8")
_DENOISER = "model.diffusion_model."
_TRAINING = ("loss.", "first_stage_model.loss.", "model_ema.")
_MOST_NAMED = 3


def convert_checkpoint(
    path: Path,
    configuration: Mapping[str, PipelineFile],
    out: Path,
    *,
    dtype: str | None,
    replaced: Set[str],
) -> list[str]:
    """Write the whole checkpoint `path` as the pipeline folder `out`.

    `configuration` holds the files of a pipeline of the same kind, of which the weights are used
    only for what the checkpoint lacks. The weights get the precision `dtype`, else the file's own.
    Components that are `replaced` get no weights. Returns lines for the user: what was changed.
    Raises: ArchiveError.
    """
    header = read_checkpoint(path)
    _refuse_scaled(header, path)
    label = f"{path}: its configuration"
    index = ModelIndex.parse(configuration[MODEL_INDEX].read(), label)
    _write_configuration(configuration, out, label)
    notes = _predict_as_marked(header, out, path)
    cls = _pipeline_class(index)
    skipped = {*replaced & index.components.keys(), *({"safety_checker"} & index.entries.keys())}
    with _explained(path):
        pipeline = cls.from_single_file(
            str(path),
            config=str(out),
            torch_dtype=_torch_dtype(header, dtype),
            local_files_only=True,
            **dict.fromkeys(skipped),
        )
    for name, module in _modules(pipeline.components):
        _check_whole(module, f"{path}: its {name}")
        if name in ("unet", "transformer"):
            _check_left_over(module, header, _DENOISER, path)
        _save(module, out, name)
    dropped = skipped - replaced
    if dropped & index.components.keys():
        notes.append(f"left out: {', '.join(sorted(dropped))}, which a single file does not have")
    _write_index(index, out, dropped)
    return notes


def convert_component(
    component: str,
    path: Path,
    index: ModelIndex,
    own: Mapping[str, PipelineFile],
    out: Path,
    *,
    dtype: str | None,
) -> Path:
    """Write the weights `path` of one component, in another layout, as a folder in `out`.

    `own` are the files of the component that it replaces, whose configuration it keeps. Returns the
    folder. Raises: ArchiveError.
    """
    from handler.loading.pipeline_class import component_class

    header = read_checkpoint(path)
    _refuse_scaled(header, path)
    _, class_name = index.components[component]
    cls: Any = component_class(component, index)
    if not hasattr(cls, "from_single_file"):
        raise ArchiveError(
            f"{path}: its names are not those of the pipeline's {component} ({class_name}), and "
            "diffusers converts no other layout of that; give a folder that save_pretrained wrote"
        )
    _write_configuration(own, out, f"{component} of the pipeline")
    with _explained(path):
        model = cls.from_single_file(
            str(path),
            config=str(out),
            subfolder=component,
            torch_dtype=_torch_dtype(header, dtype),
            local_files_only=True,
        )
    _check_whole(model, str(path))
    _check_left_over(model, header, "", path)
    _save(model, out, component)
    return out / component


def fits(path: Path, own: Mapping[str, PipelineFile]) -> bool:
    """Say whether the weights `path` have the names and shapes of those among the files `own`.

    Raises: ArchiveError, where one of the files is damaged.
    """
    for variant in {variant_of(name) for name, file in own.items() if file.is_weights}:
        shapes = {
            name: info.shape
            for each in own.values()
            if each.is_weights and variant_of(each.name) == variant
            for name, info in header_of(each).tensors.items()
        }
        if shapes == {name: info.shape for name, info in read_checkpoint(path).tensors.items()}:
            return True
    return False


def _predict_as_marked(header: Header, out: Path, path: Path) -> list[str]:
    """Let the scheduler predict v where the checkpoint is marked so, which diffusers does not read.

    The marks are the empty tensors ``v_pred`` and ``ztsnr`` (a noise schedule that ends in noise).
    """
    schedule = out / "scheduler" / "scheduler_config.json"
    if "v_pred" not in header.tensors or not schedule.is_file():
        return []
    entries = parse_json(schedule.read_bytes(), str(schedule))
    changes: dict[str, object] = {"prediction_type": "v_prediction"}
    if "ztsnr" in header.tensors:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if not isinstance(entries, dict) or changes.items() <= entries.items():
        return []
    schedule.write_text(f"{json.dumps(entries | changes, indent=2)}\n")
    said = ", ".join(f"{key}={value}" for key, value in changes.items())
    return [f"scheduler: {said}, as {path.name} is marked"]


def _pipeline_class(index: ModelIndex) -> Any:
    import diffusers

    cls: Any = getattr(diffusers, index.class_name, None)
    if not hasattr(cls, "from_single_file"):
        raise ArchiveError(
            f"diffusers converts no single file to a {index.class_name}; "
            "give a folder that save_pretrained wrote"
        )
    return cls


def _refuse_scaled(header: Header, path: Path) -> None:
    if found := [name for name in header.tensors if name.rpartition(".")[2] in _SCALES]:
        raise ArchiveError(
            f"{path} is quantised with scales of its own ({found[0]}), which diffusers would "
            "ignore: take the same model in float16 or bfloat16"
        )


def _torch_dtype(header: Header, dtype: str | None) -> torch.dtype:
    """Return the wanted precision, else that of most of the file: diffusers would take float32."""
    import torch

    if dtype is None:
        counts: Counter[str] = Counter()
        for info in header.tensors.values():
            counts[info.dtype] += info.num_values
        dtype = _DTYPES.get(counts.most_common(1)[0][0] if counts else "", "float32")
    found: torch.dtype = getattr(torch, dtype)
    return found


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Quiet diffusers, and turn whatever it raises about a file into one line."""
    from handler.library_logs import quiet_libraries

    try:
        with quiet_libraries():
            yield
    except ServingError:
        raise
    except Exception as error:
        # The conversion knows the names it wants and checks none: a missing one is a KeyError.
        reason = first_lines(error, 1) or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"{error.args[0]} is missing"
        elif isinstance(error, NotImplementedError) and "meta tensor" in str(error):
            reason = "it lacks some of the weights of a component"
        raise ArchiveError(
            f"{path} cannot be converted with this configuration: {reason}; is it of the same "
            "kind of model? A component that the file lacks is given by --component"
        ) from error


def _modules(components: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    import torch

    for name, component in components.items():
        if isinstance(component, torch.nn.Module):
            yield name, component


def _check_whole(module: Any, label: str) -> None:
    """Refuse a model with weights that the file did not have, or that its precision cannot hold."""
    import torch

    state: dict[str, torch.Tensor] = module.state_dict()
    if missing := [name for name, tensor in state.items() if tensor.is_meta]:
        raise ArchiveError(f"{label} lacks {len(missing)} of its weights, such as {_some(missing)}")
    infinite = [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if infinite:
        raise ArchiveError(
            f"{label} has values that are not finite in {next(iter(state.values())).dtype}: "
            f"{_some(infinite)}; pack it as bfloat16 (--dtype bfloat16, DTYPE=bfloat16)"
        )


def _check_left_over(module: Any, header: Header, prefix: str, path: Path) -> None:
    """Refuse a file with more weights than the model took: it is of another configuration."""
    values = sum(tensor.numel() for tensor in module.state_dict().values())
    found = sum(
        info.num_values
        for name, info in header.tensors.items()
        if name.startswith(prefix) and not name.startswith(_TRAINING)
    )
    if found > values:
        raise ArchiveError(
            f"{path} has {found - values} values that {type(module).__name__} with this "
            "configuration does not take: it is of another model"
        )


def _save(module: Any, out: Path, name: str) -> None:
    """Write the weights of `module`; the configuration beside them stays as it was."""
    before = {path.name: path.read_bytes() for path in (out / name).glob("*.json")}
    with _explained(out / name):
        module.save_pretrained(out / name)
    for path in (out / name).glob("*.json"):
        if path.name in before:
            path.write_bytes(before[path.name])
        elif variant_of(path.name) is None:  # not the index of shards
            path.unlink()


def _write_configuration(files: Mapping[str, PipelineFile], out: Path, label: str) -> None:
    """Write all `files` but weights to the folder `out`. Raises: ArchiveError."""
    for name, file in files.items():
        if file.is_weights or variant_of(name) is not None:
            continue
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read())
    if not out.is_dir():
        raise ArchiveError(f"{label} has no files")


def _write_index(index: ModelIndex, out: Path, dropped: Set[str]) -> None:
    """Write model_index.json without the components that the checkpoint cannot have."""
    entries: dict[str, object] = {**index.entries, **{name: [None, None] for name in dropped}}
    if "safety_checker" in dropped:
        entries["requires_safety_checker"] = False
        shutil.rmtree(out / "safety_checker", ignore_errors=True)
    data = json.dumps(entries, indent=2, sort_keys=True)
    (out / MODEL_INDEX).write_text(f"{data}\n")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_MOST_NAMED])
