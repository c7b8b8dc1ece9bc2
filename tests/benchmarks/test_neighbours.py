"""The benchmark beside busy processes, on shapes that take milliseconds."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import neighbours
from benchmarks.engine import Request
from tests.support.pipelines import build


def test_both_sides_draw_beside_others_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    chosen: list[int] = []

    class Counted(neighbours.ThreadChoice):
        def wrap_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
            wrapped = super().wrap_forward(forward)

            def counted(*args: Any, **kwargs: Any) -> Any:
                chosen.append(self.policy.present)
                return wrapped(*args, **kwargs)

            return counted

    monkeypatch.setattr(neighbours, "ThreadChoice", Counted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    requests = [Request("a star", 2, 7.5, seed, None) for seed in range(2)]
    pipeline = build("stable_diffusion")
    figures, details = neighbours.measure_engine(pipeline, requests, rounds=2, num_busy=1)
    names = [figure.name for figure in figures]
    assert names == [
        f"{where}: {what}"
        for where in ("1 busy", "alone")
        for what in ("threads chosen / all threads", "threads chosen", "all threads")
    ]
    assert all(value > 0 for figure in figures for value in figure.value.values)
    assert details["threads_at_the_end"].keys() == {"1 busy", "alone"}
    # Two requests of two steps, together from the first, in four rounds on the side that chooses.
    assert len(chosen) >= 2 * 4
    assert chosen[0] == 2
    # One for each round beside others, and none is left running.
    assert len(started) == 2
    assert all(process.returncode is not None for process in started)
