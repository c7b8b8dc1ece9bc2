"""What a key of the configuration may be: checks of one value, and what each allows in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from handler.messages import number_range

__all__ = [
    "MAX_LORAS",
    "MAX_LORA_SCALE",
    "Check",
    "boolean",
    "device",
    "integer",
    "loras",
    "number",
    "one_of",
    "optional",
    "sizes",
    "text",
]


MAX_LORAS = 16
"""How many LoRAs a picture may be drawn with."""
MAX_LORA_SCALE = 10.0
"""How far from nothing the scale of each may be, to either side."""


@dataclass(frozen=True, slots=True)
class Check:
    """Turns what YAML gave into the value of a key."""

    allowed: str
    """What is allowed, as an error says it: "an integer from 1 to 4"."""
    span: str
    """The same as documentation says it, in Markdown: "1 to 4"; empty where there is no limit."""
    convert: Callable[[object], object]
    """Returns the value, or raises ValueError."""


def integer(low: int, high: int) -> Check:
    """An integer from `low` to `high`."""

    def convert(value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError
        return value

    return Check(f"an integer from {low} to {high}", f"{low} to {high}", convert)


def number(low: float, high: float, *, off: bool = False) -> Check:
    """A number from `low` to `high`; integers become floats. With `off`, that word is a zero."""

    def convert(value: object) -> object:
        # YAML reads a bare `off` as false.
        if off and (value is False or value == "off"):
            return 0.0
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        # A NaN is in no range.
        if not is_number or not low <= cast(float, value) <= high:
            raise ValueError
        return float(cast(float, value))

    span = number_range(low, high)
    if off:
        return Check(f"off or a number from {span}", f"`off`, or {span}", convert)
    return Check(f"a number from {span}", span, convert)


def boolean() -> Check:
    """True or false."""

    def convert(value: object) -> object:
        if not isinstance(value, bool):
            raise ValueError
        return value

    return Check("true or false", "true or false", convert)


def one_of(*choices: str) -> Check:
    """One of several words."""

    def convert(value: object) -> object:
        # YAML reads a bare `off` as false.
        chosen = "off" if value is False else value
        if chosen not in choices:
            raise ValueError
        return chosen

    *others, last = [f"`{choice}`" for choice in choices]
    span = f"{', '.join(others)} or {last}"
    return Check(f"one of {', '.join(choices)}", span, convert)


def text() -> Check:
    """Text without NUL or half of a surrogate pair; white space around it is dropped."""

    def convert(value: object) -> object:
        if not isinstance(value, str) or re.search("[\x00\ud800-\udfff]", value):
            raise ValueError
        return value.strip()

    return Check("text", "", convert)


def device() -> Check:
    """The name of a torch device."""
    span = "`cpu`, `cuda`, `cuda:<number>`, `xpu` or `mps`"

    def convert(value: object) -> object:
        pattern = r"cpu|mps|(cuda|xpu)(:[0-9]{1,3})?"
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError
        return value

    return Check(span.replace("`", ""), span, convert)


def loras() -> Check:
    """Scales of LoRAs by name; a list of names has the scale 1."""

    def convert(value: object) -> object:
        if isinstance(value, (list, tuple)):
            if not all(isinstance(name, str) for name in value):
                raise ValueError
            value = dict.fromkeys(value, 1.0)
        if not isinstance(value, Mapping) or len(value) > MAX_LORAS:
            raise ValueError
        for name, scale in value.items():
            is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
            is_in_range = is_number and -MAX_LORA_SCALE <= scale <= MAX_LORA_SCALE
            if not isinstance(name, str) or not name or not is_in_range:
                raise ValueError
        return {name: float(scale) for name, scale in value.items()}

    span = number_range(-MAX_LORA_SCALE, MAX_LORA_SCALE)
    return Check(
        f"up to {MAX_LORAS} names with scales, {span}", f"up to {MAX_LORAS}, scales {span}", convert
    )


def sizes() -> Check:
    """A list of sizes; each becomes (height, width)."""

    def convert(value: object) -> object:
        entries = value if isinstance(value, (list, tuple)) else ()
        read = tuple(_size(entry) for entry in entries)
        if not 0 < len(read) <= 16 or None in read:
            raise ValueError
        return read

    allowed = "a list of 1 to 16 sizes such as 512x768, height x width"
    return Check(allowed, "1 to 16 of them", convert)


def _size(value: object) -> tuple[int, int] | None:
    if isinstance(value, tuple):
        return cast(tuple[int, int], value)  # checked before: this is a configuration copied
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", value) if isinstance(value, str) else None
    return None if match is None else (int(match[1]), int(match[2]))


def optional(check: Check) -> Check:
    """What `check` allows, or None."""
    return Check(
        check.allowed,
        check.span,
        lambda value: None if value is None else check.convert(value),
    )
