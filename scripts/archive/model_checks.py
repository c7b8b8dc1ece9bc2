"""Checks of a pipeline's models that need their configurations, names and shapes, and no weights.

Every check yields its problems as text instead of raising, so that a report names them all.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from types import UnionType
from typing import Any

from handler.config import HandlerConfig
from handler.errors import ConfigError
from handler.loading.contents import MODEL_INDEX
from handler.loading.model_index import ModelIndex
from handler.loading.safetensors_map import Header
from scripts.archive.lora_checks import check_loras
from scripts.archive.scope import scope_problem
from scripts.archive.skeleton import Skeleton

__all__ = ["check_pipeline", "check_settings"]

# What a component's class may differ in from the constructor's annotation: its kind must be right.
_KINDS_AT_LEAST = ("scheduler", "tokenizer", "processor", "feature_extractor", "guider")
_PACKED_SIDE = 2
"""Pipelines that pack latents make one token of squares of as many."""


def check_pipeline(
    index: ModelIndex,
    names: Iterable[str],
    skeleton: Skeleton,
    loras: Mapping[str, Header],
) -> Iterator[str]:
    """Yield what does not fit together in the pipeline of `index`, whose `skeleton` was built.

    `names` are its files; `loras` the headers of those that go with it.
    """
    yield from skeleton.problems
    for name in names:
        if name.count("/") and name.rpartition("/")[2] == MODEL_INDEX:
            yield (
                f"{name}: a whole pipeline is in the place of a component; "
                "put the component's own folder there"
            )
    pipeline = skeleton.pipeline
    if pipeline is None:
        return
    problem = scope_problem(type(pipeline), index)
    if problem is not None:
        yield problem
        return
    yield from _check_tokenizers(pipeline)
    yield from _check_annotations(pipeline)
    yield from _check_channels(pipeline)
    if not skeleton.unread:
        yield from check_loras(pipeline, loras)


def check_settings(
    skeleton: Skeleton, config: HandlerConfig, loras: Collection[str]
) -> Iterator[str]:
    """Yield what the configuration asks for that the pipeline does not do, with these LoRAs."""
    from handler.api.request_checks import check_against_pipeline
    from handler.pipelines.describe import describe

    if skeleton.pipeline is None:
        return
    # Those of the server's own folder are not here.
    known = {*loras, *(config.default_loras or ())} if config.lora_dir is not None else loras
    try:
        check_against_pipeline(config, replace(describe(skeleton.pipeline), loras=known))
    except ConfigError as error:
        yield " ".join(str(error).split())


def _check_tokenizers(pipeline: Any) -> Iterator[str]:
    """A tokenizer that knows a handful of tokens was saved without its vocabulary."""
    import transformers

    for name, part in pipeline.components.items():
        if isinstance(part, transformers.PreTrainedTokenizerBase):
            num_words = len(part) - len(part.all_special_tokens)
            if num_words < 1:
                yield f"{name}: its vocabulary is empty: get the tokenizer's files"


def _check_annotations(pipeline: Any) -> Iterator[str]:
    """Compare every component with the class that the pipeline's constructor wants there."""
    try:
        hints = typing.get_type_hints(type(pipeline).__init__)
    except Exception:
        return  # annotations of what is not installed here
    for name, part in pipeline.components.items():
        wanted = [*_classes(hints.get(name))]
        if part is None or not wanted or isinstance(part, tuple(wanted)):
            continue
        if not _is_of_the_kind(name, part, wanted):
            names = " or ".join(dict.fromkeys(each.__name__ for each in wanted))
            owner = type(pipeline).__name__
            yield f"{name}: it is a {type(part).__name__}, and {owner} wants a {names}"


def _classes(annotation: Any) -> Iterator[type]:
    if inspect.isclass(annotation) and not typing.get_args(annotation):
        if annotation is not type(None):
            yield annotation
    elif typing.get_origin(annotation) in (typing.Union, UnionType):
        for each in typing.get_args(annotation):
            yield from _classes(each)


def _is_of_the_kind(name: str, part: Any, wanted: Iterable[type]) -> bool:
    """Say whether another class than the annotated one may do as well.

    Schedulers, tokenizers and processors are exchanged freely, and so are autoencoders.
    """
    import torch

    if any(kind in name for kind in _KINDS_AT_LEAST):
        return not isinstance(part, torch.nn.Module)
    return hasattr(part, "decode") and any(hasattr(each, "decode") for each in wanted)


def _check_channels(pipeline: Any) -> Iterator[str]:
    """The denoiser must draw latents of as many channels as the autoencoder reads."""
    from handler.pipelines.tasks import pictures_of, task_of

    vae = _config_of(pipeline, "vae")
    latents = vae.get("latent_channels") or vae.get("z_dim")
    if not isinstance(latents, int):
        return
    for name in ("unet", "transformer"):
        config = _config_of(pipeline, name)
        channels = config.get("in_channels")
        if pictures_of(task_of(type(pipeline))):  # which may come in as further channels
            channels = config.get("out_channels") or channels
        if not isinstance(channels, int) or not hasattr(pipeline, "vae_scale_factor"):
            continue
        packed = latents * _PACKED_SIDE**2
        is_packed = any("pack_latents" in each or "patchify" in each for each in dir(pipeline))
        allowed = {latents, packed} if is_packed else {latents}
        if channels not in allowed:
            yield (
                f"{name} and vae do not fit together: {name} draws {channels} channels, and the "
                f"vae reads latents of {latents}"
            )


def _config_of(pipeline: Any, name: str) -> Mapping[str, Any]:
    config: Mapping[str, Any] = getattr(getattr(pipeline, name, None), "config", {})
    return config
