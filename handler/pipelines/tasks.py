"""Which tasks a pipeline's weights can do, and the pipelines of these tasks.

diffusers has a class for each task of a family. The pipelines of the other tasks are made from the
loaded one and have its very modules, so no weight is there twice. A class that cannot do without a
picture serves its own task and those that come with more pictures: a model for inpainting was not
trained to draw from text alone.

A task is named as the engine names it: ``inpainting``, ``image-to-image+control``; where several
ControlNets are packed, the name of one follows: ``text-to-image+control:canny``.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from types import MappingProxyType
from typing import Any

from diffusers import SchedulerMixin

from handler.api.tasks import IMAGE_TO_IMAGE, INPAINTING, TASKS, TEXT_TO_IMAGE, engine_task
from handler.library_logs import quiet_libraries
from handler.messages import first_lines

__all__ = [
    "controlled_by",
    "pictures_of",
    "pipeline_name",
    "pipelines_of",
    "plan_tasks",
    "split_name",
    "task_classes",
    "task_of",
]

logger = logging.getLogger(__name__)

_CONTROLLED = engine_task("", control=True)
_PICTURES = {
    TEXT_TO_IMAGE: frozenset[str](),
    IMAGE_TO_IMAGE: frozenset({"image"}),
    INPAINTING: frozenset({"image", "mask_image"}),
}
# Classes whose call has a default for the picture that it cannot do without, and nothing else that
# tells it from those that draw with and without one.
_NEEDS_A_PICTURE = frozenset(
    {
        "BriaFiboEditPipeline",
        "HunyuanImageRefinerPipeline",
        "IFSuperResolutionPipeline",
        "JoyImageEditPipeline",
        "LDMSuperResolutionPipeline",
        "LongCatImageEditPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
        "StableDiffusionInstructPix2PixPipeline",
        "StableDiffusionLatentUpscalePipeline",
        "StableDiffusionUpscalePipeline",
        "StableDiffusionXLInstructPix2PixPipeline",
        "StableUnCLIPImg2ImgPipeline",
        "UnCLIPImageVariationPipeline",
    }
)
# Classes that describe a picture in words where they are given one.
_DESCRIBES = frozenset({"UniDiffuserPipeline"})
# What the constructor takes where a picture controls the drawing.
_CONTROLLERS = ("controlnet", "adapter")
# Channels of the denoisers that diffusers' inpainting takes: latents alone, or the mask and the
# rest of the picture beside them.
_DENOISERS = {"unet": (4, 9), "transformer": (16, 33)}


def controlled_by(pipeline_class: Any) -> str | None:
    """The parameter of a class's call that takes the picture that controls it; None: it has none.

    Some call it `image` where they start from none.
    """
    call = _parameters(pipeline_class.__call__)
    if "control_image" in call:
        return "control_image"
    has_controller = any(name in _parameters(pipeline_class.__init__) for name in _CONTROLLERS)
    return "image" if has_controller and "image" in call else None


def task_of(pipeline_class: Any) -> str:
    """The engine's name of the task that a class is for: that with the fewest pictures."""
    call = _parameters(pipeline_class.__call__)
    control = controlled_by(pipeline_class)
    if "mask_image" in call:
        name = INPAINTING
    elif "image" in call and control != "image" and _needs_a_picture(pipeline_class):
        name = IMAGE_TO_IMAGE
    else:
        name = TEXT_TO_IMAGE
    return engine_task(name, control=control is not None)


def pictures_of(task: str) -> frozenset[str]:
    """The fields of pictures that a request for `task` has."""
    name, is_controlled, _ = task.partition(_CONTROLLED)
    return _PICTURES[name] | ({"control_image"} if is_controlled else set())


def pipeline_name(task: str, control: object) -> str:
    """The engine's name of the pipeline that does `task` with the ControlNet `control`."""
    return task if control is None or _CONTROLLED not in task else f"{task}:{control}"


def split_name(name: str) -> tuple[str, str | None]:
    """The task in a pipeline's name, and the ControlNet if it names one."""
    task, _, control = name.partition(":")
    return task, control or None


def task_classes(pipeline_class: Any, controlnet_class: Any = None) -> dict[str, Any]:
    """The classes of all tasks that weights of `pipeline_class` can do, its own first.

    With `controlnet_class`, those of its ControlNets too. Whether the weights have the channels
    that a class wants is not asked here.
    """
    own = task_of(pipeline_class)
    found = {own: pipeline_class}
    call = _parameters(pipeline_class.__call__)
    if own == TEXT_TO_IMAGE and "image" in call and pipeline_class.__name__ not in _DESCRIBES:
        found[IMAGE_TO_IMAGE] = pipeline_class
    families = [*_families(pipeline_class)]
    if controlnet_class is not None and _CONTROLLED not in own:
        families += filter(None, (_controlnet_family(each, controlnet_class) for each in families))
    for family in families:
        for kind in _classes_of(family):
            task = task_of(kind)
            # A mask for the control picture is nothing that a request has.
            is_whole = "control_mask" not in _parameters(kind.__call__)
            if is_whole and pictures_of(own) <= pictures_of(task):
                found.setdefault(task, kind)
    order = [engine_task(name, control=control) for control in (False, True) for name in TASKS]
    return {own: pipeline_class, **{task: found[task] for task in order if task in found}}


