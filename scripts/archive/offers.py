"""What requests may ask of a packed pipeline: its tasks, fields and samplers, from its classes.

The same as the loaded pipeline tells of itself, without loading or building it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from handler.errors import ArchiveError
from handler.loading.contents import CONTROLNET_FOLDER, controlnet_names
from scripts.archive.reader import ArchiveView
from scripts.documents import parse_json

__all__ = ["fields_of", "samplers_in", "tasks_of"]

# Parameters of a pipeline that the service itself gives, or that say nothing of a picture.
_OURS = ("callback_steps", "return_dict")
_DENOISERS = ("unet", "transformer")


def tasks_of(view: ArchiveView) -> list[str] | None:
    """Name the tasks that the worker will serve; None where the class is not known here."""
    try:
        return [*_planned(view)]
    except ArchiveError:
        return None


def fields_of(view: ArchiveView, loras: Collection[str]) -> dict[str, list[str]]:
    """Return the fields that a request may have, and the call's numbers that are none.

    `loras` are those that a request may name.
    """
    from handler.api.description import describe
    from handler.api.schema import PICTURE_FIELDS
    from handler.api.traits import PipelineTraits
    from handler.loading.pipeline_class import component_class, pipeline_class
    from handler.pipelines.describe import parameters_of
    from handler.pipelines.signature import numbers_of
    from handler.pipelines.steps import shortcuts_of_kind
    from handler.pipelines.tasks import split_name

    try:
        kind = pipeline_class(view.index)
        config = _config(view, "transformer")
        planned = [(split_name(name), each) for name, each in _planned(view).items()]
        components = view.index.components
        scheduler = (
            component_class("scheduler", view.index) if "scheduler" in components else type(None)
        )
        traits = PipelineTraits(
            schedulers=(),
            size_multiple_px=1,
            parameters=parameters_of(kind, config),
            tasks={task: parameters_of(each, config) for (task, _), each in planned},
            loras=loras,
            controls=tuple(dict.fromkeys(name for (_, name), _ in planned if name is not None)),
            reads_weights=_reads_windows(view, kind),
            shortcuts={
                task: shortcuts_of_kind(each, scheduler, components) for (task, _), each in planned
            },
        )
    except (ArchiveError, AttributeError, TypeError):  # of another diffusers than the installed
        return {"fields": [], "other_parameters": []}
    fields = describe(traits)["fields"]
    assert isinstance(fields, list)
    taken = {each.argument for each in PICTURE_FIELDS.values()}
    others = [name for name in numbers_of(kind) if name not in taken and name not in _OURS]
    return {"fields": fields, "other_parameters": others}


def samplers_in(view: ArchiveView) -> dict[str, list[str]]:
    """Return the samplers that go with the pipeline, each with the sigmas it may have."""
    if "scheduler" not in view.index.components:
        return {}
    from handler.api.samplers import samplers_of
    from handler.loading.pipeline_class import component_class
    from handler.pipelines.schedulers import compatible_with

    try:
        kind = component_class("scheduler", view.index)
        return samplers_of(compatible_with(kind))
    except (ArchiveError, AttributeError):  # of a diffusers that is not the installed one
        return {}


def _planned(view: ArchiveView) -> dict[str, Any]:
    """Return the classes of the pipelines that the worker will make. Raises: ArchiveError."""
    from handler.library_logs import quiet_libraries
    from handler.loading.controlnets import controlnet_class
    from handler.loading.pipeline_class import pipeline_class
    from handler.pipelines.tasks import plan_tasks

    model = view.model
    with quiet_libraries():
        kind = pipeline_class(view.index)
        channels = {
            component: number
            for component in _DENOISERS
            if isinstance(number := _config(view, component).get("in_channels"), int)
        }
        configs = {
            name: f"{CONTROLNET_FOLDER}/{name}/config.json"
            for name in controlnet_names(model.sizes)
        }
        controlnets = {
            name: controlnet_class(model.read(config), config) for name, config in configs.items()
        }
        return plan_tasks(kind, channels, controlnets)


def _reads_windows(view: ArchiveView, kind: Any) -> bool:
    """Say whether the prompts of a pipeline of the class `kind` may have weights."""
    from handler.loading.pipeline_class import component_class
    from handler.pipelines.prompt_embeddings import kind_reads_windows

    parts = {name: component_class(name, view.index) for name in view.index.components}
    return kind_reads_windows(kind, parts)


def _config(view: ArchiveView, component: str) -> Mapping[str, Any]:
    name = f"{component}/config.json"
    found = parse_json(view.model.read(name), name) if name in view.model.sizes else {}
    return found if isinstance(found, dict) else {}
