"""Captured graphs and compiled code against the plain forward, on the device that they are for.

On the CPU a stand-in records instead of CUDA, and a compiler that makes no machine code compiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from handler.acceleration.compiled_forward import Recorder
from handler.acceleration.speed import Plan, SpeedUp, compile_forward, make_plan
from handler.config import HandlerConfig
from handler.engine import InFlightEngine
from tests.support.compilers import Compiler, Graphs
from tests.support.on_device import (
    BOUNDS,
    difference,
    draw_alone,
    draw_together,
    kwargs_of,
    pipeline_of,
)

MAX_ROWS = 8
BUCKETS = (2, 4, 8)
CAPTURED = ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "demo")
COMPILED = ("stable_diffusion", "stable_diffusion_3")

# Of functools.lru_cache in diffusers, which dynamo looks through.
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def recorder(device: torch.device) -> Recorder | None:
    """None is the real one."""
    return None if device.type == "cuda" else _record_outputs


def _record_outputs(run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
    replay, output = Graphs().record(lambda: tuple(run()))
    return replay, output


def half_on(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32


def opened(pipeline: Any, speed_up: SpeedUp, kwargs: dict[str, Any]) -> InFlightEngine:
    """An engine that has warmed up with one request."""
    engine = InFlightEngine(
        pipeline, max_rows=MAX_ROWS, buckets=speed_up.buckets, wrappers=speed_up.wrappers
    )
    speed_up.warm_up(engine, [kwargs])
    for prepared in speed_up.prepared:
        prepared.num_prepared_runs = prepared.num_plain_runs = 0
    return engine


@pytest.mark.parametrize("name", CAPTURED)
def test_graphs_of_every_bucket_draw_what_the_plain_forward_draws(
    name: str, device: torch.device
) -> None:
    dtype = half_on(device)
    pipeline = pipeline_of(name, device, dtype)
    # Of more guidance the demo makes white pictures in so few steps: all the same.
    guided = {"guidance_scale": 2.5, "num_inference_steps": 5}
    requests = [kwargs_of(name, i, **guided) for i in range(4)]
    expected = draw_alone(pipeline, [kwargs_of(name, i, **guided) for i in range(4)])
    speed_up = SpeedUp(
        pipeline, Plan(capture=True, warm_up=True), MAX_ROWS, record=recorder(device)
    )
    assert speed_up.buckets == BUCKETS
    engine = opened(pipeline, speed_up, kwargs_of(name, 0, **guided))
    (prepared,) = speed_up.prepared
    for together in (1, 2, 3, 4):  # rows: 2, 4, 6 in 8, 8
        tickets = [
            engine.submit({**r, "generator": torch.Generator().manual_seed(1000 + i)})
            for i, r in enumerate(requests[:together])
        ]
        engine.run()
        off = [difference(t, e) for t, e in zip(tickets, expected, strict=False)]
        assert max(off) < BOUNDS[dtype], (together, off)
    assert min(difference(t, expected[i - 1]) for i, t in enumerate(tickets)) > 2 * BOUNDS[dtype]
    # Rows that are checked alone are plain, and so are arguments that nothing was warmed up for.
    assert prepared.num_prepared_runs >= 4 * 5
    assert prepared.num_plain_runs == 0
    engine.close()


def test_a_kept_result_survives_the_next_replay(device: torch.device) -> None:
    """Schedulers of several orders keep their model's last results."""
    dtype = half_on(device)
    pipeline = pipeline_of("stable_diffusion", device, dtype)
    kind = "DPMSolverMultistepScheduler"
    requests = [kwargs_of("stable_diffusion", i, guidance_scale=4.0) for i in range(3)]
    engine = InFlightEngine(pipeline, max_rows=MAX_ROWS)
    plain = [engine.submit(request, scheduler=kind) for request in requests]
    engine.run()
    engine.close()
    speed_up = SpeedUp(
        pipeline, Plan(capture=True, warm_up=True), MAX_ROWS, record=recorder(device)
    )
    engine = opened(pipeline, speed_up, kwargs_of("stable_diffusion", 0, guidance_scale=4.0))
    requests = [kwargs_of("stable_diffusion", i, guidance_scale=4.0) for i in range(3)]
    captured = [engine.submit(request, scheduler=kind) for request in requests]
    engine.run()
    engine.close()
    for ours, theirs in zip(captured, plain, strict=True):
        assert difference(ours, torch.as_tensor(theirs.result().images)) < BOUNDS[dtype]


def test_decoders_are_in_channels_last_where_that_is_faster(device: torch.device) -> None:
    pipeline = pipeline_of("stable_diffusion", device, half_on(device))
    SpeedUp(pipeline, Plan(channels_last=True), MAX_ROWS)

    def is_channels_last(module: torch.nn.Module) -> bool:
        convolutions = [part for part in module.modules() if isinstance(part, torch.nn.Conv2d)]
        wide = [c.weight for c in convolutions if c.kernel_size != (1, 1)]
        return all(weight.is_contiguous(memory_format=torch.channels_last) for weight in wide)

    assert is_channels_last(pipeline.unet)
    assert is_channels_last(pipeline.vae) == (device.type == "cpu")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_code_draws_what_the_plain_forward_draws(name: str, device: torch.device) -> None:
    dtype = half_on(device)
    pipeline = pipeline_of(name, device, dtype)
    expected = draw_alone(pipeline, [kwargs_of(name, i) for i in range(4)])
    compiler: Any = compile_forward if device.type == "cuda" else Compiler()
    plan = Plan(channels_last=True, compile=True, warm_up=True)
    speed_up = SpeedUp(pipeline, plan, MAX_ROWS, compiler=compiler)
    engine = opened(pipeline, speed_up, kwargs_of(name, 0))
    tickets = draw_together(engine, [kwargs_of(name, i) for i in range(4)])
    engine.close()
    off = [difference(t, e) for t, e in zip(tickets, expected, strict=True)]
    assert max(off) < BOUNDS[dtype], off
    (prepared,) = speed_up.prepared
    assert prepared.num_prepared_runs > 0


@pytest.mark.timeout(180)
def test_all_of_speed_max(device: torch.device) -> None:
    """What `speed: max` plans for this device: fused, compiled, captured, channels_last."""
    name, dtype = "stable_diffusion", half_on(device)
    pipeline = pipeline_of(name, device, dtype)
    expected = draw_alone(pipeline, [kwargs_of(name, i) for i in range(4)])
    config = HandlerConfig(speed="max", dtype=str(dtype).removeprefix("torch."))
    plan = make_plan(config, pipeline, device, dtype)
    assert plan.compile
    assert plan.capture == (device.type == "cuda")
    compiler: Any = None if device.type == "cuda" else Compiler()
    speed_up = SpeedUp(pipeline, plan, MAX_ROWS, compiler=compiler, record=recorder(device))
    engine = opened(pipeline, speed_up, kwargs_of(name, 0))
    tickets = draw_together(engine, [kwargs_of(name, i) for i in range(4)])
    engine.close()
    off = [difference(t, e) for t, e in zip(tickets, expected, strict=True)]
    assert max(off) < BOUNDS[dtype], off
