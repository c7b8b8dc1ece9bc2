"""What the handler relies on in TorchServe itself; if it ever behaves otherwise, this fails."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from scripts.instance import Options, Ports
from scripts.server import TorchServer
from tests.server.client import Answer, curl
from tests.toy_archive import write_toy_archive

# Answers a request in the cycle that it asks for, counted from its first; 0 is a 422.
DEFERRING = """
class Deferring:
    def initialize(self, context):
        self.cycles = {}

    def handle(self, data, context):
        answers = [b""] * len(data)
        for index, request_id in dict(context.request_ids).items():
            wanted = int(data[index]["body"])
            self.cycles[request_id] = self.cycles.get(request_id, 0) + 1
            if wanted == 0:
                context.set_response_status(422, "Unprocessable", index)
            elif self.cycles[request_id] < wanted:
                del context.request_ids[index]
                continue
            context.set_response_content_type(index, "text/x-toy")
            answers[index] = b"%d cycles" % self.cycles.pop(request_id)
        context.stopping_criteria = [lambda _: None] * len(data)
        return answers
"""
CONFIG = """
minWorkers: {num_workers}
maxWorkers: {num_workers}
batchSize: 8
maxBatchDelay: 1
continuousBatching: true
"""


@contextmanager
def deferring_server(folder: Path, num_workers: int) -> Iterator[TorchServer]:
    config = CONFIG.format(num_workers=num_workers)
    archive = write_toy_archive(folder, handler=DEFERRING, config=config)
    with TorchServer(Options(archive, folder / "run", Ports.free())).running(120) as server:
        yield server


def ask(server: TorchServer, num_cycles: int) -> Answer:
    plain = ("-H", "Content-Type: text/plain", "-d", str(num_cycles))
    return curl(server.predictions_url, *plain)


def test_replies_can_be_deferred(tmp_path: Path) -> None:
    """Guard: an id deleted from `request_ids` is not answered, and comes again next cycle."""
    wanted = [1, 50, 3, 0, 20, 1]
    with deferring_server(tmp_path, num_workers=1) as server, ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda num_cycles: ask(server, num_cycles), wanted))
    for num_cycles, answer in zip(wanted, answers, strict=True):
        assert answer.status == (200 if num_cycles else 422)
        assert answer.headers["content-type"] == "text/x-toy"
        assert answer.headers["content-length"] == str(len(answer.body))
        assert answer.body == b"%d cycles" % max(num_cycles, 1)


def test_two_workers_of_one_model_hang(tmp_path: Path) -> None:
    """Guard: continuous batching needs exactly one worker, which the handler insists on."""
    with deferring_server(tmp_path, num_workers=2) as server:
        give_up_s = time.monotonic() + 120
        while [worker["status"] for worker in server.workers()] != ["READY", "READY"]:
            assert time.monotonic() < give_up_s, server.workers()
            time.sleep(0.1)
        command = ["curl", "-s", "--max-time", "5", "-H", "Content-Type: text/plain", "-d", "50"]
        hung = subprocess.run([*command, server.predictions_url], check=False)
        assert hung.returncode == 28, "curl's exit code for a time-out"
