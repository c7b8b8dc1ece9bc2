"""Requests in flight on a device equal the same pipeline called directly on that device."""

from __future__ import annotations

import pytest
import torch

from handler.engine import InFlightEngine
from tests.support.on_device import (
    BOUNDS,
    PIPELINES,
    difference,
    draw_alone,
    draw_together,
    kwargs_of,
    pipeline_of,
)

pipelines = pytest.mark.parametrize("name", PIPELINES)
precisions = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
# Of pixels in [0, 1]: what the same seed may differ by from one kind of device to another.
ANY_DEVICE = 1e-2


@pipelines
@precisions
def test_in_flight_equals_alone(name: str, dtype: torch.dtype, device: torch.device) -> None:
    pipeline = pipeline_of(name, device, dtype)
    expected = draw_alone(pipeline, [kwargs_of(name, i) for i in range(5)])
    engine = InFlightEngine(pipeline)
    tickets = draw_together(engine, [kwargs_of(name, i) for i in range(5)])
    assert engine.counters.merged_forwards > 5
    engine.close()
    off = [difference(t, e) for t, e in zip(tickets, expected, strict=True)]
    print(f"{name} {dtype} {device}: largest difference {max(off):.2g}")  # shown by pytest -rP
    assert max(off) < BOUNDS[dtype], off
    # The control: a picture of another request is not taken for it.
    assert min(difference(t, expected[i - 1]) for i, t in enumerate(tickets)) > 2 * BOUNDS[dtype]


@pipelines
@precisions
def test_exact_is_bit_equal(name: str, dtype: torch.dtype, device: torch.device) -> None:
    pipeline = pipeline_of(name, device, dtype)
    expected = draw_alone(pipeline, [kwargs_of(name, i) for i in range(3)])
    engine = InFlightEngine(pipeline, exact=True)
    tickets = draw_together(engine, [kwargs_of(name, i) for i in range(3)])
    engine.close()
    assert [difference(t, e) for t, e in zip(tickets, expected, strict=True)] == [0.0] * 3


@pipelines
def test_the_same_seed_is_the_same_picture_on_any_device(name: str, device: torch.device) -> None:
    """Noise is drawn on the CPU, whatever computes with it."""
    here, there = (pipeline_of(name, at) for at in (torch.device("cpu"), device))
    (expected, other) = draw_alone(here, [kwargs_of(name, i) for i in (0, 1)])
    engine = InFlightEngine(there)
    (ticket,) = draw_together(engine, [kwargs_of(name, 0)])
    engine.close()
    assert difference(ticket, expected) < ANY_DEVICE
    assert difference(ticket, other) > 2 * ANY_DEVICE


def test_two_engines_on_one_device_do_not_disturb_each_other(device: torch.device) -> None:
    names = ("stable_diffusion", "stable_diffusion_xl")
    pipelines = {name: pipeline_of(name, device) for name in names}
    expected = {
        name: draw_alone(pipelines[name], [kwargs_of(name, i) for i in range(3)]) for name in names
    }
    engines = {name: InFlightEngine(pipelines[name]) for name in names}
    tickets = {name: [engines[name].submit(kwargs_of(name, i)) for i in range(3)] for name in names}
    while any(engine.has_work for engine in engines.values()):
        for engine in engines.values():
            engine.step()
    for name in names:
        engines[name].close()
        for ticket, image in zip(tickets[name], expected[name], strict=True):
            assert difference(ticket, image) < BOUNDS[torch.float32]
