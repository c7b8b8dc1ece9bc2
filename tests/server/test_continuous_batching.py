"""What TorchServe 0.12.0 does and the handler stands on; nothing of ours but a toy handler runs.

Deferred replies, rows of streams, and that two workers of one model hang: if one of these ever
changes, it is known from here and not from a mystery in traffic.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from scripts.torchserve.options import Options, Ports
from scripts.torchserve.process import TorchServer
from tests.support.client import curl
from tests.support.toy_archive import write_toy_archive

# The body says how many cycles the request is to last, and "stream N" to stream that long.
HANDLER = """
import json
import time

def plain(_): return None
def more(_): return False
def last(_): return True

class Toy:
    def initialize(self, context):
        self.cycles, self.wanted, self.seen = {}, {}, []

    def handle(self, data, context):
        time.sleep(0.002)
        ids = dict(context.request_ids)
        answers, criteria = [b""] * len(ids), [plain] * len(ids)
        for index, call in ids.items():
            body = data[index].get("body")
            self.cycles[call] = cycle = self.cycles.get(call, 0) + 1
            self.wanted.setdefault(call, body)
            streams, _, number = self.wanted[call].rpartition(" ")
            about = {"cycles": cycle, "peers": len(ids), "body": body, "live": sorted(ids.values())}
            is_last = cycle >= int(number)
            if streams:
                answers[index] = json.dumps(about).encode() + b"\\n"
                criteria[index] = last if is_last else more
            elif is_last:
                context.set_response_status(207, "Of my own", index)
                context.set_response_content_type(index, "text/x-toy")
                answers[index] = json.dumps(about).encode()
            else:
                del context.request_ids[index]
        context.stopping_criteria = criteria
        return answers
"""
PLAIN_TEXT = ("--noproxy", "*", "-H", "Content-Type: text/plain")
CONFIG = """
minWorkers: 1
maxWorkers: 1
batchSize: 16
maxBatchDelay: 1
continuousBatching: true
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServer]:
    folder = tmp_path_factory.mktemp("toy")
    archive = write_toy_archive(folder, handler=HANDLER, config=CONFIG)
    # Scaling is how the last test gets a second worker.
    options = Options(
        archive, folder / "run", Ports.free(), properties={"enable_model_api": "true"}
    )
    with TorchServer(options).running(timeout_s=120) as server:
        yield server


def post(server: TorchServer, body: str, timeout_s: float = 30) -> Any:
    headers = ("-H", "Content-Type: text/plain")
    return curl(server.predictions_url, *headers, "-d", body, timeout_s=timeout_s)


@pytest.mark.parametrize("cycles", [1, 2, 300])
def test_a_deferred_request_comes_again_until_it_is_answered(toy: TorchServer, cycles: int) -> None:
    answer = post(toy, str(cycles))
    assert (answer.status, answer.headers["content-type"]) == (207, "text/x-toy")
    assert answer.json()["cycles"] == cycles
    # Its body is sent anew each time, and the reply is an ordinary one.
    assert answer.json()["body"] == str(cycles)
    assert int(answer.headers["content-length"]) == len(answer.body)


def test_requests_join_and_leave_while_others_are_deferred(toy: TorchServer) -> None:
    with ThreadPoolExecutor(4) as threads:
        long = [threads.submit(post, toy, "400") for _ in range(2)]
        short = [threads.submit(post, toy, "3").result() for _ in range(3)]
        assert not any(future.done() for future in long)
        assert all(future.result().json()["cycles"] == 400 for future in long)
    assert {answer.json()["cycles"] for answer in short} == {3}
    assert max(answer.json()["peers"] for answer in short) == 3


def test_a_streams_later_rows_carry_only_its_id(toy: TorchServer) -> None:
    answer = post(toy, "stream 4")
    chunks = [json.loads(line) for line in answer.body.splitlines()]
    assert [chunk["cycles"] for chunk in chunks] == [1, 2, 3, 4]
    assert [chunk["body"] for chunk in chunks] == ["stream 4", None, None, None]
    assert answer.headers["transfer-encoding"] == "chunked"


def test_a_client_that_leaves_a_stream_is_missing_from_the_next_cycle(toy: TorchServer) -> None:
    with ThreadPoolExecutor(1) as thread:
        leaver = subprocess.Popen(
            ["curl", "-sN", *PLAIN_TEXT, "-d", "stream 100000", toy.predictions_url],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert leaver.stdout is not None
        chunk = json.loads(leaver.stdout.readline())
        long = thread.submit(post, toy, "400")
        while len(chunk["live"]) < 2:
            chunk = json.loads(leaver.stdout.readline())
        leaver.kill()
        leaver.communicate()
        ended = long.result().json()
    assert ended["peers"] == 1
    assert post(toy, "1").json()["peers"] == 1


def test_two_workers_hang(toy: TorchServer) -> None:
    """The last one: the server is of no use afterwards. One worker needs milliseconds for this."""
    started_s = time.monotonic()
    assert post(toy, "30").json()["cycles"] == 30
    assert time.monotonic() - started_s < 5
    socket = toy.management_address.removeprefix("unix:")
    scale = "http://localhost/models/toy?min_worker=2&max_worker=2&synchronous=true"
    assert curl("--unix-socket", socket, "-X", "PUT", scale).status == 200
    assert [worker["status"] for worker in toy.workers()] == ["READY", "READY"]
    hung = subprocess.run(
        ["curl", "-s", *PLAIN_TEXT, "--max-time", "6", "-d", "30", toy.predictions_url],
        capture_output=True,
        check=False,
    )
    timed_out = 28
    assert hung.returncode == timed_out, hung.stdout
