"""Every pipeline class of the installed diffusers, found by walking `diffusers.pipelines`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import pkgutil
import warnings

import diffusers.pipelines
from diffusers import DiffusionPipeline

__all__ = ["pipeline_classes"]


@functools.cache
def pipeline_classes() -> dict[str, type[DiffusionPipeline]]:
    """The pipelines that can be called, by name, in alphabetical order.

    Modules that cannot be imported here, for want of a package, have no pipelines of their own:
    those are defined beside them.
    """
    found: dict[str, type[DiffusionPipeline]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module_info in pkgutil.walk_packages(
            diffusers.pipelines.__path__, "diffusers.pipelines."
        ):
            with contextlib.suppress(Exception):
                _add_classes(found, module_info.name)
    return dict(sorted(found.items()))


def _add_classes(found: dict[str, type[DiffusionPipeline]], module_name: str) -> None:
    for value in vars(importlib.import_module(module_name)).values():
        if (
            inspect.isclass(value)
            and issubclass(value, DiffusionPipeline)
            and value.__module__.startswith("diffusers.pipelines.")
            and any("__call__" in vars(kind) for kind in value.__mro__)
        ):
            known = found.setdefault(value.__name__, value)
            assert known is value, f"two pipeline classes are named {value.__name__}"
