"""`make stop`: no client is reset, whatever it was doing."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from handler.service.draining import Drain
from scripts.repository import REPOSITORY
from scripts.serve import main
from scripts.torchserve.options import Options, Ports
from scripts.torchserve.process import TorchServer
from tests.support.client import Answer, grpc_predict, post_json
from tests.support.serving import MODEL, build_quick_archive
from tests.support.traffic import metrics, until, watching

# Some seconds each, of many short steps.
FIELDS: dict[str, Any] = {"prompt": "a heart", "seed": 3, "num_inference_steps": 150}
# Longer than any test, in short steps.
LONG: dict[str, Any] = {
    "prompt": "a ring",
    "seed": 1,
    "num_inference_steps": 1000,
    "num_images": 4,
    "output_format": "json",
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_quick_archive(tmp_path_factory.mktemp("archive"), {}, "dir")


@pytest.fixture
def server(archive: Path, tmp_path: Path) -> Iterator[TorchServer]:
    """A server of its own for each test, since each stops it."""
    with TorchServer(Options(archive, tmp_path / "run", Ports.free())).running(120) as server:
        yield server


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def stop(server: TorchServer, drain_s: float) -> int:
    return main(["stop", "--run-dir", str(server.state_dir), "--drain-s", str(drain_s)])


def wait_for_running(server: TorchServer, count: int) -> None:
    running = until(
        lambda: metrics(server).get("diffusers_requests_in_flight"), lambda number: number == count
    )
    assert running == count


def refused(server: TorchServer) -> Answer:
    """The first answer that is not a picture: the stop has begun."""
    return until(
        lambda: post_json(server.predictions_url, {"prompt": "a", "num_inference_steps": 1}),
        lambda answer: answer.status != 200,
    )


def test_what_is_in_flight_is_finished_and_what_is_new_refused(
    server: TorchServer, threads: ThreadPoolExecutor
) -> None:
    url = server.predictions_url
    with watching(url, FIELDS) as watched:
        plain = [threads.submit(post_json, url, {**FIELDS, "seed": seed}) for seed in range(3)]
        over_grpc = threads.submit(
            grpc_predict,
            server.options.ports.grpc_inference,
            MODEL,
            {name: str(value).encode() for name, value in FIELDS.items()},
        )
        wait_for_running(server, 5)
        stopped = threads.submit(stop, server, 60)
        new = refused(server)
        assert not any(future.done() for future in plain)
        assert new.status == 503
        assert new.error()["code"] == "draining"
        assert int(new.headers["retry-after"]) > 30
        as_stream = post_json(url, {"prompt": "a", "stream": True})
        assert (as_stream.status, as_stream.error()["code"]) == (503, "draining")
        assert watched.events()[-1][0] == "image"
    assert [future.result().status for future in plain] == [200] * 3
    assert over_grpc.result().startswith(b"\x89PNG")
    assert stopped.result() == 0
    assert TorchServer.find(server.state_dir) is None


def test_what_takes_longer_is_told_so_and_not_reset(
    server: TorchServer, threads: ThreadPoolExecutor
) -> None:
    url = server.predictions_url
    with watching(url, LONG) as watched:
        plain = threads.submit(post_json, url, LONG)
        wait_for_running(server, 2)
        # Twice four guided pictures fill the rows: this one waits for them.
        waiting = threads.submit(post_json, url, {"prompt": "a heart"})
        number = until(lambda: metrics(server)["diffusers_requests_waiting"], lambda n: n == 1)
        assert number == 1
        first = threads.submit(stop, server, 600)
        assert refused(server).status == 503
        # A second one may shorten it.
        assert stop(server, 1) == 0
        name, data = watched.events()[-1]
    assert (name, data["status"]) == ("error", 503)
    for future in (plain, waiting):
        answer = future.result()
        assert (answer.status, answer.error()["code"]) == (503, "draining")
        assert int(answer.headers["retry-after"]) >= 1
    assert first.result() == 0
    assert TorchServer.find(server.state_dir) is None


def test_a_large_reply_reaches_a_client_that_reads_slowly(
    server: TorchServer, threads: ThreadPoolExecutor
) -> None:
    """The frontend's sockets throw away what they have not sent yet when it ends."""
    # Of enough steps to be seen before it is drawn.
    asked = {"prompt": "a", "num_images": 4, "height": 512, "width": 512, "steps": 40}
    fields = json.dumps({**asked, "output_format": "npy"}).encode()
    port, size = server.options.ports.inference, 4 * 512 * 512 * 3
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(
            f"POST /predictions/{MODEL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(fields)}\r\n\r\n".encode()
            + fields
        )
        wait_for_running(server, 1)
        stopped = threads.submit(stop, server, 60)
        # Drawn, and on its way to a client that does not read yet: the server could be ended.
        wait_for_running(server, 0)
        time.sleep(2)
        received = b""
        while len(received) < size and (piece := client.recv(100_000)):
            received += piece
        assert b" 200 OK" in received[:20]
        assert len(received) >= size
    assert stopped.result() == 0


def test_an_idle_server_stops_at_once_and_an_old_drain_is_forgotten(
    archive: Path, tmp_path: Path
) -> None:
    server = TorchServer(Options(archive, tmp_path / "run", Ports.free()))
    server.state.prepare()
    Drain(time.monotonic() + 3600, "of-one-that-was-killed").write(server.drain_file)
    with server.running(120):
        assert post_json(server.predictions_url, {"prompt": "a"}).status == 200
        started_s = time.monotonic()
        assert stop(server, 600) == 0
        assert time.monotonic() - started_s < 8
        assert not server.drain_file.exists()


def test_an_interrupted_stop_lets_it_serve_on(server: TorchServer) -> None:
    url = server.predictions_url
    with watching(url, LONG) as watched:
        stopping = subprocess.Popen(
            [
                *(sys.executable, "-m", "scripts.serve", "stop", "--drain-s", "600"),
                *("--run-dir", str(server.state_dir)),
            ],
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
            # Where the tests run in the background, SIGINT is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert refused(server).status == 503
        assert "is draining" in (server.problem() or "")
        stopping.send_signal(signal.SIGINT)
        assert "goes on serving" in stopping.communicate(timeout=30)[1]
        assert stopping.returncode == 1
        assert post_json(url, {"prompt": "a"}).status == 200
        assert server.problem() is None
        assert watched.read_until("event: step")

        # Whoever has no time to wait stops it at once.
        started_s = time.monotonic()
        assert stop(server, 0) == 0
        assert time.monotonic() - started_s < 8


def test_a_worker_that_hangs_is_not_waited_for_long(server: TorchServer) -> None:
    (worker,) = server.workers()
    process = psutil.Process(int(str(worker["pid"])))
    with watching(server.predictions_url, LONG):
        process.suspend()
        started_s = time.monotonic()
        assert stop(server, 1) == 0
        assert time.monotonic() - started_s < 30
    assert not process.is_running()
