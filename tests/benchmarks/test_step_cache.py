"""The benchmarks of step caches and of stalls, on a pipeline that takes milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, stalls, step_cache
from benchmarks.engine import Request
from handler.acceleration import step_policy
from handler.engine.shortcuts import Shortcuts
from tests.support.pipelines import SIDE_PX, build


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    kwargs = Request.kwargs
    size = {"height": SIDE_PX, "width": SIDE_PX}
    monkeypatch.setattr(Request, "kwargs", lambda self: {**kwargs(self), **size})
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(step_policy, "MAX_ERROR", float("inf"))
    return tmp_path


def tiny() -> Any:
    return build("stable_diffusion")


def test_what_is_left_out_is_measured_and_compared(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_cache, "SIZE_PX", SIDE_PX)
    monkeypatch.setattr(step_cache, "NUM_IMAGES", 2)
    monkeypatch.setattr(step_cache, "mixed_requests", lambda: [Request("a", 4, 5.0, 0, "unipc")])
    monkeypatch.setattr(step_cache, "KINDS", ((12, None),))
    assert step_cache.main(["--rounds", "1", "--prompts", "2"], load=tiny) == 0
    found = json.loads((results / "step_cache.json").read_text())
    gain = found["figures"][0]
    assert gain["name"] == "50 steps, saturated: step_cache 0.5 / off"
    assert gain["target"] == ">= 1.6"
    assert len(gain["values"]) == 1
    drawn = json.loads((results / "step_cache_pictures.json").read_text())
    lines = [line for line in drawn["pictures"] if line["scheduler"] == "DDIM"]
    full, *others = lines
    assert (full["forwards"], full["difference_of_255"]) == (12, 0)
    by_name = {line["setting"]: line for line in others}
    half = by_name["step_cache 0.5"]
    assert half["forwards"] == Shortcuts(step_cache=0.5).least_forwards(12)
    assert half["difference_of_255"] > 0
    assert by_name["guidance to 0.5"]["forwards"] == 12
    assert by_name["guidance to 0.5"]["rows"] < full["rows"]
    assert by_name[f"{half['forwards']:.0f} steps in place of 12"]["steps"] == 12


@pytest.mark.usefixtures("results")
def test_gaps_are_those_of_the_long_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that a forward of the denoiser moves by one, and each decoded picture too."""
    monkeypatch.setattr(stalls, "NUM_STEPS", 12)
    monkeypatch.setattr(stalls, "OTHER_STEPS", 2)
    now_s = 0.0

    def move(_: Any, inputs: tuple[Any, ...], by: float | None = None) -> None:
        nonlocal now_s
        now_s += len(inputs[0]) if by is None else by

    pipeline = tiny()
    pipeline.unet.conv_in.register_forward_pre_hook(lambda m, i: move(m, i, 1.0))
    pipeline.vae.decoder.register_forward_pre_hook(move)
    one_by_one = stalls.gaps_s(pipeline, lambda: now_s, in_bursts=False)
    in_bursts = stalls.gaps_s(pipeline, lambda: now_s, in_bursts=True)
    assert len(one_by_one) == len(in_bursts) == 11
    assert min(one_by_one + in_bursts) >= 1
    assert max(in_bursts) > stalls.NUM_OTHERS
    assert 1 < max(one_by_one) < max(in_bursts)
