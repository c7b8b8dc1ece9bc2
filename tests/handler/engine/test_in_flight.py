"""The engine's promises to its owner: ends, refusals, schedulers, errors, sizes.

That the pictures of all families are right is `test_families`; random mixes are
`test_properties`. Here the pipeline is a toy, so that every case can be forced.
"""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch

from handler.engine import CompiledForwards, InFlightEngine
from handler.engine.ticket import State, StepEnd
from handler.errors import TooLarge
from handler.pipelines.cost import Cost
from tests.support.clock import Clock
from tests.support.engine_tools import (
    BOUND,
    Strict,
    all_right,
    is_right,
    nan_latents,
    opened,
    solo,
    step_until,
)
from tests.support.toy_pipeline import Denoise, ToyPipeline, ToyUNet, toy, toy_kwargs, toy_where

# Ends


def test_every_ticket_is_returned_once_when_it_ends() -> None:
    with opened(toy()) as engine:
        tickets = [
            engine.submit(toy_kwargs(i, num_inference_steps=n)) for i, n in enumerate((3, 1, 2))
        ]
        assert engine.run() == [tickets[1], tickets[2], tickets[0]]
        assert all(ticket.state is State.DONE for ticket in tickets)
        assert engine.step() == []
        assert not engine.has_work


def test_a_result_before_the_end_is_an_error_that_says_what_to_do() -> None:
    with opened(toy(), max_rows=2) as engine:
        first, second = (engine.submit(toy_kwargs(i)) for i in range(2))
        engine.step()
        with pytest.raises(RuntimeError, match=f"request {first.serial} is still running"):
            first.result()
        with pytest.raises(RuntimeError, match=f"{second.serial} is still waiting; step the"):
            second.result()
        assert first.error is None


def test_the_same_arrivals_give_the_same_ticks() -> None:
    def counts() -> tuple[int, ...]:
        with opened(toy(), max_rows=5) as engine:
            for i in range(6):
                engine.submit(toy_kwargs(i, num_inference_steps=1 + i % 3))
                engine.step()
            engine.run()
            c = engine.counters
            return (c.ticks, c.forwards, c.rows, c.merged_forwards)

    assert counts() == counts()


def test_times_are_read_from_the_clock() -> None:
    clock = Clock()
    with opened(toy(), clock=clock, max_rows=2) as engine:
        engine.submit(toy_kwargs(0))
        ticket = engine.submit(toy_kwargs(1))
        step_until(engine, lambda: ticket.state is State.RUNNING)
        clock.now_s += 3
        step_until(engine, lambda: ticket.num_steps_done == 3)
        clock.now_s += 4
        engine.run()
        times = (ticket.submitted_s, ticket.admitted_s, ticket.denoised_s, ticket.ended_s)
    assert times == (100.0, 100.0, 103.0, 107.0)


def test_the_seconds_of_a_tick_are_told_apart() -> None:
    """What a forward takes, what the pipeline's own code takes, and the rest."""
    clock = Clock()

    class Slow(ToyUNet):
        def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
            clock.now_s += 10
            return super().forward(sample, timestep, encoder_hidden_states)

    def pass_a_second(end: StepEnd) -> None:
        clock.now_s += 1

    with opened(toy(unet=Slow()), clock=clock) as engine:
        for i in range(2):
            engine.submit(toy_kwargs(i, num_inference_steps=4), on_step=pass_a_second)
        engine.run()
        counters = engine.counters
    # Four shared forwards and one, of the first kind seen, alone to compare with.
    assert counters.forward_s == 50
    assert counters.pipeline_s == 8
    assert counters.tick_s == 58


def test_a_late_arrival_finishes_first_when_it_is_shorter() -> None:
    with opened(toy()) as engine:
        long = engine.submit(toy_kwargs(0, num_inference_steps=9))
        engine.step()
        short = engine.submit(toy_kwargs(1, num_inference_steps=2))
        assert engine.run() == [short, long]


# What is refused


