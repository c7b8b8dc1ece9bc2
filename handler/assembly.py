"""From a configuration and a loaded pipeline to a service that is ready for requests.

The one place that puts them together: what the worker serves and what the smoke test of
``scripts.verify_archive`` draws come from here.
"""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from handler.acceleration.guidance_interval import GuidanceInterval
from handler.acceleration.speed import SpeedUp, make_plan
from handler.acceleration.step_cache import StepCache
from handler.acceleration.thread_choice import thread_choices
from handler.api.decoding import decode_pictures
from handler.api.request import GenerationRequest
from handler.api.request_checks import check_against_pipeline
from handler.api.traits import PipelineTraits
from handler.config import MAX_LORAS, HandlerConfig
from handler.engine import BUCKETS, InFlightEngine
from handler.engine.forward import is_out_of_memory
from handler.errors import ConfigError, RequestError
from handler.loading.memory import device_memory, drawing_problem
from handler.loading.pipeline import LoadedPipeline
from handler.pipelines.arguments import pipeline_arguments
from handler.pipelines.describe import describe
from handler.pipelines.safety import SafetyChecker, has_safety_checker
from handler.pipelines.tasks import pictures_of, pipeline_name, pipelines_of, split_name
from handler.service.generation import GenerationService
from handler.service.lora_shelf import LoraNames, LoraShelf
from handler.service.reading import read_requests
from handler.service.records import Watcher, log_record
from handler.service.tracing import make_tracing

__all__ = ["assemble", "short_request"]

logger = logging.getLogger(__name__)

_FEW_STEPS = 2


def assemble(
    loaded: LoadedPipeline, config: HandlerConfig, *, model_name: str, warm_up: bool = True
) -> GenerationService:
    """Return the service of a loaded pipeline; without `warm_up`, nothing is drawn beforehand.

    Mutates the pipeline as ``config.speed`` says. Close the service to give the pipeline back.

    Raises:
        ConfigError: the configuration does not fit the pipeline.
    """
    _check_safety(config, loaded.pipeline)
    loras = LoraNames(loaded.loras, _lora_folder(config))
    pipelines = pipelines_of(loaded.pipeline, loaded.controlnets)
    traits = replace(describe(loaded.pipeline, pipelines), loras=loras)
    if config.exact:
        traits = replace(traits, shortcuts={})
    logger.info("%s serves %s", type(loaded.pipeline).__name__, ", ".join(pipelines))
    if config.default_loras is None and loaded.loras:
        if len(loaded.loras) > MAX_LORAS:
            raise ConfigError(
                f"model-config.yaml: default_loras: {len(loaded.loras)} LoRAs are packed, and at"
                f" most {MAX_LORAS} may be on; say which, with their scales ({{}}: none)"
            )
        config = replace(config, default_loras=dict.fromkeys(loaded.loras, 1.0))
    check_against_pipeline(config, traits)
    requests = _warm_up_requests(config, traits, pipelines)
    plan = make_plan(config, pipelines, loaded.device, loaded.dtype)
    speed_up = SpeedUp(pipelines, plan, config.max_rows)
    engine = InFlightEngine(
        pipelines,
        max_rows=config.max_rows,
        max_pixels=config.max_pixels_in_flight,
        exact=config.exact,
        buckets=speed_up.buckets or (BUCKETS if config.pad_to_buckets else ()),
        wrappers=[
            *speed_up.wrappers,
            *thread_choices(config, loaded.device, is_compiled=plan.compile),
            GuidanceInterval(),
            StepCache(),
        ],
    )
    service = GenerationService(
        engine,
        loaded.pipeline,
        config,
        traits,
        model_name=model_name,
        checker=SafetyChecker.take_from(engine.pipelines.values()),
        shelf=_shelf(engine, loaded, config, loras),
        watchers=_watchers(config, model_name),
    )
    if warm_up and plan.warm_up:
        _warm_up(speed_up, engine, requests, config, traits, loaded)
    return service


