"""What an operator may set: the ``handler:`` section of model-config.yaml, checked whole.

Everything about a key stands in `HandlerConfig`: default, allowed values, meaning. The section in
config/model-config.yaml and the table in docs/configuration.md are written from there by
``python -m scripts.write_docs``. Checks that need two keys are in `_cross_problems`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TypeVar

from handler import config_checks as allow
from handler.config_checks import MAX_LORA_SCALE, MAX_LORAS, Check
from handler.errors import ConfigError
from handler.messages import nearest, show

__all__ = ["MAX_LORAS", "MAX_LORA_SCALE", "OUTPUT_FORMATS", "HandlerConfig", "Key", "keys"]

OUTPUT_FORMATS = ("png", "jpeg", "webp", "npy", "json", "array")
# Two prompts of 8000 characters are the most that fit the 64 KB that JPEG gives to its EXIF data.
_MAX_PROMPT_CHARS = 8000
# In base64 the three pictures of a request have four times the bytes of one; the rest is text.
_BODY_BYTES_A_PICTURE_BYTE = 4
_BODY_BYTES_BESIDE_PICTURES = 64 * 1024

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Key:
    """A key with its check, and as documentation shows it."""

    name: str
    default: object
    check: Check
    meaning: str
    span: str
    """What is allowed, where other keys say it; else what `check` says."""
    note: str
    left_out: str
    """What counts where the default is None."""
    example: str
    """A value as YAML writes it, for a key whose default is None."""
    section: str
    """The heading of the keys that begin with this one; empty for the others."""


def _key(
    default: _T,
    check: Check,
    meaning: str,
    *,
    span: str | None = None,
    note: str = "",
    left_out: str = "",
    example: str = "",
    section: str = "",
) -> _T:
    documentation = {
        "check": check,
        "meaning": meaning,
        "span": check.span if span is None else span,
        "note": note,
        "left_out": left_out,
        "example": example,
        "section": section,
    }
    return field(default=default, metadata=documentation)


@dataclass(frozen=True, slots=True)
class HandlerConfig:
    """All settings of the handler; sizes in pixels, times in the unit that the name ends with."""

    device: str | None = _key(
        None,
        allow.optional(allow.device()),
        "where the pipeline runs",
        left_out="`cuda:<gpu_id>` where there is CUDA, else `cpu`",
        example="cpu",
        section="Loading",
    )
    dtype: str | None = _key(
        None,
        allow.optional(allow.one_of("float16", "bfloat16", "float32")),
        "precision of the weights",
        left_out="`float16` on CUDA, else `float32`",
        example="float32",
    )
    num_threads: int | None = _key(
        None,
        allow.optional(allow.integer(1, 1024)),
        "CPU threads of torch",
        left_out="torch's own choice; while others use the cores, fewer for the denoiser",
        example="2",
    )
    speed: str = _key(
        "safe",
        allow.one_of("off", "safe", "max"),
        "how far forwards are made faster, see docs/performance.md",
        note="`max` may change pictures slightly",
    )
    lora_dir: str | None = _key(
        None,
        allow.optional(allow.text()),
        "folder of LoRAs, NAME.safetensors, that requests may name; read at first use",
        left_out="none but those packed",
        example="/srv/loras",
    )
    max_loras: int = _key(
        16, allow.integer(1, 1000), "LoRAs of `lora_dir` that are kept; the longest unused goes"
    )
    max_lora_bytes: int = _key(
        4 * 2**30, allow.integer(1024, 2**50), "bytes that these may occupy together"
    )
    warm_up_sizes: tuple[tuple[int, int], ...] | None = _key(
        None,
        allow.optional(allow.sizes()),
        "sizes, height x width, that are prepared before READY",
        left_out="the default size",
        example="[512x512,768x768]",
    )

    num_inference_steps: int = _key(
        50,
        allow.integer(1, 1000),
        "denoising steps",
        span="1 to `max_num_inference_steps`",
        section="What a request gets that does not say otherwise",
    )
    guidance_scale: float = _key(
        7.5,
        allow.number(0.0, 1000.0),
        "classifier-free guidance",
        span="`min_guidance_scale` to `max_guidance_scale`",
        note="1 or less is without",
    )
    height: int = _key(
        768, allow.integer(8, 16384), "pixels", span="`min_size_px` to `max_size_px`"
    )
    width: int = _key(768, allow.integer(8, 16384), "pixels", span="`min_size_px` to `max_size_px`")
    negative_prompt: str | None = _key(
        None,
        allow.optional(allow.text()),
        "what pictures should not show",
        left_out="nothing",
        example="blurry",
    )
    prompt_weighting: bool = _key(
        False,
        allow.boolean(),
        "read A1111's `(word:1.3)`, `[word]` and `BREAK` in prompts as weights, not as text",
        note="Stable Diffusion and SDXL",
    )
    scheduler: str | None = _key(
        None,
        allow.optional(allow.text()),
        "short name, or name of a diffusers class",
        left_out="the pipeline's own",
        example="ddim",
    )
    default_loras: Mapping[str, float] | None = _key(
        None,
        allow.optional(allow.loras()),
        "LoRAs that are on without being named, with their scales",
        left_out="all that are packed, at 1",
        example='{"style":0.8}',
    )
    step_cache: float = _key(
        0.0,
        allow.number(0.0, 1.0, off=True),
        "the part of the denoising steps that may be predicted instead of computed, see"
        " docs/performance.md",
        note="0 is `off`; pictures change a little",
    )
    default_output: str = _key(
        "png",
        allow.one_of(*OUTPUT_FORMATS),
        "what a request without `output_format` and `Accept` gets",
    )
    jpeg_quality: int = _key(90, allow.integer(1, 100), "quality of JPEG and WebP")
    embed_metadata: bool = _key(
        True, allow.boolean(), "write prompt, seed and parameters into PNG, JPEG and WebP"
    )

    max_prompt_chars: int = _key(
        2000,
        allow.integer(1, _MAX_PROMPT_CHARS),
        "characters of a prompt or negative prompt",
        section="Limits of one request",
    )
    max_prompt_windows: int = _key(
        8,
        allow.integer(1, 1000),
        "windows of 75 tokens that a prompt or negative prompt is encoded in",
        note="Stable Diffusion and SDXL; a `BREAK` begins one",
    )
    max_num_inference_steps: int = _key(150, allow.integer(1, 1000), "denoising steps")
    min_guidance_scale: float = _key(0.0, allow.number(0.0, 1000.0), "classifier-free guidance")
    max_guidance_scale: float = _key(30.0, allow.number(0.0, 1000.0), "classifier-free guidance")
    min_size_px: int = _key(64, allow.integer(8, 16384), "pixels of height and of width")
    max_size_px: int = _key(1536, allow.integer(8, 16384), "pixels of height and of width")
    max_pixels: int = _key(
        1024 * 1024, allow.integer(64, 2**28), "pixels of one picture, height x width"
    )
    max_images: int = _key(
        4,
        allow.integer(1, 64),
        "pictures of one prompt",
        note="each may take two of `max_rows`",
    )
    max_instances: int = _key(8, allow.integer(1, 64), "prompts of one KServe request")
    max_picture_bytes: int = _key(
        4 * 1024 * 1024,
        allow.integer(64, 2**28),
        "bytes of a picture that is sent, before base64",
        note="a request has up to three",
    )
    max_picture_pixels: int = _key(
        4096 * 4096,
        allow.integer(64, 2**26),
        "pixels of a picture that is sent, height x width; it is scaled down to `max_pixels`",
    )
    max_body_bytes: int = _key(
        17 * 1024 * 1024,
        allow.integer(256, 2**31 - 1),
        "bytes of a body",
        span="four times `max_picture_bytes` and 65536, to 2147483647",
        note="at most `max_request_size` in config.properties",
    )

    safety_checker: str = _key(
        "flag",
        allow.one_of("off", "flag", "refuse"),
        "where the archive holds a safety checker: `off` loads none, `flag` replies with what"
        " diffusers draws (black) and says so, `refuse` replies with status 422",
        note="`refuse` needs a checker, and allows no previews",
        section="Safety",
    )

    max_rows: int = _key(
        16,
        allow.integer(2, 1024),
        "rows that one forward may hold",
        note="at least twice `max_images`: a picture with guidance is two rows, one without is one",
        section="The engine",
    )
    max_pixels_in_flight: int | None = _key(
        None,
        allow.optional(allow.integer(64, 2**40)),
        "pixels of all pictures being drawn",
        span="`max_pixels` to 2^40",
        left_out="no limit",
        example="9437184",
    )
    max_waiting: int = _key(
        64, allow.integer(0, 10000), "requests that may wait for admission", note="beyond that 503"
    )
    cycle_ms: float = _key(
        20.0, allow.number(0.0, 10000.0), "milliseconds of denoising between two looks at the queue"
    )
    exact: bool = _key(
        False, allow.boolean(), "bit-equal to the pipeline called alone, at the price of batching"
    )
    deadline_s: float | None = _key(
        None,
        allow.optional(allow.number(0.001, 86400.0)),
        "seconds after which any request gets 504",
        left_out="none",
        example="120",
    )
    pad_to_buckets: bool = _key(
        False, allow.boolean(), "pad rows to a few counts, so that compiled forwards see few shapes"
    )
    encode_threads: int = _key(
        2,
        allow.integer(1, 64),
        "threads that encode finished pictures, and as many that decode those that are sent",
    )

    trace_endpoint: str | None = _key(
        None,
        allow.optional(allow.text()),
        "where spans of every request go, OTLP over HTTP; needs the extra `tracing`",
        left_out="OTEL_EXPORTER_OTLP_TRACES_ENDPOINT of the environment, else none",
        example="http://127.0.0.1:4318/v1/traces",
        section="What is told of requests",
    )
    request_log: str = _key(
        "none", allow.one_of("none", "json"), "one object a request in the log, without its prompt"
    )

    def __post_init__(self) -> None:
        problems = [
            *_value_problems({f.name: getattr(self, f.name) for f in fields(self)}),
        ] or [*_cross_problems(self)]
        if problems:
            raise ConfigError(_message(problems))

    @classmethod
    def from_mapping(cls, section: Mapping[str, object] | None) -> HandlerConfig:
        """The settings of a ``handler:`` section.

        Raises:
            ConfigError: names every unknown key, every bad value and what is allowed.
        """
        if section is None:
            section = {}
        if not isinstance(section, Mapping):
            raise ConfigError(f"handler must be a section of keys and values, not {show(section)}")
        known = [f.name for f in fields(cls)]
        problems = [*_unknown_problems(section, known), *_value_problems(section)]
        if problems:
            raise ConfigError(_message(problems))
        # Checked just above, key by key; the checks also make floats of integers.
        checked = {name: _checks()[name].convert(value) for name, value in section.items()}
        return cls(**checked)  # type: ignore[arg-type]


def keys() -> tuple[Key, ...]:
    """Every key of the ``handler:`` section, in the order of the file."""
    return tuple(Key(f.name, f.default, **f.metadata) for f in fields(HandlerConfig))


def _checks() -> dict[str, Check]:
    return {key.name: key.check for key in keys()}


def _unknown_problems(section: Mapping[str, object], known: list[str]) -> Iterator[str]:
    for name in section:
        if name not in known:
            match = nearest(str(name), known)
            hint = f"did you mean {match}?" if match else f"known are {', '.join(known)}"
            yield f"{name}: unknown key; {hint}"


def _value_problems(section: Mapping[str, object]) -> Iterator[str]:
    checks = _checks()
    for name, value in section.items():
        if name in checks:
            try:
                checks[name].convert(value)
            except ValueError:
                yield f"{name}: {show(value)} is not allowed; must be {checks[name].allowed}"


def _cross_problems(config: HandlerConfig) -> Iterator[str]:
    for low, value, high in (
        ("", "num_inference_steps", "max_num_inference_steps"),
        ("min_guidance_scale", "guidance_scale", "max_guidance_scale"),
        ("min_size_px", "height", "max_size_px"),
        ("min_size_px", "width", "max_size_px"),
    ):
        sent = getattr(config, value)
        if low and sent < getattr(config, low):
            yield f"{value}: {sent} is below {low}, {getattr(config, low)}"
        if sent > getattr(config, high):
            yield f"{value}: {sent} is above {high}, {getattr(config, high)}"
    if config.height * config.width > config.max_pixels:
        yield (
            f"height, width: {config.height}x{config.width} has more pixels than max_pixels,"
            f" {config.max_pixels}"
        )
    yield from _warm_up_problems(config)
    if config.exact and config.speed == "max":
        yield (
            "exact: true computes as the pipeline does when it is called alone, which speed: max"
            " does not; choose one of them"
        )
    if config.exact and config.step_cache:
        yield "exact: true computes every step, and step_cache predicts some; choose one of them"
    if len(config.negative_prompt or "") > config.max_prompt_chars:
        yield f"negative_prompt: longer than max_prompt_chars, {config.max_prompt_chars}"
    if 2 * config.max_images > config.max_rows:
        yield (
            f"max_rows: {config.max_rows} is too few for max_images, {config.max_images}: a guided"
            f" picture takes two rows; must be {2 * config.max_images} or more"
        )
    needed_bytes = (
        _BODY_BYTES_A_PICTURE_BYTE * config.max_picture_bytes + _BODY_BYTES_BESIDE_PICTURES
    )
    if config.max_body_bytes < needed_bytes:
        yield (
            f"max_body_bytes: {config.max_body_bytes} is too few for three pictures of"
            f" max_picture_bytes, {config.max_picture_bytes}, in base64; must be {needed_bytes} or"
            " more"
        )
    if config.max_pixels_in_flight is not None and config.max_pixels_in_flight < config.max_pixels:
        yield (
            f"max_pixels_in_flight: {config.max_pixels_in_flight} is below max_pixels,"
            f" {config.max_pixels}: the largest picture would never be drawn"
        )


def _warm_up_problems(config: HandlerConfig) -> Iterator[str]:
    for height, width in config.warm_up_sizes or ():
        sides = (height, width)
        is_allowed = min(sides) >= config.min_size_px and max(sides) <= config.max_size_px
        if not is_allowed or height * width > config.max_pixels:
            yield (
                f"warm_up_sizes: {height}x{width} is not a size that a request may ask for; see"
                " min_size_px, max_size_px and max_pixels"
            )


def _message(problems: list[str]) -> str:
    return "\n  ".join(["the handler section of model-config.yaml is wrong:", *problems])
