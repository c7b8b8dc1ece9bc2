"""Whether a server that says READY draws: TorchServe's frontend can stand still and not know it.

It then takes requests and hands none of them to the worker, for good: nothing is logged, /ping is
healthy, and only a restart of the server heals it.
"""

from __future__ import annotations

import http.client
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil

__all__ = ["PROBE_TIMEOUT_S", "is_answering", "stands_still"]

# Without a wait a cycle takes milliseconds; one forward of large pictures on a CPU takes seconds.
PROBE_TIMEOUT_S = 10.0
# Of the probe's time on one core. A frontend waiting for a worker's long forward uses next to
# nothing; one that goes in circles uses more than a core.
BUSY = 0.05
TICKS = "diffusers_ticks_total{"


def is_answering(predictions_url: str, token: str | None, timeout_s: float) -> bool:
    """Ask the handler to cancel a request that does not exist; tell whether it said anything.

    That passes the frontend's queue and one cycle of the worker, and draws nothing.
    """
    parts = urlsplit(predictions_url)
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    connection = http.client.HTTPConnection(parts.netloc, timeout=timeout_s)
    try:
        body = json.dumps({"cancel": f"status-{uuid.uuid4()}"})
        connection.request("POST", parts.path, body, headers)
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


def stands_still(
    predictions_url: str,
    metrics_url: str,
    token: str | None,
    frontend_pid: int,
    worker_pids: Sequence[int],
    timeout_s: float = PROBE_TIMEOUT_S,
) -> bool:
    """Whether the frontend hands the worker nothing although requests wait; takes `timeout_s` then.

    Not answering is not yet standing still: a worker may be in a forward that takes longer, while
    its frontend waits; or all the places of a batch are taken, and pictures are being drawn.
    """
    before = _Activity.measure(metrics_url, frontend_pid, worker_pids)
    if is_answering(predictions_url, token, timeout_s):
        return False
    after = _Activity.measure(metrics_url, frontend_pid, worker_pids)
    if after.num_ticks > before.num_ticks:
        return False
    frontend_is_busy = after.frontend_s - before.frontend_s > BUSY * timeout_s
    worker_is_busy = after.worker_s - before.worker_s > BUSY * timeout_s
    return frontend_is_busy or not worker_is_busy


@dataclass(frozen=True, slots=True)
class _Activity:
    """What has been done so far: the engine's ticks, and seconds of a core."""

    num_ticks: float
    frontend_s: float
    worker_s: float

    @classmethod
    def measure(cls, metrics_url: str, frontend_pid: int, worker_pids: Sequence[int]) -> _Activity:
        return cls(
            _num_ticks(metrics_url),
            _cpu_seconds(frontend_pid),
            # A forward that is being compiled waits for processes that compile.
            sum(_cpu_seconds(pid, with_children=True) for pid in worker_pids),
        )


def _num_ticks(metrics_url: str) -> float:
    """The handler's counter of its engine's ticks; 0 where there is none."""
    parts = urlsplit(metrics_url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=5)
    try:
        connection.request("GET", parts.path)
        lines = connection.getresponse().read().decode("utf-8", "replace").splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(TICKS))
    except (OSError, http.client.HTTPException, ValueError):
        return 0.0
    finally:
        connection.close()


def _cpu_seconds(pid: int, *, with_children: bool = False) -> float:
    try:
        process = psutil.Process(pid)
        children = process.children(recursive=True) if with_children else []
        times = [each.cpu_times() for each in (process, *children)]
    except psutil.Error:
        return 0.0
    return float(sum(each.user + each.system for each in times))
