"""What a drain asks and when it gives up, without a server; tests/server/test_drain.py has one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from handler.service.draining import Drain
from scripts.torchserve import draining
from scripts.torchserve.draining import drain
from scripts.torchserve.options import Options, Ports
from scripts.torchserve.process import TorchServer
from tests.support.toy_archive import write_toy_archive

QUEUE_FULL = b'{"code": 503, "type": "ServiceUnavailableException", "message": "no worker"}'
Start = Callable[..., tuple[TorchServer, list[str]]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start what answers with these bodies one after the other, and tells what it was asked."""
    frontends = []

    def run(*bodies: bytes, is_ready: bool = True) -> tuple[TorchServer, list[str]]:
        asked: list[str] = []
        left = list(bodies)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked.append(body["cancel"])
                self.send_response(200)
                self.end_headers()
                self.wfile.write(left.pop(0))

            def log_message(self, *args: object) -> None:
                pass

        frontend = HTTPServer(("127.0.0.1", 0), Handler)
        frontends.append(frontend)
        threading.Thread(target=frontend.serve_forever, daemon=True).start()
        archive = write_toy_archive(tmp_path / "store")
        ports = Ports(inference=frontend.server_port)
        server = TorchServer(Options(archive, tmp_path / "run", ports))
        server.drain_file.parent.mkdir(parents=True)
        monkeypatch.setattr(TorchServer, "is_ready", lambda self: is_ready)
        return server, asked

    yield run
    for frontend in frontends:
        frontend.shutdown()
        frontend.server_close()


def test_it_asks_until_nothing_is_live_and_tells(start: Start) -> None:
    server, asked = start(b'{"live": 2}', QUEUE_FULL, b'{"live": 1}', b'{"live": 0}')
    told: list[int] = []
    drain(server, 600, lambda num_live, waited_s: told.append(num_live))
    assert told == [2, 1]
    assert len(asked) == 4
    assert len(set(asked)) == 1
    written = Drain.read(server.drain_file, time.monotonic())
    assert written is not None
    assert written.inquiry == asked[0]
    assert 500 < written.until_s - time.monotonic() <= 600


@pytest.mark.parametrize("reply", [b"{'cancel': b''}", b'{"error": {"code": "not_found"}}', b""])
def test_a_handler_that_does_not_know_it_is_asked_once(start: Start, reply: bytes) -> None:
    server, asked = start(reply)
    drain(server, 600)
    assert len(asked) == 1


@pytest.mark.parametrize(("drain_s", "is_ready"), [(0, True), (600, False)])
def test_without_time_or_a_worker_nothing_is_asked(
    start: Start, drain_s: float, is_ready: bool
) -> None:
    server, asked = start(is_ready=is_ready)
    drain(server, drain_s)
    assert not asked
    assert not server.drain_file.exists()


def test_who_never_ends_is_given_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draining, "GRACE_S", 0.5)
    server, asked = start(*[b'{"live": 1}'] * 20)
    drain(server, 0.2)
    assert 1 <= len(asked) < 20


@pytest.mark.parametrize("earlier", [None, Drain(time.monotonic() + 1e6, "earlier")])
def test_an_interrupted_one_leaves_things_as_they_were(start: Start, earlier: Drain | None) -> None:
    server, asked = start(b'{"live": 1}')
    if earlier is not None:
        earlier.write(server.drain_file)

    def interrupt(num_live: int, waited_s: float) -> None:
        written = Drain.read(server.drain_file, time.monotonic())
        assert written is not None
        assert written != earlier
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drain(server, 600, interrupt)
    # Two that drain one server ask alike, so that neither is a stranger to the worker.
    assert earlier is None or asked == [earlier.inquiry]
    assert Drain.read(server.drain_file, time.monotonic()) == earlier


def test_a_server_is_stopped_also_where_no_drain_can_be_written(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    server, asked = start()
    server.drain_file.parent.rmdir()  # As on a full disk: an OSError.
    drain(server, 5)
    assert asked == []
    assert "are not finished" in capsys.readouterr().err
