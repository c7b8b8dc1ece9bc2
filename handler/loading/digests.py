"""The hashes of files that a manifest lists: BLAKE3, or SHA-256 in archives of an older form."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from blake3 import blake3

from handler.errors import ArchiveError

__all__ = ["Digest", "Hasher", "listed_digest"]


class Hasher(Protocol):
    """Takes bytes, and gives their hash in the end."""

    def update(self, data: bytes | memoryview, /) -> object:
        """Take the next bytes."""
        ...

    def hexdigest(self) -> str:
        """Return the hash of all bytes so far."""
        ...


# The quicker one first: it is the one that is compared where both are listed.
_HASHERS: Mapping[str, tuple[str, Callable[[], Hasher]]] = {
    "blake3": ("BLAKE3", blake3),
    "sha256": ("SHA-256", hashlib.sha256),
}


@dataclass(frozen=True, slots=True)
class Digest:
    """What the hash of a file must be; `name` is the hash's own, as people write it."""

    name: str
    value: object
    start: Callable[[], Hasher]


def listed_digest(name: str, entry: Mapping[str, object]) -> Digest:
    """Return the hash in a manifest's `entry` of the file `name`.

    Raises: ArchiveError, where it has none that is known.
    """
    for key, (title, start) in _HASHERS.items():
        if key in entry:
            return Digest(title, entry[key], start)
    raise ArchiveError(f"{name}: the manifest lists none of its hashes {', '.join(_HASHERS)}")
