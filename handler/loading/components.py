"""Builds a pipeline's models over memory-mapped weights."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from handler.errors import ArchiveError
from handler.loading.leftovers import scaling_problem
from handler.loading.model_dir import OpenedPipeline
from handler.loading.pipeline_class import component_class
from handler.loading.safetensors_map import map_tensors
from handler.loading.variants import select_weights

__all__ = [
    "NotMappableError",
    "build_empty",
    "build_model",
    "check_vocabulary",
    "load_components",
    "load_model",
]

logger = logging.getLogger(__name__)


class NotMappableError(Exception):
    """This component wants diffusers' own loading; the message says why."""


def load_components(
    opened: OpenedPipeline, dtype: torch.dtype, *, left_out: Collection[str] = ()
) -> dict[str, Any]:
    """Return every model of the pipeline, built; the rest is left to from_pretrained.

    Components that are `left_out` are None. Raises: ArchiveError.
    """
    components: dict[str, Any] = {}
    for name in opened.index.components:
        if name in left_out:
            components[name] = None
            continue
        cls = component_class(name, opened.index)
        check_vocabulary(name, cls, (each.name for each in (opened.folder / name).glob("*")))
        if not issubclass(cls, torch.nn.Module):
            continue
        components[name] = load_model(opened, name, cls, dtype)
    return components


def check_vocabulary(name: str, cls: type, files: Iterable[str]) -> None:
    """Refuse a tokenizer whose `files` hold no words: transformers makes an empty one of that.

    Every prompt would become the same numbers. Raises: ArchiveError.
    """
    import transformers

    if not issubclass(cls, transformers.PreTrainedTokenizerBase):
        return
    names: dict[str, str] = cls.vocab_files_names  # type: ignore[attr-defined]
    if not names:  # it reads letters, not words
        return
    known = {*names.values(), "tokenizer.json", "vocab.json", "vocab.txt"}
    known.discard("merges.txt")
    if not any(file in known or file.endswith((".model", ".tiktoken")) for file in files):
        raise ArchiveError(
            f"{name}: has no vocabulary ({', '.join(sorted(known))}): get the tokenizer's files"
        )


def load_model(opened: OpenedPipeline, name: str, cls: type, dtype: torch.dtype) -> Any:
    """Return the model `cls` out of the folder `name` of a pipeline. Raises: ArchiveError."""
    extents = {
        path: extent for path, extent in opened.weights.items() if path.startswith(f"{name}/")
    }
    if not extents:
        raise ArchiveError(
            f"{name}: has no safetensors weights; save the pipeline with safe_serialization=True"
        )
    folder = opened.folder / name
    paths, variant = select_weights(name, extents, str(dtype).removeprefix("torch."))
    try:
        if not paths:
            raise NotMappableError("its weights have unusual names")
        state: dict[str, torch.Tensor] = {}
        for path in paths:
            state.update(map_tensors(extents[path], path))
        model, unexpected = build_model(cls, folder, state, dtype)
        _report_leftovers(name, unexpected)
        return model
    except NotMappableError as reason:
        logger.warning("slow start: %s is copied, not mapped: %s", name, reason)
    opened.copy_weights(name)
    model, info = cls.from_pretrained(  # type: ignore[attr-defined]
        folder,
        dtype=dtype,
        variant=variant,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    _refuse_gaps(name, info)
    _report_leftovers(name, [*info["unexpected_keys"]])
    return model


def build_model(
    cls: type, folder: Path, state: dict[str, torch.Tensor], dtype: torch.dtype
) -> tuple[torch.nn.Module, list[str]]:
    """Build the model `cls` of the configuration in `folder` around the tensors of `state`.

    Tensors that have the wanted dtype are not copied. Returns also the names in `state` that the
    model has no use for. Raises: NotMappableError; ArchiveError, RuntimeError or ValueError, where
    names or shapes do not fit the configuration.
    """
    import diffusers
    import transformers

    if issubclass(cls, diffusers.ModelMixin):
        return _diffusers_model(cls, folder, state, dtype)
    if issubclass(cls, transformers.PreTrainedModel):
        return _transformers_model(cls, folder, state, dtype)
    raise NotMappableError(f"{cls.__name__} is neither a diffusers nor a transformers model")


def build_empty(cls: type, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """Build the model `cls` of the configuration in `folder`, without any weights."""
    import diffusers

    model: torch.nn.Module
    kind: Any = cls
    with _building(dtype):
        if issubclass(cls, diffusers.ModelMixin):
            model = kind.from_config(kind.load_config(folder))
        else:
            model = kind(kind.config_class.from_pretrained(folder, local_files_only=True))
    return model.eval()


@contextmanager
def _building(dtype: torch.dtype) -> Iterator[None]:
    """Build modules with meta parameters and with buffers of `dtype`, as from_pretrained does."""
    from accelerate import init_empty_weights

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights():
            yield
    finally:
        torch.set_default_dtype(before)


def _diffusers_model(
    cls: Any, folder: Path, state: dict[str, torch.Tensor], dtype: torch.dtype
) -> tuple[torch.nn.Module, list[str]]:
    config = cls.load_config(folder)
    if config.get("quantization_config"):
        raise NotMappableError("it is quantized")
    with _building(dtype):
        model = cls.from_config(config)
    model._fix_state_dict_keys_on_load(state)
    expected = model.state_dict()
    missing = expected.keys() - state.keys()
    wrong = {
        key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape
    }
    _refuse_gaps(folder.name, {"missing_keys": missing, "mismatched_keys": wrong})
    unexpected = sorted(state.keys() - expected.keys())
    state = {key: state[key] for key in expected}
    keep = cls._keep_in_fp32_modules or []
    for key, tensor in state.items():
        if tensor.is_floating_point():
            is_kept = any(part in keep for part in key.split("."))
            state[key] = tensor.to(torch.float32 if is_kept else dtype)
    model.load_state_dict(state, strict=True, assign=True)
    model.register_to_config(_name_or_path=str(folder))
    return model.eval(), unexpected


def _transformers_model(
    cls: Any, folder: Path, state: dict[str, torch.Tensor], dtype: torch.dtype
) -> tuple[torch.nn.Module, list[str]]:
    config = cls.config_class.from_pretrained(folder, local_files_only=True)
    if getattr(config, "quantization_config", None):
        raise NotMappableError("it is quantized")
    model, info = cls.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    _refuse_gaps(folder.name, info)
    if (folder / "generation_config.json").is_file() and model.can_generate():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval(), sorted(info["unexpected_keys"])


def _refuse_gaps(name: str, info: Mapping[str, Any]) -> None:
    """Refuse a model that a library filled up: it does so with random numbers and a warning."""
    wrong = (each if isinstance(each, str) else each[0] for each in info["mismatched_keys"])
    if odd := sorted({*info["missing_keys"], *wrong}):
        raise ArchiveError(
            f"{name}: {len(odd)} weights are missing or of the wrong shape, such as {odd[0]}"
        )


def _report_leftovers(name: str, unexpected: Sequence[str]) -> None:
    """Refuse weights whose scales would be lost; warn of others that have no use."""
    if problem := scaling_problem(name, unexpected):
        raise ArchiveError(problem)
    if unexpected:
        logger.warning(
            "%s: %d weights are not used, such as %s", name, len(unexpected), unexpected[0]
        )
