"""The LoRAs that a request names, in the forms that these are sent in, and which there are."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping

from handler.config import MAX_LORAS
from handler.messages import nearest, number_range, show

__all__ = ["is_lora_name", "lora_problem", "read_loras", "scale_in"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_NUMBER = re.compile(r"[+-]?([0-9]{1,9}(\.[0-9]{0,20})?|\.[0-9]{1,20})")
_FORMS = 'send {"NAME": SCALE}, ["NAME"], [{"name": "NAME", "scale": SCALE}] or "NAME:SCALE, NAME"'
_NUM_LISTED = 50
# As text: each with its longest name, its scale and white space.
_MAX_TEXT_CHARS = MAX_LORAS * 128


def is_lora_name(name: object) -> bool:
    """Whether a LoRA may have this name: never that of a file anywhere else."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def scale_in(text: str) -> float | None:
    """The scale that `text` is, as plain digits; None where it is none."""
    return float(text) if _NUMBER.fullmatch(text.strip()) else None


def read_loras(value: object, *, low: float, high: float) -> dict[str, float]:
    """The scale of each LoRA in `value`, 1 where it says none.

    Raises:
        ValueError: it has none of the forms, names too many, or a scale is out of range.
    """
    found: dict[str, float] = {}
    entries = _entries(value)
    if len(entries) > MAX_LORAS:
        raise _too_many(len(entries))
    for name, scale in entries:
        if not is_lora_name(name):
            raise ValueError(
                f"{show(name)} is not the name of a LoRA: 1 to 64 of the characters"
                " A-Z a-z 0-9 . _ -; a LoRA is named, not sent, and no path or URL is opened"
            )
        assert isinstance(name, str)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise ValueError(f"the scale of {name} is {show(scale)}, not a number; {_FORMS}")
        if not low <= scale <= high:
            allowed = number_range(low, high)
            raise ValueError(f"the scale of {name} is {show(scale)}; allowed: {allowed}")
        if name in found:
            raise ValueError(f"{name} is given twice")
        found[name] = float(scale)
    return found


def lora_problem(names: Collection[str], there_are: Collection[str]) -> str | None:
    """What to say of those of `names` that there are not; None where there are all.

    `there_are` is listed only where one is missing: it may be a folder.
    """
    unknown = sorted(name for name in set(names) if name not in there_are)
    if not unknown:
        return None
    known = sorted(there_are)
    match = nearest(unknown[0], known) if known else None
    hint = f"did you mean {match}? " if match else ""
    shown = ", ".join(known[:_NUM_LISTED])
    more = f" and {len(known) - _NUM_LISTED} more" if len(known) > _NUM_LISTED else ""
    listed = f"there are {shown}{more}" if known else "there are none"
    return (
        f"{', '.join(map(show, unknown))}: no such LoRA; {hint}{listed}; a server has those packed"
        " with --lora FILE and those in its lora_dir"
    )


def _entries(value: object) -> list[tuple[object, object]]:
    """What is named, with its scale; nothing is done for each name where there are too many."""
    if isinstance(value, str):
        if len(value) > _MAX_TEXT_CHARS:
            raise ValueError(
                f"is {len(value)} characters long; allowed are {_MAX_TEXT_CHARS}, which name up to"
                f" {MAX_LORAS} LoRAs"
            )
        if value.strip()[:1] in ("{", "["):
            return _entries(_from_json(value))  # as forms must send what is no text
        return [_written(part) for part in value.split(",") if part.strip()]
    if isinstance(value, Mapping):
        if "name" in value and not _is_scale(value["name"]):
            return [_listed(value)]
        if len(value) > MAX_LORAS:
            raise _too_many(len(value))
        return [(name, 1.0 if scale is None else scale) for name, scale in value.items()]
    if isinstance(value, (list, tuple)):
        if len(value) > MAX_LORAS:
            raise _too_many(len(value))
        return [_listed(each) for each in value]
    raise ValueError(f"{show(value)} names no LoRAs; {_FORMS}")


def _too_many(number: int) -> ValueError:
    return ValueError(f"{number} LoRAs are named; allowed are {MAX_LORAS}")


def _listed(value: object) -> tuple[object, object]:
    if isinstance(value, str):
        return _written(value)
    if isinstance(value, Mapping) and "name" in value:
        unknown = [key for key in value if key not in ("name", "scale")]
        if unknown:
            raise ValueError(f"{show(unknown[0])} says nothing of a LoRA; {_FORMS}")
        return value["name"], value.get("scale", 1.0)
    raise ValueError(f"{show(value)} names no LoRA; {_FORMS}")


def _written(text: str) -> tuple[object, object]:
    """A name, or a name and its scale: ``style:0.8``."""
    name, colon, scale = text.strip().partition(":")
    if not colon:
        return name, 1.0
    number = scale_in(scale)
    if number is None and (not is_lora_name(name.strip()) or "/" in scale or "\\" in scale):
        return text.strip(), 1.0  # no name of a LoRA: a path or a URL
    return name.strip(), scale.strip() if number is None else number


def _from_json(text: str) -> object:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{show(text)} is not JSON; {_FORMS}") from error
    return value


def _is_scale(value: object) -> bool:
    return isinstance(value, (int, float))
