"""Checks that concern several fields of a request at once, or the pipeline that draws it.

Each field by itself is checked by its entry in `schema`; what is wrong is reported by field.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from handler.api.fields import FieldReader
from handler.api.lora_names import lora_problem
from handler.api.prompt_syntax import weight_problem
from handler.api.request import GenerationRequest
from handler.api.samplers import find_sampler, sampler_problem
from handler.api.schema import MAX_SEED, PICTURE_FIELDS, PictureField, Value
from handler.api.task_choice import check_together
from handler.api.traits import PipelineTraits
from handler.config import HandlerConfig
from handler.errors import ConfigError

__all__ = ["check_against_pipeline", "check_request", "check_values", "is_lacking"]


def check_against_pipeline(config: HandlerConfig, traits: PipelineTraits) -> None:
    """Raise ConfigError if the configured defaults do not fit the loaded pipeline."""
    problems = []
    multiple = traits.size_multiple_px
    for name, size_px in (("height", config.height), ("width", config.width)):
        if size_px % multiple:
            problems.append(f"{name}: {_not_a_multiple(size_px, multiple)}")
    if config.scheduler is not None and not find_sampler(config.scheduler, traits.schedulers):
        problems.append(f"scheduler: {sampler_problem(config.scheduler, traits.schedulers)}")
    least = traits.least_steps_with(config.scheduler)
    if config.num_inference_steps < least:
        problems.append(
            f"num_inference_steps: {config.num_inference_steps} is too few for the default"
            f" scheduler; it needs at least {least}"
        )
    if config.default_loras and (problem := lora_problem(config.default_loras, traits.loras)):
        problems.append(f"default_loras: {problem}")
    if config.prompt_weighting and not traits.reads_weights:
        problems.append("prompt_weighting: the text encoders of this pipeline read no weights")
    if config.negative_prompt and "negative_prompt" not in traits.parameters:
        problems.append("negative_prompt: this pipeline takes none")
    if config.negative_prompt and (
        problem := _window_problem(config.negative_prompt, config.prompt_weighting, config, traits)
    ):
        problems.append(f"negative_prompt: {problem}")
    has_cache = config.exact or any("step_cache" in has for has in traits.shortcuts.values())
    if config.step_cache and not has_cache:
        problems.append("step_cache: this pipeline does not tell which step it is at")
    if problems:
        heading = "the handler section of model-config.yaml does not fit the pipeline:"
        raise ConfigError("\n  ".join([heading, *problems]))


def check_values(
    reader: FieldReader,
    sent: Mapping[str, Any],
    values: dict[str, Value],
    config: HandlerConfig,
    traits: PipelineTraits,
) -> None:
    """Check what depends on the text encoders and the LoRAs of a pipeline.

    `sent` are the fields of the request, `values` what counts for each. Mutates `values` where a
    field changes nothing.
    """
    _check_loras(reader, sent["loras"], traits)
    _check_weights(reader, values, traits)
    _check_windows(reader, values, config, traits)
    _check_encoding(reader, sent, values, traits)


def check_request(
    reader: FieldReader,
    request: GenerationRequest,
    parameters: frozenset[str],
    config: HandlerConfig,
    traits: PipelineTraits,
) -> None:
    """Check sizes, steps, numbers and pictures; `parameters` are those of its pipeline."""
    _check_num_images(reader, request, parameters)
    _check_size(reader, request, config, traits)
    _check_steps(reader, request, config, traits)
    _check_all_pixels(reader, request, config)
    check_together(reader, request.extra, request.pictures, request.num_inference_steps)


def is_lacking(each: PictureField, parameters: frozenset[str]) -> bool:
    """Whether a field becomes an argument that a pipeline with these `parameters` does not take."""
    return each.argument is not None and each.argument not in parameters


def _check_encoding(
    reader: FieldReader,
    sent: Mapping[str, Any],
    values: Mapping[str, Value],
    traits: PipelineTraits,
) -> None:
    """Check what depends on the text encoders, and the guidance that needs another prompt."""
    skip, layers = sent["clip_skip"], traits.clip_layers
    if skip is not None and layers is not None and skip >= layers:
        reader.report("clip_skip", f"{skip} is out of range; allowed: 0 to {layers - 1}")
    scale = sent["true_cfg_scale"]
    if scale is not None and scale > 1 and values["negative_prompt"] is None:
        reader.report("true_cfg_scale", 'needs a negative_prompt; " " is one that says nothing')


def _check_loras(reader: FieldReader, named: Value, traits: PipelineTraits) -> None:
    problem = lora_problem(named, traits.loras) if isinstance(named, Mapping) else None
    if problem is not None:
        reader.report("loras", problem)


def _check_weights(reader: FieldReader, values: dict[str, Value], traits: PipelineTraits) -> None:
    """Check the weights in the prompts, where they count; mutates `values` where nothing does."""
    if not values.get("prompt_weighting"):
        values.pop("prompt_weighting", None)
        return
    if not traits.reads_weights:
        reader.report("prompt_weighting", "this pipeline's text encoder reads no weights")
        return
    for name in ("prompt", "negative_prompt"):
        text = values.get(name)
        problem = weight_problem(text) if isinstance(text, str) else None
        if problem is not None:
            reader.report(name, problem)


def _check_windows(
    reader: FieldReader, values: Mapping[str, Value], config: HandlerConfig, traits: PipelineTraits
) -> None:
    """Check in how many windows the prompts are encoded: all rows of a picture attend to each."""
    is_weighted = bool(values.get("prompt_weighting"))
    for name in ("prompt", "negative_prompt"):
        text = values.get(name)
        if isinstance(text, str) and name not in reader.problems:
            problem = _window_problem(text, is_weighted, config, traits)
            if problem is not None:
                reader.report(name, problem)


def _window_problem(
    text: str, is_weighted: bool, config: HandlerConfig, traits: PipelineTraits
) -> str | None:
    num_windows = 1 if traits.count_windows is None else traits.count_windows(text, is_weighted)
    if num_windows <= config.max_prompt_windows:
        return None
    how = ", and each BREAK begins one" if is_weighted else ""
    return (
        f"takes {num_windows} windows of the text encoder{how};"
        f" allowed are {config.max_prompt_windows}"
    )


def _check_num_images(
    reader: FieldReader, request: GenerationRequest, parameters: frozenset[str]
) -> None:
    """Check that there may be several, and that the seeds of all of them stay exact in JSON."""
    if request.num_images > 1 and is_lacking(PICTURE_FIELDS["num_images"], parameters):
        reader.report("num_images", "this pipeline draws one picture a request")
    high = MAX_SEED - request.num_images + 1
    if request.seed > high:
        reader.report("seed", f"{request.seed} is out of range; allowed: 0 to {high}")


def _check_size(
    reader: FieldReader, request: GenerationRequest, config: HandlerConfig, traits: PipelineTraits
) -> None:
    height, width = request.height, request.width
    for name, size_px in (("height", height), ("width", width)):
        if size_px % traits.size_multiple_px:
            reader.report(name, _not_a_multiple(size_px, traits.size_multiple_px))
    if height * width > config.max_pixels and not {"height", "width"} & reader.problems.keys():
        reader.report(
            "height",
            f"{height}x{width} (height x width) is {height * width} pixels;"
            f" allowed are {config.max_pixels}",
        )


def _not_a_multiple(size_px: int, multiple: int) -> str:
    below = size_px // multiple * multiple
    return f"{size_px} is not a multiple of {multiple}; nearest are {below} and {below + multiple}"


def _check_steps(
    reader: FieldReader, request: GenerationRequest, config: HandlerConfig, traits: PipelineTraits
) -> None:
    num_steps, least = request.num_inference_steps, traits.least_steps_with(request.sampler)
    if num_steps < least and not {"num_inference_steps", "scheduler"} & reader.problems.keys():
        reader.report(
            "num_inference_steps",
            f"{num_steps} is too few for {request.scheduler or traits.schedulers[0]};"
            f" allowed: {least} to {config.max_num_inference_steps}",
        )


def _check_all_pixels(
    reader: FieldReader, request: GenerationRequest, config: HandlerConfig
) -> None:
    allowed, height, width = config.max_pixels_in_flight, request.height, request.width
    pixels = request.num_images * height * width
    if allowed is not None and pixels > allowed and not reader.problems:
        reader.report(
            "num_images",
            f"{request.num_images} of {height}x{width} (height x width) are {pixels} pixels;"
            f" allowed are {allowed} together",
        )
