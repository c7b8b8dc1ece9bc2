"""The classes that a model_index.json names: of the pipeline, and of its components."""

from __future__ import annotations

import importlib.util
import inspect
import re
from typing import Any

from handler.errors import ArchiveError
from handler.library_logs import quiet_libraries
from handler.loading.model_index import ModelIndex

__all__ = ["absent_components", "component_class", "pipeline_class"]


# What no pipeline draws without; of text encoders and their tokenizers, some draw with fewer.
_NEEDED = re.compile("(prior_)?(unet|transformer|vae|movq|vqgan|prior|decoder|scheduler)")


def pipeline_class(index: ModelIndex) -> Any:
    """Return the class of `index`, checked to have all the components that it wants.

    Raises: ArchiveError.
    """
    import diffusers

    name = index.class_name
    found = getattr(diffusers, name, None)
    if isinstance(found, type) and _is_stand_in(found):
        raise ArchiveError(f"{name} needs {_backends(found)}, which is not installed")
    if (
        not isinstance(found, type)
        or not issubclass(found, diffusers.DiffusionPipeline)
        or found is diffusers.DiffusionPipeline
    ):
        raise ArchiveError(
            f"diffusers {diffusers.__version__} has no pipeline {name}{_written_by(index)}"
        )
    cls: Any = found
    wanted = {
        each.name
        for each in _parameters(cls)
        if each.default is each.empty and each.kind is not each.VAR_KEYWORD
    }
    without = {
        name for name in wanted if _NEEDED.fullmatch(name) and _is_null(index.entries.get(name))
    }
    absent = (wanted - index.entries.keys()) | without
    if missing := sorted(absent - {*cls._optional_components}):
        raise ArchiveError(f"{name} needs components that the pipeline lacks: {', '.join(missing)}")
    return cls


def absent_components(cls: Any, index: ModelIndex) -> tuple[str, ...]:
    """Return the constructor's arguments that `index` says are left out, by [null, null].

    diffusers wants each of them passed as None, unless the class calls it optional.
    """
    return tuple(each.name for each in _parameters(cls) if _is_null(index.entries.get(each.name)))


def component_class(name: str, index: ModelIndex) -> type:
    """Return the class of the component `name`, under its present name if it was renamed.

    Raises: ArchiveError, where the installed libraries have none, or one that is no component.
    """
    import diffusers
    import transformers
    from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj

    library, class_name = index.components[name]
    try:
        with quiet_libraries():
            found = simple_get_class_obj(library, class_name)
    except (AttributeError, ImportError, ValueError):
        found = None
    if not isinstance(found, type):
        installed = transformers if library == "transformers" else diffusers
        raise ArchiveError(
            f"{name}: {installed.__name__} {installed.__version__} has no {class_name} in "
            f"{library}{_written_by(index)}"
        )
    if _is_stand_in(found):
        raise ArchiveError(f"{name}: {class_name} needs {_backends(found)}, which is not installed")
    bases = (
        diffusers.ModelMixin,
        diffusers.SchedulerMixin,
        diffusers.guiders.BaseGuidance,
        transformers.PreTrainedModel,
        transformers.PreTrainedTokenizerBase,
        transformers.FeatureExtractionMixin,
        transformers.ImageProcessingMixin,
        transformers.ProcessorMixin,
    )
    if not issubclass(found, bases):
        raise ArchiveError(f"{name}: {library}.{class_name} is not a model, scheduler or tokenizer")
    return found


def _is_null(entry: object) -> bool:
    return isinstance(entry, list) and bool(entry) and entry[0] is None


def _parameters(cls: Any) -> list[inspect.Parameter]:
    return [*inspect.signature(cls).parameters.values()]


def _is_stand_in(found: type) -> bool:
    """Say whether `found` only says which package is missing, as diffusers' and others' dummies."""
    return ".dummy_" in found.__module__ or bool(vars(found).get("_backends"))


def _backends(found: type) -> str:
    """Name the missing packages that a stand-in wants."""
    wanted = getattr(found, "_backends", ())
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    return " and ".join(missing or wanted) or "another package"


def _written_by(index: ModelIndex) -> str:
    """Say which diffusers wrote `index`, where it tells that it was another one."""
    import diffusers

    version = index.entries.get("_diffusers_version")
    if not isinstance(version, str) or version == diffusers.__version__:
        return ""
    return f"; the pipeline was saved by diffusers {version}: save it again with the installed one"
