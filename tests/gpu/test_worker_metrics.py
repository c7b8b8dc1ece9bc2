"""What a worker says of its GPU's memory."""

from __future__ import annotations

import pytest
import torch

from handler.config import HandlerConfig
from handler.service.worker_metrics import WorkerMetrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def kinds(worker: WorkerMetrics) -> dict[str, float]:
    return {
        sample.dimensions[0]: sample.value
        for sample in worker.samples()
        if sample.name == "diffusers_gpu_memory_bytes"
    }


def test_what_is_allocated_is_told() -> None:
    worker = WorkerMetrics(HandlerConfig(), {}, torch.device("cuda"))
    before = kinds(worker)
    held = torch.zeros(64 * 1024 * 1024, device="cuda")
    after = kinds(worker)
    assert after["allocated"] - before["allocated"] >= held.nbytes
    assert after["allocated"] <= after["reserved"] <= after["total"]
    assert 0 < after["free"] < after["total"]
