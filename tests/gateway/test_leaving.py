"""Clients that leave before their reply: what they asked for is cancelled on the instance."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from scripts.torchserve.process import TorchServer
from tests.support.gateways import RunningGateway
from tests.support.traffic import metrics, until

pytestmark = pytest.mark.server

LONG = {"prompt": "a ring", "num_inference_steps": 1000}


def outcomes(server: TorchServer, outcome: str) -> float:
    return metrics(server).get(f"diffusers_requests_total{{outcome={outcome}}}", 0.0)


def in_flight(server: TorchServer) -> float:
    return metrics(server).get("diffusers_requests_in_flight", 0.0)


@contextmanager
def posted(gateway: RunningGateway, path: str, fields: object) -> Iterator[socket.socket]:
    """A connection over which a request has been sent."""
    body = json.dumps(fields).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as connection:
        connection.sendall(head.encode() + body)
        yield connection


def read_reply(connection: socket.socket) -> tuple[list[bytes], bytes]:
    """The lines of status of a reply, interim ones first, and its body up to the end."""
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    statuses = []
    while True:
        head, _, received = received.partition(b"\r\n\r\n")
        statuses.append(head.split(b"\r\n")[0])
        if b" 100 " not in statuses[-1]:
            return statuses, received


@pytest.mark.parametrize(
    ("path", "fields", "outcome"),
    [
        ("/v1/images/generations", LONG, "cancelled"),
        ("/v1/images/generations", {**LONG, "n": 3}, "cancelled"),
        ("/v1/images/generations", {**LONG, "stream": True}, None),
        ("/predictions/stable_diffusion", LONG, "cancelled"),
        ("/v1/models/stable_diffusion:predict", {"instances": [LONG, LONG]}, "cancelled"),
    ],
)
def test_what_nobody_waits_for_is_cancelled(
    gateway: RunningGateway,
    instance: TorchServer,
    path: str,
    fields: dict[str, object],
    outcome: str,
) -> None:
    ok, cancelled = outcomes(instance, "ok"), outcomes(instance, "cancelled")
    with posted(gateway, path, fields):
        assert until(lambda: in_flight(instance), lambda number: number > 0) > 0
    assert until(lambda: in_flight(instance), lambda number: number == 0) == 0
    assert outcomes(instance, "ok") == ok
    if outcome is not None:
        assert until(lambda: outcomes(instance, outcome), lambda number: number > cancelled)


def test_a_stream_that_was_read_so_far_is_cancelled(
    gateway: RunningGateway, instance: TorchServer
) -> None:
    """As a browser leaves it: with nothing unread, long before the next preview."""
    with posted(gateway, "/v1/images/generations", {**LONG, "stream": True}) as connection:
        assert b"200 OK" in connection.recv(65536)
        assert until(lambda: in_flight(instance), lambda number: number > 0) > 0
        while b": drawing" not in connection.recv(65536):
            pass
    assert until(lambda: in_flight(instance), lambda number: number == 0) == 0


def test_a_client_that_shuts_its_side_gets_its_picture(gateway: RunningGateway) -> None:
    """As `nc -N` and others do; TorchServe itself resets them."""
    fields = {"prompt": "a ring", "size": "64x64", "num_inference_steps": 60}
    with posted(gateway, "/v1/images/generations", fields) as connection:
        connection.shutdown(socket.SHUT_WR)
        statuses, body = read_reply(connection)
    assert statuses[-1] == b"HTTP/1.1 200 OK"
    assert b'"b64_json"' in body


def test_a_stream_to_a_client_that_shuts_its_side(gateway: RunningGateway) -> None:
    fields = {"prompt": "a ring", "size": "64x64", "num_inference_steps": 60, "stream": True}
    with posted(gateway, "/v1/images/generations", fields) as connection:
        connection.shutdown(socket.SHUT_WR)
        statuses, body = read_reply(connection)
    assert statuses[-1] == b"HTTP/1.1 200 OK"
    assert b"image_generation.completed" in body
    assert b"data: [DONE]" in body
