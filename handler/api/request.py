"""What one request may ask of the pipeline: fields, ranges, schedulers.

`parse_fields` is the only door: plain fields in, a checked `GenerationRequest` or every problem
at once out. It knows nothing of HTTP, TorchServe or torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from handler.api.fields import FieldReader
from handler.api.traits import PipelineTraits, scheduler_choices, scheduler_class, short_name
from handler.config import HandlerConfig
from handler.errors import ConfigError, InvalidRequest
from handler.messages import nearest, show, summarise

__all__ = [
    "ALIASES",
    "CALL_FIELDS",
    "FIELD_NAMES",
    "MAX_SEED",
    "GenerationRequest",
    "check_against_pipeline",
    "parse_fields",
]

# The largest integer that every JSON reader keeps exact.
MAX_SEED = 2**53 - 1

ALIASES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "prompt": ("data", "inputs", "text"),
        "negative_prompt": (),
        "seed": (),
        "num_inference_steps": ("steps",),
        "guidance_scale": ("guidance",),
        "height": (),
        "width": (),
        "num_images": ("n",),
        "scheduler": (),
    }
)
FIELD_NAMES = frozenset(ALIASES) | {alias for names in ALIASES.values() for alias in names}
# These steer the reply, not the picture: `wire` reads them.
CALL_FIELDS = frozenset(
    ["output_format", "request_id", "deadline_s", "stream", "previews", "cancel"]
)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One checked request; picture k of it is drawn with the seed ``seed + k``."""

    prompt: str
    negative_prompt: str | None
    seed: int
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    num_images: int
    scheduler: str | None
    """A diffusers class name; None is the pipeline's own."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of every picture."""
        return tuple(range(self.seed, self.seed + self.num_images))


def check_against_pipeline(config: HandlerConfig, traits: PipelineTraits) -> None:
    """Raise ConfigError if the configured defaults do not fit the loaded pipeline."""
    problems = []
    multiple = traits.size_multiple_px
    for name, size_px in (("height", config.height), ("width", config.width)):
        if size_px % multiple:
            problems.append(f"{name}: {_not_a_multiple(size_px, multiple)}")
    if config.scheduler is not None and scheduler_class(config.scheduler, traits) is None:
        choices = ", ".join(scheduler_choices(traits))
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
    reader = FieldReader(fields, allow_text=is_form)
    prompt = reader.text(
        "prompt", ALIASES["prompt"], min_chars=1, max_chars=config.max_prompt_chars
    )
    if prompt is None and not reader.problems:
        reader.report("prompt", "is missing")
    negative_prompt = reader.text("negative_prompt", max_chars=config.max_prompt_chars)
    num_images = reader.integer("num_images", ALIASES["num_images"], low=1, high=config.max_images)
    num_images = num_images or 1
    seed = reader.integer("seed", low=0, high=MAX_SEED - num_images + 1)
    num_inference_steps = reader.integer(
        "num_inference_steps",
        ALIASES["num_inference_steps"],
        low=1,
        high=config.max_num_inference_steps,
    )
    guidance_scale = reader.number(
        "guidance_scale",
        ALIASES["guidance_scale"],
        low=config.min_guidance_scale,
        high=config.max_guidance_scale,
    )
    height, width = _read_size(reader, config, traits)
    scheduler = _read_scheduler(reader, config, traits)
    num_inference_steps = num_inference_steps or config.num_inference_steps
    _check_steps(reader, num_inference_steps, scheduler, config, traits)
    _check_all_pixels(reader, num_images, (height, width), config)
    _refuse_what_the_pipeline_lacks(reader, fields, num_images, traits)
    reader.refuse_rest(FIELD_NAMES | CALL_FIELDS)
    if reader.problems:
        raise InvalidRequest(summarise(reader.problems), reader.problems)
    assert prompt is not None
    if negative_prompt is None and "negative_prompt" in traits.parameters:
        negative_prompt = config.negative_prompt
    return GenerationRequest(
        prompt=prompt,
        negative_prompt=negative_prompt,
        seed=draw_seed() if seed is None else seed,
        num_inference_steps=num_inference_steps,
        guidance_scale=config.guidance_scale if guidance_scale is None else guidance_scale,
        height=height,
        width=width,
        num_images=num_images,
        scheduler=scheduler,
    )


def _read_size(
    reader: FieldReader, config: HandlerConfig, traits: PipelineTraits
) -> tuple[int, int]:
    sizes = []
    for name, default in (("height", config.height), ("width", config.width)):
        size_px = reader.integer(name, low=config.min_size_px, high=config.max_size_px)
        if size_px is not None and size_px % traits.size_multiple_px:
            reader.report(name, _not_a_multiple(size_px, traits.size_multiple_px))
        sizes.append(default if size_px is None else size_px)
    height, width = sizes
    if height * width > config.max_pixels and not {"height", "width"} & reader.problems.keys():
        reader.report(
            "height",
            f"{height}x{width} (height x width) is {height * width} pixels;"
            f" allowed are {config.max_pixels}",
        )
    return height, width


def _check_all_pixels(
    reader: FieldReader, num_images: int, size: tuple[int, int], config: HandlerConfig
) -> None:
    allowed, (height, width) = config.max_pixels_in_flight, size
    pixels = num_images * height * width
    if allowed is not None and pixels > allowed and not reader.problems:
        reader.report(
            "num_images",
            f"{num_images} of {height}x{width} (height x width) are {pixels} pixels;"
            f" allowed are {allowed} together",
        )


def _not_a_multiple(size_px: int, multiple: int) -> str:
    below = size_px // multiple * multiple
    return f"{size_px} is not a multiple of {multiple}; nearest are {below} and {below + multiple}"


def _read_scheduler(
    reader: FieldReader, config: HandlerConfig, traits: PipelineTraits
) -> str | None:
    name = reader.text("scheduler", min_chars=1, max_chars=100)
    if name is None:
        default = config.scheduler
        return None if default is None else scheduler_class(default, traits)
    class_name = scheduler_class(name, traits)
    if class_name is None:
        choices = scheduler_choices(traits)
        match = nearest(name, choices)
        hint = f"did you mean {match}? " if match else ""
        reader.report(
            "scheduler",
            f"{show(name)} does not go with this pipeline; {hint}allowed: {', '.join(choices)}",
        )
    return class_name


def _check_steps(
    reader: FieldReader,
    num_steps: int,
    scheduler: str | None,
    config: HandlerConfig,
    traits: PipelineTraits,
) -> None:
    least = traits.least_steps_with(scheduler)
    if num_steps < least and not {"num_inference_steps", "scheduler"} & reader.problems.keys():
        reader.report(
            "num_inference_steps",
            f"{num_steps} is too few for {short_name(scheduler or traits.schedulers[0])};"
            f" allowed: {least} to {config.max_num_inference_steps}",
        )


def _refuse_what_the_pipeline_lacks(
    reader: FieldReader, fields: Mapping[str, object], num_images: int, traits: PipelineTraits
) -> None:
    for name in ("negative_prompt", "num_inference_steps", "guidance_scale", "height", "width"):
        sent = any(fields.get(n) is not None for n in (name, *ALIASES[name]))
        if sent and name not in traits.parameters:
            reader.report(name, "this pipeline has no such parameter")
    if num_images > 1 and "num_images_per_prompt" not in traits.parameters:
        reader.report("num_images", "this pipeline draws one picture a request")