def _controlnet_family(family: str, controlnet_class: Any) -> str | None:
    """Diffusers' name of `family` with a ControlNet of this class; None where there is none."""
    base, pag, _ = family.partition("-pag")
    name = f"{base}-controlnet{pag}"
    kinds = _classes_of(name)
    if not kinds:
        return None
    parameter = inspect.signature(kinds[0].__init__).parameters.get("controlnet")
    wanted = "" if parameter is None else str(parameter.annotation)
    return name if re.search(rf"\b{controlnet_class.__name__}\b", wanted) else None


def plan_tasks(
    pipeline_class: Any,
    channels: Mapping[str, int],
    controlnets: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """The classes of what `pipelines_of` makes, by name: nothing has to be loaded for that.

    `channels` are those that the denoiser takes, by its component; `controlnets` are classes.
    """
    classes = task_classes(pipeline_class)
    planned = {
        task: kind
        for task, kind in classes.items()
        if kind is pipeline_class or _fits(kind, channels)
    }
    for name, controlnet_class in controlnets.items():
        for task, kind in task_classes(pipeline_class, controlnet_class).items():
            if task not in classes and _fits(kind, channels):
                planned[pipeline_name(task, name)] = kind
    return planned


def pipelines_of(
    pipeline: Any, controlnets: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """The pipelines of all tasks that `pipeline` can do, itself first, sharing every module.

    `controlnets` are ControlNets by the names that requests choose them by. A pipeline that cannot
    be made of the modules is left out.
    """
    kinds = {name: type(controlnet) for name, controlnet in controlnets.items()}
    made = {}
    for name, kind in plan_tasks(type(pipeline), _channels_of(pipeline), kinds).items():
        if kind is type(pipeline):
            made[name] = pipeline
            continue
        control = split_name(name)[1]
        parts = {} if control is None else {"controlnet": controlnets[control]}
        try:
            with quiet_libraries(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what was said when the pipeline was loaded
                made[name] = _make(kind, pipeline, parts)
        except Exception as error:  # what a constructor makes of parts that it does not take
            reason = first_lines(error, 1)
            logger.warning("no %s: %s cannot be made: %s", name, kind.__name__, reason)
    return made


def _channels_of(pipeline: Any) -> dict[str, int]:
    configs = {name: getattr(getattr(pipeline, name, None), "config", {}) for name in _DENOISERS}
    return {name: each["in_channels"] for name, each in configs.items() if "in_channels" in each}


def _fits(kind: Any, channels: Mapping[str, int]) -> bool:
    """Whether calls of `kind` can work with a denoiser that takes so many `channels`."""
    if "mask_image" not in _parameters(kind.__call__):
        return True
    return not any(
        number not in _DENOISERS[component]
        for component, number in channels.items()
        if component == "unet" or "StableDiffusion3" in kind.__name__
    )


def _make(kind: Any, pipeline: Any, parts: Mapping[str, Any]) -> Any:
    """The class called with the components: `from_pipe` drops those of unexpected types."""
    values = {
        "add_watermarker": getattr(pipeline, "watermark", None) is not None,
        **dict.fromkeys(kind._optional_components),
        **pipeline.config,
        **vars(pipeline),
        **pipeline.components,
        **parts,
    }
    arguments = {name: values[name] for name in _parameters(kind.__init__) & values.keys()}
    for name, value in arguments.items():
        # Some constructors correct the configuration of the scheduler that they are given.
        if isinstance(value, SchedulerMixin):
            arguments[name] = deepcopy(value)
    made = kind(**arguments)
    made.set_progress_bar_config(disable=True)
    return made


def _needs_a_picture(kind: Any) -> bool:
    call = inspect.signature(kind.__call__).parameters
    from_text, from_pictures, _ = _tables()
    return (
        kind.__name__ in _NEEDS_A_PICTURE
        or "strength" in call
        or call["image"].default is inspect.Parameter.empty
        or (kind in from_pictures.values() and kind not in from_text.values())
    )


def _parameters(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


@functools.cache
def _tables() -> tuple[Mapping[str, Any], ...]:
    """Diffusers' classes by family, of each task."""
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that nobody asked for
        from diffusers.pipelines import auto_pipeline

    return (
        auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
        auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
    )


def _families(kind: Any) -> Iterator[str]:
    found = (name for table in _tables() for name, each in table.items() if each is kind)
    yield from dict.fromkeys(found)


def _classes_of(family: str) -> list[Any]:
    return [table[family] for table in _tables() if family in table]
