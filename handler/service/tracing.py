"""Spans of requests for OpenTelemetry, made when a request has ended; nothing of prompts.

    draw ─┬─ read_pictures   of what was sent, and LoRAs of the folder
          ├─ queue           until it was admitted
          ├─ encode_text     until the denoiser was called first
          ├─ steps 1-10 …    denoising, ten steps a span
          ├─ decode          until the picture was there
          └─ encode          as PNG, in threads

`draw` continues the trace that the request's traceparent names. OpenTelemetry is imported where an
endpoint is configured and nowhere else; its own variables (OTEL_…) count there.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from typing import Any

from handler.config import HandlerConfig
from handler.engine.ticket import Ticket
from handler.errors import ConfigError, DeviceLost, EngineFault, OutOfMemory, PipelineFailed
from handler.service.records import Record, Watcher

__all__ = ["ENDPOINT_VARIABLE", "Tracing", "make_tracing"]

logger = logging.getLogger(__name__)

ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
"""OpenTelemetry's own; it counts where the configuration names no endpoint."""
_SEND_EVERY_MS = 1000
_FAULTS = {error.code for error in (EngineFault, PipelineFailed, OutOfMemory, DeviceLost)}

# Name, begin and end by the service's clock, attributes.
_Span = tuple[str, float, float, dict[str, Any]]


def make_tracing(config: HandlerConfig, model_name: str) -> Watcher | None:
    """Return what sends traces; None where nobody asked for it.

    Raises:
        ConfigError: the configuration asks for it, and OpenTelemetry is not installed.
    """
    endpoint = config.trace_endpoint or os.environ.get(ENDPOINT_VARIABLE)
    if not endpoint:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        problem = f"{error.name} is not installed: pip install 'diffusers-torchserve[tracing]'"
        if config.trace_endpoint is not None:
            raise ConfigError(f"model-config.yaml: trace_endpoint: {problem}") from error
        # Set for all programs of a machine, perhaps: no reason not to draw.
        logger.warning("%s is set, and there are no traces: %s", ENDPOINT_VARIABLE, problem)
        return None
    logger.info("traces go to %s", endpoint)
    processor = BatchSpanProcessor(
        OTLPSpanExporter(endpoint=endpoint), schedule_delay_millis=_SEND_EVERY_MS
    )
    return Tracing(processor, model_name)


class Tracing:
    """Hands the spans of every request that has ended to `processor`."""

    def __init__(self, processor: Any, model_name: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        name = os.environ.get("OTEL_SERVICE_NAME", "diffusers-torchserve")
        provider = TracerProvider(
            resource=Resource.create({"service.name": name, "model": model_name})
        )
        provider.add_span_processor(processor)
        self._tracer = provider.get_tracer("diffusers-torchserve.worker")
        # The service's clock is monotonic; spans are in Unix time.
        self._offset_s = time.time() - time.monotonic()

    def __call__(self, record: Record) -> None:
        """Make its spans. A trace that fails is none: the request is not touched."""
        try:
            self._tell(record)
        except Exception:
            logger.exception("request %s has no trace", record.request_id)

    def _tell(self, record: Record) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        assert record.ended_s is not None
        parent = TraceContextTextMapPropagator().extract({"traceparent": record.traceparent})
        draw = self._tracer.start_span(
            "draw",
            context=parent,
            kind=SpanKind.SERVER,
            attributes=_attributes(record),
            start_time=self._ns(record.opened_s),
        )
        if record.outcome in _FAULTS:
            draw.set_status(Status(StatusCode.ERROR, record.outcome))
        inside = set_span_in_context(draw)
        for name, begun_s, ended_s, attributes in _spans(record):
            span = self._tracer.start_span(
                name, context=inside, attributes=attributes, start_time=self._ns(begun_s)
            )
            span.end(self._ns(ended_s))
        draw.end(self._ns(record.ended_s))

    def _ns(self, clock_s: float) -> int:
        return int((clock_s + self._offset_s) * 1e9)


def _attributes(record: Record) -> dict[str, Any]:
    found: dict[str, Any] = {"request.id": record.request_id, "outcome": record.outcome}
    if record.client_id is not None:
        found["request.client_id"] = record.client_id
    if record.requests:
        first = record.requests[0]
        found |= {
            "task": first.engine_task,
            "width": first.width,
            "height": first.height,
            "images": sum(each.num_images for each in record.requests),
            "steps": sum(ticket.num_steps_done for ticket in record.tickets),
            "loras": sorted(first.loras or ()),
        }
    return found


def _spans(record: Record) -> Iterator[_Span]:
    assert record.ended_s is not None
    if record.tickets and record.is_read:
        yield "read_pictures", record.opened_s, record.tickets[0].submitted_s, {}
    for index, ticket in enumerate(record.tickets):
        attributes = {"drawing": index} if len(record.tickets) > 1 else {}
        yield from _of_ticket(ticket, record, attributes)
    if record.encoding_s is not None:
        yield "encode", record.encoding_s, record.ended_s, {}


def _of_ticket(ticket: Ticket, record: Record, attributes: dict[str, Any]) -> Iterator[_Span]:
    ended_s = ticket.ended_s if ticket.ended_s is not None else record.ended_s
    assert ended_s is not None
    admitted_s = ended_s if ticket.admitted_s is None else ticket.admitted_s
    yield "queue", ticket.submitted_s, admitted_s, attributes
    if ticket.denoising_s is None:
        return
    yield "encode_text", admitted_s, ticket.denoising_s, attributes
    denoised_s = ended_s if ticket.denoised_s is None else ticket.denoised_s
    yield from _steps(ticket.denoising_s, denoised_s, record, attributes)
    if ticket.error is None and ticket.ended_s is not None:
        yield "decode", denoised_s, ended_s, attributes


def _steps(
    begun_s: float, denoised_s: float, record: Record, attributes: dict[str, Any]
) -> Iterator[_Span]:
    """Ten steps a span; all in one where the pipeline does not tell of its steps."""
    if not record.steps:
        yield "steps", begun_s, denoised_s, attributes
        return
    before = 0
    for step, done_s in record.steps:
        yield f"steps {before + 1}-{step}", begun_s, done_s, attributes
        begun_s, before = done_s, step
