"""What is counted between two emissions, its declaration, and what emitting it costs."""

from __future__ import annotations

import ast
import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

from handler import __version__, errors
from handler.api.request import GenerationRequest
from handler.api.result import Result, Timings
from handler.config import HandlerConfig
from handler.engine import InFlightEngine
from handler.engine.forward import Counters
from handler.service.metrics import COUNTERS, GAUGES, HISTOGRAMS, Load, Meter, Sample, emit
from handler.service.worker_metrics import WorkerMetrics, archive_labels
from scripts.repository import REPOSITORY
from tests.support.frontend import METRICS
from tests.support.pipelines import build, example_kwargs

LORAS = {"loras": {"style": 1.0, "detail": 0.5}}
REQUEST = GenerationRequest("a", None, 1, 4, 7.5, 32, 32, 2, None, LORAS)
RESULT = Result(REQUEST, (Image.new("RGB", (8, 8)),) * 2, Timings(0.1, 0.2, 0.3))
DECLARED = yaml.safe_load(METRICS.read_text())
IDLE = Load(0, 0, 0)
OURS = {**COUNTERS, **GAUGES, **HISTOGRAMS}
OF_THE_WORKER = {
    sample.name for sample in WorkerMetrics(HandlerConfig(), {}, torch.device("cpu")).samples()
}


def sink() -> MetricsCacheYamlImpl:
    """TorchServe's own cache, with the shipped declaration."""
    cache = MetricsCacheYamlImpl(str(METRICS))
    cache.initialize_cache()
    return cache


def by_name(samples: list[Sample]) -> dict[str, list[tuple[float, tuple[str, ...]]]]:
    found: dict[str, list[tuple[float, tuple[str, ...]]]] = {}
    for sample in samples:
        found.setdefault(sample.name, []).append((sample.value, sample.dimensions))
    return found


def traffic(meter: Meter) -> None:
    """One of everything that a meter is told."""
    meter.request_ended("ok", total_s=1.5)
    meter.request_ended("invalid_request")
    meter.images_drawn(RESULT)
    meter.steps_done(4)


def busy(**changes: Any) -> Counters:
    return Counters(**{"ticks": 9, "tick_s": 0.5, "forwards": 20, "rows": 70, **changes})


def test_the_declaration_is_exactly_what_is_emitted() -> None:
    for kind, names in (("counter", COUNTERS), ("gauge", GAUGES), ("histogram", HISTOGRAMS)):
        declared = {m["name"]: m for m in DECLARED["model_metrics"][kind]}
        declared.pop("PredictionTime", None)  # TorchServe's worker emits it
        assert declared.keys() == names.keys()
        for name, dimensions in names.items():
            assert declared[name]["dimensions"] == [*dimensions, "ModelName", "Level"]


def test_no_other_name_is_in_the_code() -> None:
    """The tables of handler.service.metrics name all that the handler emits, nothing else."""
    named = set()
    for path in (REPOSITORY / "handler").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named |= set(re.findall(r"\bdiffusers_\w+", node.value))
    assert named - {"diffusers_handler"} == OURS.keys()


def test_names_and_units_follow_prometheus() -> None:
    assert all(name.endswith("_total") for name in COUNTERS)
    assert not any(name.endswith("_total") for name in (*GAUGES, *HISTOGRAMS))
    for kind in ("counter", "gauge", "histogram"):
        for metric in DECLARED["model_metrics"][kind]:
            if metric["name"] in OURS:
                name = metric["name"]
                unit = "Bytes" if name.endswith("_bytes") else "Count"
                assert metric["unit"] == ("Seconds" if "_seconds" in name else unit)


