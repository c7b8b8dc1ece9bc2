"""The table of request fields: names, type, bounds, default, pipeline argument, metadata, meaning.

Everything that knows a field reads it here: parsing of every form of request, refusals, metadata,
pipeline arguments and the tables of docs/requests.md. A new field is one entry here, a key of
`HandlerConfig` if an operator may set its bounds or default, and a test. What concerns several
fields at once (sizes and pixels, steps and scheduler) is code in `request` and `call`.

Plain data: importing it needs neither torch nor diffusers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import TypeVar

from handler.api.samplers import SCHEDULES
from handler.config import OUTPUT_FORMATS, HandlerConfig

__all__ = [
    "MAX_SEED",
    "PICTURE_FIELDS",
    "PICTURE_NAMES",
    "REPLY_FIELDS",
    "Field",
    "Kind",
    "PictureField",
    "ReplyField",
    "Setting",
    "Value",
    "bounds_of",
    "default_of",
]

# The largest integer that every JSON reader keeps exact.
MAX_SEED = 2**53 - 1

Value = str | int | float | bool | None
"""What a field may hold once it is checked."""


class Kind(Enum):
    """The type of a field's value."""

    TEXT = "text"
    INTEGER = "integer"
    NUMBER = "number"
    BOOLEAN = "boolean"
    CHOICE = "one of its choices"
    ID = "id"


