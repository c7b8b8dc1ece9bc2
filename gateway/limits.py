"""What one key may do at a time and a minute: counted here, refused by 429 and 403."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gateway.errors import Forbidden, ModelNotFound, RateLimited
from gateway.keys import Key

__all__ = ["Limiter", "check_model", "check_picture"]


class Limiter:
    """Counts the requests of every key; a minute's are a bucket that fills at an even pace."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open: Counter[str] = Counter()
        self._buckets: dict[str, tuple[float, float]] = {}

    @contextmanager
    def admit(self, key: Key | None, *, takes_place: bool = True) -> Iterator[None]:
        """Count a request of `key`, which `takes_place` as an open one inside the block.

        Raises:
            RateLimited: the key has too many open, or sent too many in the last minute.
        """
        if key is None:
            yield
            return
        is_full = key.concurrency is not None and self._open[key.name] >= key.concurrency
        if takes_place and is_full:
            raise RateLimited(
                f"{self._open[key.name]} requests of this key are open; allowed are"
                f" {key.concurrency} at a time",
                retry_after_s=1,
            )
        self._take_from_bucket(key)
        if not takes_place:
            yield
            return
        self._open[key.name] += 1
        try:
            yield
        finally:
            self._open[key.name] -= 1
            if not self._open[key.name]:
                del self._open[key.name]

    def _take_from_bucket(self, key: Key) -> None:
        if key.requests_per_minute is None:
            return
        size, now_s = float(key.requests_per_minute), self._clock()
        level, at_s = self._buckets.get(key.name, (size, now_s))
        level = min(size, level + (now_s - at_s) * size / 60)
        if level < 1:
            self._buckets[key.name] = (level, now_s)
            raise RateLimited(
                f"this key may send {key.requests_per_minute} requests a minute",
                retry_after_s=math.ceil((1 - level) * 60 / size),
            )
        self._buckets[key.name] = (level - 1, now_s)


def check_model(key: Key | None, model: str) -> None:
    """Raise ModelNotFound where `key` may not use `model`."""
    if key is not None and key.models is not None and model not in key.models:
        problem = f"this key may use {', '.join(key.models) or 'no model'}"
        raise ModelNotFound(f"the model {model} is not for this key; {problem}", {"model": problem})


def check_picture(key: Key | None, height_px: int, width_px: int, num_steps: int) -> None:
    """Raise Forbidden where a picture is larger than `key` may ask for, or has more steps."""
    if key is None:
        return
    problems = {}
    if key.max_pixels is not None and height_px * width_px > key.max_pixels:
        problems["size"] = (
            f"{width_px}x{height_px} is {height_px * width_px} pixels; this key may have"
            f" {key.max_pixels}"
        )
    if key.max_steps is not None and num_steps > key.max_steps:
        problems["num_inference_steps"] = f"{num_steps} steps; this key may have {key.max_steps}"
    if problems:
        raise Forbidden("; ".join(f"{k}: {v}" for k, v in problems.items()), problems)
