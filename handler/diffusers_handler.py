"""TorchServe's handler: its contexts, its cycles, and what its worker is told.

With ``continuousBatching: true`` TorchServe calls `handle` in cycles, each time with every live
request. A cycle opens the new ones, runs the engine for a while, answers what is finished, and
leaves the others out of its reply, so that they come again in the next cycle::

    cycle 1   open A, B   tick tick …   defer A, B
    cycle 2   open C      tick tick …   answer B, defer A, C
"""

from __future__ import annotations

import logging
import math
import os
import select
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from ts.torch_handler.base_handler import BaseHandler

from handler.api.traits import PipelineTraits
from handler.assembly import assemble
from handler.config import HandlerConfig
from handler.cycle_messages import CycleMessages
from handler.cycle_pace import MIN_BYTES, CyclePace
from handler.cycle_replies import CycleReplies, http_headers
from handler.errors import ConfigError, ServingError
from handler.garbage import leave_out_what_is_loaded
from handler.library_logs import quiet_for_good
from handler.loading.contents import MANIFEST_NAME
from handler.loading.pipeline import load_pipeline
from handler.service.draining import DRAIN_FILE_VARIABLE, Drain
from handler.service.generation import GenerationService
from handler.service.metrics import emit
from handler.service.worker_metrics import WorkerMetrics, archive_labels
from handler.single_worker import hold_model
from handler.torchserve_logs import shorten_torchserve_logs
from handler.watchdog import Watchdog

__all__ = ["EXIT_DEVICE_LOST", "MAX_WAITING_S", "SILENT_AFTER_S", "DiffusersHandler"]

logger = logging.getLogger(__name__)

_EMIT_EVERY_S = 1.0
MAX_WAITING_S = 2.0
"""How long is drawn while TorchServe's next message is awaited."""
# Between two cycles with live requests there are milliseconds.
SILENT_AFTER_S = 5.0
"""How long TorchServe may send nothing while requests are live."""
# Long enough for the last replies to leave, short enough that few requests come in between.
_END_AFTER_S = 1.0
EXIT_DEVICE_LOST = 75
"""What the worker's process ends with when its device has failed; TorchServe starts a new one."""


