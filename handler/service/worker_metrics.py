"""Metrics of the worker's process: what it serves, since when, how much it may do, its memory."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from handler import __version__
from handler.config import HandlerConfig
from handler.service.metrics import Sample

__all__ = ["WorkerMetrics", "archive_labels"]

# Of these TorchServe's lines are made.
_NOT_IN_LABELS = re.compile(r"[^\w./+-]+")
_MAX_LABEL = 100


class WorkerMetrics:
    """What is known when the worker has loaded its model, and its memory at any time after."""

    def __init__(self, config: HandlerConfig, labels: Mapping[str, str], device: Any) -> None:
        self._constants = [
            _gauge("diffusers_max_rows", config.max_rows),
            _gauge("diffusers_max_waiting", config.max_waiting),
            _gauge("diffusers_worker_start_time_seconds", time.time()),
            Sample(
                "gauge",
                "diffusers_worker_info",
                1.0,
                (
                    _label(__version__),
                    *(_label(labels.get(name, "")) for name in ("archive", "pipeline", "source")),
                    _label(torch.__version__),
                    _label(importlib.metadata.version("diffusers")),
                    _label(str(device)),
                ),
            ),
        ]
        self._process = psutil.Process()
        self._device = torch.device(device)

    def samples(self) -> list[Sample]:
        """Everything, as gauges."""
        return [*self._constants, *self._memory()]

    def _memory(self) -> list[Sample]:
        resident = self._process.memory_info().rss
        on_device = (0, 0, 0, 0)
        if self._device.type == "cuda":
            try:
                free, total = torch.cuda.mem_get_info(self._device)
            except RuntimeError:
                return [_gauge("diffusers_worker_memory_bytes", resident)]  # the device is lost
            allocated = torch.cuda.memory_allocated(self._device)
            on_device = (allocated, torch.cuda.memory_reserved(self._device), free, total)
        kinds = ("allocated", "reserved", "free", "total")
        return [
            _gauge("diffusers_worker_memory_bytes", resident),
            *(
                Sample("gauge", "diffusers_gpu_memory_bytes", float(size), (kind,))
                for kind, size in zip(kinds, on_device, strict=True)
            ),
        ]


def archive_labels(manifest: Path) -> dict[str, str]:
    """What the archive's own manifest says: a digest of all it holds, its pipeline, its source."""
    try:
        content = manifest.read_bytes()
        facts = json.loads(content)
        source = facts.get("source") or {}
        return {
            "archive": hashlib.sha256(content).hexdigest()[:12],
            "pipeline": str(facts["pipeline"]["class"]),
            "source": " ".join(str(value) for _, value in sorted(source.items())),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # An archive that another tool packed.
        return {}


def _gauge(name: str, value: float) -> Sample:
    return Sample("gauge", name, float(value))


def _label(text: str) -> str:
    return _NOT_IN_LABELS.sub("_", text)[:_MAX_LABEL] or "unknown"
