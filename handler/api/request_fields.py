"""Plain fields become a checked `GenerationRequest`, or every problem at once.

Each field by itself is checked by its entry in `schema`, several together by `request_checks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from handler.api.fields import FieldReader
from handler.api.images import SentPicture
from handler.api.lora_names import read_loras
from handler.api.picture_sizes import choose_size
from handler.api.prompt_syntax import take_loras
from handler.api.request import ATTRIBUTES, GenerationRequest
from handler.api.request_checks import check_request, check_values, is_lacking
from handler.api.sampler_table import SCHEDULES
from handler.api.samplers import find_sampler, parse_name, sampler_problem
from handler.api.schema import (
    KNOWN_NAMES,
    PICTURE_FIELDS,
    SENT_PICTURES,
    Kind,
    Value,
    bounds_of,
    default_of,
)
from handler.api.shortcuts import check_shortcuts
from handler.api.task_choice import choose_control, choose_task
from handler.api.tasks import TEXT_TO_IMAGE, engine_task
from handler.api.traits import PipelineTraits
from handler.api.translation import translate
from handler.config import HandlerConfig
from handler.errors import InvalidRequest
from handler.messages import show, summarise

__all__ = ["parse_fields"]


def parse_fields(
    fields: Mapping[str, object],
    config: HandlerConfig,
    traits: PipelineTraits,
    *,
    is_form: bool,
    draw_seed: Callable[[], int],
    known_pictures: dict[int, SentPicture] | None = None,
) -> GenerationRequest:
    """Check the fields of one request and fill in the configured defaults.

    `draw_seed` is called once if, and only if, the request is valid and has no seed.
    `known_pictures` are those that other requests of the body have read, see `FieldReader.picture`.

    Raises:
        InvalidRequest: with every problem, by field.
    """
    fields, problems = translate(fields)
    reader = FieldReader(fields, allow_text=is_form)
    for name, problem in problems.items():
        reader.report(name, problem)
    sent = {
        name: reader.read(each, config)
        for name, each in PICTURE_FIELDS.items()
        if each.kind is not Kind.PICTURE
    }
    if sent["prompt"] is None and "prompt" not in reader.problems:
        reader.report("prompt", "is missing")
    _take_loras(reader, sent, config)
    present = {name for name in SENT_PICTURES if _is_sent(name, fields)}
    task = choose_task(reader, sent["task"], present, traits)
    known = {} if known_pictures is None else known_pictures
    pictures = _read_pictures(reader, config, known, is_wanted=task is not None)
    sent["control"] = choose_control(reader, sent["control"], present, traits)
    has_size = {"image", "control_image"} & present
    parameters = _parameters(task, present, traits) | ({"height", "width"} if has_size else set())
    _refuse_what_the_pipeline_lacks(reader, fields, traits, parameters)
    values = {**_defaults(config, parameters), **{n: v for n, v in sent.items() if v is not None}}
    values["task"] = task or TEXT_TO_IMAGE
    values.update(_resolve_sampler(reader, sent, values, traits))
    check_values(reader, sent, values, config, traits)
    _size_by_picture(reader, values, sent, pictures, config, traits)
    extra = {name: value for name, value in values.items() if name not in ATTRIBUTES}
    attributes = {name: values[name] for name in ATTRIBUTES}
    # The table's kinds are those of the attributes; what is wrong has its default until the end.
    request = GenerationRequest(**attributes, extra=extra, pictures=pictures)  # type: ignore[arg-type]
    check_shortcuts(reader, sent, extra, request.engine_task, request.sampler, config, traits)
    check_request(reader, request, parameters, config, traits)
    reader.refuse_rest(KNOWN_NAMES)
    if reader.problems:
        raise InvalidRequest(summarise(reader.problems), reader.problems)
    return request if sent["seed"] is not None else replace(request, seed=draw_seed())


def _is_sent(name: str, fields: Mapping[str, object]) -> bool:
    return any(fields.get(each) is not None for each in PICTURE_FIELDS[name].names)


def _read_pictures(
    reader: FieldReader,
    config: HandlerConfig,
    known: dict[int, SentPicture],
    *,
    is_wanted: bool,
) -> dict[str, SentPicture]:
    """The pictures by field. They are only taken where they are not wanted: they may be large."""
    pictures = {}
    for name in SENT_PICTURES:
        each = PICTURE_FIELDS[name]
        if not is_wanted:
            reader.take(name, each.aliases)
        elif (picture := reader.picture(each, config, known)) is not None:
            pictures[name] = picture
    return pictures


def _parameters(task: str | None, present: set[str], traits: PipelineTraits) -> frozenset[str]:
    """The parameters of the task's pipeline; of all where there is none, which is a problem."""
    if task is None:
        return traits.parameters.union(*traits.tasks.values())
    return traits.tasks[engine_task(task, control="control_image" in present)]


