"""Receives what OpenTelemetry sends: OTLP over HTTP, spans as plain values."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

__all__ = ["Receiver", "Span", "running_receiver"]


@dataclass(frozen=True, slots=True)
class Span:
    """One span, as it came."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    begun_s: float
    ended_s: float
    attributes: dict[str, Any]
    is_error: bool


@dataclass(slots=True)
class Receiver:
    """Where spans are sent, and those that came."""

    endpoint: str = ""
    spans: list[Span] = field(default_factory=list)
    raw: bytes = b""

    def wait_for(self, is_so: Callable[[list[Span]], bool], timeout_s: float = 20) -> list[Span]:
        """The spans, once they are as they shall be."""
        until_s = time.monotonic() + timeout_s
        while not is_so(spans := list(self.spans)):
            assert time.monotonic() < until_s, [(span.service, span.name) for span in spans]
            time.sleep(0.05)
        return spans


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind)


def _spans(request: ExportTraceServiceRequest) -> Iterator[Span]:
    for of_resource in request.resource_spans:
        resource = {each.key: _value(each.value) for each in of_resource.resource.attributes}
        for of_scope in of_resource.scope_spans:
            for span in of_scope.spans:
                yield Span(
                    resource["service.name"],
                    span.name,
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.start_time_unix_nano / 1e9,
                    span.end_time_unix_nano / 1e9,
                    {each.key: _value(each.value) for each in span.attributes},
                    span.status.code == span.status.STATUS_CODE_ERROR,
                )


@contextmanager
def running_receiver() -> Iterator[Receiver]:
    """Run one on a free port inside the block."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            receiver.raw += body
            receiver.spans += _spans(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    receiver.endpoint = f"http://127.0.0.1:{server.server_port}/v1/traces"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
