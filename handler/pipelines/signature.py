"""The parameters of a pipeline's ``__call__`` and their defaults."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

__all__ = ["call_defaults", "defaults_of", "numbers_of", "unknown_arguments"]

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def call_defaults(pipeline: Any) -> dict[str, Any]:
    """The parameters of the pipeline's ``__call__`` and their defaults."""
    return defaults_of(type(pipeline))


def defaults_of(kind: type) -> dict[str, Any]:
    """The parameters of ``kind.__call__`` and their defaults."""
    return _call_parameters(kind)[0]


def unknown_arguments(pipeline: Any, kwargs: Mapping[str, Any]) -> list[str]:
    """The names in `kwargs` that the pipeline's ``__call__`` does not have."""
    kind: type = type(pipeline)
    defaults, takes_any = _call_parameters(kind)
    return [] if takes_any else sorted(kwargs.keys() - defaults.keys())


def numbers_of(kind: type) -> list[str]:
    """The parameters of ``kind.__call__`` that are numbers, or true or false, by their defaults."""
    defaults = defaults_of(kind).items()
    return sorted(name for name, default in defaults if isinstance(default, (int, float)))


@functools.cache
def _call_parameters(kind: type) -> tuple[dict[str, Any], bool]:
    """The parameters of ``kind.__call__`` with their defaults, and whether it takes any other.

    Where it takes ``**kwargs``, those of the class above, to which such wrappers pass them on.
    """
    defaults: dict[str, Any] = {}
    for owner in kind.__mro__:
        if "__call__" not in vars(owner):
            continue
        parameters = inspect.signature(vars(owner)["__call__"]).parameters.values()
        for parameter in parameters:
            if parameter.name != "self" and parameter.kind not in _VARIADIC:
                defaults.setdefault(parameter.name, parameter.default)
        # In diffusers' own pipelines it only takes arguments of long ago.
        is_last = owner.__module__.startswith("diffusers.")
        if is_last or not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return defaults, False
    return defaults, True
