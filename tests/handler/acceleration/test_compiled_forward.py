"""Forwards that are compiled and captured while they warm up, and run as they are for all else.

Captured graphs are played by a stand-in that keeps the one property of theirs that is dangerous:
every replay reads the same inputs and writes over the same outputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from handler.acceleration.compiled_forward import PreparedForward
from handler.engine import CompiledForwards, InFlightEngine
from tests.support.compilers import Compiler, Graphs
from tests.support.toy_pipeline import ToyUNet, toy, toy_kwargs

BUCKETS = (2, 4, 6)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def unet() -> ToyUNet:
    return toy().unet


def example(rows: int, *, side: int = 8, step: Any = None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rows)
    return {
        "sample": torch.randn((rows, 4, side, side), generator=generator),
        "timestep": torch.full((rows,), 981) if step is None else step,
        "encoder_hidden_states": torch.randn((rows, 6, 8), generator=generator),
    }


def warmed(forward: Callable[..., Any], **options: Any) -> PreparedForward:
    prepared = PreparedForward(forward, BUCKETS, **options)
    prepared.is_warming = True
    with torch.no_grad():
        prepared(**example(2))
    prepared.is_warming = False
    prepared.num_prepared_runs = prepared.num_plain_runs = 0
    return prepared


def difference(prepared: PreparedForward, forward: Callable[..., Any], **call: Any) -> float:
    with torch.no_grad():
        return float((prepared(**call)[0] - forward(**call)[0]).abs().max())


def test_a_kind_that_was_warmed_up_is_replayed() -> None:
    forward, graphs = unet().forward, Graphs()
    prepared = warmed(forward, record=graphs.record)
    graphs.num_replays = 0
    for rows in BUCKETS:
        assert difference(prepared, forward, **example(rows)) < 1e-6
    assert graphs.num_replays == prepared.num_prepared_runs == len(BUCKETS)
    assert prepared.num_plain_runs == 0


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(example(3), id="rows between two buckets"),
        pytest.param(example(8), id="rows above the last bucket"),
        pytest.param(example(2, side=16), id="another size"),
        pytest.param({**example(2), "return_dict": True}, id="another plain value"),
        pytest.param({k: v.double() for k, v in example(2).items()}, id="another dtype"),
    ],
)
def test_every_other_call_runs_as_it_is(call: dict[str, Any]) -> None:
    model, graphs = unet(), Graphs()
    prepared = warmed(model.forward, record=graphs.record)
    graphs.num_replays = 0
    model.to(call["sample"].dtype)
    assert difference(prepared, model.forward, **call) == 0.0
    assert (graphs.num_replays, prepared.num_plain_runs) == (0, 1)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(torch.tensor(981), id="one for all rows"),
        pytest.param(torch.tensor([981]), id="one in a list"),
        pytest.param(torch.tensor(980.5), id="of a scheduler that counts in floats"),
        pytest.param(torch.tensor([981.0, 41.0]), id="of a mixed batch"),
    ],
)
def test_however_the_step_is_written_it_is_one_kind(step: torch.Tensor) -> None:
    forward = unet().forward
    prepared = warmed(forward, record=Graphs().record)
    assert difference(prepared, forward, **example(2, step=step)) < 1e-6
    assert prepared.num_prepared_runs == 1


def test_gaps_in_memory_make_no_other_kind() -> None:
    forward = unet().forward
    prepared = warmed(forward, record=Graphs().record)
    call = example(2)
    call["sample"] = call["sample"].to(memory_format=torch.channels_last)
    call["encoder_hidden_states"] = torch.randn(4, 6, 8)[::2]
    assert difference(prepared, forward, **call) < 1e-6
    assert prepared.num_prepared_runs == 1


def test_results_are_kept_when_the_graph_is_replayed() -> None:
    """A scheduler of several orders keeps the last results of its model."""
    prepared = warmed(unet().forward, record=Graphs().record)
    first = prepared(**example(2))[0]
    kept = first.clone()
    prepared(**example(2, step=torch.tensor(1)))
    assert torch.equal(first, kept)


def test_a_recorder_that_loses_its_inputs_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    """Negative control of the comparison: what replays its first result is not used."""

    def record_once(run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        return lambda: None, run()

    forward = unet().forward
    with caplog.at_level(logging.WARNING):
        prepared = warmed(forward, record=record_once)
    assert "not captured" in caplog.text
    assert difference(prepared, forward, **example(2)) == 0.0
    assert prepared.num_plain_runs == 1


def test_compiled_once_for_all_rows_above_one() -> None:
    forward, compiler = unet().forward, Compiler()
    prepared = warmed(forward, compiler=compiler)
    assert compiler.num_graphs == 1
    for rows in (2, 3, 5, 6):
        assert difference(prepared, forward, **example(rows)) < 1e-6
    assert prepared.num_prepared_runs == 4
    prepared(**example(1))
    assert prepared.num_plain_runs == 1
    assert compiler.num_graphs == 1


def test_nothing_is_compiled_in_traffic() -> None:
    """Gradients switched on are a new case for the compiler, which must not stop to compile it."""
    forward, compiler = unet().forward, Compiler()
    prepared = warmed(forward, compiler=compiler)
    with torch.enable_grad():
        assert prepared(**example(2))[0].requires_grad
    assert compiler.num_graphs == 1


def test_graphs_are_captured_of_the_compiled_code() -> None:
    forward, compiler, graphs = unet().forward, Compiler(), Graphs()
    prepared = warmed(forward, compiler=compiler, record=graphs.record)
    assert difference(prepared, forward, **example(4)) < 1e-6
    assert compiler.num_graphs == 1
    prepared(**example(3))  # no bucket, but the compiled code has any number of rows
    assert prepared.num_prepared_runs == 2


def wrong(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: (forward(*args, **kwargs)[0] * 1.01,)


def broken(forward: Callable[..., Any]) -> Callable[..., Any]:
    raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")


@pytest.mark.parametrize(("compiler", "reason"), [(wrong, "other results"), (broken, "No working")])
def test_without_a_compiler_that_works_forwards_run_as_they_are(
    compiler: Callable[..., Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    forward, graphs = unet().forward, Graphs()
    with caplog.at_level(logging.WARNING):
        prepared = warmed(forward, compiler=compiler, record=graphs.record)
    (line,) = caplog.messages
    assert "not compiled" in line
    assert reason in line
    # Graphs of the forward as it is are still worth their memory.
    graphs.num_replays = 0
    assert difference(prepared, forward, **example(2)) < 1e-6
    assert graphs.num_replays == 1


def test_buckets_without_memory_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    graphs = Graphs()

    def record(run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        replay, output = graphs.record(run)
        if len(output[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return replay, output

    forward = unet().forward
    with caplog.at_level(logging.WARNING):
        prepared = warmed(forward, record=record)
    assert caplog.messages == ["no memory to capture forwards of 6 rows"]
    for rows in BUCKETS:
        difference(prepared, forward, **example(rows))
    assert (prepared.num_prepared_runs, prepared.num_plain_runs) == (2, 1)


def test_the_function_looks_like_the_forward() -> None:
    forward = unet().forward
    function = PreparedForward(forward, BUCKETS).function
    assert function.__name__ == "forward"
    assert function.__wrapped__ == forward  # type: ignore[attr-defined]


def test_in_flight_every_picture_is_its_own() -> None:
    """Ten requests through graphs that overwrite their results, each against its solo run."""
    pipeline = toy()
    requests = [toy_kwargs(i, num_inference_steps=2 + i % 4) for i in range(10)]
    for kwargs in requests[::3]:
        kwargs["guidance_scale"] = 1.0
    solo = [pipeline(**kwargs).images for kwargs in requests]
    for i, kwargs in enumerate(requests):
        kwargs["generator"] = torch.Generator().manual_seed(i)
    made: list[PreparedForward] = []

    def prepare(forward: Callable[..., Any]) -> Callable[..., Any]:
        made.append(PreparedForward(forward, BUCKETS, compiler=Compiler(), record=Graphs().record))
        return made[-1].function

    engine = InFlightEngine(
        pipeline, max_rows=6, buckets=BUCKETS, wrappers=[CompiledForwards(prepare)]
    )
    (prepared,) = made
    prepared.is_warming = True
    engine.submit(toy_kwargs(0))
    engine.run()
    prepared.is_warming = False
    prepared.num_plain_runs = 0
    tickets = [engine.submit(kwargs) for kwargs in requests]
    engine.run()
    for ticket, expected in zip(tickets, solo, strict=True):
        assert torch.allclose(ticket.result().images, expected, atol=1e-5)
    assert prepared.num_prepared_runs > 5
    assert prepared.num_plain_runs == 0
    exact = engine.submit(toy_kwargs(3), exact=True)
    engine.run()
    assert torch.equal(exact.result().images, toy()(**toy_kwargs(3)).images)
    engine.close()