def _warm_up(
    speed_up: SpeedUp,
    engine: InFlightEngine,
    requests: Sequence[GenerationRequest],
    config: HandlerConfig,
    traits: PipelineTraits,
    loaded: LoadedPipeline,
) -> None:
    """Draw `requests`. Raises: ConfigError, where the memory is too small for one of them."""
    calls = [
        pipeline_arguments(each, traits.tasks[each.engine_task], decode_pictures(each, config))
        for each in requests
    ]
    names = [pipeline_name(each.engine_task, each.extra.get("control")) for each in requests]
    try:
        speed_up.warm_up(engine, calls, names)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        problem = drawing_problem(device_memory(loaded.device), loaded.dtype)
        raise ConfigError(problem) from error


def _watchers(config: HandlerConfig, model_name: str) -> list[Watcher]:
    """Return who is told of requests that have ended."""
    watchers: list[Watcher] = [log_record] if config.request_log == "json" else []
    if (tracing := make_tracing(config, model_name)) is not None:
        watchers.append(tracing)
    return watchers


def _lora_folder(config: HandlerConfig) -> Path | None:
    if config.lora_dir is None:
        return None
    folder = Path(config.lora_dir)
    if not folder.is_dir():
        raise ConfigError(f"model-config.yaml: lora_dir: {config.lora_dir!r} is not a folder")
    return folder


def _shelf(
    engine: InFlightEngine, loaded: LoadedPipeline, config: HandlerConfig, names: LoraNames
) -> LoraShelf | None:
    """Return what reads the LoRAs of a folder; None where there is no folder."""
    reader = loaded.lora_reader
    if reader is None or names.folder is None:
        return None
    return LoraShelf(
        engine,
        names,
        reader.read_file,
        max_loras=config.max_loras,
        max_bytes=config.max_lora_bytes,
    )


def _check_safety(config: HandlerConfig, pipeline: Any) -> None:
    """Raise ConfigError where pictures are to be refused and nothing would look at them."""
    if config.safety_checker == "refuse" and not has_safety_checker(pipeline):
        raise ConfigError(
            "model-config.yaml: safety_checker: 'refuse' needs a safety checker, and the archive"
            " holds none; pack one (--component safety_checker=PATH), or say flag or off"
        )


def short_request(
    config: HandlerConfig,
    traits: PipelineTraits,
    *,
    prompt: str = "a",
    size: tuple[int, int] | None = None,
    task: str | None = None,
    control: str | None = None,
) -> dict[str, object]:
    """Return the fields of a request of two steps, or as many as its scheduler needs; seed 0.

    `size` is (height, width); None, and all that is not among the fields: as configured. `task` is
    one of `traits`, by default the first, with the pictures that it needs; `control` names the
    ControlNet.
    """
    task = task or next(iter(traits.tasks))
    num_steps = min(_FEW_STEPS, config.max_num_inference_steps)
    least_steps = traits.least_steps_with(config.scheduler)
    fields: dict[str, object] = {
        "num_inference_steps": max(num_steps, least_steps),
        "strength": 1.0,
    }
    if size is not None:
        fields["height"], fields["width"] = size
    known = {name: value for name, value in fields.items() if name in traits.tasks[task]}
    height, width = size or (config.height, config.width)
    pictures = {name: _plain_picture(height, width) for name in sorted(pictures_of(task))}
    named = {} if control is None else {"control": control}
    return {"prompt": prompt, "seed": 0, **known, **pictures, **named}


def _plain_picture(height: int, width: int) -> str:
    """Return a picture in base64, white: as a mask it leaves nothing as it was."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _warm_up_requests(
    config: HandlerConfig, traits: PipelineTraits, names: Iterable[str]
) -> list[GenerationRequest]:
    """Return a short request of every size that must not be slow at first, for every pipeline."""
    sizes = config.warm_up_sizes or (None,)
    bodies: list[Mapping[str, object]] = [
        {"body": short_request(config, traits, size=size, task=task, control=control)}
        for size in sizes
        for task, control in map(split_name, names)
    ]
    try:
        return read_requests(bodies, config, traits)
    except RequestError as error:
        raise ConfigError(f"model-config.yaml: warm_up_sizes: {error}") from error
