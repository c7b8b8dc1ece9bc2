"""Server-sent events: those of an instance read, ours written."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any, Protocol

__all__ = ["DONE", "Chunks", "encode_event", "read_events"]

DONE = b"data: [DONE]\n\n"
"""What ends a stream of OpenAI's."""


class Chunks(Protocol):
    """The body of a reply as it comes in."""

    def iter_any(self) -> AsyncIterator[bytes]:
        """Yield what has come, as soon as something has."""
        ...


async def read_events(content: Chunks) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Yield name and data of each event that has both."""
    pending = bytearray()
    searched = 0
    async for chunk in content.iter_any():
        pending += chunk
        while (end := pending.find(b"\n\n", max(0, searched - 1))) >= 0:
            event = _parse(bytes(pending[:end]))
            del pending[: end + 2]
            searched = 0
            if event is not None:
                yield event
        searched = len(pending)


def _parse(block: bytes) -> tuple[str, dict[str, Any]] | None:
    name, data = "", b""
    for line in block.split(b"\n"):
        if line.startswith(b"event: "):
            name = line[7:].decode("ascii", "replace")
        elif line.startswith(b"data: "):
            data = line[6:]
    if not name or not data:
        return None
    content = json.loads(data)
    return (name, content) if isinstance(content, dict) else None


def encode_event(name: str, data: dict[str, Any]) -> bytes:
    """One event; its name is in the data as well, as OpenAI's are."""
    text = json.dumps({"type": name, **data}, separators=(",", ":"))
    return f"event: {name}\ndata: {text}\n\n".encode("ascii")
