"""Which task a request is, from the pictures that it has; and what does not go together."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from handler.api.fields import FieldReader
from handler.api.images import SentPicture
from handler.api.schema import SENT_PICTURES, Value
from handler.api.tasks import IMAGE_TO_IMAGE, INPAINTING, TEXT_TO_IMAGE, engine_task
from handler.api.traits import PipelineTraits
from handler.messages import nearest, show

__all__ = ["check_together", "choose_control", "choose_task", "served_tasks"]

_PICTURES_OF: Mapping[str, tuple[str, ...]] = {
    TEXT_TO_IMAGE: (),
    IMAGE_TO_IMAGE: ("image",),
    INPAINTING: ("image", "mask_image"),
}


def served_tasks(traits: PipelineTraits) -> str:
    """The tasks that an archive serves, in words."""
    return ", ".join(task.replace("+control", " with control_image") for task in traits.tasks)


def choose_task(
    reader: FieldReader, asked: Value, present: Collection[str], traits: PipelineTraits
) -> str | None:
    """The name of the task of a request that has the pictures in `present`.

    `asked` is the task that it names itself. What is wrong is reported by field; then it is None.
    """
    before = len(reader.problems)
    for name in SENT_PICTURES:
        if name in traits.required and name not in present:
            reader.report(name, f"is missing: this archive serves {served_tasks(traits)}")
    if "mask_image" in present and "image" not in present:
        reader.report("mask_image", "needs image, the picture that it masks")
    if len(reader.problems) > before:
        return None
    task = TEXT_TO_IMAGE
    if "image" in present:
        task = INPAINTING if "mask_image" in present else IMAGE_TO_IMAGE
    if asked is not None and asked != task:
        _report_mismatch(reader, str(asked), present)
    elif engine_task(task, control="control_image" in present) in traits.tasks:
        return task
    else:
        _report_not_served(reader, task, present, traits)
    return None


def check_together(
    reader: FieldReader,
    values: Mapping[str, Value],
    pictures: Mapping[str, SentPicture],
    num_steps: int,
) -> None:
    """Report what does not go together among the fields that go with pictures."""
    strength = values.get("strength")
    if isinstance(strength, float) and int(num_steps * strength) < 1:
        reader.report(
            "strength",
            f"{strength:g} of {num_steps} steps is less than one step; ask for more of either",
        )
    start, end = (values.get(f"control_guidance_{each}") for each in ("start", "end"))
    start, end = (0.0 if start is None else start), (1.0 if end is None else end)
    if isinstance(start, float) and isinstance(end, float) and start >= end:
        name = "control_guidance_start" if start > 0 else "control_guidance_end"
        reader.report(name, f"the start, {start:g}, must be below the end, {end:g}")
    image, mask = pictures.get("image"), pictures.get("mask_image")
    if image is not None and mask is not None and not _have_one_ratio(image, mask):
        reader.report(
            "mask_image",
            f"is {mask.width_px}x{mask.height_px} (width x height) and image is"
            f" {image.width_px}x{image.height_px}; they must have the same ratio",
        )


def choose_control(
    reader: FieldReader, asked: Value, present: Collection[str], traits: PipelineTraits
) -> str | None:
    """The name of the ControlNet that follows the control picture; None where it has no name."""
    if "control_image" not in present:
        if asked is not None:
            reader.report("control", "needs control_image, the picture that it follows")
        return None
    choices = ", ".join(traits.controls)
    if asked is None:
        if len(traits.controls) > 1:
            reader.report("control", f"is missing; one of {choices}")
        return traits.controls[0] if len(traits.controls) == 1 else None
    if asked in traits.controls:
        return str(asked)
    match = nearest(str(asked), traits.controls)
    hint = f"did you mean {match}? " if match else ""
    allowed = (
        f"one of {choices}" if choices else "this archive has one without a name: leave it out"
    )
    reader.report("control", f"{show(asked)} is not packed; {hint}{allowed}")
    return None


def _report_mismatch(reader: FieldReader, asked: str, present: Collection[str]) -> None:
    needed = _PICTURES_OF[asked]
    for name in _PICTURES_OF[INPAINTING]:
        if name in present and name not in needed:
            reader.report(name, f"does not go with the task {asked}; leave one of them out")
        elif name in needed and name not in present:
            reader.report(name, f"is missing; the task {asked} needs it")


def _report_not_served(
    reader: FieldReader, task: str, present: Collection[str], traits: PipelineTraits
) -> None:
    control = "control_image" in present
    wanted = engine_task(task, control=control).replace("+control", " with control_image")
    problem = f"this archive does not serve {wanted}; it serves {served_tasks(traits)}"
    if control and task in traits.tasks:
        blamed = ["control_image"]
    elif engine_task(IMAGE_TO_IMAGE, control=control) in traits.tasks and "mask_image" in present:
        blamed = ["mask_image"]
    else:
        blamed = [name for name in SENT_PICTURES if name in present] or ["task"]
    for name in blamed:
        reader.report(name, problem)


def _have_one_ratio(image: SentPicture, mask: SentPicture) -> bool:
    """Whether the mask is the image scaled, but for a pixel that rounding takes."""
    difference = abs(image.width_px * mask.height_px - mask.width_px * image.height_px)
    return difference <= max(image.width_px, image.height_px)
