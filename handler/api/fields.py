"""Reads the values that a client sent under their names, and collects every problem.

A form (or gRPC) can only send text, so there ``"50"`` is an integer; JSON has types, so there it
is not. Clients are untrusted: nothing here recurses into a value or formats one of unbounded size.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

from handler.api.images import BadPicture, SentPicture, read_picture
from handler.api.lora_names import read_loras
from handler.api.schema import Field, Kind, Value, bounds_of
from handler.config import HandlerConfig
from handler.messages import nearest, number_range, show, shown_name

__all__ = ["ID_RULE", "FieldReader", "is_id"]

MAX_UNKNOWN_NAMED = 16
_FORM_INTEGER = re.compile(r"[+-]?[0-9]{1,20}", re.ASCII)
_FORM_NUMBER = re.compile(r"[+-]?([0-9]{1,40}(\.[0-9]{0,40})?|\.[0-9]{1,40})([eE][+-]?[0-9]{1,4})?")
_FORM_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
ID_RULE = "1 to 128 of the characters A-Z a-z 0-9 . _ : -"


def is_id(value: object) -> bool:
    """Whether `value` may name a request."""
    return isinstance(value, str) and _ID.fullmatch(value) is not None


class FieldReader:
    """Takes fields one by one out of a mapping; what is wrong with them is in `problems`.

    A JSON null counts as a field that is absent. `allow_text` lets text stand for a number or a
    boolean, as it must in a form.
    """

    def __init__(self, fields: Mapping[str, object], *, allow_text: bool) -> None:
        self._fields = fields
        self._allow_text = allow_text
        self._taken: set[str] = set()
        self.problems: dict[str, str] = {}

    def report(self, name: str, problem: str) -> None:
        """Note a problem, unless the field has one already."""
        self.problems.setdefault(name, problem)

    def take(self, name: str, aliases: Sequence[str] = ()) -> object | None:
        """The value sent as `name` or one of its aliases; None when absent or sent twice."""
        names = [n for n in (name, *aliases) if n in self._fields]
        self._taken.update(names)
        sent = [n for n in names if self._fields[n] is not None]
        if len(sent) > 1:
            self.report(name, f"given more than once, as {' and '.join(sent)}: send one of them")
            return None
        return self._fields[sent[0]] if sent else None

    def rest(self) -> dict[str, object]:
        """The fields that nobody took."""
        return {name: value for name, value in self._fields.items() if name not in self._taken}

    def refuse_rest(self, known: Collection[str]) -> None:
        """Report every field that nobody took, with the nearest of the `known` names."""
        unknown = list(self.rest())
        for name in unknown[:MAX_UNKNOWN_NAMED]:
            match = nearest(name, known)
            hint = f"did you mean {match}?" if match else f"known are {', '.join(sorted(known))}"
            self.report(shown_name(name), f"unknown field; {hint}")
        if len(unknown) > MAX_UNKNOWN_NAMED:
            self.report("…", f"{len(unknown) - MAX_UNKNOWN_NAMED} more unknown fields")

    def read(self, field: Field, config: HandlerConfig) -> Value:
        """The checked value of a field of the table; None when absent or wrong."""
        name, aliases = field.name, field.aliases
        if field.kind is Kind.BOOLEAN:
            return self.boolean(name, aliases)
        if field.kind is Kind.CHOICE:
            return self.choice(name, aliases, choices=field.choices)
        if field.kind is Kind.ID:
            return self.id(name, aliases)
        low, high = bounds_of(field, config)
        if field.kind is Kind.LORAS:
            return self.loras(name, aliases, low=low, high=high)
        if field.kind is Kind.NUMBER:
            return self.number(name, aliases, low=low, high=high, words=field.words)
        if field.kind is Kind.INTEGER:
            return self.integer(name, aliases, low=int(low), high=int(high))
        return self.text(name, aliases, min_chars=int(low), max_chars=int(high))

    def picture(
        self, field: Field, config: HandlerConfig, known: dict[int, SentPicture]
    ) -> SentPicture | None:
        """The picture sent for a field, checked by its header; None when absent or wrong.

        `known` are those that other prompts of the body have read, by the identity of what was
        sent: megabytes of base64 that all prompts share are read once. Mutates `known`.
        """
        value = self.take(field.name, field.aliases)
        if value is None:
            return None
        max_bytes, max_pixels = int(bounds_of(field, config)[1]), config.max_picture_pixels
        try:
            if id(value) not in known:
                known[id(value)] = read_picture(value, max_bytes=max_bytes, max_pixels=max_pixels)
            return known[id(value)]
        except BadPicture as problem:
            self.report(field.name, str(problem))
            return None

    def loras(
        self, name: str, aliases: Sequence[str], *, low: float, high: float
    ) -> dict[str, float] | None:
        """The scale of each LoRA by its name, in any of the forms that these are sent in."""
        value = self.take(name, aliases)
        if value is None:
            return None
        try:
            return read_loras(value, low=low, high=high)
        except ValueError as error:
            self.report(name, str(error))
            return None

    def text(
        self, name: str, aliases: Sequence[str] = (), *, min_chars: int = 0, max_chars: int
    ) -> str | None:
        """Text without surrounding white space; no NUL and no half of a surrogate pair."""
        value = self.take(name, aliases)
        if value is None:
            return None
        if not isinstance(value, str):
            self.report(name, f"must be text, not {show(value)}")
            return None
        value = value.strip()
        unusable = re.search("[\x00\ud800-\udfff]", value)
        if unusable:
            self.report(
                name,
                f"has the unusable character {unusable.group()!a} at {unusable.start()}",
            )
        elif len(value) < min_chars:
            self.report(name, "is empty" if not value else f"is shorter than {min_chars}")
        elif len(value) > max_chars:
            self.report(name, f"is {len(value)} characters long; allowed are {max_chars}")
        else:
            return value
        return None

    def integer(self, name: str, aliases: Sequence[str] = (), *, low: int, high: int) -> int | None:
        """An integer from `low` to `high`."""
        value = self.take(name, aliases)
        if value is None:
            return None
        if self._allow_text and isinstance(value, str) and _FORM_INTEGER.fullmatch(value.strip()):
            value = int(value.strip())
        if isinstance(value, bool) or not isinstance(value, int):
            quoted = isinstance(value, str) and _FORM_INTEGER.fullmatch(value)
            hint = "; write it without quotes" if quoted else ""
            self.report(name, f"{show(value)} is not an integer{hint}; allowed: {low} to {high}")
        elif not low <= value <= high:
            self.report(name, f"{show(value)} is out of range; allowed: {low} to {high}")
        else:
            return value
        return None

    def number(
        self,
        name: str,
        aliases: Sequence[str] = (),
        *,
        low: float,
        high: float,
        words: Mapping[str, float] = MappingProxyType({}),
    ) -> float | None:
        """A finite number, or one of the `words` for one; integers are numbers too."""
        value = self.take(name, aliases)
        if value is None:
            return None
        if isinstance(value, str) and value.strip().lower() in words:
            return words[value.strip().lower()]
        allowed = ", ".join([number_range(low, high), *map(show, words)])
        if self._allow_text and isinstance(value, str) and _FORM_NUMBER.fullmatch(value.strip()):
            value = float(value.strip())
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            quoted = isinstance(value, str) and _FORM_NUMBER.fullmatch(value)
            hint = "; write it without quotes" if quoted else ""
            self.report(name, f"{show(value)} is not a number{hint}; allowed: {allowed}")
        elif not low <= value <= high:  # as it is for a NaN
            self.report(name, f"{show(value)} is out of range; allowed: {allowed}")
        else:
            return float(value)
        return None

    def boolean(self, name: str, aliases: Sequence[str] = ()) -> bool | None:
        """True or false."""
        value = self.take(name, aliases)
        if self._allow_text and isinstance(value, str):
            value = _FORM_BOOLEANS.get(value.strip().lower(), value)
        if value is None or isinstance(value, bool):
            return value
        quoted = isinstance(value, str) and value.strip().lower() in _FORM_BOOLEANS
        hint = "; write it without quotes" if quoted else ""
        self.report(name, f"{show(value)} is neither true nor false{hint}")
        return None

    def choice(
        self, name: str, aliases: Sequence[str] = (), *, choices: Mapping[str, str]
    ) -> str | None:
        """What `choices` says for the text that was sent, whatever its case."""
        value = self.take(name, aliases)
        if value is None:
            return None
        chosen = choices.get(value.strip().lower()) if isinstance(value, str) else None
        if chosen is None:
            match = nearest(value, choices) if isinstance(value, str) else None
            hint = f"did you mean {match}? " if match else ""
            self.report(name, f"{show(value)} is not allowed; {hint}one of {', '.join(choices)}")
        return chosen

    def id(self, name: str, aliases: Sequence[str] = ()) -> str | None:
        """The id of a request."""
        value = self.take(name, aliases)
        if value is None or (isinstance(value, str) and is_id(value)):
            return value
        self.report(name, f"{show(value)} is not an id; allowed are {ID_RULE}")
        return None
