"""What one request asks of the pipeline, and the checks that concern several of its fields.

`parse_fields` is the only entry: plain fields become a checked `GenerationRequest`, or every
problem at once. Each field by itself is checked by its entry in `schema`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from handler.api.fields import FieldReader
from handler.api.images import SentPicture
from handler.api.lora_names import lora_problem
from handler.api.picture_sizes import choose_size
from handler.api.prompt_syntax import take_loras, weight_problem
from handler.api.samplers import (
    SCHEDULES,
    find_sampler,
    offered,
    sampler_problem,
    split_schedule,
)
from handler.api.schema import (
    MAX_SEED,
    PICTURE_FIELDS,
    PICTURE_NAMES,
    REPLY_FIELDS,
    SENT_PICTURES,
    Kind,
    PictureField,
    Value,
    default_of,
)
from handler.api.shortcuts import check_shortcuts
from handler.api.task_choice import check_together, choose_control, choose_task
from handler.api.tasks import TEXT_TO_IMAGE, engine_task
from handler.api.traits import PipelineTraits
from handler.api.translation import translate
from handler.config import HandlerConfig
from handler.errors import ConfigError, InvalidRequest
from handler.messages import show, summarise

__all__ = ["GenerationRequest", "check_against_pipeline", "parse_fields"]


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One checked request; picture k of it is drawn with the seed ``seed + k``.

    Fields of the table that need no code of their own are in `extra`, those that were given or
    have a default.
    """

    prompt: str
    negative_prompt: str | None
    seed: int
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    num_images: int
    scheduler: str | None
    """A sampler's name, or a diffusers class; None is the pipeline's own."""
    extra: Mapping[str, Value] = field(default_factory=dict, hash=False)
    task: str = TEXT_TO_IMAGE
    """Without what a control picture adds; see `engine_task`."""
    pictures: Mapping[str, SentPicture] = field(default_factory=dict, hash=False)
    """What was sent to begin with, by field."""

    @property
    def engine_task(self) -> str:
        """What the engine calls the task."""
        return engine_task(self.task, control="control_image" in self.pictures)

    @property
    def loras(self) -> Mapping[str, float] | None:
        """The scale of each LoRA that it is drawn with; None: what the pipeline came with."""
        found = self.extra.get("loras")
        return found if isinstance(found, Mapping) else None

    def values(self) -> dict[str, Value]:
        """The fields by name, in the order of the table."""
        return {
            name: getattr(self, name) if name in _ATTRIBUTES else self.extra[name]
            for name in PICTURE_FIELDS
            if name in _ATTRIBUTES or name in self.extra
        }

    @property
    def is_weighted(self) -> bool:
        """Whether words of its prompts have weights."""
        return bool(self.extra.get("prompt_weighting"))

    @property
    def sampler(self) -> str | None:
        """The scheduler with its sigmas, under one name; None is the pipeline's own as it is."""
        named = [each for each in (self.scheduler, self.extra.get("sigmas")) if each is not None]
        return " ".join(map(str, named)) or None

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of every picture."""
        return tuple(range(self.seed, self.seed + self.num_images))


_ATTRIBUTES = frozenset(each.name for each in dataclasses.fields(GenerationRequest)) - {
    "extra",
    "pictures",
}


def check_against_pipeline(config: HandlerConfig, traits: PipelineTraits) -> None:
    """Raise ConfigError if the configured defaults do not fit the loaded pipeline."""
    problems = []
    multiple = traits.size_multiple_px
    for name, size_px in (("height", config.height), ("width", config.width)):
        if size_px % multiple:
            problems.append(f"{name}: {_not_a_multiple(size_px, multiple)}")
    if config.scheduler is not None and not find_sampler(config.scheduler, traits.schedulers):
        choices = ", ".join(offered(traits.schedulers))
        problems.append(f"scheduler: {show(config.scheduler)} is not one of {choices}")
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
    if config.step_cache and not any("step_cache" in has for has in traits.shortcuts.values()):
        problems.append("step_cache: this pipeline does not tell which step it is at")
    if problems:
        heading = "the handler section of model-config.yaml does not fit the pipeline:"
        raise ConfigError("\n  ".join([heading, *problems]))


def parse_fields(
    fields: Mapping[str, object],
    config: HandlerConfig,
    traits: PipelineTraits,
    *,
    is_form: bool,
    draw_seed: Callable[[], int],
    known_pictures: dict[int, SentPicture] | None = None,
) -> GenerationRequest:
    """Check the fields of one request and fill in the configured defaults.

    `draw_seed` is called once if, and only if, the request is valid and has no seed.
    `known_pictures` are those that other requests of the body have read, see `FieldReader.picture`.

    Raises:
        InvalidRequest: with every problem, by field.
    """
    fields, problems = translate(fields)
    reader = FieldReader(fields, allow_text=is_form)
    for name, problem in problems.items():
        reader.report(name, problem)
    sent = {
        name: reader.read(each, config)
        for name, each in PICTURE_FIELDS.items()
        if each.kind is not Kind.PICTURE
    }
    if sent["prompt"] is None and "prompt" not in reader.problems:
        reader.report("prompt", "is missing")
    _take_loras(reader, sent, config)
    present = {name for name in SENT_PICTURES if _is_sent(name, fields)}
    task = choose_task(reader, sent["task"], present, traits)
    known = {} if known_pictures is None else known_pictures
    pictures = _read_pictures(reader, config, known, is_wanted=task is not None)
    sent["control"] = choose_control(reader, sent["control"], present, traits)
    has_size = {"image", "control_image"} & present
    parameters = _parameters(task, present, traits) | ({"height", "width"} if has_size else set())
    _refuse_what_the_pipeline_lacks(reader, fields, traits, parameters)
    values = {**_defaults(config, parameters), **{n: v for n, v in sent.items() if v is not None}}
    values["task"] = task or TEXT_TO_IMAGE
    values.update(_resolve_sampler(reader, sent, values, traits))
    _check_loras(reader, sent["loras"], traits)
    _check_weights(reader, values, traits)
    _check_encoding(reader, sent, values, traits)
    _size_by_picture(reader, values, sent, pictures, config, traits)
    extra = {name: value for name, value in values.items() if name not in _ATTRIBUTES}
    attributes = {name: values[name] for name in _ATTRIBUTES}
    # The table's kinds are those of the attributes; what is wrong has its default until the end.
    request = GenerationRequest(**attributes, extra=extra, pictures=pictures)  # type: ignore[arg-type]
    _check_num_images(reader, request, parameters)
    _check_size(reader, request, config, traits)
    _check_steps(reader, request, config, traits)
    _check_all_pixels(reader, request, config)
    check_shortcuts(reader, sent, extra, request.engine_task, request.sampler, config, traits)
    check_together(reader, extra, pictures, request.num_inference_steps)
    reader.refuse_rest(PICTURE_NAMES | REPLY_FIELDS.keys())
    if reader.problems:
        raise InvalidRequest(summarise(reader.problems), reader.problems)
    return request if sent["seed"] is not None else replace(request, seed=draw_seed())


def _is_sent(name: str, fields: Mapping[str, object]) -> bool:
    return any(fields.get(each) is not None for each in PICTURE_FIELDS[name].names)


def _read_pictures(
    reader: FieldReader,
    config: HandlerConfig,
    known: dict[int, SentPicture],
    *,
    is_wanted: bool,
) -> dict[str, SentPicture]:
    """The pictures by field. They are only taken where they are not wanted: they may be large."""
    pictures = {}
    for name in SENT_PICTURES:
        each = PICTURE_FIELDS[name]
        if not is_wanted:
            reader.take(name, each.aliases)
        elif (picture := reader.picture(each, config, known)) is not None:
            pictures[name] = picture
    return pictures


def _parameters(task: str | None, present: set[str], traits: PipelineTraits) -> frozenset[str]:
    """The parameters of the task's pipeline; of all where there is none, which is a problem."""
    if task is None:
        return traits.parameters.union(*traits.tasks.values())
    return traits.tasks[engine_task(task, control="control_image" in present)]


