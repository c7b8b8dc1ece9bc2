"""What each speed does to a pipeline, and that its pictures stay what they were."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import Decoder

from handler.acceleration.speed import Plan, SpeedUp, make_plan
from handler.config import HandlerConfig
from handler.diffusers_handler import DiffusersHandler
from handler.engine import InFlightEngine
from handler.errors import ConfigError
from tests.support.compilers import Compiler, Graphs
from tests.support.frontend import CONTINUOUS, QUICK, Frontend
from tests.support.picture_tasks import task_kwargs, task_pipelines
from tests.support.pipelines import build, example_kwargs, image_of
from tests.support.toy_pipeline import toy, toy_kwargs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

# Of pixels in [0, 1]: what the engine promises in float32, and what a bfloat16 model stays within
# after a few steps. A wrong seed is ten times further off.
BOUND, BOUND_HALF = 1e-4, 2e-2


def plan_of(
    speed: str, device: torch.device = CPU, *, pipeline: Any = None, half: bool = True, **keys: Any
) -> Plan:
    dtype = torch.float16 if device == CUDA else torch.float32
    config = HandlerConfig(speed=speed, **keys)
    return make_plan(config, pipeline or toy(), device, dtype, has_bfloat16=half)


def test_what_the_speeds_mean() -> None:
    assert plan_of("off") == plan_of("off", CUDA) == Plan()
    assert plan_of("safe") == Plan(channels_last=True)
    assert plan_of("safe", CUDA) == Plan(channels_last=True, slice_decoding=True, warm_up=True)
    assert plan_of("max") == Plan(
        channels_last=True, precision=torch.bfloat16, compile=True, warm_up=True
    )
    assert plan_of("max", CUDA) == Plan(
        channels_last=True,
        slice_decoding=True,
        fuse_projections=True,
        compile=True,
        capture=True,
        warm_up=True,
    )


def test_exact_leaves_the_pipeline_alone() -> None:
    assert plan_of("safe", exact=True) == Plan()


def test_the_precision_that_was_chosen_stays() -> None:
    assert plan_of("max", dtype="float32").precision is None
    assert plan_of("max", half=False).precision is None


def test_without_a_text_encoder_latents_would_take_the_denoisers_precision() -> None:
    assert plan_of("max", pipeline=build("kandinsky_2_2")).precision is None


def test_pipelines_that_change_their_modules_are_not_compiled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan = plan_of("max", CUDA, pipeline=build("stable_diffusion_pag"))
    assert not plan.prepares
    assert not plan.fuse_projections
    assert "calls of this pipeline replace parts of its modules" in caplog.text


def test_adapters_are_not_compiled_in(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = toy()
    pipeline.unet.peft_config = {"style": object()}
    assert not plan_of("max", pipeline=pipeline).prepares
    assert "unet has LoRA adapters" in caplog.text


def test_padding_only_where_shapes_are_few() -> None:
    def buckets(plan: Plan, max_rows: int = 10) -> tuple[int, ...]:
        return SpeedUp(toy(), plan, max_rows).buckets

    assert buckets(Plan(channels_last=True)) == ()
    assert buckets(Plan(compile=True), 5) == (2, 3, 4, 5)
    assert buckets(Plan(compile=True, capture=True)) == (2, 4, 8, 10)
    assert buckets(Plan(compile=True), 2) == (2,)


def is_channels_last(module: torch.nn.Module) -> bool:
    weights = [w for w in module.parameters() if w.ndim == 4 and w.shape[1] > 1 < w.shape[2]]
    assert weights
    return all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def test_safe_changes_no_picture_beyond_rounding() -> None:
    pipeline = build("stable_diffusion")
    expected = image_of(pipeline(**example_kwargs("stable_diffusion", 0)))
    assert not is_channels_last(pipeline.unet)
    SpeedUp(pipeline, Plan(channels_last=True, slice_decoding=True), 16)
    assert is_channels_last(pipeline.unet)
    assert is_channels_last(pipeline.vae)
    assert pipeline.vae.use_slicing
    engine = InFlightEngine(pipeline)
    tickets = [engine.submit(example_kwargs("stable_diffusion", i)) for i in range(3)]
    engine.run()
    engine.close()
    assert (image_of(tickets[0].result()) - expected).abs().max() < BOUND
    assert (image_of(tickets[1].result()) - expected).abs().max() > 30 * BOUND


def test_fused_projections_change_no_picture_beyond_rounding() -> None:
    pipeline = build("stable_diffusion_xl")
    expected = image_of(pipeline(**example_kwargs("stable_diffusion_xl", 0)))
    SpeedUp(pipeline, Plan(fuse_projections=True), 16)
    assert any("Fused" in type(p).__name__ for p in pipeline.unet.attn_processors.values())
    fused = image_of(pipeline(**example_kwargs("stable_diffusion_xl", 0)))
    assert (fused - expected).abs().max() < BOUND


def test_three_dimensional_convolutions_are_left_alone() -> None:
    pipeline = toy()
    pipeline.vae.leave = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.Conv3d(4, 3, 1))
    SpeedUp(pipeline, Plan(channels_last=True), 16)
    assert is_channels_last(pipeline.unet)
    assert not is_channels_last(pipeline.vae)


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl", "flux"])
def test_half_precision_inside_of_the_denoiser(family: str) -> None:
    """The schedulers, the guidance and the VAE go on in float32, and batches still merge."""
    pipeline = build(family)
    requests = [example_kwargs(family, i) for i in range(4)]
    expected = [image_of(pipeline(**kwargs)) for kwargs in requests]
    SpeedUp(pipeline, Plan(precision=torch.bfloat16), 16)
    denoiser = pipeline.transformer if family == "flux" else pipeline.unet
    assert denoiser.dtype is torch.bfloat16
    dtypes = set()

    def watch(view: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        dtypes.add(tensors["latents"].dtype)
        return tensors

    engine = InFlightEngine(pipeline)
    requests = [example_kwargs(family, i) for i in range(4)]
    tickets = [engine.submit({**kwargs, "callback_on_step_end": watch}) for kwargs in requests]
    engine.run()
    assert engine.counters.merged_forwards > 3
    engine.close()
    assert dtypes == {torch.float32}
    pictures = [image_of(ticket.result()) for ticket in tickets]
    off = [float((p - e).abs().mean()) for p, e in zip(pictures, expected, strict=True)]
    assert 0 < max(off) < BOUND_HALF
    assert float((pictures[0] - expected[1]).abs().mean()) > 2 * BOUND_HALF


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "flux"])
def test_half_precision_inside_of_the_denoiser_of_several_tasks(name: str) -> None:
    """What the tasks share is changed once, and ControlNets with it."""
    pipelines = task_pipelines(name)
    expected = {
        task: image_of(each(**task_kwargs(pipelines, name, task, 1)))
        for task, each in pipelines.items()
    }
    first = next(iter(pipelines.values()))
    SpeedUp(pipelines, Plan(channels_last=True, precision=torch.bfloat16), 16)
    denoiser = first.transformer if name == "flux" else first.unet
    assert denoiser.dtype is torch.bfloat16
    assert first.vae.dtype is torch.float32
    if name != "flux":
        controlled = pipelines["text-to-image+control:edges"]
        assert is_channels_last(controlled.controlnet)
        assert is_channels_last(denoiser)
    with closing(InFlightEngine(pipelines)) as engine:
        tickets = {
            task: engine.submit(task_kwargs(pipelines, name, task, 1), task=task)
            for task in pipelines
        }
        engine.run()
        assert engine.counters.merged_forwards > 0
    for task, ticket in tickets.items():
        off = float((image_of(ticket.result()) - expected[task]).abs().mean())
        assert 0 < off < BOUND_HALF, task


def test_steps_and_positions_keep_their_digits() -> None:
    """bfloat16 has no 981: it would be 980."""
    pipeline, seen = toy(), []
    forward = pipeline.unet.forward

    def watched(
        sample: Any, timestep: Any, encoder_hidden_states: Any, return_dict: bool = False
    ) -> Any:
        seen.append((sample.dtype, timestep.dtype, encoder_hidden_states.dtype))
        return (sample,)

    pipeline.unet.forward = watched
    SpeedUp(pipeline, Plan(precision=torch.bfloat16), 16)
    pipeline.unet(torch.ones(1, 4, 2, 2), torch.tensor(981.0), torch.ones(1, 6, 8))
    assert seen == [(torch.bfloat16, torch.float32, torch.bfloat16)]
    assert forward.__func__ is type(pipeline.unet).forward


def test_warming_up_prepares_and_traffic_only_uses_it(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    pipeline, compiler, graphs = toy(), Compiler(), Graphs()
    expected = [toy()(**toy_kwargs(i)).images for i in range(5)]
    plan = Plan(channels_last=True, compile=True, capture=True, warm_up=True)
    speed_up = SpeedUp(pipeline, plan, 8, compiler=compiler, record=graphs.record)
    engine = InFlightEngine(
        pipeline, max_rows=8, buckets=speed_up.buckets, wrappers=speed_up.wrappers
    )
    with caplog.at_level(logging.INFO):
        speed_up.warm_up(engine, [toy_kwargs(0), toy_kwargs(0, height=32)])
    assert "warmed up in" in caplog.text
    assert "(channels_last, compile, capture)" in caplog.text
    (prepared,) = speed_up.prepared
    assert not prepared.is_warming
    assert compiler.num_graphs == 2
    prepared.num_plain_runs = 0
    tickets = [engine.submit(toy_kwargs(i)) for i in range(5)]
    small = engine.submit(toy_kwargs(0, height=32))
    engine.run()
    for ticket, picture in zip(tickets, expected, strict=True):
        assert torch.allclose(ticket.result().images, picture, atol=1e-5)
    assert small.result().images.shape[-2:] == (4, 8)
    assert prepared.num_plain_runs == 0
    engine.submit(toy_kwargs(0, height=128))
    engine.run()
    assert prepared.num_plain_runs > 0
    assert compiler.num_graphs == 2
    engine.close()


def test_a_picture_that_cannot_be_drawn_is_said_and_ends_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    speed_up = SpeedUp(toy(), Plan(warm_up=True), 16)
    pipeline = toy()
    pipeline.vae.decode = lambda z: 1 / 0
    engine = InFlightEngine(pipeline)
    speed_up.warm_up(engine, [toy_kwargs(0)])
    assert "warming up failed: division by zero" in caplog.text
    assert not engine.has_work
    engine.close()


def out_of_memory(*_: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_graphs_that_leave_no_room_for_the_rest_are_given_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Decoding finds too little memory for as long as there are graphs."""
    pipeline, graphs = toy(), Graphs()
    expected = toy()(**toy_kwargs(1)).images
    speed_up = SpeedUp(pipeline, Plan(capture=True, warm_up=True), 8, record=graphs.record)
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda z: (
        out_of_memory() if any(p.has_graphs for p in speed_up.prepared) else decode(z)
    )
    engine = InFlightEngine(
        pipeline, max_rows=8, buckets=speed_up.buckets, wrappers=speed_up.wrappers
    )
    speed_up.warm_up(engine, [toy_kwargs(0)])
    assert "up to 8 rows leave too little memory" in caplog.text
    ticket = engine.submit(toy_kwargs(1))
    engine.run()
    engine.close()
    assert graphs.num_replays > 0
    assert torch.allclose(ticket.result().images, expected, atol=1e-5)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: device-side assert triggered"),
    ],
)
def test_what_would_fail_every_picture_ends_the_start(error: Exception) -> None:
    def fail(z: Any) -> Any:
        raise error

    pipeline = toy()
    pipeline.vae.decode = fail
    speed_up = SpeedUp(pipeline, Plan(warm_up=True), 16)
    engine = InFlightEngine(pipeline)
    with pytest.raises(type(error), match=str(error)):
        speed_up.warm_up(engine, [toy_kwargs(0)])
    engine.close()