def test_traffic_becomes_samples_once() -> None:
    meter = Meter()
    meter.samples(Counters(), IDLE)
    traffic(meter)
    load = Load(2, 2, 2)
    first = by_name(meter.samples(busy(out_of_memory_retries=1), load))
    assert first.keys() == OURS.keys() - OF_THE_WORKER
    assert first["diffusers_requests_total"] == [(1, ("ok",)), (1, ("invalid_request",))]
    assert first["diffusers_task_images_total"] == [(2, ("text-to-image",))]
    assert first["diffusers_lora_images_total"] == [(2, ("style",)), (2, ("detail",))]
    assert first["diffusers_images_total"] == [(2, ())]
    assert first["diffusers_steps_total"] == [(4, ())]
    assert first["diffusers_forward_rows_total"] == [(70, ())]
    assert first["diffusers_request_seconds"] == [
        (1.5, ("total",)),
        (0.1, ("queue",)),
        (0.2, ("denoise",)),
        (0.3, ("decode",)),
    ]
    # Nothing happened since: only gauges are left to say.
    again = by_name(meter.samples(busy(out_of_memory_retries=1), load))
    assert again == {name: [(2.0, ())] for name in GAUGES.keys() - OF_THE_WORKER}
    more = by_name(meter.samples(busy(out_of_memory_retries=1, rows=75), load))
    assert more["diffusers_forward_rows_total"] == [(5, ())]


def test_counters_are_there_before_they_first_count() -> None:
    first = by_name(Meter().samples(Counters(), IDLE))
    outcomes = first.pop("diffusers_requests_total")
    assert (0, ("disconnected",)) in outcomes
    assert (0, ("engine_fault",)) in outcomes
    assert {value for value, _ in outcomes} == {0}
    counters = {name for name, dimensions in COUNTERS.items() if not dimensions}
    names = counters | GAUGES.keys() - OF_THE_WORKER
    assert first == {name: [(0, ())] for name in names}


def test_the_engines_counters_may_go_on_while_samples_are_kept() -> None:
    meter, counters = Meter(), Counters(forwards=3)
    meter.samples(counters, IDLE)
    counters.forwards += 4
    assert by_name(meter.samples(counters, IDLE))["diffusers_forwards_total"] == [(4, ())]


def test_emitted_as_torchserve_writes_them(caplog: pytest.LogCaptureFixture) -> None:
    meter = Meter()
    traffic(meter)
    samples = meter.samples(busy(), Load(1, 1, 1))
    with caplog.at_level(logging.INFO, "ts.metrics.caching_metric"):
        emit(samples, sink(), "tiny")
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == len(samples)
    assert all(line.startswith("[METRICS]diffusers_") for line in lines)
    ok = [line for line in lines if "outcome:ok" in line][-1]
    assert ok.startswith(
        "[METRICS]diffusers_requests_total.Count:1|#outcome:ok,ModelName:tiny,Level:Model|"
    )
    assert not [r for r in caplog.records if r.levelno > logging.INFO]


def test_an_undeclared_metric_is_skipped_and_hurts_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    samples = [
        Sample("counter", "diffusers_of_tomorrow_total", 1),
        Sample("gauge", "diffusers_rows_in_flight", 3.0),
    ]
    with caplog.at_level(logging.INFO, "ts.metrics.caching_metric"):
        emit(samples, sink(), "tiny")
        emit(samples, None, "tiny")
    assert [r.getMessage().partition(".")[0] for r in caplog.records] == [
        "[METRICS]diffusers_rows_in_flight"
    ]


def test_every_outcome_can_be_a_label() -> None:
    codes = {
        e.code
        for e in vars(errors).values()
        if isinstance(e, type) and issubclass(e, errors.RequestError)
    }
    assert all(re.fullmatch("[a-z_]+", code) for code in codes)