def _size_by_picture(
    reader: FieldReader,
    values: dict[str, Value],
    sent: Mapping[str, Value],
    pictures: Mapping[str, SentPicture],
    config: HandlerConfig,
    traits: PipelineTraits,
) -> None:
    """Set height and width in `values` where a picture says them."""
    name = next((each for each in ("image", "control_image") if each in pictures), None)
    if name is None:
        return
    size = choose_size(
        reader,
        (sent["height"], sent["width"]),
        name,
        pictures[name],
        config,
        traits.size_multiple_px,
    )
    if size is not None:
        values["height"], values["width"] = size


def _defaults(config: HandlerConfig, parameters: frozenset[str]) -> dict[str, Value]:
    """What counts for every field that is not sent; extra fields have an entry if they have one."""
    values: dict[str, Value] = {"seed": 0}  # drawn at the end
    for name, each in PICTURE_FIELDS.items():
        value = default_of(each, config)
        if name in _ATTRIBUTES:
            values.setdefault(name, value)
        elif value is not None and not _is_lacking(each, parameters):
            values[name] = value
    if _is_lacking(PICTURE_FIELDS["negative_prompt"], parameters):
        values["negative_prompt"] = None
    return values


def _is_lacking(each: PictureField, parameters: frozenset[str]) -> bool:
    return each.argument is not None and each.argument not in parameters


