"""What Prometheus reads after traffic: every metric that is declared, counting what was done."""

from __future__ import annotations

import yaml

from handler.service.metrics import COUNTERS, GAUGES, HISTOGRAMS
from scripts.repository import REPOSITORY
from scripts.torchserve.process import TorchServer
from tests.support.client import curl, post_json
from tests.support.traffic import cancel, metrics, until, watching

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
    assert shown >= {*COUNTERS, *GAUGES}
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


def settled(server: TorchServer) -> dict[str, float]:
    """The metrics once all that ran is counted: lines of the worker's are read a little later."""
    last: dict[str, float] = {}
    for _ in range(100):
        now = until(lambda: metrics(server), lambda m: m.get("diffusers_requests_in_flight") == 0)
        if now == last:
            return now
        last = now
    return last
