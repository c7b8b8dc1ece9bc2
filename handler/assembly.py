"""From a configuration and a loaded pipeline to a service that is ready for requests.

The one place that puts them together: what the worker serves and what the smoke test of
``scripts.verify_archive`` draws come from here.
"""

from __future__ import annotations

from collections.abc import Mapping

from handler.acceleration.speed import SpeedUp, make_plan
from handler.api.request import GenerationRequest, check_against_pipeline
from handler.api.traits import PipelineTraits
from handler.config import HandlerConfig
from handler.engine import BUCKETS, InFlightEngine
from handler.engine.forward import is_out_of_memory
from handler.errors import ConfigError, RequestError
from handler.loading.memory import device_memory, drawing_problem
from handler.loading.pipeline import LoadedPipeline
from handler.pipelines.arguments import pipeline_arguments
from handler.pipelines.describe import describe
from handler.service.generation import GenerationService
from handler.service.reading import read_requests

__all__ = ["assemble", "short_request"]

_FEW_STEPS = 2


def assemble(
    loaded: LoadedPipeline, config: HandlerConfig, *, model_name: str, warm_up: bool = True
) -> GenerationService:
    """Return the service of a loaded pipeline; without `warm_up`, nothing is drawn beforehand.

    Mutates the pipeline as ``config.speed`` says. Close the service to give the pipeline back.

    Raises:
        ConfigError: the configuration does not fit the pipeline.
    """
    traits = describe(loaded.pipeline)
    check_against_pipeline(config, traits)
    requests = _warm_up_requests(config, traits)
    plan = make_plan(config, loaded.pipeline, loaded.device, loaded.dtype)
    speed_up = SpeedUp(loaded.pipeline, plan, config.max_rows)
    engine = InFlightEngine(
        loaded.pipeline,
        max_rows=config.max_rows,
        max_pixels=config.max_pixels_in_flight,
        exact=config.exact,
        buckets=speed_up.buckets or (BUCKETS if config.pad_to_buckets else ()),
        wrappers=speed_up.wrappers,
    )
    service = GenerationService(engine, loaded.pipeline, config, traits, model_name=model_name)
    if warm_up:
        try:
            speed_up.warm_up(engine, [pipeline_arguments(r, traits.parameters) for r in requests])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            problem = drawing_problem(device_memory(loaded.device), loaded.dtype)
            raise ConfigError(problem) from error
    return service


def short_request(
    config: HandlerConfig,
    traits: PipelineTraits,
    *,
    prompt: str = "a",
    size: tuple[int, int] | None = None,
) -> dict[str, object]:
    """Return the fields of a request of two steps, or as many as its scheduler needs; seed 0.

    `size` is (height, width); None, and all that is not among the fields: as configured.
    """
    num_steps = min(_FEW_STEPS, config.max_num_inference_steps)
    least_steps = traits.least_steps_with(config.scheduler)
    fields: dict[str, object] = {"num_inference_steps": max(num_steps, least_steps)}
    if size is not None:
        fields["height"], fields["width"] = size
    known = {name: value for name, value in fields.items() if name in traits.parameters}
    return {"prompt": prompt, "seed": 0, **known}


def _warm_up_requests(config: HandlerConfig, traits: PipelineTraits) -> list[GenerationRequest]:
    """Return a short request of every size that must not be slow at first."""
    sizes = config.warm_up_sizes or (None,)
    bodies: list[Mapping[str, object]] = [
        {"body": short_request(config, traits, size=size)} for size in sizes
    ]
    try:
        return read_requests(bodies, config, traits)
    except RequestError as error:
        raise ConfigError(f"model-config.yaml: warm_up_sizes: {error}") from error
