"""gateway.telemetry: what /metrics says of real requests, and for whom."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.keys import add_key
from gateway.telemetry.metrics import BUCKETS_S
from handler import __version__
from tests.support.fake_front import (
    BODY,
    IMAGES,
    Values,
    eventually,
    in_front_of,
    running_instances,
    send,
)
from tests.support.fake_instance import MODEL, WORKER_DIED, FakeInstance, Received
from tests.support.gateways import RunningGateway


@pytest.fixture(scope="module")
def fakes() -> Iterator[list[FakeInstance]]:
    with running_instances(2) as running:
        yield running


@pytest.fixture(autouse=True)
def as_they_were(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "fakes" in request.fixturenames:
        for fake in request.getfixturevalue("fakes"):
            fake.answer, fake.is_ready = None, True


@pytest.fixture(scope="module")
def gateway(
    fakes: list[FakeInstance], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    with in_front_of(tmp_path_factory.mktemp("gateway"), fakes, max_in_flight=1) as running:
        yield running


def test_a_request_is_counted_and_timed(gateway: RunningGateway) -> None:
    assert send(gateway.url, IMAGES, BODY).status == 200
    before = Values(gateway)
    assert send(gateway.url, IMAGES, {**BODY, "n": 2}).status == 200
    after = Values(gateway)
    for name, labels, more in [
        ("gateway_requests_total", {"route": IMAGES, "status": "200", "code": "ok"}, 1),
        ("gateway_request_seconds_count", {"route": IMAGES}, 1),
        ("gateway_wait_seconds_count", {"model": MODEL}, 2),
        ("gateway_draw_seconds_count", {"model": MODEL, "outcome": "ok"}, 2),
        ("gateway_disconnects_total", {"route": IMAGES}, 0),
    ]:
        assert after(name, **labels) - before(name, **labels) == more, name
    assert after("gateway_request_seconds_sum") > before("gateway_request_seconds_sum")
    assert after("gateway_requests_open") == 1  # the one that asks
    assert after("gateway_build_info", version=__version__) == 1


def test_buckets_reach_from_quick_replies_to_long_drawings(gateway: RunningGateway) -> None:
    send(gateway.url, IMAGES, BODY)
    found = {
        sample.labels["le"]
        for family in Values(gateway).families
        for sample in family.samples
        if sample.name == "gateway_draw_seconds_bucket"
    }
    assert (min(BUCKETS_S), max(BUCKETS_S)) == (0.05, 600)
    assert {float(each) for each in found} == {*map(float, BUCKETS_S), float("inf")}


def test_errors_are_counted_by_their_code(gateway: RunningGateway) -> None:
    assert send(gateway.url, IMAGES, {**BODY, "model": "no such model"}).status == 404
    assert send(gateway.url, IMAGES, {**BODY, "n": 1000}).status == 400
    values = Values(gateway)
    assert values("gateway_requests_total", status="404", code="model_not_found") == 1
    assert values("gateway_requests_total", status="400", code="invalid_request") == 1


def test_errors_of_instances_that_are_passed_on_too(
    gateway: RunningGateway, fakes: list[FakeInstance]
) -> None:
    late = (504, {"error": {"code": "deadline_exceeded", "message": "late"}}, {})
    javas = (500, {"code": 500, "type": "InternalServerException", "message": "x"}, {})
    for reply in (late, javas):
        for fake in fakes:
            fake.answer = lambda _, reply=reply: reply
        assert send(gateway.url, f"/predictions/{MODEL}", BODY).status == reply[0]
    values, route = Values(gateway), "/predictions/{name}"
    for status, code in (("504", "deadline_exceeded"), ("500", "InternalServerException")):
        assert values("gateway_requests_total", route=route, status=status, code=code) == 1
    assert values("gateway_draw_seconds_count", outcome="error") == 2


def test_models_are_no_labels_of_routes(gateway: RunningGateway) -> None:
    for name in ("one", "two", "three"):
        send(gateway.url, f"/v1/models/{name}")
    values = Values(gateway)
    assert values("gateway_requests_total", route="/v1/models/{name}", status="404") == 3
    assert "three" not in values.text


def test_what_waits_is_seen_to_wait(gateway: RunningGateway, fakes: list[FakeInstance]) -> None:
    release = threading.Event()
    with holding(fakes, release), requests(gateway, 5) as finish:
        values = eventually(gateway, lambda v: v("gateway_requests_waiting") == 3)
        assert values("gateway_instance_requests") == 2
        assert values("gateway_load", model=MODEL) == 5
        assert [values("gateway_instance_requests", upstream=f.url) for f in fakes] == [1, 1]
        assert values("gateway_instance_max_requests", upstream=fakes[0].url) == 1
        assert values("gateway_requests_open") == 6
        assert values("gateway_body_bytes") > 0
        release.set()
        finish()
    values = eventually(gateway, lambda v: v("gateway_load") == 0)
    assert values("gateway_requests_waiting") == values("gateway_instance_requests") == 0
    assert values("gateway_body_bytes") == 0
    assert values("gateway_wait_seconds_sum") > 0


def test_ready_and_starts_of_each_instance(
    gateway: RunningGateway, fakes: list[FakeInstance]
) -> None:
    first, second = fakes
    before = Values(gateway)
    assert before("gateway_instance_ready", upstream=first.url, model=MODEL) == 1
    first.is_ready = False
    down = eventually(gateway, lambda v: not v("gateway_instance_ready", upstream=first.url))
    assert down("gateway_instance_ready", upstream=second.url) == 1
    first.is_ready = True
    up = eventually(gateway, lambda v: bool(v("gateway_instance_ready", upstream=first.url)))
    name = "gateway_instance_starts_total"
    assert up(name, upstream=first.url) - before(name, upstream=first.url) == 1
    assert up(name, upstream=second.url) == before(name, upstream=second.url)
    assert up("gateway_instance_max_rows", upstream=first.url) > 1


def test_deaths_are_counted_where_they_happen(
    gateway: RunningGateway, fakes: list[FakeInstance]
) -> None:
    before = Values(gateway) if send(gateway.url, IMAGES, BODY).status == 200 else None
    assert before is not None
    for fake in fakes:
        fake.answer = lambda _: (500, WORKER_DIED, {})
    assert send(gateway.url, IMAGES, BODY).status == 502
    after = Values(gateway)
    deaths = "gateway_instance_deaths_total"
    assert sum(after(deaths, upstream=f.url) for f in fakes) == 2
    assert after("gateway_resent_total", model=MODEL) - before("gateway_resent_total") == 1
    assert after("gateway_draw_seconds_count", outcome="died") == 2


def test_an_instance_that_is_full_is_counted(
    gateway: RunningGateway, fakes: list[FakeInstance]
) -> None:
    full = (503, {"error": {"code": "queue_full", "message": "full"}}, {"Retry-After": "1"})
    fakes[0].answer = fakes[1].answer = _first_time(full)
    assert send(gateway.url, IMAGES, BODY).status == 200
    assert Values(gateway)("gateway_not_taken_total") == 1


def test_clients_that_leave_are_counted(gateway: RunningGateway, fakes: list[FakeInstance]) -> None:
    release = threading.Event()
    with holding(fakes, release):
        leave_after_sending(gateway)
        values = eventually(gateway, lambda v: v("gateway_disconnects_total", route=IMAGES) == 1)
        assert values("gateway_requests_total", status="499") == 1
        assert values("gateway_draw_seconds_count", outcome="cancelled") == 1
        release.set()
    eventually(gateway, lambda v: v("gateway_load") == 0)


def test_a_stream_counts_until_its_last_event(
    gateway: RunningGateway, fakes: list[FakeInstance]
) -> None:
    event = b'event: image\ndata: {"image": "QUJD", "seeds": [1]}\n\n'
    for fake in fakes:
        fake.answer = lambda _: event
    before = Values(gateway)
    reply = send(gateway.url, IMAGES, {**BODY, "stream": True})
    assert b"completed" in reply.body
    after = Values(gateway)
    name = "gateway_request_seconds_count"
    assert after(name, route=IMAGES) - before(name, route=IMAGES) == 1
    assert after("gateway_disconnects_total") == before("gateway_disconnects_total")


def test_nothing_of_a_request_is_in_the_metrics(gateway: RunningGateway) -> None:
    send(gateway.url, IMAGES, BODY, {"X-Request-Id": "an-id", "Authorization": "Bearer secret"})
    text = Values(gateway).text
    for part in ("nobody shall read", "an-id", "secret"):
        assert part not in text


def test_probes_and_scrapes_are_no_requests(gateway: RunningGateway) -> None:
    for path in ("/healthz", "/readyz", "/metrics", "/metrics/instances"):
        send(gateway.url, path)
    assert not any(
        f'route="{path}"' in Values(gateway).text for path in ("/healthz", "/readyz", "/metrics")
    )


@pytest.mark.parametrize(
    ("metrics_for", "with_no_key", "with_other", "with_own"),
    [
        (None, 401, 403, 403),
        ("everybody", 200, 200, 200),
        ("nobody", 401, 403, 403),
        ("prometheus", 401, 403, 200),
    ],
)
def test_who_may_read_them_where_keys_are_needed(
    fakes: list[FakeInstance],
    tmp_path: Path,
    metrics_for: str | None,
    with_no_key: int,
    with_other: int,
    with_own: int,
) -> None:
    own = add_key(tmp_path / "keys", "prometheus", {})
    other = add_key(tmp_path / "keys", "client", {})
    settings = {} if metrics_for is None else {"metrics_for": metrics_for}
    with in_front_of(tmp_path, fakes, require_keys=True, **settings) as gateway:
        found = [
            send(gateway.url, "/metrics", headers=headers).status
            for headers in (
                {},
                {"Authorization": f"Bearer {other}"},
                {"Authorization": f"Bearer {own}"},
            )
        ]
    assert found == [with_no_key, with_other, with_own]


@pytest.mark.parametrize(("metrics_for", "status"), [("nobody", 403), ("prometheus", 401)])
def test_they_can_be_closed_on_loopback_too(
    fakes: list[FakeInstance], tmp_path: Path, metrics_for: str, status: int
) -> None:
    add_key(tmp_path / "keys", "prometheus", {})
    with in_front_of(tmp_path, fakes, metrics_for=metrics_for) as gateway:
        for path in ("/metrics", "/metrics/instances"):
            assert send(gateway.url, path).status == status


def test_a_reader_without_a_key_stops_the_start(fakes: list[FakeInstance], tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match=r"metrics_for: .* has no key 'prometheus'"),
        in_front_of(tmp_path, fakes, metrics_for="prometheus"),
    ):
        pass


WORKERS = """# TYPE Requests2XX counter
Requests2XX{{Level="Host",Hostname="h",}} 7.0
# HELP diffusers_rows_in_flight Torchserve prometheus gauge metric with unit: Count
# TYPE diffusers_rows_in_flight gauge
diffusers_rows_in_flight{{ModelName="toy",Level="Model",Hostname="h",}} {rows}
# HELP diffusers_request_seconds Torchserve prometheus histogram metric with unit: Seconds
# TYPE diffusers_request_seconds histogram
diffusers_request_seconds_bucket{{stage="queue",ModelName="toy",Level="Model",le="0.005",}} 1.0
diffusers_request_seconds_bucket{{stage="queue",ModelName="toy",Level="Model",le="+Inf",}} 2.0
diffusers_request_seconds_count{{stage="queue",ModelName="toy",Level="Model",}} 2.0
diffusers_request_seconds_sum{{stage="queue",ModelName="toy",Level="Model",}} 0.5
"""


def test_the_metrics_of_instances_are_passed_on(fakes: list[FakeInstance], tmp_path: Path) -> None:
    for rows, fake in zip((3, 5), fakes, strict=True):
        fake.metrics = WORKERS.format(rows=rows)
    with in_front_of(tmp_path, fakes, with_metrics=True) as gateway:
        values = Values(gateway, "/metrics/instances")
        for rows, fake in zip((3, 5), fakes, strict=True):
            assert values("diffusers_rows_in_flight", upstream=fake.url, ModelName="toy") == rows
            name = "diffusers_request_seconds_bucket"
            assert values(name, upstream=fake.url, le="0.005") == 1
            assert values("diffusers_request_seconds_sum", upstream=fake.url) == 0.5
        assert values.text.count("# TYPE diffusers_rows_in_flight gauge") == 1
        # TorchServe's own counters have no ending, and get none.
        assert f'\nRequests2XX{{upstream="{fakes[0].url}",Level="Host",' in values.text
        # One that says nothing, or nonsense, takes nothing of the others' away.
        fakes[0].metrics = "diffusers_rows_in_flight{ 3"
        values = Values(gateway, "/metrics/instances")
        assert values("diffusers_rows_in_flight") == 5
        fakes[1].metrics = ""
        assert "diffusers" not in Values(gateway, "/metrics/instances").text


@contextmanager
def holding(fakes: list[FakeInstance], release: threading.Event) -> Iterator[None]:
    """Let the instances draw nothing until `release`."""

    async def answer(_: Received) -> None:
        while not release.is_set():
            await asyncio.sleep(0.01)

    for fake in fakes:
        fake.answer = answer
    try:
        yield
    finally:
        release.set()


@contextmanager
def requests(gateway: RunningGateway, num: int) -> Iterator[Callable[[], None]]:
    """Send some at the same time inside the block; what is yielded waits for their replies."""
    threads = [threading.Thread(target=send, args=(gateway.url, IMAGES, BODY)) for _ in range(num)]
    for thread in threads:
        thread.start()

    def finish() -> None:
        for thread in threads:
            thread.join(30)

    try:
        yield finish
    finally:
        finish()


def leave_after_sending(gateway: RunningGateway) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port)
    connection.request("POST", IMAGES, json.dumps(BODY), {"Content-Type": "application/json"})
    eventually(gateway, lambda v: v("gateway_instance_requests") == 1)
    assert connection.sock is not None
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()


def _first_time(reply: Any) -> Callable[[Received], Any]:
    left = [reply]
    return lambda _: left.pop() if left else None
