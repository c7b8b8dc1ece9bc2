"""gateway.telemetry.tracing: the spans of a request, and what instances continue them by."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.telemetry.tracing import ENDPOINT_VARIABLE, sent_traceparent
from scripts.repository import REPOSITORY
from tests.support.fake_front import BODY, IMAGES, in_front_of, running_instances, send
from tests.support.fake_instance import MODEL, WORKER_DIED, FakeInstance
from tests.support.gateways import RunningGateway
from tests.support.otlp import Receiver, Span, running_receiver

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SENT = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeInstance]:
    with running_instances(1) as (fake,):
        yield fake


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with running_receiver() as receiver:
        yield receiver


@pytest.fixture(autouse=True)
def afresh(receiver: Receiver, fake: FakeInstance) -> Iterator[None]:
    yield
    receiver.spans.clear()
    receiver.raw = b""
    fake.answer = None


@pytest.fixture(scope="module")
def gateway(
    fake: FakeInstance, receiver: Receiver, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway")
    with in_front_of(folder, [fake], trace_endpoint=receiver.endpoint) as running:
        yield running


def by_name(spans: list[Span], name: str) -> list[Span]:
    return [span for span in spans if span.name == name]


def test_a_request_is_a_trace(
    gateway: RunningGateway, fake: FakeInstance, receiver: Receiver
) -> None:
    send(gateway.url, IMAGES, {**BODY, "n": 2}, {"X-Request-Id": "mine"})
    spans = receiver.wait_for(lambda spans: len(spans) == 5)
    (root,) = by_name(spans, f"POST {IMAGES}")
    assert root.parent_id == ""
    assert root.service == "diffusers-gateway"
    assert root.attributes["request.id"] == "mine"
    assert root.attributes["http.response.status_code"] == 200
    inner = [*by_name(spans, "wait"), *by_name(spans, "instance")]
    assert len(inner) == 4
    for span in inner:
        assert (span.trace_id, span.parent_id) == (root.trace_id, root.span_id)
        assert root.begun_s <= span.begun_s <= span.ended_s <= root.ended_s
    sent = {received.traceparent[:-3] for received in fake.received[-2:]}
    assert sent == {f"00-{root.trace_id}-{span.span_id}" for span in by_name(spans, "instance")}
    assert {span.attributes["outcome"] for span in by_name(spans, "instance")} == {"ok"}


def test_it_continues_its_clients_trace(gateway: RunningGateway, receiver: Receiver) -> None:
    send(gateway.url, IMAGES, BODY, {"traceparent": SENT})
    spans = receiver.wait_for(lambda spans: len(spans) == 3)
    (root,) = by_name(spans, f"POST {IMAGES}")
    assert (root.trace_id, root.parent_id) == (TRACE, PARENT)


def test_what_its_client_does_not_sample_is_not_sent(
    gateway: RunningGateway, fake: FakeInstance, receiver: Receiver
) -> None:
    send(gateway.url, IMAGES, BODY, {"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert fake.received[-1].traceparent.startswith(f"00-{TRACE}-")
    assert fake.received[-1].traceparent.endswith("-00")
    send(gateway.url, IMAGES, BODY)
    spans = receiver.wait_for(lambda spans: len(spans) == 3)
    assert TRACE not in {span.trace_id for span in spans}


def test_deaths_are_in_it(gateway: RunningGateway, fake: FakeInstance, receiver: Receiver) -> None:
    fake.answer = lambda _: (500, WORKER_DIED, {})
    assert send(gateway.url, IMAGES, BODY).status == 502
    spans = receiver.wait_for(lambda spans: len(spans) == 5)
    assert [s.attributes["outcome"] for s in by_name(spans, "instance")] == ["died", "died"]
    (root,) = by_name(spans, f"POST {IMAGES}")
    assert root.is_error
    assert root.attributes["error.type"] == "instance_died"


def test_a_stream_lasts_until_its_last_event(
    gateway: RunningGateway, fake: FakeInstance, receiver: Receiver
) -> None:
    fake.answer = lambda _: b'event: image\ndata: {"image": "QUJD", "seeds": [1]}\n\n'
    send(gateway.url, IMAGES, {**BODY, "stream": True})
    spans = receiver.wait_for(lambda spans: len(spans) == 3)
    (root,), (instance,) = by_name(spans, f"POST {IMAGES}"), by_name(spans, "instance")
    assert root.ended_s >= instance.ended_s


def test_prompts_keys_and_probes_are_not_in_it(gateway: RunningGateway, receiver: Receiver) -> None:
    send(gateway.url, "/healthz")
    send(gateway.url, IMAGES, BODY, {"Authorization": "Bearer secret-of-a-client"})
    spans = receiver.wait_for(lambda spans: len(spans) == 3)
    assert not by_name(spans, "GET /healthz")
    assert MODEL.encode() in receiver.raw
    for secret in (b"nobody shall read", b"secret-of-a-client"):
        assert secret not in receiver.raw


def test_without_an_endpoint_the_clients_trace_is_passed_on(
    fake: FakeInstance, tmp_path: Path
) -> None:
    with in_front_of(tmp_path, [fake], log_format="json") as gateway:
        send(gateway.url, IMAGES, BODY, {"traceparent": SENT})
        assert fake.received[-1].traceparent == SENT
        assert f'"trace_id": "{TRACE}"' in gateway.log
        send(gateway.url, IMAGES, BODY)
        assert fake.received[-1].traceparent == ""
        send(gateway.url, IMAGES, BODY, {"traceparent": "00-nonsense"})
        assert fake.received[-1].traceparent == ""


def test_opentelemetrys_own_variable_counts(
    fake: FakeInstance, tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENDPOINT_VARIABLE, receiver.endpoint)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    with in_front_of(tmp_path, [fake]) as gateway:
        send(gateway.url, IMAGES, BODY)
    # What had not been sent is sent at the end.
    spans = receiver.wait_for(lambda spans: len(spans) == 3)
    assert {span.service for span in spans} == {"ours"}


def test_nothing_of_opentelemetry_is_imported_where_nobody_asked_for_it() -> None:
    code = (
        "import sys, gateway.app; from gateway.telemetry.tracing import make_tracing;"
        " assert make_tracing(None) is None;"
        " sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


@pytest.mark.parametrize(
    "wrong",
    [
        *("", "x", SENT[:-1], SENT + "0", SENT.upper().replace("00-", "00-", 1)),
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{PARENT}-01",
    ],
)
def test_what_is_no_traceparent_is_none(wrong: str) -> None:
    assert sent_traceparent({"traceparent": wrong}) == ""
    assert sent_traceparent({"traceparent": SENT}) == SENT