def _size_by_picture(
    reader: FieldReader,
    values: dict[str, Value],
    sent: Mapping[str, Value],
    pictures: Mapping[str, SentPicture],
    config: HandlerConfig,
    traits: PipelineTraits,
) -> None:
    """Set height and width in `values` where a picture says them."""
    name = next((each for each in ("image", "control_image") if each in pictures), None)
    if name is None:
        return
    size = choose_size(
        reader,
        (sent["height"], sent["width"]),
        name,
        pictures[name],
        config,
        traits.size_multiple_px,
    )
    if size is not None:
        values["height"], values["width"] = size


def _defaults(config: HandlerConfig, parameters: frozenset[str]) -> dict[str, Value]:
    """What counts for every field that is not sent; extra fields have an entry if they have one."""
    values: dict[str, Value] = {"seed": 0}  # drawn at the end
    for name, each in PICTURE_FIELDS.items():
        value = default_of(each, config)
        if name in ATTRIBUTES:
            values.setdefault(name, value)
        elif value is not None and not is_lacking(each, parameters):
            values[name] = value
    if is_lacking(PICTURE_FIELDS["negative_prompt"], parameters):
        values["negative_prompt"] = None
    return values


def _refuse_what_the_pipeline_lacks(
    reader: FieldReader,
    fields: Mapping[str, object],
    traits: PipelineTraits,
    parameters: frozenset[str],
) -> None:
    for name, each in PICTURE_FIELDS.items():
        if each.kind is Kind.PICTURE or not each.is_refused_without_argument:
            continue
        if _is_sent(name, fields) and is_lacking(each, parameters):
            others = [task for task, has in traits.tasks.items() if each.argument in has]
            have = "have" if len(others) > 1 else "has"
            needed = f"; {', '.join(others)} {have} it" if others else ""
            what = "this task" if others else "this pipeline"
            if name == "guidance_scale" and "true_cfg_scale" in parameters:
                needed = "; its guidance is true_cfg_scale, with a negative_prompt"
            reader.report(name, f"{what} has no such parameter{needed}")


def _take_loras(reader: FieldReader, sent: dict[str, Any], config: HandlerConfig) -> None:
    """Move the LoRAs that a weighted prompt names to the field for them; mutates `sent`."""
    prompt, weighting = sent["prompt"], sent["prompt_weighting"]
    is_weighted = config.prompt_weighting if weighting is None else weighting
    if not is_weighted or prompt is None:
        return
    low, high = bounds_of(PICTURE_FIELDS["loras"], config)
    try:
        text, tagged = take_loras(prompt)
        named = read_loras(tagged, low=low, high=high)
    except ValueError as error:
        reader.report("prompt", str(error))
        return
    if not named:
        return
    if not text:
        reader.report("prompt", "is empty but for its LoRA tags")
    sent["prompt"] = text
    for name, scale in (sent["loras"] or {}).items():
        if named.setdefault(name, scale) != scale:
            reader.report("loras", f"{show(name)} has another scale in the prompt")
    try:
        sent["loras"] = read_loras(named, low=low, high=high)
    except ValueError as error:
        reader.report("loras", f"with those in the prompt, {error}")


def _resolve_sampler(
    reader: FieldReader,
    sent: Mapping[str, Value],
    values: Mapping[str, Value],
    traits: PipelineTraits,
) -> dict[str, Value]:
    """The fields `scheduler` and `sigmas` for what was sent or configured of them."""
    name, sigmas = values["scheduler"], values.get("sigmas")
    assert name is None or isinstance(name, str)
    assert sigmas is None or isinstance(sigmas, str)
    parsed = parse_name(name or "")
    said = None if sent["scheduler"] is None else parsed.schedule
    if said is not None and sigmas is not None and said != SCHEDULES[sigmas].name:
        reader.report("sigmas", f"{show(sigmas)}, but the scheduler says {said}: send one")
    if name is None and sigmas is None:
        return {"scheduler": None}
    sampler = find_sampler(name, traits.schedulers, sigmas)
    if sampler is None:
        is_named = name is not None and find_sampler(name, traits.schedulers) is None
        own = next(iter(traits.schedulers), "")
        problem = sampler_problem(name or own, traits.schedulers, None if is_named else sigmas)
        reader.report("scheduler" if is_named else "sigmas", problem)
        return {"scheduler": None}
    is_own = not parsed.solver
    chosen = {} if sampler.sigmas is None else {"sigmas": sampler.sigmas}
    return {"scheduler": None if is_own else sampler.name, **chosen}
