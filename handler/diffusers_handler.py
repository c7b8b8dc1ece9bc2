"""TorchServe's side of things: its contexts, its cycles, its way of deferring and streaming.

With ``continuousBatching: true`` TorchServe calls `handle` in cycles, each time with every live
request. A cycle opens the new ones, runs the engine for a while, answers what is finished, and
leaves the others out of its reply, so that they come again in the next cycle::

    cycle 1   open A, B   tick tick …   defer A, B
    cycle 2   open C      tick tick …   answer B, defer A, C
"""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from ts.torch_handler.base_handler import BaseHandler

from handler.acceleration.speed import SpeedUp, make_plan
from handler.api.call import Call, read_call
from handler.api.replies import Reply
from handler.api.request import GenerationRequest, check_against_pipeline
from handler.api.traits import PipelineTraits
from handler.config import HandlerConfig
from handler.engine import BUCKETS, InFlightEngine
from handler.errors import ConfigError, RequestError, ServingError
from handler.library_logs import keep_prompts_out_of_the_log
from handler.loading.pipeline import load_pipeline
from handler.pipelines.arguments import pipeline_arguments
from handler.pipelines.describe import describe
from handler.service.event_stream import INTERRUPTED
from handler.service.generation import GenerationService, draw_seed
from handler.service.metrics import emit
from handler.single_worker import hold_model
from handler.torchserve_logs import shorten_torchserve_logs
from handler.watchdog import SilenceAlarm

__all__ = ["DiffusersHandler"]

logger = logging.getLogger(__name__)

_EMIT_EVERY_S = 1.0
# Between two cycles with live requests there are milliseconds.
_SILENT_AFTER_S = 5.0