@dataclass(frozen=True, slots=True)
class Setting:
    """A bound or a default that the operator sets: a key of `HandlerConfig`."""

    key: str
    unset: float | None = None
    """What counts where the operator set nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """What every field has; bounds are of a number, or of the characters of a text."""

    name: str
    kind: Kind
    meaning: str
    aliases: tuple[str, ...] = ()
    minimum: float | Setting = 0
    maximum: float | Setting | None = None
    default: Value | Setting = None
    """None: left out, or found by code; `default_note` says what it is."""
    default_note: str = ""
    choices: Mapping[str, str] = field(default_factory=dict)
    """What may be written for a CHOICE, and what each stands for."""

    @property
    def names(self) -> tuple[str, ...]:
        """The name and its aliases."""
        return (self.name, *self.aliases)


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureField(Field):
    """A field that the picture depends on."""

    argument: str | None
    """The parameter of the pipeline's ``__call__`` that it becomes; None is none."""
    is_refused_without_argument: bool = True
    """Whether a request that sends it is refused where the pipeline has no such parameter."""
    is_recorded: bool = True
    """Whether it stands, under its name, in the JSON that goes with a picture."""
    label: str | None = None
    """Its name in the line of parameters that AUTOMATIC1111's web UI reads; None is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyField(Field):
    """A field that steers the reply and counts for the whole body."""

    header: str | None = None
    """The header of the request that says the same."""


_T = TypeVar("_T", bound=Field)


def _table(fields: Iterable[_T]) -> Mapping[str, _T]:
    return MappingProxyType({each.name: each for each in fields})


PICTURE_FIELDS: Mapping[str, PictureField] = _table(
    [
        PictureField(
            name="prompt",
            aliases=("data", "inputs", "text"),
            kind=Kind.TEXT,
            minimum=1,
            maximum=Setting("max_prompt_chars"),
            argument="prompt",
            default_note="required",
            is_refused_without_argument=False,
            meaning="what to draw",
        ),
        PictureField(
            name="negative_prompt",
            kind=Kind.TEXT,
            maximum=Setting("max_prompt_chars"),
            default=Setting("negative_prompt"),
            argument="negative_prompt",
            meaning="what not to draw",
        ),
        PictureField(
            name="num_inference_steps",
            aliases=("steps",),
            kind=Kind.INTEGER,
            minimum=1,
            maximum=Setting("max_num_inference_steps"),
            default=Setting("num_inference_steps"),
            argument="num_inference_steps",
            label="Steps",
            meaning="denoising steps; some schedulers need more than one",
        ),
        PictureField(
            name="scheduler",
            kind=Kind.TEXT,
            minimum=1,
            maximum=100,
            default=Setting("scheduler"),
            default_note="the pipeline's own",
            argument=None,
            label="Sampler",
            meaning="a sampler by the name that AUTOMATIC1111, ComfyUI or k-diffusion has for it"
            " (`DPM++ 2M Karras`, `Euler a`, `dpmpp_2m_sde`, `unipc`), or the name of a diffusers"
            " class; those that go with the pipeline's own",
        ),
        PictureField(
            name="sigmas",
            kind=Kind.CHOICE,
            choices={
                alias: key
                for key, schedule in SCHEDULES.items()
                for alias in (key, schedule.name.lower(), *schedule.aliases)
                if len(alias) > 2
            },
            default_note="the sampler's own",
            argument=None,
            label="Schedule type",
            meaning="the schedule of sigmas, as at the end of a sampler's name: `karras`,"
            " `exponential`, `beta`, `sgm_uniform`, `simple`, `normal` or `ddim_uniform`",
        ),
        PictureField(
            name="guidance_scale",
            aliases=("guidance",),
            kind=Kind.NUMBER,
            minimum=Setting("min_guidance_scale"),
            maximum=Setting("max_guidance_scale"),
            default=Setting("guidance_scale"),
            argument="guidance_scale",
            label="CFG scale",
            meaning="how closely the picture follows the prompt; 1 or less is without guidance",
        ),
        PictureField(
            name="seed",
            kind=Kind.INTEGER,
            maximum=MAX_SEED,
            default_note="drawn, and reported",
            argument="generator",
            is_refused_without_argument=False,
            is_recorded=False,
            label="Seed",
            meaning="the same seed, the same picture; picture k of a request has the seed + k",
        ),
        PictureField(
            name="height",
            kind=Kind.INTEGER,
            minimum=Setting("min_size_px"),
            maximum=Setting("max_size_px"),
            default=Setting("height"),
            argument="height",
            label="Size",
            meaning="pixels; a multiple of the pipeline's scale factor",
        ),
        PictureField(
            name="width",
            kind=Kind.INTEGER,
            minimum=Setting("min_size_px"),
            maximum=Setting("max_size_px"),
            default=Setting("width"),
            argument="width",
            meaning="pixels; a multiple of the pipeline's scale factor",
        ),
        PictureField(
            name="num_images",
            aliases=("n",),
            kind=Kind.INTEGER,
            minimum=1,
            maximum=Setting("max_images"),
            default=1,
            argument="num_images_per_prompt",
            is_refused_without_argument=False,
            is_recorded=False,
            meaning="pictures of this prompt; more than one needs a JSON or NumPy reply",
        ),
        PictureField(
            name="eta",
            kind=Kind.NUMBER,
            maximum=1,
            default_note="the pipeline's own",
            argument="eta",
            label="Eta DDIM",
            meaning="η of DDIM: 0 is deterministic, 1 adds as much noise as DDPM; other"
            " schedulers ignore it",
        ),
    ]
)
PICTURE_NAMES = frozenset(name for each in PICTURE_FIELDS.values() for name in each.names)
"""Every name that a field of a picture may be sent under."""

REPLY_FIELDS: Mapping[str, ReplyField] = _table(
    [
        ReplyField(
            name="output_format",
            header="Accept",
            kind=Kind.CHOICE,
            choices={**{name: name for name in OUTPUT_FORMATS}, "jpg": "jpeg"},
            default_note="what `Accept` asks for, else `default_output`",
            meaning="how the picture is encoded: see below; it outranks the `Accept` header",
        ),
        ReplyField(
            name="deadline_s",
            kind=Kind.NUMBER,
            minimum=0.001,
            maximum=Setting("deadline_s", unset=86400.0),
            default=Setting("deadline_s"),
            default_note="none",
            meaning="seconds after which the request is given up with status 504",
        ),
        ReplyField(
            name="request_id",
            header="X-Request-Id",
            kind=Kind.ID,
            default_note="drawn",
            meaning="a name to cancel the request by",
        ),
        ReplyField(
            name="stream",
            header="Accept: text/event-stream",
            kind=Kind.BOOLEAN,
            default=False,
            meaning="reply with one event a step, and the picture as the last one",
        ),
        ReplyField(
            name="previews",
            kind=Kind.INTEGER,
            maximum=Setting("max_num_inference_steps"),
            default=0,
            meaning="in a stream, a small picture every so many steps; 0 is none",
        ),
        ReplyField(
            name="cancel",
            kind=Kind.ID,
            meaning="alone in a body: end the running request with this id",
        ),
    ]
)


def bounds_of(each: Field, config: HandlerConfig) -> tuple[float, float]:
    """The minimum and the maximum of a field, both allowed."""
    low, high = _settled(each.minimum, config), _settled(each.maximum, config)
    assert isinstance(low, int | float), each.name
    assert isinstance(high, int | float), each.name
    return low, high


def default_of(each: Field, config: HandlerConfig) -> Value:
    """What counts where a request leaves the field out; None where that is left to others."""
    return _settled(each.default, config)


def _settled(value: Value | Setting, config: HandlerConfig) -> Value:
    if not isinstance(value, Setting):
        return value
    configured: Value = getattr(config, value.key)
    return value.unset if configured is None else configured
