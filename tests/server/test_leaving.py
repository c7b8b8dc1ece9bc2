"""A client that leaves before its plain reply: TorchServe does not tell the worker.

It does for streams (test_streaming). Should it ever for plain requests, the handler may cancel
them, and docs/requests.md is to be changed.
"""

from __future__ import annotations

import json
import subprocess

from scripts.torchserve.process import TorchServer
from tests.support.client import post_json
from tests.support.traffic import metrics, until, watching

FIELDS = {"prompt": "a ring", "seed": 1, "num_inference_steps": 40}


def outcomes(server: TorchServer, outcome: str) -> float:
    return metrics(server).get(f"diffusers_requests_total{{outcome={outcome}}}", 0.0)


def in_flight(server: TorchServer) -> float:
    return metrics(server).get("diffusers_requests_in_flight", 0.0)


def test_what_nobody_waits_for_is_drawn_to_its_end(server: TorchServer, url: str) -> None:
    assert post_json(url, {**FIELDS, "num_inference_steps": 2}).status == 200
    ok, disconnected = outcomes(server, "ok"), outcomes(server, "disconnected")
    # Another request, so that cycles in which the worker could be told come all the time.
    with watching(url, {**FIELDS, "num_inference_steps": 300}) as other:
        leaver = subprocess.Popen(
            [
                *("curl", "-s", "--noproxy", "*", "-H", "Content-Type: application/json", url),
                *("-d", json.dumps(FIELDS), "-o", "/dev/null"),
            ]
        )
        assert until(lambda: in_flight(server), lambda number: number == 2) == 2
        leaver.kill()
        leaver.wait()
        assert until(lambda: in_flight(server), lambda number: number == 1) == 1
        assert until(lambda: outcomes(server, "ok"), lambda number: number > ok) == ok + 1
        assert outcomes(server, "disconnected") == disconnected
        assert other.events()[-1][0] == "image"
