"""What an operator may set: the ``handler:`` section of model-config.yaml, checked whole.

A key's default and its allowed values stand together in `HandlerConfig`; checks that need two
keys are in `_cross_problems`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TypeVar, cast

from handler.errors import ConfigError
from handler.messages import nearest, number_range, show

__all__ = ["OUTPUT_FORMATS", "HandlerConfig"]

OUTPUT_FORMATS = ("png", "jpeg", "webp", "npy", "json", "array")
# Two prompts of 8000 characters are the most that fit the 64 KB that JPEG gives to its EXIF data.
_MAX_PROMPT_CHARS = 8000

_T = TypeVar("_T")
# A check turns what YAML gave into the value, or raises ValueError saying what is allowed.
_Check = Callable[[object], object]


def _integer(low: int, high: int) -> _Check:
    def check(value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"an integer from {low} to {high}")
        return value

    return check


def _number(low: float, high: float) -> _Check:
    def check(value: object) -> object:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # A NaN is in no range.
        if not is_number or not low <= cast(float, value) <= high:
            raise ValueError(f"a number from {number_range(low, high)}")
        return float(cast(float, value))

    return check


def _boolean(value: object) -> object:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _one_of(*choices: str) -> _Check:
    def check(value: object) -> object:
        if value not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return value

    return check


def _text(value: object) -> object:
    if not isinstance(value, str) or re.search("[\x00\ud800-\udfff]", value):
        raise ValueError("text")
    return value.strip()


def _device(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(r"cpu|mps|(cuda|xpu)(:[0-9]{1,3})?", value):
        raise ValueError("cpu, cuda, cuda:<number>, xpu or mps")
    return value


def _speed(value: object) -> object:
    # YAML reads a bare `off` as false.
    return _one_of("off", "safe", "max")("off" if value is False else value)


def _sizes(value: object) -> object:
    """A list of sizes as a tuple of (height, width)."""
    entries = value if isinstance(value, (list, tuple)) else ()
    sizes = tuple(_size(entry) for entry in entries)
    if not 0 < len(sizes) <= 16 or None in sizes:
        raise ValueError("a list of 1 to 16 sizes such as 512x768, height x width")
    return sizes


def _size(value: object) -> tuple[int, int] | None:
    if isinstance(value, tuple):
        return cast(tuple[int, int], value)  # checked before: this is a `HandlerConfig` copied
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", value) if isinstance(value, str) else None
    return None if match is None else (int(match[1]), int(match[2]))


def _optional(check: _Check) -> _Check:
    def check_or_none(value: object) -> object:
        return None if value is None else check(value)

    return check_or_none


def _key(default: _T, check: _Check) -> _T:
    return field(default=default, metadata={"check": check})


@dataclass(frozen=True, slots=True)
class HandlerConfig:
    """All settings of the handler; sizes in pixels, times in the unit that the name ends with."""

    # Loading. None: cuda:<gpu_id> in float16 where CUDA is, else the CPU in float32.
    device: str | None = _key(None, _optional(_device))
    dtype: str | None = _key(None, _optional(_one_of("float16", "bfloat16", "float32")))
    num_threads: int | None = _key(None, _optional(_integer(1, 1024)))
    speed: str = _key("safe", _speed)
    warm_up_sizes: tuple[tuple[int, int], ...] | None = _key(None, _optional(_sizes))

    # What a request gets that does not say otherwise.
    num_inference_steps: int = _key(50, _integer(1, 1000))
    guidance_scale: float = _key(7.5, _number(0.0, 1000.0))
    height: int = _key(768, _integer(8, 16384))
    width: int = _key(768, _integer(8, 16384))
    negative_prompt: str | None = _key(None, _optional(_text))
    scheduler: str | None = _key(None, _optional(_text))
    default_output: str = _key("png", _one_of(*OUTPUT_FORMATS))
    jpeg_quality: int = _key(90, _integer(1, 100))
    embed_metadata: bool = _key(True, _boolean)

    # Limits of one request.
    max_prompt_chars: int = _key(2000, _integer(1, _MAX_PROMPT_CHARS))
    max_num_inference_steps: int = _key(150, _integer(1, 1000))
    min_guidance_scale: float = _key(0.0, _number(0.0, 1000.0))
    max_guidance_scale: float = _key(30.0, _number(0.0, 1000.0))
    min_size_px: int = _key(64, _integer(8, 16384))
    max_size_px: int = _key(1536, _integer(8, 16384))
    max_pixels: int = _key(1024 * 1024, _integer(64, 2**28))
    max_images: int = _key(4, _integer(1, 64))
    max_instances: int = _key(8, _integer(1, 64))
    max_body_bytes: int = _key(1024 * 1024, _integer(256, 2**31 - 1))

    # The engine. A guided picture is two rows of a forward, an unguided one is one.
    max_rows: int = _key(16, _integer(2, 1024))
    max_pixels_in_flight: int | None = _key(None, _optional(_integer(64, 2**40)))
    max_waiting: int = _key(64, _integer(0, 10000))
    cycle_ms: float = _key(20.0, _number(0.0, 10000.0))
    exact: bool = _key(False, _boolean)
    deadline_s: float | None = _key(None, _optional(_number(0.001, 86400.0)))
    pad_to_buckets: bool = _key(False, _boolean)
    encode_threads: int = _key(2, _integer(1, 64))

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
        checked = {name: _checks()[name](value) for name, value in section.items()}
        return cls(**checked)  # type: ignore[arg-type]


def _checks() -> dict[str, _Check]:
    return {f.name: f.metadata["check"] for f in fields(HandlerConfig)}


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
                checks[name](value)
            except ValueError as error:
                yield f"{name}: {show(value)} is not allowed; must be {error}"


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
    if len(config.negative_prompt or "") > config.max_prompt_chars:
        yield f"negative_prompt: longer than max_prompt_chars, {config.max_prompt_chars}"
    if 2 * config.max_images > config.max_rows:
        yield (
            f"max_rows: {config.max_rows} is too few for max_images, {config.max_images}: a guided"
            f" picture takes two rows; must be {2 * config.max_images} or more"
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
                f"warm_up_sizes: {height}x{width} is no size that a request may ask for; see"
                " min_size_px, max_size_px and max_pixels"
            )


def _message(problems: list[str]) -> str:
    return "\n  ".join(["the handler section of model-config.yaml is wrong:", *problems])