def _refuse_what_the_pipeline_lacks(
    reader: FieldReader,
    fields: Mapping[str, object],
    traits: PipelineTraits,
    parameters: frozenset[str],
) -> None:
    for name, each in PICTURE_FIELDS.items():
        if each.kind is Kind.PICTURE or not each.is_refused_without_argument:
            continue
        if _is_sent(name, fields) and _is_lacking(each, parameters):
            others = [task for task, has in traits.tasks.items() if each.argument in has]
            needed = f"; {', '.join(others)} has it" if others else ""
            what = "this task" if others else "this pipeline"
            if name == "guidance_scale" and "true_cfg_scale" in parameters:
                needed = "; its guidance is true_cfg_scale, with a negative_prompt"
            reader.report(name, f"{what} has no such parameter{needed}")


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


def _take_loras(reader: FieldReader, sent: dict[str, Any], config: HandlerConfig) -> None:
    """Move the LoRAs that a weighted prompt names to the field for them; mutates `sent`."""
    prompt, weighting = sent["prompt"], sent["prompt_weighting"]
    is_weighted = config.prompt_weighting if weighting is None else weighting
    if not is_weighted or prompt is None or "loras" not in PICTURE_FIELDS:
        return
    try:
        text, named = take_loras(prompt)
    except ValueError as error:
        reader.report("prompt", str(error))
        return
    if named:
        sent["prompt"] = text.strip()
        for name, scale in (sent["loras"] or {}).items():
            if named.setdefault(name, scale) != scale:
                reader.report("loras", f"{show(name)} has another scale in the prompt")
        sent["loras"] = named


def _check_weights(reader: FieldReader, values: dict[str, Value], traits: PipelineTraits) -> None:
    """Check the weights in the prompts, where they count; mutates `values` where nothing does."""
    if not values.get("prompt_weighting"):
        values.pop("prompt_weighting", None)
        return
    if not traits.reads_weights:
        reader.report("prompt_weighting", "this pipeline's text encoder reads no weights")
    for name in ("prompt", "negative_prompt"):
        text = values.get(name)
        problem = weight_problem(text) if isinstance(text, str) else None
        if problem is not None:
            reader.report(name, problem)


def _resolve_sampler(
    reader: FieldReader,
    sent: Mapping[str, Value],
    values: Mapping[str, Value],
    traits: PipelineTraits,
) -> dict[str, Value]:
    """The fields `scheduler` and `sigmas` for what was sent or configured of them."""
    name, sigmas = values["scheduler"], values.get("sigmas")
    assert name is None or isinstance(name, str)
    assert sigmas is None or isinstance(sigmas, str)
    split = split_schedule(name or "")
    said = split[1] if sent["scheduler"] is not None and split is not None else None
    if said is not None and sigmas is not None and said != SCHEDULES[sigmas].name:
        reader.report("sigmas", f"{show(sigmas)}, but the scheduler says {said}: send one")
    if name is None and sigmas is None:
        return {"scheduler": None}
    sampler = find_sampler(name, traits.schedulers, sigmas)
    if sampler is None:
        is_named = name is not None and find_sampler(name, traits.schedulers) is None
        own = next(iter(traits.schedulers), "")
        problem = sampler_problem(name or own, traits.schedulers, None if is_named else sigmas)
        reader.report("scheduler" if is_named else "sigmas", problem)
        return {"scheduler": None}
    is_own = name is None or (split is not None and not split[0])
    chosen = {} if sampler.sigmas is None else {"sigmas": sampler.sigmas}
    return {"scheduler": None if is_own else sampler.name, **chosen}


def _check_loras(reader: FieldReader, named: Value, traits: PipelineTraits) -> None:
    problem = lora_problem(named, traits.loras) if isinstance(named, Mapping) else None
    if problem is not None:
        reader.report("loras", problem)


def _check_num_images(
    reader: FieldReader, request: GenerationRequest, parameters: frozenset[str]
) -> None:
    """Check that there may be several, and that the seeds of all of them stay exact in JSON."""
    if request.num_images > 1 and _is_lacking(PICTURE_FIELDS["num_images"], parameters):
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
