"""The table of request fields: names, type, bounds, default, pipeline argument, metadata, meaning.

Everything that knows a field reads it here: parsing of every form of request, refusals, metadata,
pipeline arguments and the tables of docs/requests.md. A new field is one entry here, a key of
`HandlerConfig` if an operator may set its bounds or default, and a test. What concerns several
fields at once is code: `request_fields` and `request_checks` (sizes and pixels, steps and
scheduler), `picture_sizes` (sizes that follow from pictures), `task_choice` (the task that they
make) and `call` (the reply).

Plain data: importing it needs neither torch nor diffusers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import TypeVar

from handler.api.sampler_table import SCHEDULES
from handler.api.tasks import IMAGE_TO_IMAGE, INPAINTING, TASKS, TEXT_TO_IMAGE
from handler.config import MAX_LORA_SCALE, OUTPUT_FORMATS, HandlerConfig

__all__ = [
    "KNOWN_NAMES",
    "MAX_SEED",
    "PICTURE_FIELDS",
    "PICTURE_NAMES",
    "REPLY_FIELDS",
    "SENT_PICTURES",
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

Value = str | int | float | bool | Mapping[str, float] | None
"""What a field may hold once it is checked."""


class Kind(Enum):
    """The type of a field's value."""

    TEXT = "text"
    INTEGER = "integer"
    NUMBER = "number"
    BOOLEAN = "boolean"
    CHOICE = "one of its choices"
    ID = "id"
    PICTURE = "a picture"
    LORAS = "LoRAs by name"


