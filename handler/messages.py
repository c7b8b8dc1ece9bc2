"""Text for error messages: values and names from untrusted clients, safe to show.

Nothing here recurses into a value or formats one of unbounded size.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

__all__ = [
    "MAX_NAME_CHARS",
    "first_lines",
    "nearest",
    "number_range",
    "show",
    "shown_name",
    "summarise",
]

MAX_NAME_CHARS = 64
_SHOWN_CHARS = 60
# Nobody means a number of more than 256 bits; Python refuses to write very long ones in decimal.
_MAX_INTEGER_BITS = 256


def show(value: object) -> str:
    """A value as it may stand in a message: short and printable, whatever it is."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        head = repr(value[:_SHOWN_CHARS])
        return head if len(value) <= _SHOWN_CHARS else f"{head}… ({len(value)} characters)"
    if isinstance(value, int):
        is_short = value.bit_length() <= _MAX_INTEGER_BITS
        return str(value) if is_short else f"an integer of {value.bit_length()} bits"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    return f"a {type(value).__name__}"


def first_lines(error: BaseException, num_lines: int = 3, num_chars: int = 400) -> str:
    """What a library says of its error, as one line of bounded length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:num_lines]) or type(error).__name__
    return text if len(text) <= num_chars else f"{text[:num_chars]}…"


def shown_name(name: str) -> str:
    """A field's name as it may stand in a message."""
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name[:MAX_NAME_CHARS])
    return printable if len(name) <= MAX_NAME_CHARS else printable + "…"


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that `name` was probably meant to be."""
    matches = difflib.get_close_matches(name[:MAX_NAME_CHARS].lower(), sorted(known), n=1)
    return matches[0] if matches else None


def number_range(low: float, high: float) -> str:
    """``low to high``, without needless digits."""
    return f"{low:.17g} to {high:.17g}"


def summarise(problems: Mapping[str, str]) -> str:
    """One line for people who only see the message."""
    shown = [f"{name}: {problem}" for name, problem in list(problems.items())[:3]]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    return "; ".join(shown)