class DiffusersHandler(BaseHandler):  # type: ignore[misc]
    """Serves a zipped diffusers pipeline from its archive, many requests in flight at once."""

    def __init__(self) -> None:
        super().__init__()
        self.pipeline: Any = None
        self.config = HandlerConfig()
        self.traits = PipelineTraits(schedulers=(), size_multiple_px=8, parameters=frozenset())
        self._service: GenerationService | None = None
        self._watchdog: Watchdog | None = None
        self._messages: CycleMessages | None = None
        self._pace = CyclePace(self.config.cycle_ms / 1000)
        self._replies = CycleReplies()
        self._drain_file: Path | None = None
        self._is_continuous = False
        self._emitted_s = time.monotonic()
        self._ending: threading.Timer | None = None
        self._worker_metrics: WorkerMetrics | None = None
        self._worker_told_s = -math.inf

    @property
    def service(self) -> GenerationService:
        """The service behind the handler; there is one once `initialize` has been called."""
        if self._service is None:
            raise RuntimeError("initialize(context) has not been called")
        return self._service

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
        leave_out_what_is_loaded()
        self._emit_metrics(context)
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
        quiet_for_good()
        properties = context.system_properties
        loaded = load_pipeline(Path(properties["model_dir"]), self.config, properties.get("gpu_id"))
        self._service = assemble(loaded, self.config, model_name=context.model_name or "model")
        self.traits = self._service.traits
        self.pipeline, self.device = loaded.pipeline, loaded.device
        manifest = Path(properties["model_dir"]) / MANIFEST_NAME
        self._worker_metrics = WorkerMetrics(self.config, archive_labels(manifest), self.device)
        if drain_file := os.environ.get(DRAIN_FILE_VARIABLE):
            self._drain_file = Path(drain_file)
        if self._is_continuous:
            self._watchdog = Watchdog(self.on_silence, SILENT_AFTER_S)
            self._pace = CyclePace(self.config.cycle_ms / 1000)
            self._messages = CycleMessages(
                self._is_known,
                self.draw_while_waiting,
                # From a message's first byte on nothing may change which bodies are known.
                on_message=self._watchdog.stop,
            )
            self._messages.install()

    def preprocess(self, data: Sequence[Mapping[str, object]]) -> list[str]:
        """Return the prompts of the bodies that TorchServe delivers, in their order.

        Raises:
            RequestError: a body is not a valid request.
        """
        return [request.prompt for request in self.service.read(data)]

    def inference(self, data: Sequence[str], *args: Any, **kwargs: Any) -> list[Image.Image]:
        """Draw one picture a prompt, with the configured steps, guidance and size, a fresh seed."""
        service = self.service
        requests = service.read([{"data": prompt} for prompt in data])
        return [result.images[0] for result in service.draw(requests)]

    def postprocess(self, data: Sequence[Image.Image]) -> list[npt.NDArray[np.uint8]]:
        """Return pictures as uint8 arrays (H, W, 3)."""
        return [np.array(image.convert("RGB"), dtype=np.uint8) for image in data]

    def handle(self, data: Sequence[Mapping[str, object]], context: Any) -> list[bytes]:
        """Run one cycle. What goes wrong with a request becomes that request's reply."""
        service = self.service
        if self._watchdog is not None:
            self._watchdog.stop()
        self._pace.begin(self._messages.num_bytes if self._messages is not None else 0)
        ids: dict[int, str] = dict(context.request_ids)
        self._drop(service.live_ids - set(ids.values()))
        if self._drain_file is not None:
            service.drain(Drain.read(self._drain_file, time.monotonic()))
        for index, request_id in ids.items():
            if self._is_known(request_id):
                continue
            service.open(request_id, data[index], http_headers(context, index))
        if self._is_continuous:
            service.advance(self._pace.budget_s, hold_s=self._pace.hold_s)
        else:
            service.advance()
        bodies = self._replies.write(service, ids, context)
        if service.is_device_lost:
            self._end_process()
        self._emit_metrics(context)
        if self._watchdog is not None and service.live_ids:
            self._watchdog.start()
        self._pace.end(is_live=bool(service.live_ids))
        return bodies

    def draw_while_waiting(self, connection: socket.socket) -> None:
        """Draw while TorchServe puts its next message together.

        That takes long where the last one brought large bodies, which the next brings again.
        """
        if self._messages is None or self._messages.num_bytes < MIN_BYTES:
            return
        service, until_s = self.service, time.monotonic() + MAX_WAITING_S
        if self._watchdog is not None:
            self._watchdog.stop()
        while service.load.num_running and time.monotonic() < until_s and not _has_data(connection):
            service.advance(0.0)
        if self._watchdog is not None and service.live_ids:
            self._watchdog.start()

    def on_silence(self) -> None:
        """Let go of all live requests: TorchServe sends nothing, so it has let go of them.

        Should its next message have come just now, `handle` finds its context as it was.
        """
        if _has_data(self.context.cl_socket):
            if self._watchdog is not None:
                self._watchdog.start()
            return
        self._replies.interrupt_streams()
        service = self.service
        self._drop(service.live_ids)
        service.advance(self.config.cycle_ms / 1000)
        self._emit_metrics(self.context)

    def _is_known(self, request_id: str) -> bool:
        """Whether its body is not to be read (again)."""
        return request_id in self.service.live_ids or self._replies.is_interrupted(request_id)

    def _end_process(self) -> None:
        """End once the replies are sent: only a new process can use the device again."""
        if self._ending is not None:
            return
        logger.critical("the worker ends with code %d", EXIT_DEVICE_LOST)
        # By force: what runs at an ordinary exit waits for the device.
        self._ending = threading.Timer(_END_AFTER_S, os._exit, [EXIT_DEVICE_LOST])
        self._ending.daemon = True
        self._ending.start()

    def _drop(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self.service.drop(request_id)
            self._replies.forget(request_id)

    def _emit_metrics(self, context: Any) -> None:
        now_s = time.monotonic()
        if self.service.live_ids and now_s - self._emitted_s < _EMIT_EVERY_S:
            return
        self._emitted_s = now_s
        samples = self.service.samples()
        if self._worker_metrics is not None and now_s - self._worker_told_s >= _EMIT_EVERY_S:
            self._worker_told_s = now_s
            samples += self._worker_metrics.samples()
        emit(samples, context.metrics, context.model_name)


def _has_data(connection: socket.socket) -> bool:
    readable, _, _ = select.select([connection], [], [], 0)
    return bool(readable)


def _check_workers(model_config: Mapping[str, Any], *, is_continuous: bool) -> None:
    # Left out, TorchServe takes one for each core.
    workers = [model_config.get(key) for key in ("minWorkers", "maxWorkers")]
    if is_continuous and workers != [1, 1]:
        raise ConfigError(
            "model-config.yaml: continuousBatching needs minWorkers: 1 and maxWorkers: 1, since "
            "requests share forwards inside one worker (TorchServe hangs with two)"
        )