class DiffusersHandler(BaseHandler):  # type: ignore[misc]
    """Serves a zipped diffusers pipeline from its archive, many requests in flight at once."""

    def __init__(self) -> None:
        super().__init__()
        self.pipeline: Any = None
        self.config = HandlerConfig()
        self.traits = PipelineTraits(schedulers=(), size_multiple_px=8, parameters=frozenset())
        self._service: GenerationService | None = None
        self._engine: InFlightEngine | None = None
        self._alarm: SilenceAlarm | None = None
        self._is_continuous = False
        self._streaming: set[str] = set()
        # Streams that were given up in the last silence: TorchServe sends no more than their ids.
        self._lost: set[str] = set()
        self._emitted_s = time.monotonic()

    def initialize(self, context: Any) -> None:
        """Open the archived pipeline on the worker's device; sets `pipeline` and `initialized`.

        Raises:
            ServingError: the configuration or the archive is wrong; the log says how.
        """
        started_s = time.monotonic()
        self.context, self.manifest = context, context.manifest
        try:
            self._initialize(context)
        except ServingError as error:
            logger.error("cannot serve this model: %s", error)
            raise
        self.initialized = True
        logger.info(
            "%s is ready on %s after %.1f s",
            type(self.pipeline).__name__,
            self.device,
            time.monotonic() - started_s,
        )

    def _initialize(self, context: Any) -> None:
        model_config: Mapping[str, Any] = context.model_yaml_config or {}
        self.config = HandlerConfig.from_mapping(model_config.get("handler"))
        self._is_continuous = bool(model_config.get("continuousBatching", False))
        shorten_torchserve_logs()
        if self._is_continuous:
            hold_model(Path(context.system_properties["model_dir"]))
        _check_workers(model_config, is_continuous=self._is_continuous)
        keep_prompts_out_of_the_log()
        properties = context.system_properties
        loaded = load_pipeline(Path(properties["model_dir"]), self.config, properties.get("gpu_id"))
        self.traits = describe(loaded.pipeline)
        check_against_pipeline(self.config, self.traits)
        self.pipeline, self.device = loaded.pipeline, loaded.device
        plan = make_plan(self.config, loaded.pipeline, loaded.device, loaded.dtype)
        speed_up = SpeedUp(self.pipeline, plan, self.config.max_rows)
        self._engine = InFlightEngine(
            self.pipeline,
            max_rows=self.config.max_rows,
            max_pixels=self.config.max_pixels_in_flight,
            exact=self.config.exact,
            buckets=speed_up.buckets or (BUCKETS if self.config.pad_to_buckets else ()),
            compile_forward=speed_up.wrap_forward,
        )
        self._service = GenerationService(
            self._engine, self.config, self.traits, model_name=context.model_name or "model"
        )
        speed_up.warm_up(self._engine, self._warm_up_calls())
        if self._is_continuous:
            self._alarm = SilenceAlarm(self._on_silence, _SILENT_AFTER_S)

    def preprocess(self, data: Sequence[Mapping[str, object]]) -> list[str]:
        """The prompts of TorchServe's rows, in their order.

        Raises:
            RequestError: a row that is no valid request.
        """
        return [request.prompt for request in self._requests(data)]

    def inference(self, data: Sequence[str], *args: Any, **kwargs: Any) -> list[Image.Image]:
        """One picture a prompt, with the configured steps, guidance and size and a fresh seed."""
        requests = self._requests([{"data": prompt} for prompt in data])
        return [result.images[0] for result in self._serving().draw(requests)]

    def postprocess(self, data: Sequence[Image.Image]) -> list[npt.NDArray[np.uint8]]:
        """Pictures as uint8 arrays (H, W, 3)."""
        return [np.array(image.convert("RGB"), dtype=np.uint8) for image in data]

    def handle(self, data: Sequence[Mapping[str, object]], context: Any) -> list[bytes]:
        """One cycle of TorchServe. What goes wrong with a request becomes that request's reply."""
        service = self._serving()
        if self._alarm is not None:
            self._alarm.clear()
        ids: dict[int, str] = dict(context.request_ids)
        self._let_go_of(service.live_ids - set(ids.values()))
        for index, call_id in ids.items():
            if call_id not in service.live_ids and call_id not in self._lost:
                service.open(call_id, data[index], _headers(context, index))
        service.advance(self.config.cycle_ms / 1000 if self._is_continuous else None)
        answers = self._answer(ids, context)
        self._emit_metrics(context)
        if self._alarm is not None and service.live_ids:
            self._alarm.set()
        return answers

    def _on_silence(self) -> None:
        """TorchServe sends nothing although calls are live: it has let go of them all.

        Should its next message have come just now, `handle` finds its context as it was.
        """
        assert self._alarm is not None
        is_sending, _, _ = select.select([self.context.cl_socket], [], [], 0)
        if is_sending:
            self._alarm.set()
            return
        self._lost = set(self._streaming)
        service = self._serving()
        self._let_go_of(service.live_ids)
        service.advance(self.config.cycle_ms / 1000)
        self._emit_metrics(self.context)

    def _let_go_of(self, call_ids: Iterable[str]) -> None:
        for call_id in call_ids:
            self._serving().drop(call_id)
            self._streaming.discard(call_id)

    def _warm_up_calls(self) -> list[dict[str, Any]]:
        """The arguments of a short request of every size that must not be slow at first."""
        sizes = [{"height": h, "width": w} for h, w in self.config.warm_up_sizes or ()] or [{}]
        num_steps = min(2, self.config.max_num_inference_steps)
        num_steps = max(num_steps, self.traits.least_steps_with(self.config.scheduler))
        fields = {"prompt": "a", "num_inference_steps": num_steps, "seed": 0}
        try:
            requests = self._requests([{"body": {**fields, **size}} for size in sizes])
        except RequestError as error:
            raise ConfigError(f"model-config.yaml: warm_up_sizes: {error}") from error
        return [pipeline_arguments(request, self.traits.parameters) for request in requests]

    def _requests(self, rows: Sequence[Mapping[str, object]]) -> list[GenerationRequest]:
        calls = [read_call(row, {}, self.config, self.traits, draw_seed=draw_seed) for row in rows]
        return [request for call in calls if isinstance(call, Call) for request in call.requests]

    def _answer(self, ids: Mapping[int, str], context: Any) -> list[bytes]:
        """The body for each place; places without one are taken out of `context.request_ids`."""
        service = self._serving()
        replies = service.take_replies()
        answers = [b""] * len(ids)
        criteria = [_plain] * len(ids)
        for index, call_id in ids.items():
            reply, stream = replies.get(call_id), service.stream_of(call_id)
            if call_id in self._lost:
                self._lost.remove(call_id)
                answers[index], criteria[index] = INTERRUPTED, _last
            elif reply is not None:
                answers[index] = _write(context, index, call_id, reply)
                if call_id in self._streaming:
                    self._streaming.remove(call_id)
                    criteria[index] = _last
            elif stream is not None and call_id not in self._streaming:
                self._streaming.add(call_id)
                answers[index] = _write(context, index, call_id, stream.opening())
                criteria[index] = _more
            elif stream is not None and (chunk := stream.take()):
                answers[index], criteria[index] = chunk, _more
            else:
                del context.request_ids[index]
        # Read by TorchServe's encoder of replies, request by request; stale ones would be reused.
        context.stopping_criteria = criteria if self._is_continuous else None
        return answers

    def _emit_metrics(self, context: Any) -> None:
        assert self._engine is not None
        now_s, service = time.monotonic(), self._serving()
        if service.live_ids and now_s - self._emitted_s < _EMIT_EVERY_S:
            return
        self._emitted_s = now_s
        gauges = {
            "diffusers_requests_in_flight": float(self._engine.num_running),
            "diffusers_requests_waiting": float(self._engine.num_waiting),
            "diffusers_rows_in_flight": float(self._engine.in_flight.rows),
        }
        samples = service.meter.samples(self._engine.counters, gauges)
        emit(samples, context.metrics, context.model_name)

    def _serving(self) -> GenerationService:
        if self._service is None:
            raise RuntimeError("initialize(context) has not been called")
        return self._service


def _plain(_: object) -> bool | None:
    """TorchServe's stopping criterion for a reply that is no stream."""
    return None


def _more(_: object) -> bool | None:
    """A chunk of a stream that goes on."""
    return False


def _last(_: object) -> bool | None:
    """The last chunk of a stream."""
    return True


def _write(context: Any, index: int, call_id: str, reply: Reply) -> bytes:
    context.set_response_status(reply.status, reply.phrase, index)
    context.set_response_content_type(index, reply.content_type)
    for name, value in reply.headers.items():
        context.set_response_header(index, name, value)
    logger.debug("%s %d %s %d bytes", call_id, reply.status, reply.content_type, len(reply.body))
    return reply.body


def _headers(context: Any, index: int) -> dict[str, str]:
    """The request's headers by lower-cased name; TorchServe puts those of form parts among them."""
    headers: Mapping[str, object] = context.get_all_request_header(index)
    return {name.lower(): value for name, value in headers.items() if isinstance(value, str)}


def _check_workers(model_config: Mapping[str, Any], *, is_continuous: bool) -> None:
    # Left out, TorchServe takes one for each core.
    workers = [model_config.get(key) for key in ("minWorkers", "maxWorkers")]
    if is_continuous and workers != [1, 1]:
        raise ConfigError(
            "model-config.yaml: continuousBatching needs minWorkers: 1 and maxWorkers: 1, since "
            "requests share forwards inside one worker (TorchServe hangs with two)"
        )
