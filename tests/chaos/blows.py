"""What is done to a site, how often, and in which order."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from tests.chaos.site import Site

__all__ = ["AN_HOUR", "BLOWS", "FIVE_MINUTES", "in_order", "parse_parts"]

BLOWS: Mapping[str, Callable[[Site], object]] = {
    "worker": Site.kill_worker,
    "jvm": Site.kill_jvm,
    "gateway": Site.kill_gateway,
    "stop": Site.stop_instance,
    "disk": Site.fill_disk,
    "archive": Site.replace_archive,
    "restart": Site.restart,
}
AN_HOUR = {
    "worker": 50,
    "jvm": 20,
    "gateway": 10,
    "stop": 10,
    "disk": 1,
    "archive": 1,
    "restart": 5,
}
FIVE_MINUTES = {"worker": 3, "jvm": 2, "gateway": 2, "stop": 1, "disk": 1, "archive": 1}


def in_order(parts: Mapping[str, int], seed: int = 0) -> list[str]:
    """Return every blow as often as `parts` says, mixed, the same with every run."""
    order = [name for name, count in parts.items() for _ in range(count)]
    random.Random(seed).shuffle(order)
    return order


def parse_parts(words: list[str]) -> dict[str, int]:
    """Read ``worker=3 jvm=1``; a name alone is once. Raises: ValueError."""
    parts = {}
    for word in words:
        name, _, count = word.partition("=")
        if name not in BLOWS:
            raise ValueError(f"{name!r} is not one of {', '.join(BLOWS)}")
        parts[name] = int(count or 1)
    return parts
