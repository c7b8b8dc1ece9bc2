"""What a forward runs under and as what: the thread's context, exact, padded, compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from handler.engine import BUCKETS, CompiledForwards
from tests.support.engine_tools import BOUND, all_right, opened, solo
from tests.support.toy_pipeline import ToyPipeline, ToyUNet, toy, toy_kwargs

# The thread's context


OUTSIDE: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing": nullcontext,
    "gradients": torch.enable_grad,
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def context() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
    )


@pytest.mark.parametrize("outside", OUTSIDE)
def test_grad_mode_is_off_in_every_forward_and_as_before_outside(outside: str) -> None:
    class Undecorated(ToyPipeline):
        __call__ = ToyPipeline.__call__.__wrapped__  # type: ignore[attr-defined]

    pipeline, modes = toy(Undecorated), set()
    for module in (pipeline.unet, pipeline.text_encoder.table, pipeline.vae.leave):
        module.register_forward_pre_hook(lambda *_: modes.add(torch.is_grad_enabled()))
    with OUTSIDE[outside]():
        before = context()
        with torch.no_grad():
            expected = [solo(pipeline, i) for i in range(3)]
        with opened(pipeline) as engine:
            tickets = [engine.submit(toy_kwargs(i)) for i in range(3)]
            engine.step()
            assert context() == before
            engine.cancel(tickets[2])
            assert context() == before
            engine.run()
            assert context() == before
            assert engine.counters.merged_forwards > 0
        assert context() == before
    assert modes == {False}
    assert all(ticket.result().images.grad_fn is None for ticket in tickets[:2])
    # Under autocast the picture has eight bits of mantissa, and rounds at other places in a batch.
    bound = 0.02 if outside == "autocast" else BOUND
    for ticket, image in zip(tickets[:2], expected, strict=False):
        assert (ticket.result().images - image).abs().max() < bound


INSIDE: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "gradients": torch.enable_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("whole", [True, False], ids=["whole call", "denoiser"])
def test_a_context_within_a_pipeline_is_its_own(inside: str, whole: bool) -> None:
    """Requests with and without one, interleaved: each as by itself, nothing left behind."""

    class Contextual(ToyPipeline):
        def __call__(self, prompt: str = "", **kwargs: Any) -> Any:
            self.enter = INSIDE[inside] if prompt == "own" else nullcontext
            with self.enter() if whole else nullcontext():
                return super().__call__(prompt, **kwargs)

        def denoise(self, *args: torch.Tensor) -> torch.Tensor:
            with self.enter():
                return super().denoise(*args)

    pipeline = toy(Contextual)
    plain = toy(Contextual)
    prompts = ["own", "a", "own", "b"]
    expected = [
        solo(plain, i, prompt=prompt, num_inference_steps=4 - i) for i, prompt in enumerate(prompts)
    ]
    before = context()
    with opened(pipeline) as engine:
        tickets = [
            engine.submit(toy_kwargs(i, prompt=prompt, num_inference_steps=4 - i))
            for i, prompt in enumerate(prompts)
        ]
        while engine.has_work:
            engine.step()
            assert context() == before
        assert engine.counters.merged_forwards > 0
    assert all_right(tickets, expected)


def test_a_pipeline_that_leaves_gradients_on_does_not_turn_them_on_for_others() -> None:
    class LeavesOn(ToyPipeline):
        def __call__(self, prompt: str = "", **kwargs: Any) -> Any:
            result = super().__call__(prompt, **kwargs)
            torch.set_grad_enabled(prompt == "on")
            return result

    modes: list[bool] = []
    with opened(toy(LeavesOn)) as engine:
        leaving = engine.submit(toy_kwargs(0, prompt="on", num_inference_steps=1))
        other = engine.submit(
            toy_kwargs(1), on_step=lambda end: modes.append(torch.is_grad_enabled())
        )
        assert engine.run() == [leaving, other]
    assert modes == [False] * 3
    assert not other.result().images.requires_grad


# Exact


class Mixing(ToyUNet):
    """A denoiser whose rows depend a little on how many there are: company shows."""

    def forward(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        (noise,) = super().forward(sample, *args, **kwargs)
        return (noise * (1 + 1e-5 * len(sample)),)


@pytest.mark.parametrize("of", ["engine", "request"])
def test_exact_requests_are_bit_equal_to_their_solo_runs(of: str) -> None:
    pipeline = toy(unet=Mixing())
    expected = [solo(pipeline, i) for i in range(4)]
    exact = {0, 2} if of == "request" else {0, 1, 2, 3}
    with opened(pipeline, exact=of == "engine", buckets=BUCKETS) as engine:
        options = {i: {"exact": True} if of == "request" and i in exact else {} for i in range(4)}
        tickets = [engine.submit(toy_kwargs(i), **options[i]) for i in range(4)]
        engine.run()
    equal = {i for i, t in enumerate(tickets) if torch.equal(t.result().images, expected[i])}
    assert equal == exact, "and the control: the others are not"


def test_a_request_may_do_without_exactness() -> None:
    with opened(toy(), exact=True) as engine:
        for i in range(2):
            engine.submit(toy_kwargs(i), exact=False)
        engine.run()
        assert engine.counters.merged_forwards > 0


# Padding and compiling


def test_a_denoiser_sees_bucket_sizes_within_the_limit() -> None:
    pipeline = toy()
    expected = [solo(pipeline, i, num_inference_steps=1 + i) for i in range(5)]
    rows: list[int] = []
    with opened(pipeline, buckets=(8, 1, 4, 64), max_rows=11) as engine:
        # From here on, past the first forwards, which also run alone to compare.
        for i in range(2):
            engine.submit(toy_kwargs(i, num_inference_steps=1 + i))
        engine.run()
        pipeline.unet.enter.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        tickets = [engine.submit(toy_kwargs(i, num_inference_steps=1 + i)) for i in range(5)]
        engine.run()
    assert rows == [11, 8, 8, 4, 4]
    assert all_right(tickets, expected)


def test_a_compiled_forward_meets_few_shapes() -> None:
    graphs: list[int] = []

    def backend(graph: Any, inputs: Sequence[torch.Tensor]) -> Any:
        graphs.append(1)
        return graph.forward

    pipeline = toy()
    expected = [solo(pipeline, i, num_inference_steps=1 + i) for i in range(6)]
    torch._dynamo.reset()
    with opened(
        pipeline,
        buckets=(2, 4, 8, 12),
        max_rows=12,
        wrappers=[
            CompiledForwards(lambda real: torch.compile(real, backend=backend, dynamic=False))
        ],
    ) as engine:
        tickets = [engine.submit(toy_kwargs(i, num_inference_steps=1 + i)) for i in range(6)]
        engine.run()
        num_graphs = len(graphs)
        again = [engine.submit(toy_kwargs(i, num_inference_steps=1 + i)) for i in range(6)]
        engine.run()
    torch._dynamo.reset()
    assert all_right([*tickets, *again], expected * 2)
    assert 0 < num_graphs <= 4
    assert len(graphs) == num_graphs, "nothing is compiled in traffic"
    assert "forward" not in vars(pipeline.unet)


def test_a_compiled_component_shares_its_forward() -> None:
    pipeline = toy()
    expected = [solo(pipeline, i, num_inference_steps=1 + i) for i in range(3)]
    torch._dynamo.reset()
    pipeline.unet = torch.compile(pipeline.unet, backend="eager", dynamic=False)
    with opened(pipeline, modules=["unet"]) as engine:
        tickets = [engine.submit(toy_kwargs(i, num_inference_steps=1 + i)) for i in range(3)]
        engine.run()
        assert engine.counters.merged_forwards == 2
    torch._dynamo.reset()
    assert all_right(tickets, expected)
