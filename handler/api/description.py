"""What a loaded pipeline has, for a client that offers it: a form with lists to choose from."""

from __future__ import annotations

from handler.api.samplers import offered
from handler.api.schema import PICTURE_FIELDS, PictureField
from handler.api.tasks import IMAGE_TO_IMAGE, INPAINTING
from handler.api.traits import PipelineTraits

__all__ = ["describe"]

_CONTROL = "+control"


def describe(traits: PipelineTraits) -> dict[str, object]:
    """Return plain data: the fields that some task has, and the names that may be sent in them."""
    return {
        "fields": [each.name for each in PICTURE_FIELDS.values() if _has(each, traits)],
        "tasks": list(traits.tasks),
        "schedulers": offered(traits.schedulers),
        "loras": sorted(traits.loras),
        "controls": list(traits.controls),
        "size_multiple_px": traits.size_multiple_px,
    }


def _has(field: PictureField, traits: PipelineTraits) -> bool:
    tasks = {name.removesuffix(_CONTROL) for name in traits.tasks}
    # What several pipelines call the same, or none has as an argument.
    found = {
        "image": bool({IMAGE_TO_IMAGE, INPAINTING} & tasks),
        "mask_image": INPAINTING in tasks,
        "control_image": any(name.endswith(_CONTROL) for name in traits.tasks),
        "control": len(traits.controls) > 1,
        "task": len(tasks) > 1,
        "loras": bool(len(traits.loras)),
        "prompt_weighting": traits.reads_weights,
    }
    if field.name in found:
        return found[field.name]
    arguments = traits.parameters.union(*traits.tasks.values())
    return (
        field.argument is None
        or field.argument in arguments
        or not field.is_refused_without_argument
    )