def test_only_denoisers_are_padded() -> None:
    """A picture that is decoded alone is not decoded twice."""
    pipeline, rows = toy(), dict[str, list[int]]()
    parts = {
        "encoder": pipeline.text_encoder.table,
        "unet": pipeline.unet.enter,
        "vae": pipeline.vae.leave,
    }
    for name, part in parts.items():
        part.register_forward_pre_hook(
            lambda _, inputs, name=name: rows.setdefault(name, []).append(len(inputs[0]))
        )
    engine = InFlightEngine(pipeline, buckets=(4,))
    engine.submit(toy_kwargs(0, guidance_scale=1.0, num_inference_steps=2))
    engine.run()
    engine.close()
    # The first forward is compared with one that is not padded.
    assert rows == {"encoder": [1], "unet": [4, 1, 4], "vae": [1]}


Serve = Callable[..., DiffusersHandler]


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    build("stable_diffusion").save_pretrained(tmp_path / "model")

    def start(**settings: Any) -> DiffusersHandler:
        handler = DiffusersHandler()
        config = {**CONTINUOUS, "handler": {**QUICK, **settings}}
        handler.initialize(Frontend(handler, tmp_path, config).context)
        return handler

    return start


def test_the_handler_warms_up_every_size(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        handler = serve(speed="safe", warm_up_sizes=["64x32", "64x64"])
    assert "warmed up in" in caplog.text
    assert is_channels_last(handler.pipeline.unet)


def test_a_start_without_memory_for_one_picture_says_what_would_help(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoder, "forward", out_of_memory)
    with pytest.raises(ConfigError, match=r"dtype: float16; a smaller default size .* max_rows"):
        serve(speed="safe", warm_up_sizes=["64x32"])


def test_the_handler_does_nothing_when_speed_is_off(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        handler = serve(speed="off")
    assert "warmed up" not in caplog.text
    assert not is_channels_last(handler.pipeline.unet)


def test_sizes_to_warm_up_must_fit_the_pipeline(serve: Serve) -> None:
    with pytest.raises(ConfigError, match=r"warm_up_sizes: .*height"):
        serve(warm_up_sizes=["65x64"])
