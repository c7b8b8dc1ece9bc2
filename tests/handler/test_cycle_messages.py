"""Messages of TorchServe through its own codec, and what is not read of them."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from ts.protocol import otf_message_handler as codec

from handler import diffusers_handler
from handler.cycle_messages import CycleMessages
from handler.cycle_pace import MIN_BYTES
from handler.diffusers_handler import DiffusersHandler
from tests.support.frontend import CONTINUOUS, PATIENCE_S, QUICK, Frontend
from tests.support.pipelines import build

END = struct.pack("!i", -1)
HEADERS = {"content-type": "application/json", "x-odd": "é"}


def part(data: bytes) -> bytes:
    return struct.pack("!i", len(data)) + data


def message(bodies: Mapping[str, bytes], *others: str) -> bytes:
    """An inference message with a JSON body for each id, and others, empty, beside it."""
    sent = bytearray(codec.PREDICT_MSG)
    for request_id, body in bodies.items():
        sent += part(request_id.encode())
        for name, value in HEADERS.items():
            sent += part(name.encode()) + part(value.encode())
        sent += END
        for name, value in {"body": body, **dict.fromkeys(others, b"")}.items():
            sent += part(name.encode()) + part(b"application/json") + part(value)
        sent += END
    return bytes(sent + END)


@pytest.fixture(autouse=True)
def codec_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is installed is TorchServe's own again afterwards."""
    for name in ("_retrieve_buffer", "_retrieve_request"):
        monkeypatch.setattr(codec, name, getattr(codec, name))


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """TorchServe's end and ours."""
    theirs, ours = socket.socketpair()
    yield theirs, ours
    theirs.close()
    ours.close()


def receive(pair: tuple[socket.socket, socket.socket], sent: bytes) -> Any:
    theirs, ours = pair
    sender = threading.Thread(target=theirs.sendall, args=(sent,))
    sender.start()
    command, received = codec.retrieve_msg(ours)
    sender.join()
    assert command == codec.PREDICT_MSG
    return received


def test_known_bodies_are_left_out_and_all_else_is_as_torchserve_reads_it(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    bodies = {
        "new": b'{"prompt": "a cat"}',
        "known": b'{"prompt": "' + b"x" * 3_000_000 + b'"}',
        "known too": b"[not JSON",
        "newer": b"{}",
    }
    sent = message(bodies, "other")
    expected = receive(pair, sent)
    told: list[object] = []
    messages = CycleMessages(
        is_known=lambda request_id: request_id.startswith("known"),
        while_waiting=lambda connection: told.append(connection is pair[1]),
        on_message=lambda: told.append("message"),
    )
    messages.install()
    for _ in range(2):
        told.clear()
        received = receive(pair, sent)
        assert told == [True, "message"]
        assert [len(request["parameters"]) for request in received] == [2, 0, 0, 2]
        for request in expected:
            if request["requestId"].startswith(b"known"):
                request["parameters"] = []
        assert received == expected
        assert messages.num_bytes == len(sent)


def test_a_frontend_that_is_gone_ends_the_worker(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    messages = CycleMessages(lambda _: True, lambda _: None, lambda: None)
    messages.install()
    theirs, ours = pair
    theirs.sendall(message({"known": b'"' + b"x" * 1000 + b'"'})[:-500])
    theirs.close()
    with pytest.raises(SystemExit):
        codec.retrieve_msg(ours)


def test_the_handler_draws_while_a_large_message_is_on_its_way(
    tmp_path: Path, pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diffusers_handler, "MAX_WAITING_S", PATIENCE_S)
    build("stable_diffusion").save_pretrained(tmp_path / "model")
    handler = DiffusersHandler()
    settings = {**CONTINUOUS, "handler": {**QUICK, "cycle_ms": 0}}
    frontend = Frontend(handler, tmp_path, settings)
    handler.initialize(frontend.context)
    theirs, ours = pair
    frontend.context.cl_socket = ours
    small = json.dumps({"prompt": "a cat", "num_inference_steps": 20}).encode()
    frontend.predict(receive(pair, message({"one": small})))
    # What is small comes at once.
    handler.draw_while_waiting(ours)
    assert handler.service.load.num_running == 1
    bodies = {"one": small, "two": small + b" " * MIN_BYTES}
    frontend.predict(receive(pair, message(bodies)))
    theirs.sendall(b"I")
    handler.draw_while_waiting(ours)
    assert handler.service.load.num_running == 2
    ours.recv(1)
    handler.draw_while_waiting(ours)
    assert handler.service.load.num_running == 0
    received = receive(pair, message(bodies))
    assert [request["parameters"] for request in received] == [[], []]
    frontend.predict(received)
    while handler.service.live_ids:
        frontend.predict(receive(pair, message(dict.fromkeys(handler.service.live_ids, b""))))