def test_emitting_costs_less_than_a_hundredth_of_the_ticks() -> None:
    """Emissions come once a second: their time against a second, with a busy second's samples.

    The real sink writes lines to the worker's output, here to a formatter and nothing behind it.
    """
    meter, cache = Meter(), sink()
    stream = logging.StreamHandler(stream=_Nowhere())
    log = logging.getLogger("ts.metrics.caching_metric")
    log.addHandler(stream)
    propagate, log.propagate, level = log.propagate, False, log.level
    log.setLevel(logging.INFO)
    try:
        costs_s = []
        for round_ in range(20):
            for _ in range(20):  # requests a second: many for a diffusion model
                traffic(meter)
            started_s = time.perf_counter()
            counters = busy(ticks=round_ * 50, rows=round_ * 800)
            emit(meter.samples(counters, Load(1, 1, 1)), cache, "tiny")
            costs_s.append(time.perf_counter() - started_s)
    finally:
        log.removeHandler(stream)
        log.propagate = propagate
        log.setLevel(level)
    assert min(costs_s) < 0.01


def test_a_lost_device_takes_no_metric_but_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(device: object) -> tuple[int, int]:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lost)
    worker = WorkerMetrics(HandlerConfig(), {}, torch.device("cuda"))
    names = {sample.name for sample in worker.samples()}
    assert "diffusers_worker_memory_bytes" in names
    assert "diffusers_gpu_memory_bytes" not in names


def test_what_a_worker_says_of_itself(tmp_path: Path) -> None:
    manifest = tmp_path / "PIPELINE.json"
    source = {"model_id": "org/a,model:1", "revision": "main"}
    manifest.write_text(json.dumps({"pipeline": {"class": "ToyPipeline"}, "source": source}))
    labels = archive_labels(manifest)
    begun_s = time.time()
    worker = WorkerMetrics(HandlerConfig(max_rows=12, max_waiting=34), labels, torch.device("cpu"))
    values = by_name(worker.samples())
    assert values["diffusers_max_rows"] == [(12, ())]
    assert values["diffusers_max_waiting"] == [(34, ())]
    ((started_s, _),) = values["diffusers_worker_start_time_seconds"]
    assert begun_s <= started_s <= time.time()
    ((one, info),) = values["diffusers_worker_info"]
    named = dict(zip(GAUGES["diffusers_worker_info"], info, strict=True))
    assert (one, named["version"], named["device"]) == (1, __version__, "cpu")
    assert (named["pipeline"], named["source"]) == ("ToyPipeline", "org/a_model_1_main")
    assert named["torch"] == torch.__version__
    assert re.fullmatch("[0-9a-f]{12}", named["archive"])
    manifest.write_text(manifest.read_text() + "\n")
    assert archive_labels(manifest)["archive"] != named["archive"]
    ((resident, _),) = values["diffusers_worker_memory_bytes"]
    assert resident > 50e6
    held = bytearray(100_000_000)
    held[::4096] = b"x" * len(held[::4096])
    ((more, _),) = by_name(worker.samples())["diffusers_worker_memory_bytes"]
    assert more - resident > 50e6
    assert {kind for _, (kind,) in values["diffusers_gpu_memory_bytes"]} == {
        *("allocated", "reserved", "free", "total")
    }


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"pipeline": []}', '{"pipeline": {}}'])
def test_an_archive_of_another_tool_says_nothing(tmp_path: Path, content: str | None) -> None:
    manifest = tmp_path / "PIPELINE.json"
    if content is not None:
        manifest.write_text(content)
    assert archive_labels(manifest) == {}
    samples = WorkerMetrics(HandlerConfig(), {}, "cpu").samples()
    (info,) = [sample for sample in samples if sample.name == "diffusers_worker_info"]
    assert info.dimensions[1:4] == ("unknown",) * 3


class _Nowhere:
    def write(self, text: str) -> None: ...

    def flush(self) -> None: ...


def test_a_real_engines_counters_are_emitted() -> None:
    engine = InFlightEngine(build("stable_diffusion"))
    for index in range(2):
        engine.submit(example_kwargs("stable_diffusion", index))
    engine.run()
    values = by_name(Meter().samples(engine.counters, IDLE))
    engine.close()
    assert values["diffusers_ticks_total"][0][0] > 7
    assert values["diffusers_forward_rows_total"][0][0] >= 2 * 4 + 7
    assert 0 < values["diffusers_tick_seconds_total"][0][0] < 60
