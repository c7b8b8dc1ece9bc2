"""Loads an opened pipeline onto its device.

Weights are mapped where they are, and handed to the pipeline class's own ``from_pretrained`` as
finished components. A component that cannot be mapped is loaded by diffusers itself, from a copy.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from handler.errors import ArchiveError, ConfigError
from handler.library_logs import quiet_libraries
from handler.loading.contents import LORA_FOLDER
from handler.loading.controlnets import load_controlnets
from handler.loading.embeddings import load_embeddings
from handler.loading.lora_files import LoraReader, in_present_names
from handler.loading.memory import device_memory, memory_problem, weights_bytes
from handler.loading.model_dir import OpenedPipeline, check_loras, open_pipeline
from handler.messages import first_lines

if TYPE_CHECKING:
    from handler.config import HandlerConfig

__all__ = [
    "LoadedPipeline",
    "choose_device",
    "choose_dtype",
    "load_opened",
    "load_pipeline",
    "offline",
]

logger = logging.getLogger(__name__)

# What we, diffusers and PEFT raise of a LoRA that does not fit.
_MISFITS = (ArchiveError, AttributeError, ValueError, RuntimeError, KeyError, ImportError)


@dataclass(frozen=True, slots=True)
class LoadedPipeline:
    """A diffusers pipeline on its device. `pipeline` is as untyped as diffusers is.

    `controlnets` are those that were packed with it, by the names that requests choose them by.
    """

    pipeline: Any
    device: torch.device
    dtype: torch.dtype
    controlnets: Mapping[str, Any] = field(default_factory=dict)
    loras: tuple[str, ...] = ()
    """The names of the LoRAs that were packed."""
    lora_reader: LoraReader | None = None
    """What checked them, and reads more; None where none was packed and no folder is configured."""


def choose_device(configured: str | None, gpu_id: int | None) -> torch.device:
    """Return the configured device, else the GPU that TorchServe gave, else the CPU.

    A GPU is always one by its number.
    """
    if configured is None:
        has_gpu = torch.cuda.is_available() and gpu_id is not None and gpu_id >= 0
        return torch.device(f"cuda:{gpu_id}" if has_gpu else "cpu")
    try:
        device = torch.device(configured)
    except RuntimeError as error:
        raise ConfigError(f"device is {configured!r}: wanted cpu, cuda or cuda:<n>") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {configured!r}, but torch finds no CUDA device here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device is {configured!r}, but torch finds only cuda:0 "
            f"to cuda:{torch.cuda.device_count() - 1} here"
        )
    if configured == "cuda":
        return torch.device("cuda", gpu_id if gpu_id is not None and gpu_id >= 0 else 0)
    return device


def choose_dtype(configured: str | None, device: torch.device) -> torch.dtype:
    """Return the configured precision, else float16 on CUDA and float32 on the CPU."""
    known = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    if configured is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    if configured not in known:
        raise ConfigError(f"dtype is {configured!r}: wanted one of {', '.join(known)}")
    return known[configured]


def load_pipeline(model_dir: Path, config: HandlerConfig, gpu_id: int | None) -> LoadedPipeline:
    """Load the pipeline in TorchServe's `model_dir` as `config` says; never asks the network.

    Raises: ArchiveError, ConfigError.
    """
    try:
        with open_pipeline(model_dir) as opened:
            loras = sorted((model_dir / LORA_FOLDER).glob("*.safetensors"))
            check_loras(model_dir, loras)
            return load_opened(opened, loras, config, gpu_id)
    except OSError as error:
        raise ArchiveError(f"{model_dir}: cannot be opened: {error}") from error


def load_opened(
    opened: OpenedPipeline, loras: Sequence[Path], config: HandlerConfig, gpu_id: int | None
) -> LoadedPipeline:
    """Load what `open_pipeline` opened, with `loras` active. Raises: ArchiveError, ConfigError."""
    device = choose_device(config.device, gpu_id)
    dtype = choose_dtype(config.dtype, device)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    with offline(), quiet_libraries():
        try:
            left_out = ["safety_checker"] if config.safety_checker == "off" else []
            pipeline = _from_pretrained(opened, dtype, left_out)
            reader = LoraReader(pipeline) if loras or config.lora_dir else None
            if reader is not None:
                _load_loras(pipeline, loras, reader)
            controlnets = load_controlnets(opened, dtype)
            load_embeddings(pipeline, opened)
        except ArchiveError:
            raise
        except Exception as error:
            # Whatever the libraries make of a wrong file ends the start with one clear line.
            raise ArchiveError(f"the pipeline does not load: {first_lines(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    if device.type != "cpu":
        _move(pipeline, list(controlnets.values()), device)
    names = tuple(path.stem for path in loras)
    return LoadedPipeline(pipeline, device, dtype, controlnets, names, reader)


def _move(pipeline: Any, controlnets: Sequence[Any], device: torch.device) -> None:
    """Copy the weights to `device`. Raises: ConfigError, before any is copied where it can be."""
    sizes = weights_bytes([*pipeline.components.values(), *controlnets])
    if problem := memory_problem(sizes, device_memory(device), device):
        raise ConfigError(problem)
    if device.type == "cuda":
        # Streams and graphs are of the current device, which is the first until this is said.
        torch.cuda.set_device(device)
    try:
        for part in (pipeline, *controlnets):
            part.to(device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the weights did not fit on {device} while something else took memory there too: "
            f"{first_lines(error)}"
        ) from error


@contextmanager
def offline() -> Iterator[None]:
    """Keep the hub's client from the network, even where it was imported before."""
    from huggingface_hub import constants

    was_offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def _from_pretrained(
    opened: OpenedPipeline, dtype: torch.dtype, left_out: Collection[str] = ()
) -> Any:
    from handler.loading.components import load_components
    from handler.loading.pipeline_class import absent_components, pipeline_class

    cls = pipeline_class(opened.index)
    components: dict[str, Any] = dict.fromkeys(absent_components(cls, opened.index))
    components.update(load_components(opened, dtype, left_out=left_out))
    # The class itself, for DiffusionPipeline does not know which components are optional.
    return cls.from_pretrained(
        os.fspath(opened.folder),
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        **components,
    )


def _load_loras(pipeline: Any, paths: Sequence[Path], reader: LoraReader) -> None:
    """Load the LoRAs that were packed, each as the adapter of its file's name; all are active."""
    for path in paths:
        try:
            _load_lora(pipeline, path, reader)
        except _MISFITS as error:
            raise ArchiveError(
                f"{path}: this LoRA does not fit the pipeline: {first_lines(error)}"
            ) from error
    if paths:
        pipeline.set_adapters([path.stem for path in paths])


def _load_lora(pipeline: Any, path: Path, reader: LoraReader) -> None:
    layers = reader.read_file(path)
    # By its path, for diffusers reads the scale out of the file's metadata.
    pipeline.load_lora_weights(
        os.fspath(path.parent),
        weight_name=path.name,
        adapter_name=path.stem,
        local_files_only=True,
        use_safetensors=True,
    )
    modules = {name: dict(getattr(pipeline, name).named_modules()) for name in layers}
    if not all(
        path.stem in getattr(modules[name][layer], "scaling", ())
        for name, found in layers.items()
        for layer in found
    ):
        # diffusers hands PEFT some of a text encoder's layers under names that it drops.
        pipeline.delete_adapters(path.stem)
        pipeline.load_lora_weights(in_present_names(layers), adapter_name=path.stem)
