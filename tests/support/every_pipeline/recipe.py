"""How one pipeline class is built from tiny parts and called, as far as names do not tell."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from diffusers import DiffusionPipeline

from tests.support.every_pipeline.inputs import USUAL, Inputs, Value
from tests.support.every_pipeline.parts import PARTS
from tests.support.every_pipeline.stand_ins import NothingUnsafe
from tests.support.tiny_models import make_every_parameter_count

__all__ = ["NotBuildable", "Recipe", "build", "call_arguments"]

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

# Constructor arguments that are components only in name.
_SETTINGS: Mapping[str, Any] = {
    "safety_checker": None,
    "feature_extractor": None,
    "watermarker": None,
    "requires_safety_checker": False,
    "add_watermarker": False,
}


class NotBuildable(Exception):
    """A pipeline cannot be built here, and this is why."""


@dataclass(frozen=True)
class Recipe:
    """What a pipeline class needs beside the usual parts and arguments.

    Attributes:
        parts: makers of constructor arguments; others are made by the class in their annotation.
        call: arguments of ``__call__``; functions take the request's `Inputs`.
        leave_out: usual arguments that this pipeline's calls go without.
        num_requests: fewer where one request fills much of a batch.
        not_built: why there is no recipe, where there is none.
        alone: why its requests share no forward, where that was looked into.
        prepare: changes the pipeline once built.
    """

    parts: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    call: Mapping[str, Value] = field(default_factory=dict)
    leave_out: frozenset[str] = frozenset()
    num_requests: int = 3
    not_built: str = ""
    alone: str = ""
    prepare: Callable[[Any], Any] | None = None


def build(kind: type[DiffusionPipeline], recipe: Recipe) -> DiffusionPipeline:
    """Build a pipeline of `kind`: float32, CPU, eval mode, seeded random weights.

    Raises:
        NotBuildable: a part has no recipe.
    """
    if recipe.not_built:
        raise NotBuildable(recipe.not_built)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = kind(**dict(_constructor_arguments(kind, recipe)))
        _shorten_templates(pipeline)
        if recipe.prepare is not None:
            pipeline = recipe.prepare(pipeline) or pipeline
        for module in pipeline.components.values():
            if isinstance(module, torch.nn.Module):
                make_every_parameter_count(module)
                _speak_up(module)
                module.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _shorten_templates(pipeline: Any) -> None:
    """Leave the prompt alone between few tokens, where the pipeline sets it in a long instruction.

    With a token a character, the instruction would be most of what the model reads.
    """
    for name in ("prompt_template", "prompt_template_encode"):
        template = getattr(pipeline, name, None)
        if isinstance(template, str) and "{}" in template:
            picture = "<|vision_start|><|image_pad|><|vision_end|>"
            setattr(pipeline, name, f"{picture}{{}}" if picture in template else "{}")
            pipeline.prompt_template_encode_start_idx = 0
    prefix = getattr(pipeline, "prompt_template_encode_prefix", None)
    if isinstance(prefix, str) and "<|vision_start|>" not in prefix:
        pipeline.prompt_template_encode_prefix = "<|im_start|>"
        if hasattr(pipeline, "prompt_template_encode_start_idx"):
            pipeline.prompt_template_encode_start_idx = 0
    if isinstance(getattr(pipeline, "system_message", None), str):
        pipeline.system_message = ""
        if hasattr(pipeline, "prompt_template_encode_start_idx"):
            pipeline.prompt_template_encode_start_idx = 0


def _speak_up(module: torch.nn.Module) -> None:
    """Make a text encoder's outputs large enough to change what is drawn. Mutates `module`.

    The libraries start embeddings small, and random layers above them hardly tell words apart.
    """
    if not isinstance(module, transformers.PreTrainedModel):
        return
    with torch.no_grad():
        for name, part in module.named_modules():
            if isinstance(part, torch.nn.Embedding):
                part.weight.mul_(0.5 / part.weight.std().clamp(min=1e-3))
            elif name.endswith(("final_layer_norm", ".norm")) and hasattr(part, "weight"):
                part.weight.mul_(2.0)


def _constructor_arguments(
    kind: type[DiffusionPipeline], recipe: Recipe
) -> Iterator[tuple[str, Any]]:
    parameters = inspect.signature(kind.__init__).parameters
    hints = typing.get_type_hints(kind.__init__)
    if unknown := recipe.parts.keys() - parameters.keys():
        raise NotBuildable(f"its constructor takes no {sorted(unknown)}")
    for name, parameter in list(parameters.items())[1:]:
        if name in recipe.parts:
            yield name, recipe.parts[name]()
        elif name in _SETTINGS:
            is_cosmos = "Cosmos" in str(hints.get(name))
            yield name, NothingUnsafe() if is_cosmos else _SETTINGS[name]
        elif parameter.default is parameter.empty and parameter.kind not in _VARIADIC:
            yield name, _part_by_annotation(name, hints.get(name))


def _part_by_annotation(name: str, annotation: Any) -> Any:
    """The usual tiny part of the first class in `annotation` that has one."""
    names = [kind.__name__ for kind in _classes(annotation)]
    for class_name in names:
        if class_name in PARTS:
            return PARTS[class_name]()
    raise NotBuildable(f"no tiny part for {name}: {' | '.join(names) or annotation}")


def _classes(annotation: Any) -> Iterator[type]:
    if inspect.isclass(annotation) and not typing.get_args(annotation):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _classes(inner)


def call_arguments(kind: type[DiffusionPipeline], recipe: Recipe, inputs: Inputs) -> dict[str, Any]:
    """The keyword arguments of one request's call, tensors and generator fresh.

    Raises:
        NotBuildable: a required argument has no value, or the recipe names one that is none.
    """
    inputs = replace(inputs)  # whose numbers start anew
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(kind.__call__).parameters.items()
        if name != "self"
    }
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if (unknown := recipe.call.keys() - parameters.keys()) and not takes_any:
        raise NotBuildable(f"its call takes no {sorted(unknown)}")
    arguments = {}
    for name, parameter in parameters.items():
        if name in recipe.call:
            continue
        if name in USUAL and name not in recipe.leave_out:
            arguments[name] = USUAL[name](inputs)
        elif parameter.default is parameter.empty and parameter.kind not in _VARIADIC:
            raise NotBuildable(f"no value for the argument {name}")
    for name, value in recipe.call.items():
        arguments[name] = value(inputs) if callable(value) else value
    return arguments
