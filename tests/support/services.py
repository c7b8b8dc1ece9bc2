"""A `GenerationService` on a tiny pipeline that can be told to fail, and its tests' helpers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from diffusers import StableDiffusionPipeline

from handler.api.replies import Reply, success_reply
from handler.api.request import GenerationRequest
from handler.config import HandlerConfig
from handler.engine import InFlightEngine
from handler.pipelines.describe import describe
from handler.pipelines.tasks import pipelines_of
from handler.service.generation import GenerationService
from handler.service.records import Watcher
from tests.support.clock import Clock
from tests.support.pipelines import build

LONG = 900
"""Steps of a request that does not end by itself."""
HTTP = {"host": "localhost"}
"""Headers as any HTTP request has them; gRPC has none."""

Make = Callable[..., GenerationService]
"""Makes services that are closed when the test is over; see `make_service`."""


class Faulty(StableDiffusionPipeline):  # type: ignore[misc]
    """Fails where its prompt says, or returns what is not a picture."""

    def encode_prompt(self, prompt: str, *args: Any, **kwargs: Any) -> Any:
        self.asked, self.looked = prompt, 0
        if prompt == "refuse":
            raise ValueError("I do not draw this")
        if prompt == "crash early":
            raise TypeError("early")
        return super().encode_prompt(prompt, *args, **kwargs)

    @property
    def interrupt(self) -> bool:
        self.looked += 1
        if self.looked == 3 and self.asked == "crash late":
            raise ValueError("late")
        if self.looked == 3 and self.asked == "oom":
            raise MemoryError
        return False

    def run_safety_checker(self, image: Any, *args: Any) -> Any:
        if self.asked in _NO_PICTURES:
            self.image_processor = _Spoiler(_NO_PICTURES[self.asked])
        return super().run_safety_checker(image, *args)


_NO_PICTURES = {"no picture": None, "odd picture": ["odd"]}


class _Spoiler:
    def __init__(self, images: object) -> None:
        self._images = images

    def postprocess(self, *args: Any, **kwargs: Any) -> object:
        return self._images


def faulty() -> Faulty:
    """A fresh tiny pipeline that can be told to fail."""
    return Faulty(**build("stable_diffusion").components, requires_safety_checker=False)


def tiny_config(**settings: Any) -> HandlerConfig:
    """A configuration that goes with tiny pipelines, but for `settings`."""
    return HandlerConfig(
        **{
            "num_inference_steps": 4,
            "max_num_inference_steps": 1000,
            "height": 32,
            "width": 32,
            "min_size_px": 8,
            **settings,
        }
    )


def make_service(
    clock: Clock,
    *,
    pipeline: Any = None,
    engine_max_pixels: int | None = None,
    draw_seed: Callable[[], int] = lambda: 5,
    encode: Callable[..., Reply] = success_reply,
    service_clock: Callable[[], float] | None = None,
    watchers: Sequence[Watcher] = (),
    **settings: Any,
) -> GenerationService:
    """A service on `pipeline`, by default a `faulty` one; `settings` are its configuration's."""
    pipeline = faulty() if pipeline is None else pipeline
    config = tiny_config(**settings)
    pipelines = pipelines_of(pipeline)
    engine = InFlightEngine(
        pipelines, max_rows=config.max_rows, max_pixels=engine_max_pixels, clock=clock
    )
    return GenerationService(
        engine,
        pipeline,
        config,
        describe(pipeline, pipelines),
        model_name="tiny",
        draw_seed=draw_seed,
        encode=encode,
        watchers=watchers,
        clock=service_clock or clock,
    )


def open_request(
    service: GenerationService, request_id: str, prompt: str = "a cat", /, **fields: Any
) -> None:
    """Open a request that came over HTTP as JSON."""
    service.open(request_id, {"body": {"prompt": prompt, "seed": 3, **fields}}, HTTP)


def request(**changes: Any) -> GenerationRequest:
    """A checked request of three steps, to be drawn."""
    values: dict[str, Any] = {
        "prompt": "a dog",
        "negative_prompt": None,
        "seed": 1,
        "num_inference_steps": 3,
        "guidance_scale": 7.5,
        "height": 32,
        "width": 32,
        "num_images": 1,
        "scheduler": None,
    }
    return GenerationRequest(**{**values, **changes})


def tick(service: GenerationService, times: int = 1) -> None:
    """Advance by single ticks."""
    for _ in range(times):
        service.advance(0.0)


def finish(service: GenerationService) -> dict[str, Reply]:
    """Advance until nothing is live; the replies by their ids."""
    service.advance()
    return service.take_replies()


def statuses(replies: dict[str, Reply]) -> dict[str, int]:
    """The HTTP status of each reply."""
    return {request_id: reply.status for request_id, reply in replies.items()}


def error_of(reply: Reply) -> dict[str, Any]:
    """The error that a reply is."""
    error: dict[str, Any] = json.loads(reply.body)["error"]
    return error


def counted(service: GenerationService) -> dict[tuple[str, tuple[str, ...]], float]:
    """What the service's metrics counted since the last time, by name and labels; no zeros."""
    return {
        (sample.name, sample.dimensions): sample.value
        for sample in service.samples()
        if sample.kind == "counter" and sample.value
    }
