"""What one request asks of the pipeline, and the checks that concern several of its fields.

`parse_fields` is the only entry: plain fields become a checked `GenerationRequest`, or every
problem at once. Each field by itself is checked by its entry in `schema`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from handler.api.fields import FieldReader
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
    PictureField,
    Value,
    default_of,
)
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

    def values(self) -> dict[str, Value]:
        """The fields by name, in the order of the table."""
        return {
            name: getattr(self, name) if name in _ATTRIBUTES else self.extra[name]
            for name in PICTURE_FIELDS
            if name in _ATTRIBUTES or name in self.extra
        }

    @property
    def sampler(self) -> str | None:
        """The scheduler with its sigmas, under one name; None is the pipeline's own as it is."""
        named = [each for each in (self.scheduler, self.extra.get("sigmas")) if each is not None]
        return " ".join(map(str, named)) or None

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of every picture."""
        return tuple(range(self.seed, self.seed + self.num_images))


_ATTRIBUTES = frozenset(each.name for each in dataclasses.fields(GenerationRequest)) - {"extra"}


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
    if config.negative_prompt and "negative_prompt" not in traits.parameters:
        problems.append("negative_prompt: this pipeline takes none")
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
) -> GenerationRequest:
    """Check the fields of one request and fill in the configured defaults.

    `draw_seed` is called once if, and only if, the request is valid and has no seed.

    Raises:
        InvalidRequest: with every problem, by field.
    """
    fields, problems = translate(fields)
    reader = FieldReader(fields, allow_text=is_form)
    for name, problem in problems.items():
        reader.report(name, problem)
    sent = {name: reader.read(each, config) for name, each in PICTURE_FIELDS.items()}
    if sent["prompt"] is None and "prompt" not in reader.problems:
        reader.report("prompt", "is missing")
    _refuse_what_the_pipeline_lacks(reader, fields, traits)
    values = {**_defaults(config, traits), **{n: v for n, v in sent.items() if v is not None}}
    values.update(_resolve_sampler(reader, sent, values, traits))
    extra = {name: value for name, value in values.items() if name not in _ATTRIBUTES}
    attributes = {name: values[name] for name in _ATTRIBUTES}
    # The table's kinds are those of the attributes; what is wrong has its default until the end.
    request = GenerationRequest(**attributes, extra=extra)  # type: ignore[arg-type]
    _check_num_images(reader, request, traits)
    _check_size(reader, request, config, traits)
    _check_steps(reader, request, config, traits)
    _check_all_pixels(reader, request, config)
    reader.refuse_rest(PICTURE_NAMES | REPLY_FIELDS.keys())
    if reader.problems:
        raise InvalidRequest(summarise(reader.problems), reader.problems)
    return request if sent["seed"] is not None else replace(request, seed=draw_seed())


def _defaults(config: HandlerConfig, traits: PipelineTraits) -> dict[str, Value]:
    """What counts for every field that is not sent; extra fields have an entry if they have one."""
    values: dict[str, Value] = {"seed": 0}  # drawn at the end
    for name, each in PICTURE_FIELDS.items():
        value = default_of(each, config)
        if name in _ATTRIBUTES:
            values.setdefault(name, value)
        elif value is not None and not _is_lacking(each, traits):
            values[name] = value
    if _is_lacking(PICTURE_FIELDS["negative_prompt"], traits):
        values["negative_prompt"] = None
    return values


def _is_lacking(each: PictureField, traits: PipelineTraits) -> bool:
    return each.argument is not None and each.argument not in traits.parameters


def _refuse_what_the_pipeline_lacks(
    reader: FieldReader, fields: Mapping[str, object], traits: PipelineTraits
) -> None:
    for name, each in PICTURE_FIELDS.items():
        is_sent = any(fields.get(n) is not None for n in each.names)
        if is_sent and each.is_refused_without_argument and _is_lacking(each, traits):
            reader.report(name, "this pipeline has no such parameter")


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


def _check_num_images(
    reader: FieldReader, request: GenerationRequest, traits: PipelineTraits
) -> None:
    """Check that there may be several, and that the seeds of all of them stay exact in JSON."""
    if request.num_images > 1 and _is_lacking(PICTURE_FIELDS["num_images"], traits):
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
