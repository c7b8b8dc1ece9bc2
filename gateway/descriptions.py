"""What a model has, as its worker says: the fields that it takes, and the names to choose from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp

from gateway.addresses import Address
from gateway.asking import ask_worker

__all__ = ["Description", "ask_for_description"]

_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Description:
    """Of the model of one instance."""

    fields: frozenset[str]
    """The names of those of handler.api.schema that it has."""
    suggestions: Mapping[str, tuple[str, ...]]
    """The names that may be sent in a field."""


async def ask_for_description(
    session: aiohttp.ClientSession, address: Address
) -> Description | None:
    """Ask a worker; None where it does not say, as earlier handlers and other people's do not."""
    try:
        status, body = await ask_worker(session, address, {"describe": True}, _TIMEOUT_S)
        content = json.loads(body) if status == 200 else None
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
        return None
    if not isinstance(content, Mapping):
        return None
    fields = _names(content, "fields")
    suggested = {"scheduler": "schedulers", "loras": "loras", "control": "controls"}
    suggestions = {name: _names(content, source) for name, source in suggested.items()}
    return Description(frozenset(fields), suggestions) if fields else None


def _names(content: Mapping[str, object], name: str) -> tuple[str, ...]:
    found = content.get(name)
    return tuple(each for each in found if isinstance(each, str)) if isinstance(found, list) else ()
