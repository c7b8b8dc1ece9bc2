"""`stands_still` against a frontend and a worker that are child processes of this test."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from scripts.torchserve.health import is_answering, stands_still

BUSY, IDLE = "while True: pass", "import time; time.sleep(60)"


@contextmanager
def process(code: str) -> Iterator[int]:
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield child.pid
    finally:
        child.kill()
        child.wait()


@contextmanager
def endpoints(*, answers: bool, draws: bool) -> Iterator[str]:
    """A server that answers the probe or never does, and whose engine's ticks may go on."""
    num_ticks = 0
    is_over = threading.Event()

    class Endpoints(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal num_ticks
            num_ticks += draws
            line = f'diffusers_ticks_total{{ModelName="m",Level="Model",}} {num_ticks}.0\n'
            self._reply(200, f"# TYPE diffusers_ticks_total counter\n{line}")

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if answers:
                self._reply(404, "{}")
            else:
                is_over.wait(30)

        def _reply(self, status: int, body: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoints) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            is_over.set()
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("answers", "draws", "frontend", "worker", "expected"),
    [
        (True, False, IDLE, IDLE, False),
        (True, False, BUSY, BUSY, False),
        (False, False, IDLE, IDLE, True),
        (False, False, BUSY, BUSY, True),
        (False, False, IDLE, BUSY, False),
        (False, True, BUSY, BUSY, False),
    ],
    ids=[
        "it answers",
        "it answers under load",
        "nothing is handed to the worker",
        "the frontend goes in circles",
        "one long forward",
        "all places are taken and pictures are drawn",
    ],
)
def test_stands_still(
    answers: bool, draws: bool, frontend: str, worker: str, expected: bool
) -> None:
    with ExitStack() as stack:
        url = stack.enter_context(endpoints(answers=answers, draws=draws))
        pids = [stack.enter_context(process(code)) for code in (frontend, worker)]
        urls = (f"{url}/predictions/m", f"{url}/metrics")
        assert stands_still(*urls, None, pids[0], pids[1:], timeout_s=2.0) is expected


def test_a_server_that_is_gone_does_not_answer() -> None:
    with endpoints(answers=True, draws=False) as url:
        assert is_answering(f"{url}/predictions/m", "key", timeout_s=5)
    assert not is_answering(f"{url}/predictions/m", None, timeout_s=5)
