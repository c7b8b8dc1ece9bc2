"""What Prometheus reads after traffic: every metric that is declared, counting what was done."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import yaml

from handler import __version__
from handler.service.metrics import COUNTERS, GAUGES, HISTOGRAMS
from scripts.repository import REPOSITORY
from scripts.torchserve.process import TorchServer
from tests.support.client import curl, post_json
from tests.support.traffic import SSE, cancel, metrics, until, watching

OURS = {**COUNTERS, **GAUGES, **HISTOGRAMS}


def test_traffic_is_counted(server: TorchServer, url: str) -> None:
    assert post_json(url, {"prompt": "a"}).status == 200
    before = settled(server)
    assert post_json(url, {"prompt": "a", "num_inference_steps": 5}).status == 200
    body = {"instances": ["a", "b"], "parameters": {"num_inference_steps": 7, "n": 2}}
    assert post_json(url, body).status == 200
    assert post_json(url, {"prompt": ""}).status == 400
    with watching(url, {"prompt": "a", "steps": 1000, "request_id": "x"}):
        assert cancel(url, "x").status == 200
    after = settled(server)
    changed = {name: after[name] - before.get(name, 0.0) for name in after}
    assert changed["diffusers_requests_total{outcome=ok}"] == 2
    assert changed["diffusers_requests_total{outcome=invalid_request}"] == 1
    assert changed["diffusers_requests_total{outcome=cancelled}"] == 1
    assert changed["diffusers_images_total"] == 5
    assert changed["diffusers_task_images_total{task=text-to-image}"] == 5
    assert 5 + 2 * 7 + 1 <= changed["diffusers_steps_total"] < 1000
    assert changed["diffusers_request_seconds_count{stage=total}"] == 3
    for stage in ("queue", "denoise", "decode"):
        assert changed[f"diffusers_request_seconds_count{{stage={stage}}}"] == 3
    assert 0 < changed["diffusers_request_seconds_sum{stage=denoise}"] < 60
    # Guided: two rows a picture; what a forward holds is rows over forwards.
    assert changed["diffusers_forward_rows_total"] >= 2 * 5 + 2 * 4 * 7
    assert changed["diffusers_forwards_total"] >= 5 + 7
    assert changed["diffusers_ticks_total"] >= 5 + 7
    assert 0 < changed["diffusers_tick_seconds_total"] < 120
    assert changed["diffusers_out_of_memory_retries_total"] == 0


def test_every_declared_metric_of_ours_is_there(server: TorchServer, url: str) -> None:
    post_json(url, {"prompt": "a"})
    shown = {name.partition("{")[0] for name in settled(server)}
    assert shown >= {*COUNTERS, *GAUGES} - {"diffusers_lora_images_total"}
    assert {f"{name}_bucket" for name in HISTOGRAMS} <= shown
    declared = yaml.safe_load((REPOSITORY / "config" / "metrics.yaml").read_text())
    names = {m["name"] for kind in declared["model_metrics"].values() for m in kind}
    assert names - {"PredictionTime"} == OURS.keys()


def test_nothing_else_with_our_prefix_and_torchserves_own_beside(server: TorchServer) -> None:
    shown = {name.partition("{")[0] for name in settled(server)}
    suffixes = ("_bucket", "_count", "_sum", "_created")
    roots = {name for name in shown if not name.endswith(suffixes)}
    assert roots <= OURS.keys()
    text = curl(server.metrics_url).body.decode()
    assert "ts_inference_requests_total" in text
    assert "PredictionTime" in text


def test_what_waits_is_seen_to_wait(server: TorchServer, url: str) -> None:
    """Guided pictures are two rows: more of them than fit wait, and the gauges say so."""
    settled(server)
    max_rows = metrics(server)["diffusers_max_rows"]
    num = int(max_rows) // 2 + 3
    with ExitStack() as stack:
        for _ in range(num):
            stack.enter_context(open_request(url, {"prompt": "a", "steps": 1000}))
        full = until(lambda: metrics(server), lambda m: m["diffusers_requests_waiting"] == 3)
        assert full["diffusers_requests_waiting"] == 3
        assert full["diffusers_requests_in_flight"] == num - 3
        assert full["diffusers_rows_in_flight"] == max_rows
        before = full["diffusers_requests_total{outcome=disconnected}"]
    # Those that were watched have left.
    after = settled(server)
    assert after["diffusers_requests_waiting"] == after["diffusers_rows_in_flight"] == 0
    assert after["diffusers_requests_total{outcome=disconnected}"] - before == num


def test_a_worker_tells_of_itself(server: TorchServer, url: str) -> None:
    text = curl(server.metrics_url).body.decode()
    (info,) = [line for line in text.splitlines() if line.startswith("diffusers_worker_info{")]
    assert f'version="{__version__}"' in info
    assert 'pipeline="StableDiffusionPipeline"' in info
    values = metrics(server)
    assert values["diffusers_worker_memory_bytes"] > 100e6
    assert values["diffusers_gpu_memory_bytes{kind=total}"] == 0
    assert 0 < time.time() - values["diffusers_worker_start_time_seconds"] < 3600


def settled(server: TorchServer) -> dict[str, float]:
    """The metrics once all that ran is counted: lines of the worker's are read a little later."""
    last: dict[str, float] = {}
    for _ in range(100):
        now = until(lambda: metrics(server), lambda m: m.get("diffusers_requests_in_flight") == 0)
        if now == last:
            return now
        last = now
    return last


@contextmanager
def open_request(url: str, fields: Mapping[str, object]) -> Iterator[None]:
    """A stream that is left at the end of the block, whether it has begun or waits."""
    process = subprocess.Popen(
        [
            *("curl", "-sSN", "--noproxy", "*", "--max-time", "120", "-o", "/dev/null", url),
            *("-H", "Content-Type: application/json", *SSE, "-d", json.dumps(dict(fields))),
        ]
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()