@dataclass(frozen=True, slots=True)
class Setting:
    """A bound or a default that the operator sets: a key of `HandlerConfig`."""

    key: str
    unset: float | None = None
    """What counts where the operator set nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """What every field has.

    Bounds are of a number, a text's characters, a picture's bytes or the scale of a LoRA.
    """

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
    words: Mapping[str, float] = field(default_factory=dict)
    """What may be written for a NUMBER beside numbers, and what each stands for."""

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


def _own_number(
    name: str,
    meaning: str,
    *,
    kind: Kind = Kind.NUMBER,
    minimum: float | Setting = 0,
    maximum: float | Setting | None = 1,
    label: str | None = None,
) -> PictureField:
    """A parameter that some pipelines have beside the usual ones, under its own name."""
    return PictureField(
        name=name,
        kind=kind,
        minimum=minimum,
        maximum=maximum,
        default_note="the pipeline's own",
        argument=name,
        label=label,
        meaning=meaning,
    )


def _own_numbers() -> Iterable[PictureField]:
    guidance, steps = Setting("max_guidance_scale"), Setting("max_num_inference_steps")
    yield _own_number(
        "clip_skip",
        "layers at the end of CLIP's text encoder that are not read; A1111's Clip skip is one more",
        kind=Kind.INTEGER,
        maximum=48,
    )
    yield _own_number(
        "guidance_rescale", "how far guided noise gets the spread of the unguided: 0 is not at all"
    )
    yield _own_number(
        "true_cfg_scale",
        "classifier-free guidance of models that were distilled, as Flux and Qwen-Image are; needs"
        " a `negative_prompt`",
        maximum=guidance,
    )
    yield _own_number("pag_scale", "perturbed-attention guidance; 0 is without", maximum=guidance)
    yield _own_number(
        "pag_adaptive_scale", "how fast it wears off over the steps", maximum=guidance
    )
    yield _own_number("sag_scale", "self-attention guidance; 0 is without")
    yield _own_number(
        "skip_layer_guidance_scale", "skip-layer guidance of Stable Diffusion 3", maximum=guidance
    )
    yield _own_number("skip_layer_guidance_start", "the part of the steps after which it begins")
    yield _own_number("skip_layer_guidance_stop", "the part of the steps after which it ends")
    yield _own_number("cfg_truncation", "the part of the steps after which guidance ends")
    yield _own_number(
        "cfg_normalization",
        "whether guided noise gets the length of the unguided",
        kind=Kind.BOOLEAN,
    )
    for stage in ("prior", "decoder"):
        yield _own_number(
            f"{stage}_guidance_scale", f"guidance of the {stage} of two stages", maximum=guidance
        )
        yield _own_number(
            f"{stage}_num_inference_steps",
            f"steps of the {stage} of two stages",
            kind=Kind.INTEGER,
            minimum=1,
            maximum=steps,
        )
    yield _own_number(
        "max_sequence_length",
        "tokens of the prompt that T5 and language models read",
        kind=Kind.INTEGER,
        minimum=1,
        maximum=512,
    )


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
            name="prompt_weighting",
            kind=Kind.BOOLEAN,
            default=Setting("prompt_weighting"),
            argument=None,
            meaning="whether A1111's `(word:1.3)`, `(word)`, `[word]`, `\\(` and `BREAK` in both"
            " prompts are weights and breaks, and `<lora:style:0.8>` in `prompt` is one of `loras`,"
            " or all of it is text",
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
            name="loras",
            aliases=("lora",),
            kind=Kind.LORAS,
            minimum=-MAX_LORA_SCALE,
            maximum=MAX_LORA_SCALE,
            default=Setting("default_loras"),
            default_note="those packed",
            argument=None,
            label="Lora",
            meaning='the LoRAs to draw with, and no others: `{"style": 0.8}`, `["style"]`,'
            ' `[{"name": "style", "scale": 0.8}]` or `"style:0.8, ink"`, in a form as JSON'
            " too; `{}` is none. Names only: of what is packed or in the server's `lora_dir`; an"
            " unknown name is told them all",
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
            name="step_cache",
            kind=Kind.NUMBER,
            maximum=1,
            words={"off": 0.0},
            default=Setting("step_cache"),
            argument=None,
            meaning="the part of the steps that may be predicted from those before instead of"
            " computed, where the prediction is close: 0.5 is every second one; 0 or `off` is none."
            " The picture changes a little: see docs/performance.md",
        ),
        PictureField(
            name="guidance_start",
            kind=Kind.NUMBER,
            maximum=1,
            default_note="0",
            argument=None,
            meaning="the part of the steps before which guidance is left out; those steps compute"
            " half as much",
        ),
        PictureField(
            name="guidance_end",
            kind=Kind.NUMBER,
            maximum=1,
            default_note="1",
            argument=None,
            meaning="the part of the steps after which guidance is left out",
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
        *_own_numbers(),
        PictureField(
            name="task",
            kind=Kind.CHOICE,
            choices={
                **{name: name for name in TASKS},
                "txt2img": TEXT_TO_IMAGE,
                "img2img": IMAGE_TO_IMAGE,
                "inpaint": INPAINTING,
            },
            default_note="what the pictures sent make it",
            argument=None,
            meaning="what the request begins with; it follows from the pictures that are sent",
        ),
        PictureField(
            name="image",
            aliases=("init_image", "input_image"),
            kind=Kind.PICTURE,
            maximum=Setting("max_picture_bytes"),
            argument="image",
            is_recorded=False,
            meaning="the picture to begin with; without `height` and `width` its size counts",
        ),
        PictureField(
            name="mask_image",
            aliases=("mask",),
            kind=Kind.PICTURE,
            maximum=Setting("max_picture_bytes"),
            argument="mask_image",
            is_recorded=False,
            meaning="with `image`: what to draw anew, white, and what to keep, black",
        ),
        PictureField(
            name="control_image",
            kind=Kind.PICTURE,
            maximum=Setting("max_picture_bytes"),
            argument="control_image",
            is_recorded=False,
            meaning="the picture that a ControlNet follows, as it wants it: edges, depth …",
        ),
        PictureField(
            name="control",
            kind=Kind.TEXT,
            minimum=1,
            maximum=100,
            default_note="the only one",
            argument=None,
            meaning="with `control_image`: the ControlNet's name, where several are packed",
        ),
        PictureField(
            name="strength",
            kind=Kind.NUMBER,
            maximum=1,
            default_note="the pipeline's own",
            argument="strength",
            label="Denoising strength",
            meaning="with `image`: how much of it is drawn anew, 1 is all; so many of the steps are"
            " done, and at least one must be",
        ),
        PictureField(
            name="image_guidance_scale",
            kind=Kind.NUMBER,
            maximum=Setting("max_guidance_scale"),
            default_note="the pipeline's own",
            argument="image_guidance_scale",
            meaning="with pipelines that edit `image` by an instruction: how closely it is kept",
        ),
        PictureField(
            name="controlnet_conditioning_scale",
            kind=Kind.NUMBER,
            maximum=2,
            default_note="the pipeline's own",
            argument="controlnet_conditioning_scale",
            meaning="with `control_image`: how closely it is followed",
        ),
        PictureField(
            name="control_guidance_start",
            kind=Kind.NUMBER,
            maximum=1,
            default_note="the pipeline's own",
            argument="control_guidance_start",
            meaning="with `control_image`: the part of the steps after which it begins to count",
        ),
        PictureField(
            name="control_guidance_end",
            kind=Kind.NUMBER,
            maximum=1,
            default_note="the pipeline's own",
            argument="control_guidance_end",
            meaning="with `control_image`: the part of the steps after which it ends to count",
        ),
        PictureField(
            name="padding_mask_crop",
            kind=Kind.INTEGER,
            maximum=Setting("max_size_px"),
            default_note="all of the picture is drawn",
            argument="padding_mask_crop",
            meaning="with `mask_image`: only what it masks is drawn, with so many pixels around it,"
            " in the size that is asked for, and laid into the picture",
        ),
    ]
)
PICTURE_NAMES = frozenset(name for each in PICTURE_FIELDS.values() for name in each.names)
"""Every name that a field of a picture may be sent under."""
SENT_PICTURES = tuple(n for n, each in PICTURE_FIELDS.items() if each.kind is Kind.PICTURE)
"""The fields that are pictures themselves."""

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
            name="jpeg_quality",
            kind=Kind.INTEGER,
            minimum=1,
            maximum=100,
            default=Setting("jpeg_quality"),
            meaning="quality of JPEG and WebP",
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
        ReplyField(
            name="describe",
            kind=Kind.BOOLEAN,
            default=False,
            meaning="alone in a body: reply, as JSON, which fields the pipeline has, and its tasks,"
            " LoRAs, ControlNets and samplers by name",
        ),
    ]
)
KNOWN_NAMES = PICTURE_NAMES | REPLY_FIELDS.keys()
"""Every name that may stand in a body."""


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
