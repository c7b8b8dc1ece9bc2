"""Spans of requests for OpenTelemetry: one trace a request, across gateway and worker.

    POST /v1/images/generations ─┬─ wait       for an instance, a span a picture
                                 └─ instance   what it did with it; its own spans are below

Nothing of what was sent is in them. OpenTelemetry is imported where an endpoint is configured and
nowhere else; a traceparent that a client sends is passed on in any case.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gateway.telemetry.facts import Facts
from handler import __version__
from handler.errors import ConfigError

__all__ = ["ENDPOINT_VARIABLE", "Tracing", "check_tracing", "make_tracing", "sent_traceparent"]

logger = logging.getLogger(__name__)

ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
"""OpenTelemetry's own; it counts where the settings name no endpoint."""
_SEND_EVERY_MS = 1000
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def sent_traceparent(headers: Mapping[str, str]) -> str:
    """The traceparent that a client sent; empty where it sent none that can be read."""
    sent = headers.get("traceparent", "").strip()
    return sent if _TRACEPARENT.fullmatch(sent) else ""


def check_tracing(setting: str | None) -> None:
    """Raise ConfigError where `setting` asks for traces, and OpenTelemetry is not installed."""
    if setting is None:
        return
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.sdk.trace.export  # noqa: F401
    except ImportError as error:
        problem = f"{error.name} is not installed: pip install 'diffusers-torchserve[tracing]'"
        raise ConfigError(f"trace_endpoint: {problem}") from error


def make_tracing(setting: str | None) -> Tracing | None:
    """What makes spans; None where nobody asked for it.

    Raises:
        ConfigError: the settings ask for it, and OpenTelemetry is not installed.
    """
    endpoint = setting or os.environ.get(ENDPOINT_VARIABLE)
    if not endpoint:
        return None
    try:
        check_tracing(endpoint)
    except ConfigError as problem:
        if setting is not None:
            raise
        # Set for all programs of a machine, perhaps: no reason not to serve.
        logger.warning("%s is set, and there are no traces: %s", ENDPOINT_VARIABLE, problem)
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    logger.info("traces go to %s", endpoint)
    exporter = OTLPSpanExporter(endpoint=endpoint)
    return Tracing(BatchSpanProcessor(exporter, schedule_delay_millis=_SEND_EVERY_MS))


class Tracing:
    """Hands spans to `processor`, once for each that has ended."""

    def __init__(self, processor: Any) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        name = os.environ.get("OTEL_SERVICE_NAME", "diffusers-gateway")
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": name, "service.version": __version__})
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("diffusers-torchserve.gateway")

    def close(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown()

    def begun(self, facts: Facts) -> None:
        """Begin the span of a request, within the trace that its client began, if it did."""
        if facts.is_keyless:
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract({"traceparent": facts.traceparent})
        facts.span = self._tracer.start_span(
            f"{facts.method} {facts.route}",
            context=parent,
            kind=SpanKind.SERVER,
            attributes={"http.request.method": facts.method, "http.route": facts.route},
        )
        facts.traceparent = _traceparent(facts.span)

    def ended(self, facts: Facts) -> None:
        """End the span of a request."""
        span = facts.span
        if span is None:
            return
        from opentelemetry.trace import Status, StatusCode

        span.set_attribute("request.id", facts.request_id)
        span.set_attribute("http.response.status_code", facts.status)
        if facts.model:
            span.set_attribute("model", facts.model)
        if facts.has_left:
            span.set_attribute("client.left", True)
        if facts.code:
            span.set_attribute("error.type", facts.code)
        if facts.status >= 500 or (facts.code and facts.status == 200):
            span.set_status(Status(StatusCode.ERROR, facts.code))
        span.end()

    @contextmanager
    def span(self, name: str, facts: Facts | None, **attributes: str) -> Iterator[Any]:
        """A span below that of a request, or of its own, for as long as the block runs."""
        from opentelemetry.trace import SpanKind, set_span_in_context

        parent = None if facts is None or facts.span is None else facts.span
        context = None if parent is None else set_span_in_context(parent)
        kind = SpanKind.CLIENT if name == "instance" else SpanKind.INTERNAL
        span = self._tracer.start_span(name, context=context, kind=kind, attributes=attributes)
        try:
            yield span
        finally:
            span.end()

    @staticmethod
    def traceparent(span: Any) -> str:
        """What continues a span elsewhere."""
        return _traceparent(span)


def _traceparent(span: Any) -> str:
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
