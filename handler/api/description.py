"""What a loaded pipeline has, for a client that offers it: a form with lists to choose from."""

from __future__ import annotations

from handler.api.samplers import offered
from handler.api.schema import PICTURE_FIELDS, PictureField
from handler.api.shortcuts import SHORTCUTS
from handler.api.tasks import IMAGE_TO_IMAGE, INPAINTING
from handler.api.traits import PipelineTraits

__all__ = ["describe"]

_CONTROL = "+control"


def describe(traits: PipelineTraits) -> dict[str, object]:
    """Return plain data: the fields that some task has, and the names that may be sent in them."""
    loras = sorted(traits.loras)
    tasks = {name.removesuffix(_CONTROL) for name in traits.tasks}
    arguments = traits.parameters.union(*traits.tasks.values())
    # What several pipelines call the same, or none has as an argument.
    found = {
        "image": bool({IMAGE_TO_IMAGE, INPAINTING} & tasks),
        "mask_image": INPAINTING in tasks,
        "control_image": any(name.endswith(_CONTROL) for name in traits.tasks),
        "control": len(traits.controls) > 1,
        "task": len(tasks) > 1,
        "loras": bool(loras),
        "prompt_weighting": traits.reads_weights,
        **{name: any(name in has for has in traits.shortcuts.values()) for name in SHORTCUTS},
    }
    return {
        "fields": [
            each.name
            for each in PICTURE_FIELDS.values()
            if found.get(each.name, _has_argument(each, arguments))
        ],
        "tasks": list(traits.tasks),
        "schedulers": offered(traits.schedulers),
        "loras": loras,
        "controls": list(traits.controls),
        "size_multiple_px": traits.size_multiple_px,
    }


def _has_argument(field: PictureField, arguments: frozenset[str]) -> bool:
    return (
        field.argument is None
        or field.argument in arguments
        or not field.is_refused_without_argument
    )
