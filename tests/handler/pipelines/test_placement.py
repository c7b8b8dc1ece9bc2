"""Pipelines whose weights move, or lie on several devices, are refused with what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload

from handler.engine import InFlightEngine
from handler.pipelines.placement import placement_problem
from tests.support.pipelines import build, shared

CPU = torch.device("cpu")


def offloaded_by_model(pipeline: Any) -> None:
    pipeline._all_hooks = [object()]


def offloaded_by_layer(pipeline: Any) -> None:
    cpu_offload(pipeline.unet, CPU)


def offloaded_by_group(pipeline: Any) -> None:
    pipeline.unet.enable_group_offload(CPU, CPU, offload_type="leaf_level")


def without_weights(pipeline: Any) -> None:
    pipeline.vae.to("meta")


@pytest.mark.parametrize(
    ("move", "says"),
    [
        (offloaded_by_model, "without enable_model_cpu_offload"),
        (offloaded_by_layer, "unet offloads its weights layer by layer"),
        (offloaded_by_group, "unet offloads its weights layer by layer"),
        (without_weights, "vae has no weights in memory"),
    ],
)
def test_what_moves_its_weights_is_refused(move: Callable[[Any], None], says: str) -> None:
    pipeline = build("stable_diffusion")
    move(pipeline)
    with pytest.raises(ValueError, match=says):
        InFlightEngine(pipeline)


def test_modules_on_several_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = build("stable_diffusion")
    (weight, *_) = pipeline.vae.parameters()
    monkeypatch.setattr(type(weight), "device", property(_device_of(weight)), raising=False)
    problem = placement_problem(pipeline)
    assert problem is not None
    assert "several devices" in problem
    assert "vae: cpu and cuda:1" in problem
    assert "unet: cpu," in problem.replace(")", ",")


def _device_of(elsewhere: torch.Tensor) -> Callable[[torch.Tensor], torch.device]:
    """As if one weight was on a second card."""
    return lambda weight: torch.device("cuda:1") if weight is elsewhere else CPU


def test_a_pipeline_on_one_device_is_taken() -> None:
    assert placement_problem(shared("stable_diffusion_xl")) is None
