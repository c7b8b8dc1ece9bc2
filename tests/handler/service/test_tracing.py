"""What is told of requests that have ended: spans, and a line of JSON; no prompts."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from handler.config import HandlerConfig
from handler.errors import ConfigError
from handler.service.records import Record, log_record
from handler.service.tracing import ENDPOINT_VARIABLE, Tracing, make_tracing
from scripts.repository import REPOSITORY
from tests.support.services import HTTP, Make, finish, open_request, tick

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACED = {**HTTP, "traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "its-own"}
PROMPT = "what nobody shall read"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> Tracing:
    return Tracing(SimpleSpanProcessor(exporter), "tiny")


def body(**fields: Any) -> dict[str, Any]:
    return {"body": {"prompt": PROMPT, "seed": 3, **fields}}


def in_order(exporter: InMemorySpanExporter) -> list[ReadableSpan]:
    return sorted(exporter.get_finished_spans(), key=lambda span: span.start_time or 0)


def names(exporter: InMemorySpanExporter) -> list[str]:
    return [span.name for span in in_order(exporter)]


def test_a_request_has_a_span_a_stage(
    make: Make, tracing: Tracing, exporter: InMemorySpanExporter
) -> None:
    service = make(watchers=[tracing])
    service.open("a", body(num_inference_steps=23), TRACED)
    finish(service)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    stages = ["queue", "encode_text", "steps 1-10", "steps 11-20", "steps 21-23", "decode"]
    assert spans.keys() == {"draw", *stages, "encode"}
    draw = spans["draw"]
    assert draw.parent is not None
    assert draw.context is not None
    assert (f"{draw.context.trace_id:032x}", f"{draw.parent.span_id:016x}") == (TRACE, PARENT)
    for span in spans.values():
        assert span.context is not None
        assert span.context.trace_id == draw.context.trace_id
        assert draw.start_time is not None
        assert span.start_time is not None
        assert span.end_time is not None
        assert draw.end_time is not None
        assert draw.start_time <= span.start_time <= span.end_time <= draw.end_time
        if span is not draw:
            assert span.parent is not None
            assert span.parent.span_id == draw.context.span_id
    # They follow one another without a gap.
    for before, after in pairwise(stages):
        assert spans[before].end_time == spans[after].start_time, (before, after)
    assert dict(draw.attributes or {}) == {
        "request.id": "a",
        "request.client_id": "its-own",
        "outcome": "ok",
        "task": "text-to-image",
        "width": 32,
        "height": 32,
        "images": 1,
        "steps": 23,
        "loras": (),
    }


def test_a_request_of_nobodys_trace_begins_one(
    make: Make, tracing: Tracing, exporter: InMemorySpanExporter
) -> None:
    service = make(watchers=[tracing])
    open_request(service, "a")
    open_request(service, "b")
    finish(service)
    draws = [span for span in exporter.get_finished_spans() if span.name == "draw"]
    assert [span.parent for span in draws] == [None, None]
    assert len({span.context.trace_id for span in draws if span.context}) == 2


def test_what_is_refused_is_a_span_too(
    make: Make, tracing: Tracing, exporter: InMemorySpanExporter
) -> None:
    service = make(watchers=[tracing])
    service.open("a", body(stpes=3), TRACED)
    service.take_replies()
    (span,) = exporter.get_finished_spans()
    assert span.attributes is not None
    assert (span.name, span.attributes["outcome"]) == ("draw", "invalid_request")
    assert span.status.is_unset


def test_faults_are_errors(make: Make, tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    service = make(watchers=[tracing])
    open_request(service, "a", "crash late")
    finish(service)
    (draw,) = [span for span in exporter.get_finished_spans() if span.name == "draw"]
    assert draw.status.status_code.name == "ERROR"
    assert draw.status.description == "engine_fault"
    assert "decode" not in names(exporter)


def test_who_leaves_while_it_waits(
    make: Make, tracing: Tracing, exporter: InMemorySpanExporter
) -> None:
    service = make(watchers=[tracing], max_rows=2, max_images=1)
    open_request(service, "a", num_inference_steps=900)
    tick(service)
    service.open("b", body(), TRACED)
    tick(service)
    service.drop("b")
    assert sorted(names(exporter)) == ["draw", "queue"]
    service.drop("a")
    draws = [span for span in exporter.get_finished_spans() if span.name == "draw"]
    assert [dict(span.attributes or {})["outcome"] for span in draws] == ["disconnected"] * 2


def test_several_drawings_of_one_request(
    make: Make, tracing: Tracing, exporter: InMemorySpanExporter
) -> None:
    service = make(watchers=[tracing])
    service.open("a", {"body": {"instances": ["x", "y"]}}, TRACED)
    finish(service)
    found = names(exporter)
    assert found.count("draw") == found.count("encode") == 1
    assert found.count("queue") == found.count("steps") == found.count("decode") == 2


def test_prompts_are_in_no_span_and_no_line(
    make: Make, tracing: Tracing, exporter: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    service = make(watchers=[tracing, log_record])
    with caplog.at_level(logging.INFO, "handler.requests"):
        service.open("a", body(negative_prompt=PROMPT), TRACED)
        finish(service)
    assert caplog.messages
    assert PROMPT not in caplog.text
    assert not [span for span in exporter.get_finished_spans() if PROMPT in span.to_json()]


def test_a_line_a_request(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    service = make(watchers=[log_record])
    with caplog.at_level(logging.INFO, "handler.requests"):
        service.open("a", body(num_inference_steps=5), TRACED)
        service.open("b", body(stpes=3), {})
        finish(service)
    lines = {line["request_id"]: line for line in map(json.loads, caplog.messages)}
    assert len(caplog.messages) == 2
    assert {k: v for k, v in lines["a"].items() if not k.endswith("ms")} == {
        "request_id": "a",
        "client_id": "its-own",
        "outcome": "ok",
        "task": "text-to-image",
        "images": 1,
        "size": "32x32",
        "steps": 5,
    }
    assert lines["a"].keys() >= {"ms", "queue_ms"}
    assert (lines["b"]["outcome"], "client_id" in lines["b"]) == ("invalid_request", False)


def test_a_watcher_that_fails_hurts_nobody(
    make: Make, tracing: Tracing, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(record: Record) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(tracing, "_tell", fail)
    service = make(watchers=[tracing])
    open_request(service, "a")
    assert finish(service)["a"].status == 200
    assert "request a has no trace" in caplog.text


def test_nobody_is_told_where_nobody_asked() -> None:
    assert make_tracing(HandlerConfig(), "tiny") is None
    code = (
        "import sys, handler.assembly;"
        " sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_without_opentelemetry_the_configuration_is_wrong_and_the_variable_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with pytest.raises(ConfigError, match=r"trace_endpoint: .*tracing"):
        make_tracing(HandlerConfig(trace_endpoint="http://127.0.0.1:1"), "tiny")
    monkeypatch.setenv(ENDPOINT_VARIABLE, "http://127.0.0.1:1")
    assert make_tracing(HandlerConfig(), "tiny") is None
    assert "there are no traces" in caplog.text
