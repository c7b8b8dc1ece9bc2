"""Requests in other people's words: their names and values become ours before they are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from handler.api.foreign_names import (
    FOREIGN_NAMES,
    HOW_PICTURES_ARE_SENT,
    SEVERAL_PROMPTS,
    is_picture_input,
)
from handler.api.images import looks_like_base64_picture
from handler.api.samplers import parse_name
from handler.api.schema import KNOWN_NAMES, PICTURE_FIELDS, SENT_PICTURES
from handler.messages import show, shown_name

__all__ = ["holds_picture", "names_for", "translate"]


def names_for(target: str) -> tuple[str, ...]:
    """Every name under which a field of a picture may have been sent, its own first."""
    own = PICTURE_FIELDS[target].names if target in PICTURE_FIELDS else (target,)
    if target == "image":
        own = (*own, _INPUTS)
    return (*own, *(each.name for each in FOREIGN_NAMES.values() if target in each.targets))


def holds_picture(name: str) -> bool:
    """Whether a field of this name is a picture, under our name or another API's."""
    if name in FOREIGN_NAMES:
        return bool(set(SENT_PICTURES) & set(FOREIGN_NAMES[name].targets))
    return _OWN_NAMES.get(name) in SENT_PICTURES


def translate(fields: Mapping[str, object]) -> tuple[dict[str, object], dict[str, str]]:
    """The fields of one request under our names, and what is wrong with the foreign ones.

    A field that is sent under a foreign name and its own is a problem of the field.
    """
    fields = _schedules_as_sigmas(fields)
    translated: dict[str, object] = {}
    problems: dict[str, str] = {}
    foreign: dict[str, object] = {}
    for name, value in _with_picture_of_inputs(fields).items():
        if name in FOREIGN_NAMES:
            foreign[name] = value
            continue
        if name not in KNOWN_NAMES and value is not None and is_picture_input(name):
            problems[shown_name(name)] = HOW_PICTURES_ARE_SENT
            continue
        target = _OWN_NAMES.get(name, name)
        try:
            translated[name] = _VALUES.get(target, _unchanged)(value)
        except ValueError as error:
            problems[target] = str(error)
    sent_as: dict[str, str] = {}
    # What only counts beside another field comes after it.
    for name, value in sorted(foreign.items(), key=lambda item: _counts_with(item[0]) is not None):
        needed = _counts_with(name)
        if needed is not None and all(
            translated.get(each) is None for each in PICTURE_FIELDS[needed].names
        ):
            continue
        try:
            found = {} if value is None else FOREIGN_NAMES[name].translate(value)
            for target, meant in found.items():
                own = [n for n in PICTURE_FIELDS[target].names if translated.get(n) is not None]
                earlier = sent_as.setdefault(target, own[0] if own else name)
                # Names of samplers hold it, so that many say it twice.
                is_said = target == "sigmas" and translated.get(target) == meant
                if earlier != name and not is_said:
                    problems[target] = (
                        f"given more than once, as {earlier} and {name}: send one of them"
                    )
                else:
                    translated[target] = _VALUES.get(target, _unchanged)(meant)
        except ValueError as error:
            problems[name] = str(error)
    return translated, problems


def _with_picture_of_inputs(fields: Mapping[str, object]) -> Mapping[str, object]:
    """Hugging Face's image to image has the picture in ``inputs``, the prompt in ``parameters``."""
    sent = fields.get(_INPUTS)
    if not isinstance(sent, str):
        return fields
    # Two short texts are the prompt given twice.
    has_prompt = fields.get("prompt") is not None and len(sent) >= _MIN_PICTURE_CHARS
    if not (has_prompt or looks_like_base64_picture(sent)):
        return fields
    rest = {name: value for name, value in fields.items() if name != _INPUTS}
    if any(rest.get(name) is not None for name in PICTURE_FIELDS["image"].names):
        return fields
    return {**rest, "image": sent}


def _counts_with(name: str) -> str | None:
    return FOREIGN_NAMES[name].counts_with


def _unchanged(value: object) -> object:
    return value


def _one_text(several: str) -> Callable[[object], object]:
    """A list of one text is that text; of any other list the problem says `several`."""

    def convert(value: object) -> object:
        if not isinstance(value, list | tuple):
            return value
        if len(value) != 1:
            raise ValueError(f"is {show(value)}; {several}")
        return value[0] if isinstance(value[0], str) else value

    return convert


def _one_of_list(value: object) -> object:
    """A list of one picture is that picture."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def _seed(value: object) -> object:
    """A seed as text of digits is that integer; -1 is none, so that one is drawn."""
    if isinstance(value, str) and re.fullmatch(r"\s*(-1|[0-9]{1,20})\s*", value, re.ASCII):
        value = int(value)
    return None if value == -1 and type(value) is int else value


def _not_automatic(value: object) -> object:
    """What AUTOMATIC1111 calls automatic is what counts where nothing is sent."""
    if isinstance(value, str) and value.strip().lower() == "automatic":
        return None
    return value


def _schedules_as_sigmas(fields: Mapping[str, object]) -> dict[str, object]:
    """The fields with a schedule of sigmas that is sent as `scheduler` under its own name.

    AUTOMATIC1111 and ComfyUI have a field of that name for it, beside one for the sampler.
    """
    value = fields.get("scheduler")
    if not isinstance(value, str):
        return dict(fields)
    named = parse_name(value)
    if named.solver or named.sigmas is None:
        return dict(fields)
    moved = {name: each for name, each in fields.items() if name != "scheduler"}
    if moved.get("sigmas") not in (None, named.sigmas):
        return dict(fields)  # two different ones: each is read, and refused, for what it is
    return {**moved, "sigmas": named.sigmas}


# Values that others send in our own fields.
_VALUES: Mapping[str, Callable[[object], object]] = {
    "prompt": _one_text(SEVERAL_PROMPTS),
    "negative_prompt": _one_text("a prompt has one: join them with commas"),
    "seed": _seed,
    "scheduler": _not_automatic,
    "sigmas": _not_automatic,
    **dict.fromkeys(SENT_PICTURES, _one_of_list),
}
# Hugging Face's name for what a model takes: a prompt, or a picture.
_INPUTS = "inputs"
_MIN_PICTURE_CHARS = 64
_OWN_NAMES = {name: each.name for each in PICTURE_FIELDS.values() for name in each.names}
