"""gateway.telemetry.logs: lines of JSON, one a request, with the id that its client saw."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.keys import add_key
from gateway.telemetry.logs import JsonLines
from tests.support.fake_front import BODY, IMAGES, in_front_of, running_instances, send
from tests.support.fake_instance import MODEL, WORKER_DIED, FakeInstance
from tests.support.gateways import RunningGateway


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeInstance]:
    with running_instances(1) as (fake,):
        yield fake


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("gateway")
    return folder, add_key(folder / "keys", "a-team", {})


@pytest.fixture(scope="module")
def gateway(fake: FakeInstance, key: tuple[Path, str]) -> Iterator[RunningGateway]:
    with in_front_of(key[0], [fake], log_format="json") as running:
        yield running


def lines(gateway: RunningGateway) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gateway.log.splitlines()]


def of_request(gateway: RunningGateway, request_id: str) -> dict[str, Any]:
    """Its only line, which may be written just after its client has read the reply."""
    until_s = time.monotonic() + 10
    while True:
        found = [each for each in lines(gateway) if each.get("request_id") == request_id]
        if found or time.monotonic() > until_s:
            (line,) = found
            return line
        time.sleep(0.02)


def test_every_line_is_an_object(gateway: RunningGateway) -> None:
    assert all({"time", "level", "logger"} <= line.keys() for line in lines(gateway))


def test_a_request_is_one_line_with_the_clients_id(
    gateway: RunningGateway, fake: FakeInstance, key: tuple[Path, str]
) -> None:
    headers = {"Authorization": f"Bearer {key[1]}"}
    reply = send(gateway.url, IMAGES, {**BODY, "n": 2}, headers)
    line = of_request(gateway, reply.headers["x-request-id"])
    assert line["upstream_ids"] == [received.upstream_id for received in fake.received[-2:]]
    assert line["ms"] >= line["waited_ms"] >= 0
    assert {name: line[name] for name in ("method", "path", "status", "key", "model")} == {
        "method": "POST",
        "path": IMAGES,
        "status": 200,
        "key": "a-team",
        "model": MODEL,
    }
    assert line["instances"] == [fake.url, fake.url]
    assert line["resent"] == 0


def test_the_clients_own_id(gateway: RunningGateway) -> None:
    send(gateway.url, IMAGES, BODY, {"X-Request-Id": "its.own:id"})
    assert of_request(gateway, "its.own:id")["status"] == 200


def test_an_error_is_named(gateway: RunningGateway, fake: FakeInstance) -> None:
    send(gateway.url, IMAGES, {**BODY, "model": "other"}, {"X-Request-Id": "other"})
    line = of_request(gateway, "other")
    assert (line["status"], line["error"]) == (404, "model_not_found")
    fake.answer = lambda _: (500, WORKER_DIED, {})
    try:
        send(gateway.url, IMAGES, BODY, {"X-Request-Id": "felled"})
    finally:
        fake.answer = None
    found = [line for line in lines(gateway) if line.get("request_id") == "felled"]
    # What else is logged of a request has its id too.
    assert {line["logger"] for line in found} == {"gateway.access", "gateway.forwarding"}
    line = next(line for line in found if line["logger"] == "gateway.access")
    assert (line["status"], line["error"], line["resent"]) == (502, "instance_died", 1)


def test_a_stream_is_one_line_with_the_error_of_its_last_event(
    gateway: RunningGateway, fake: FakeInstance
) -> None:
    fake.answer = lambda _: b'event: error\ndata: {"status": 507, "error": {"code": "oom"}}\n\n'
    try:
        send(gateway.url, IMAGES, {**BODY, "stream": True}, {"X-Request-Id": "streamed"})
    finally:
        fake.answer = None
    line = of_request(gateway, "streamed")
    assert (line["status"], line["error"]) == (200, "oom")


def test_prompts_are_in_no_line(gateway: RunningGateway) -> None:
    send(gateway.url, IMAGES, BODY)
    send(gateway.url, IMAGES, {**BODY, "stream": True})
    assert "nobody shall read" not in gateway.log


def test_text_is_the_default(fake: FakeInstance, tmp_path: Path) -> None:
    with in_front_of(tmp_path, [fake]) as gateway:
        send(gateway.url, IMAGES, BODY, {"X-Request-Id": "plain"})
        (line,) = [line for line in gateway.log.splitlines() if " plain " in line]
    assert f"INFO gateway.access plain POST {IMAGES} 200 " in line
    assert line.endswith(" ms key -")


def test_an_exception_is_a_field() -> None:
    try:
        raise ValueError("wrong\nin two lines")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "said %s", ("it",), sys.exc_info())
    text = JsonLines().format(record)
    line = json.loads(text)
    assert "\n" not in text
    assert line["message"] == "said it"
    assert "ValueError: wrong\nin two lines" in line["exception"]
