"""Parses JSON that others wrote."""

from __future__ import annotations

import json
from typing import Any

from handler.errors import ArchiveError

__all__ = ["parse_json"]


def parse_json(text: str | bytes, label: str, *, is_strict: bool = False) -> Any:
    """Return what the JSON `text` says.

    Where `is_strict`, what two readers could understand differently is refused: keys that are
    listed twice, and bytes that are not UTF-8. Raises: ArchiveError, which begins with `label`.
    """
    try:
        if is_strict and isinstance(text, bytes):
            text = text.decode("utf-8")
        hook = _refuse_doubles if is_strict else None
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=hook)
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"{label} is not JSON: {error}") from error


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a number there")


def _refuse_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is listed twice")
    return found
