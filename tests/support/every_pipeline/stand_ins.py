"""What stands in for absent optional packages, and for pictures of a million pixels.

A pipeline that cleans its prompt with ftfy calls the module by name, and Cosmos wants a safety
checker of a package of its own. Pipelines that edit pictures scale all of them to a million pixels,
which takes a minute each. None of these is what the sweep is about.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

__all__ = ["NothingUnsafe", "stand_ins"]

_SMALL_AREA = 64 * 64


class NothingUnsafe:
    """A safety checker for Cosmos that finds everything safe."""

    def to(self, *args: Any, **kwargs: Any) -> NothingUnsafe:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


@contextmanager
def stand_ins(kind: type[Any]) -> Iterator[None]:
    """While `kind` is judged: an ftfy that changes nothing where none is, and small pictures."""
    names = vars(sys.modules[kind.__module__])
    before = dict(names)
    if importlib.util.find_spec("ftfy") is None and "is_ftfy_available" in names:
        names.setdefault("ftfy", SimpleNamespace(fix_text=lambda text: text))
    if "calculate_dimensions" in names:
        real = names["calculate_dimensions"]
        names["calculate_dimensions"] = lambda area, ratio: real(min(area, _SMALL_AREA), ratio)
    try:
        yield
    finally:
        names.clear()
        names.update(before)