@pytest.mark.parametrize(
    ("kwargs", "options", "error", "says"),
    [
        ({"step": 3}, {}, ValueError, r"ToyPipeline takes no argument \['step'\]"),
        ({}, {"scheduler": "nonsense"}, ValueError, "scheduler 'nonsense' does not fit"),
        ({}, {"scheduler": "flow_euler"}, ValueError, "'flow_euler' does not fit"),
        ({}, {"adapters": {"a": 1.0}}, ValueError, r"adapters \['a'\] are not loaded"),
        ({"num_images_per_prompt": -1}, {}, ValueError, "num_images_per_prompt is -1; it is at"),
        ({"num_images_per_prompt": 0}, {}, ValueError, "num_images_per_prompt is 0; it is at"),
        ({"height": -8}, {}, ValueError, "height is -8; it is at least 1"),
        ({"num_images_per_prompt": 3}, {}, TooLarge, "needs 6 rows and 12288 pixels"),
        ({"height": 800}, {}, TooLarge, "up to 4 rows and 20000 pixels"),
    ],
)
def test_what_can_never_run_is_refused(
    kwargs: dict[str, Any], options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with opened(toy(), max_rows=4, max_pixels=20_000) as engine:
        with pytest.raises(error, match=says):
            engine.submit(toy_kwargs(**kwargs), **options)
        assert not engine.has_work


def test_a_pipeline_that_offloads_its_modules_is_refused() -> None:
    pipeline = toy()
    pipeline._all_hooks = [object()]
    with pytest.raises(ValueError, match="offloads its modules"):
        InFlightEngine(pipeline)


@pytest.mark.parametrize("modules", [None, ["unet"]])
def test_a_second_engine_on_the_same_modules_is_refused(modules: list[str] | None) -> None:
    """Also on another pipeline that shares them; the first serves on and gives all back."""
    pipeline = toy()
    expected = [solo(pipeline, i) for i in range(2)]
    other = ToyPipeline(**pipeline.components)
    with opened(pipeline) as engine:
        for taken in (pipeline, other):
            with pytest.raises(ValueError, match=r"serves another engine already; close\(\) that"):
                InFlightEngine(taken, modules=modules)
        tickets = [engine.submit(toy_kwargs(i)) for i in range(2)]
        engine.run()
        assert engine.counters.merged_forwards > 0
    assert all_right(tickets, expected)
    for module in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        assert not {"forward", "decode"} & vars(module).keys()
    with opened(other):
        pass


def test_engines_may_share_a_pipeline_module_by_module() -> None:
    pipeline = toy()
    with opened(pipeline, modules=["unet"]), opened(pipeline, modules=["vae.decode"]) as engine:
        ticket = engine.submit(toy_kwargs())
        engine.run()
    assert is_right(ticket, solo(pipeline))


@pytest.mark.parametrize(
    "options",
    [{"modules": ["unet", "nonsense"]}, {"wrappers": [CompiledForwards(lambda real: 1 / 0)]}],
    ids=["name", "compiler"],
)
def test_an_engine_that_does_not_start_leaves_the_pipeline_as_it_was(
    options: dict[str, Any],
) -> None:
    pipeline = toy()
    with pytest.raises((ValueError, ZeroDivisionError)):
        InFlightEngine(pipeline, **options)
    assert not any(
        name in vars(module)
        for module in (pipeline.unet, pipeline.text_encoder, pipeline.vae)
        for name in ("forward", "decode")
    )


# Schedulers


def test_a_scheduler_is_a_short_name_a_class_name_or_an_object() -> None:
    pipeline = toy()
    euler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    expected = solo(pipeline, scheduler=copy.deepcopy(euler))
    assert (expected - solo(pipeline)).abs().max() > 100 * BOUND
    with opened(pipeline) as engine:
        tickets = [
            engine.submit(toy_kwargs(), scheduler=scheduler)
            for scheduler in ("euler", "EulerDiscreteScheduler", euler)
        ]
        engine.run()
    assert all(is_right(ticket, expected) for ticket in tickets)


def test_a_scheduler_object_is_copied() -> None:
    """One object for two requests, changed after they were submitted: neither notices."""
    pipeline = toy()
    scheduler = diffusers.DPMSolverMultistepScheduler()
    expected = [solo(pipeline, i, diffusers.DPMSolverMultistepScheduler()) for i in range(2)]
    with opened(pipeline) as engine:
        tickets = [engine.submit(toy_kwargs(i), scheduler=scheduler) for i in range(2)]
        scheduler.set_timesteps(1)
        engine.run()
    assert scheduler.num_inference_steps == 1
    assert all(is_right(t, e) for t, e in zip(tickets, expected, strict=True))


# Errors


def test_an_error_of_one_request_is_its_own() -> None:
    def fail(prompt: str, denoise: Denoise) -> torch.Tensor:
        if prompt == "bad":
            denoise()
            raise ZeroDivisionError("theirs")
        return denoise()

    pipeline = toy_where(fail)
    expected = [solo(pipeline, i) for i in range(3)]
    with opened(pipeline) as engine:
        good = [engine.submit(toy_kwargs(i)) for i in range(2)]
        bad = engine.submit(toy_kwargs(9, prompt="bad"))
        good.append(engine.submit(toy_kwargs(2)))
        engine.run()
    assert bad.state is State.FAILED
    assert isinstance(bad.error, ZeroDivisionError)
    with pytest.raises(ZeroDivisionError, match="theirs"):
        bad.result()
    assert all_right(good, expected)


def test_an_error_of_a_shared_forward_is_the_failing_requests() -> None:
    pipeline = toy(unet=Strict())
    expected = [solo(pipeline, i) for i in range(3)]
    with opened(pipeline) as engine:
        good = [engine.submit(toy_kwargs(i)) for i in range(2)]
        bad = engine.submit(toy_kwargs(9, callback_on_step_end=nan_latents))
        good.append(engine.submit(toy_kwargs(2)))
        engine.run()
    assert isinstance(bad.error, FloatingPointError)
    assert bad.num_steps_done == 1
    assert all_right(good, expected)


def test_a_pipeline_may_handle_the_error_of_its_forward() -> None:
    def careful(prompt: str, denoise: Denoise) -> torch.Tensor:
        try:
            return denoise()
        except FloatingPointError:
            return torch.zeros(2, 4, 8, 8)

    def nan_once(view: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        broken = torch.full_like(tensors["latents"], float("nan"))
        return {"latents": broken if step == 1 else tensors["latents"].nan_to_num()}

    pipeline = toy_where(careful, unet=Strict())
    expected = [solo(pipeline, 0), solo(pipeline, 1, callback_on_step_end=nan_once)]
    with opened(pipeline) as engine:
        good = engine.submit(toy_kwargs(0))
        bad = engine.submit(toy_kwargs(1, callback_on_step_end=nan_once))
        engine.run()
    assert is_right(good, expected[0])
    assert is_right(bad, expected[1])
    assert not is_right(bad, solo(pipeline, 1))


def test_only_the_request_that_does_not_fit_in_memory_fails() -> None:
    class Small(ToyUNet):
        def forward(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if len(sample) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().forward(sample, *args, **kwargs)

    pipeline = toy(unet=Small())
    expected = [solo(pipeline, i) for i in range(3)]
    with opened(pipeline) as engine:
        tickets = [engine.submit(toy_kwargs(i)) for i in range(3)]
        large = engine.submit(toy_kwargs(5, num_images_per_prompt=2))
        engine.run()
        assert engine.counters.out_of_memory_retries > 0
    assert isinstance(large.error, torch.OutOfMemoryError)
    assert all_right(tickets, expected)


def test_an_error_in_on_step_is_the_requests() -> None:
    def complain(end: StepEnd) -> None:
        if end.step == 2:
            raise LookupError("the listener is gone")

    pipeline = toy()
    with opened(pipeline) as engine:
        heard = engine.submit(toy_kwargs(0), on_step=complain)
        other = engine.submit(toy_kwargs(1))
        engine.run()
    assert isinstance(heard.error, LookupError)
    assert heard.num_steps_done == 2
    assert is_right(other, solo(pipeline, 1))


def test_a_request_that_cannot_even_start_ends_alone() -> None:
    pipeline = toy()
    with opened(pipeline) as engine:
        stuck = engine.submit(toy_kwargs(0), scheduler=diffusers.EulerDiscreteScheduler())
        stuck.kwargs["callback_on_step_end"] = 1
        stuck.kwargs["num_inference_steps"] = "three"
        other = engine.submit(toy_kwargs(1))
        # What copying the pipeline's own scheduler runs into, while the view is made.
        pipeline.scheduler.lock = (i for i in "cannot be copied")
        unmade = engine.submit(toy_kwargs(2))
        ended = engine.step()
        del pipeline.scheduler.lock
        assert set(ended) == {stuck, other, unmade}
    assert isinstance(unmade.error, TypeError)


def test_an_interrupt_leaves_the_engine_whole() -> None:
    """Control-C lands in some request's code: that one ends, and the others can go on."""

    def interrupt(prompt: str, denoise: Denoise) -> torch.Tensor:
        noise = denoise()
        if prompt == "bad":
            raise KeyboardInterrupt
        return noise

    pipeline = toy_where(interrupt)
    expected = [solo(pipeline, i) for i in range(2)]
    with opened(pipeline) as engine:
        first = engine.submit(toy_kwargs(0))
        bad = engine.submit(toy_kwargs(9, prompt="bad"))
        last = engine.submit(toy_kwargs(1))
        with pytest.raises(KeyboardInterrupt):
            engine.run()
        assert set(engine.run()) == {first, bad, last}
    assert isinstance(bad.error, KeyboardInterrupt)
    assert all_right([first, last], expected)


# Sizes


def test_rows_that_turn_out_larger_are_counted_as_they_are() -> None:
    """Every call has three times the rows that its arguments told: limits hold all the same."""

    class Threefold(ToyPipeline):
        def denoise(self, *args: Any) -> torch.Tensor:
            rows, t, embeds = args
            noise = super().denoise(rows.repeat(3, 1, 1, 1), t, embeds.repeat(3, 1, 1))
            return noise.chunk(3)[1]

    pipeline = toy(Threefold)
    expected = [solo(pipeline, i, guidance_scale=1.0) for i in range(5)]
    rows: list[int] = []
    pipeline.unet.enter.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    with opened(pipeline, max_rows=7) as engine:
        tickets = [engine.submit(toy_kwargs(i, guidance_scale=1.0)) for i in range(5)]
        assert tickets[0].cost.rows == 1
        step_until(engine, lambda: tickets[0].num_steps_done > 0)
        assert engine.in_flight == Cost(15, 5 * 4096, 4096)
        engine.run()
        too_large = engine.submit(toy_kwargs(9, num_images_per_prompt=3, guidance_scale=1.0))
        engine.run()
    assert max(rows) == 6
    assert all_right(tickets, expected)
    assert isinstance(too_large.error, TooLarge)
    assert "needs 9 rows" in str(too_large.error)


class Packed(ToyUNet):
    """Takes the tokens of one picture packed together: no tensor of it is a batch."""

    def forward(
        self, tokens: torch.Tensor, ids: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor
    ) -> Any:
        sample = tokens.reshape(1, 8, 8, 4).permute(0, 3, 1, 2)
        (noise,) = super().forward(sample * (1 + ids.sum()), timestep, text[None])
        return (noise.permute(0, 2, 3, 1).reshape(64, 4),)


@pytest.mark.parametrize("first", ["ids", "tokens"])
def test_packed_tokens_are_no_batch_and_run(first: str) -> None:
    """64 of them, where 16 rows are the most: the request is as large as it said, one row."""

    class Packing(ToyPipeline):
        def denoise(self, rows: Any, t: torch.Tensor, embeds: Any) -> torch.Tensor:
            tokens = rows.permute(0, 2, 3, 1).reshape(64, 4)
            ids = {"ids": torch.arange(39) / 1000}
            arguments = {**ids, "tokens": tokens} if first == "ids" else {"tokens": tokens, **ids}
            noise = self.unet(**arguments, timestep=t, text=embeds[0])[0]
            return noise.reshape(1, 8, 8, 4).permute(0, 3, 1, 2)

    pipeline = toy(Packing, unet=Packed())
    expected = [solo(pipeline, i, guidance_scale=1.0) for i in range(3)]
    with opened(pipeline, max_rows=16) as engine:
        tickets = [engine.submit(toy_kwargs(i, guidance_scale=1.0)) for i in range(3)]
        engine.run()
        assert [ticket.cost.rows for ticket in tickets] == [1, 1, 1]
    assert all_right(tickets, expected)


def test_newcomers_do_not_starve_who_is_in_flight() -> None:
    """One-step requests of four rows that claim two, one a tick: the old one keeps its turns."""

    class Twofold(ToyPipeline):
        def __call__(self, prompt: str = "", **kwargs: Any) -> Any:
            self.fold = 2 if prompt == "large" else 1
            return super().__call__(prompt, **kwargs)

        def encode(self, prompts: list[str]) -> torch.Tensor:
            return torch.zeros(len(prompts), 6, 8)  # no call that parks: the first is the denoiser

        def denoise(self, *args: Any) -> torch.Tensor:
            rows, t, embeds = args
            n = self.fold
            return super().denoise(rows.repeat(n, 1, 1, 1), t, embeds.repeat(n, 1, 1))[: len(rows)]

    with opened(toy(Twofold), max_rows=4, modules=["unet"]) as engine:
        old = engine.submit(toy_kwargs(0, num_inference_steps=5))
        engine.step()
        for _ in range(20):
            engine.submit(toy_kwargs(1, prompt="large", num_inference_steps=1))
            engine.step()
            if old.ended:
                break
        assert old.ended
        assert engine.counters.ticks <= 11, "it is left out every other tick at most"
