"""The engine's promises to its owner: ends, errors, cancelling, deadlines, grad mode, closing.

That the pictures of all families are right is `test_engine_families`; random mixes are
`test_engine_properties`. Here the pipeline is a toy, so that every case can be forced.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from greenlet import GreenletExit

from handler.engine import BUCKETS, InFlightEngine
from handler.errors import Cancelled, DeadlineExceeded, TooLarge
from handler.policy import Cost
from handler.ticket import State, StepEnd, Ticket
from tests.toy_pipeline import (
    Denoise,
    ToyPipeline,
    ToyUNet,
    ToyVAE,
    toy,
    toy_kwargs,
    toy_where,
)

BOUND = 1e-5


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def solo(pipeline: Any, seed: int = 0, scheduler: Any = None, **changes: Any) -> torch.Tensor:
    """The picture of a pipeline that no engine has touched."""
    pipeline = copy.copy(pipeline)
    if scheduler is not None:
        pipeline.scheduler = scheduler
    images: torch.Tensor = pipeline(**toy_kwargs(seed, **changes)).images
    return images


def is_right(ticket: Ticket, expected: torch.Tensor) -> bool:
    images: torch.Tensor = ticket.result().images
    return images.shape == expected.shape and bool((images - expected).abs().max() < BOUND)


def all_right(tickets: Sequence[Ticket], expected: Sequence[torch.Tensor]) -> bool:
    return all(is_right(t, e) for t, e in zip(tickets, expected, strict=True))


@contextmanager
def opened(pipeline: Any, **options: Any) -> Iterator[InFlightEngine]:
    engine = InFlightEngine(pipeline, **options)
    try:
        yield engine
    finally:
        engine.close()


def step_until(engine: InFlightEngine, is_reached: Callable[[], bool]) -> list[Ticket]:
    ended: list[Ticket] = []
    for _ in range(100):
        if is_reached():
            return ended
        ended += engine.step()
    raise AssertionError("never reached")


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
    [{"modules": ["unet", "nonsense"]}, {"compile_forward": lambda real: 1 / 0}],
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


class Strict(ToyUNet):
    """A denoiser that refuses what is not a number, whoever's rows it is in."""

    def forward(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if sample.isnan().any():
            raise FloatingPointError("not a number")
        return super().forward(sample, *args, **kwargs)


def nan_latents(view: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"] * float("nan")}


def test_an_error_of_a_shared_forward_is_the_guilty_requests() -> None:
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

    pipeline = toy_where(careful, unet=Strict())
    expected = [solo(pipeline, 0), solo(pipeline, 1, callback_on_step_end=nan_latents)]
    with opened(pipeline) as engine:
        good = engine.submit(toy_kwargs(0))
        bad = engine.submit(toy_kwargs(1, callback_on_step_end=nan_latents))
        engine.run()
    assert is_right(good, expected[0])
    assert bad.result().images.isnan().all()
    assert expected[1].isnan().all()


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
        assert engine.in_flight == Cost(15, 5 * 4096)
        engine.run()
        too_large = engine.submit(toy_kwargs(9, num_images_per_prompt=3, guidance_scale=1.0))
        engine.run()
    assert max(rows) == 6
    assert all_right(tickets, expected)
    assert isinstance(too_large.error, TooLarge)
    assert "needs 9 rows" in str(too_large.error)


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


# Cancelling


def test_a_waiting_request_is_cancelled_at_once() -> None:
    with opened(toy(), max_rows=2) as engine:
        running, waiting = (engine.submit(toy_kwargs(i)) for i in range(2))
        engine.step()
        assert engine.cancel(waiting)
        assert isinstance(waiting.error, Cancelled)
        assert engine.num_waiting == 0
        assert engine.run() == [waiting, running]


@pytest.mark.parametrize("ticks", range(1, 6))
def test_a_running_request_is_cancelled_at_once_wherever_it_stands(ticks: int) -> None:
    """In its text encoder, its denoiser or its decoder."""
    pipeline = toy()
    with opened(pipeline) as engine:
        tickets = [engine.submit(toy_kwargs(i)) for i in range(3)]
        for _ in range(ticks):
            engine.step()
        assert engine.in_flight.rows == 6
        assert engine.cancel(tickets[1])
        assert tickets[1].ended
        assert engine.in_flight.rows == 4
        assert not engine.cancel(tickets[1])
        assert set(engine.run()) == set(tickets)
    with pytest.raises(Cancelled, match="the request was cancelled"):
        tickets[1].result()
    assert all_right(tickets[::2], [solo(pipeline, 0), solo(pipeline, 2)])


def test_a_reason_can_be_given_and_the_first_stands() -> None:
    reasons = [DeadlineExceeded("first"), Cancelled("second")]
    with opened(toy()) as engine:
        ticket = engine.submit(
            toy_kwargs(), on_step=lambda end: [engine.cancel(ticket, r) for r in reasons]
        )
        engine.run()
        assert ticket.error is reasons[0]
        assert not engine.cancel(ticket, reasons[1])
    assert ticket.error is reasons[0]


def test_an_ended_request_stays_as_it_ended() -> None:
    with opened(toy()) as engine:
        ticket = engine.submit(toy_kwargs())
        engine.run()
        assert not engine.cancel(ticket)
        assert ticket.state is State.DONE
        assert engine.step() == []


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_request_may_cancel_itself_at_any_step(step: int) -> None:
    """After the last step too: who was told that it is cancelled gets no picture."""

    def listen(end: StepEnd) -> None:
        if end.step == step:
            assert engine.cancel(ticket)

    with opened(toy(), modules=["unet"]) as engine:
        ticket = engine.submit(toy_kwargs(), on_step=listen)
        assert engine.run() == [ticket]
    assert isinstance(ticket.error, Cancelled)
    assert ticket.num_steps_done == step


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("canceller", [0, 1])
def test_a_request_may_cancel_its_neighbour(step: int, canceller: int) -> None:
    """One that shares its last forward and gets its rows in this tick, before or after it."""

    def listen(end: StepEnd) -> None:
        if end.step == step and not tickets[1 - canceller].ended:
            assert engine.cancel(tickets[1 - canceller])

    pipeline = toy()
    with opened(pipeline) as engine:
        tickets = [
            engine.submit(toy_kwargs(i), on_step=listen if i == canceller else None)
            for i in range(2)
        ]
        engine.run()
    assert isinstance(tickets[1 - canceller].error, Cancelled)
    # The first has had its turn in this tick; the second is not run on for nothing.
    assert tickets[1 - canceller].num_steps_done == (step - 1 if canceller == 0 else step)
    assert is_right(tickets[canceller], solo(pipeline, canceller))


def test_a_request_may_cancel_one_that_waits() -> None:
    with opened(toy(), max_rows=2) as engine:
        running = engine.submit(toy_kwargs(0), on_step=lambda end: engine.cancel(waiting))
        waiting = engine.submit(toy_kwargs(1))
        assert set(engine.run()) == {running, waiting}
    assert running.state is State.DONE
    assert isinstance(waiting.error, Cancelled)
    assert waiting.admitted_s is None


def test_a_request_may_submit_another() -> None:
    pipeline, more = toy(), []
    with opened(pipeline) as engine:
        engine.submit(toy_kwargs(0), on_step=lambda end: more.append(engine.submit(toy_kwargs(1))))
        engine.run()
    assert all_right(more, [solo(pipeline, 1)] * 3)


@pytest.mark.parametrize("name", ["step", "run", "close"])
def test_a_request_may_not_drive_the_engine(name: str) -> None:
    with opened(toy()) as engine:
        ticket = engine.submit(toy_kwargs(), on_step=lambda end: getattr(engine, name)())
        engine.run()
    with pytest.raises(RuntimeError, match="from within a request"):
        ticket.result()


def test_a_request_that_raises_its_own_exit_has_no_picture() -> None:
    def leave(end: StepEnd) -> None:
        raise GreenletExit

    with opened(toy()) as engine:
        ticket = engine.submit(toy_kwargs(), on_step=leave)
        engine.run()
    assert str(ticket.error) == "the request ended itself"


def swallow(prompt: str, denoise: Denoise) -> torch.Tensor:
    try:
        return denoise()
    except BaseException:
        return torch.zeros(2, 4, 8, 8)  # and on to the next step, which parks again


def fail_on_the_way_out(prompt: str, denoise: Denoise) -> torch.Tensor:
    try:
        return denoise()
    except GreenletExit:
        raise ValueError("cleaning failed") from None


def denoise_on_the_way_out(prompt: str, denoise: Denoise) -> torch.Tensor:
    try:
        return denoise()
    except GreenletExit:
        return denoise()


STUBBORN = [swallow, fail_on_the_way_out, denoise_on_the_way_out]


@pytest.mark.parametrize("hook", STUBBORN)
@pytest.mark.parametrize("within", [False, True])
def test_a_pipeline_that_resists_is_cancelled_all_the_same(hook: Any, within: bool) -> None:
    pipeline = toy_where(hook)
    expected = solo(pipeline, 1)
    with opened(pipeline) as engine:
        stubborn = engine.submit(
            toy_kwargs(0), on_step=lambda end: within and engine.cancel(stubborn)
        )
        other = engine.submit(toy_kwargs(1))
        step_until(engine, lambda: other.num_steps_done > 0)
        engine.cancel(stubborn)
        assert set(engine.run()) == {stubborn, other}
        assert engine.num_running == 0
    assert isinstance(stubborn.error, Cancelled)
    assert is_right(other, expected)


# Deadlines


def test_a_deadline_ends_who_runs_and_who_waits() -> None:
    clock, pipeline = Clock(), toy()
    with opened(pipeline, clock=clock, max_rows=4) as engine:
        late = engine.submit(toy_kwargs(0), deadline_s=2.0)
        fine = engine.submit(toy_kwargs(1, num_inference_steps=9), deadline_s=60.0)
        waiting = engine.submit(toy_kwargs(2), deadline_s=2.0)
        step_until(engine, lambda: late.num_steps_done == 2)
        clock.now_s += 1.999
        assert engine.step() == []
        clock.now_s += 0.001
        assert set(engine.step()) == {late, waiting}
        engine.run()
    assert isinstance(late.error, DeadlineExceeded)
    assert str(late.error) == "the deadline passed after 3 steps"
    assert isinstance(waiting.error, DeadlineExceeded)
    assert waiting.admitted_s is None
    assert is_right(fine, solo(pipeline, 1, num_inference_steps=9))


def test_a_deadline_that_has_passed_already_never_starts() -> None:
    with opened(toy(), clock=Clock()) as engine:
        ticket = engine.submit(toy_kwargs(), deadline_s=0.0)
        assert engine.step() == [ticket]
        assert engine.counters.forwards == 0
    assert isinstance(ticket.error, DeadlineExceeded)


class Slow(ToyUNet):
    """A denoiser whose every forward takes a second of `clock`."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.clock.now_s += 1.0
        return super().forward(*args, **kwargs)


def test_a_deadline_that_cannot_be_met_is_refused_with_the_figures() -> None:
    clock = Clock()
    with opened(toy(unet=Slow(clock)), clock=clock) as engine:
        early = engine.submit(toy_kwargs(0, num_inference_steps=50), deadline_s=2.0)
        engine.run()
        assert isinstance(early.error, DeadlineExceeded), "nothing was known of the pace"
        long = engine.submit(toy_kwargs(0, num_inference_steps=40))
        step_until(engine, lambda: long.num_steps_done == 17)
        says = "deadline of 9.9 s cannot be met: at the present pace 10 steps need at least 10 s"
        with pytest.raises(DeadlineExceeded, match=says):
            engine.submit(toy_kwargs(1, num_inference_steps=10), deadline_s=9.9)
        fine = [
            engine.submit(toy_kwargs(2, num_inference_steps=10), deadline_s=60.0),
            engine.submit(toy_kwargs(2, num_inference_steps=9), deadline_s=9.9),
            engine.submit(toy_kwargs(2, num_inference_steps=10)),
        ]
        engine.run()
        assert fine[0].state is fine[2].state is State.DONE
        engine.submit(toy_kwargs(1, num_inference_steps=10), deadline_s=9.9)
        assert engine.num_waiting == 1, "what comes after a rest may be faster"


def test_who_ends_in_time_keeps_the_picture() -> None:
    clock = Clock()
    with opened(toy(), clock=clock) as engine:
        ticket = engine.submit(toy_kwargs(), deadline_s=1.0)
        step_until(engine, lambda: ticket.ended)
        clock.now_s += 5
        engine.step()
    assert ticket.state is State.DONE


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
        compile_forward=lambda real: torch.compile(real, backend=backend, dynamic=False),
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


# Closing


def test_closing_ends_what_is_left_and_gives_everything_back() -> None:
    pipeline = toy()
    expected = solo(pipeline)
    engine = InFlightEngine(pipeline, max_rows=4)
    done = engine.submit(toy_kwargs(num_inference_steps=1))
    engine.run()
    left = [engine.submit(toy_kwargs(i)) for i in range(3)]
    engine.step()
    engine.close()
    assert done.state is State.DONE
    assert all(str(ticket.error) == "the engine was closed" for ticket in left)
    assert set(engine.step()) == set(left)
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.submit(toy_kwargs())
    engine.close()
    assert torch.equal(solo(pipeline), expected)
    for module in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        assert not {"forward", "decode"} & vars(module).keys()


def test_engines_follow_each_other_on_one_pipeline() -> None:
    pipeline = toy()
    expected = [solo(pipeline, i) for i in range(2)]
    for _ in range(3):
        with opened(pipeline) as engine:
            tickets = [engine.submit(toy_kwargs(i)) for i in range(2)]
            engine.run()
        assert engine.counters.merged_forwards > 0
        assert all_right(tickets, expected)


def test_the_pipeline_can_be_called_beside_the_engine() -> None:
    pipeline = toy()
    expected = [solo(pipeline, i) for i in range(2)]
    with opened(pipeline) as engine:
        ticket = engine.submit(toy_kwargs(0))
        engine.step()
        assert torch.equal(solo(pipeline, 1), expected[1])
        engine.run()
    assert is_right(ticket, expected[0])


# Nothing is left of a request


def test_nothing_is_left_of_a_request_but_its_outcome() -> None:
    """However it ended, and though its ticket and its error are kept."""
    born: dict[str, list[weakref.ref[Any]]] = {}

    class Watched(ToyPipeline):
        def __call__(self, prompt: str = "", **kwargs: Any) -> Any:
            self.watch = born.setdefault(prompt, [])
            self.watch += [weakref.ref(self), weakref.ref(self.scheduler)]
            return super().__call__(prompt, **kwargs)

        def denoise(self, *args: torch.Tensor) -> torch.Tensor:
            noise = super().denoise(*args)
            self.watch += [weakref.ref(tensor) for tensor in (*args[::2], noise)]
            return noise

    def ends(ticket: Ticket) -> Callable[[StepEnd], None]:
        def listen(end: StepEnd) -> None:
            born["watched"].append(weakref.ref(end.latents))
            if ticket_names[ticket] == "fails":
                raise ValueError("theirs")

        return listen

    names = ["done", "fails", "fails below", "cancelled", "late", "closed"]
    ticket_names: dict[Ticket, str] = {}
    clock = Clock()
    born["watched"] = []
    pipeline = toy(Watched, unet=Strict())
    engine = InFlightEngine(pipeline, clock=clock)
    for i, name in enumerate(names):
        callback = nan_latents if name == "fails below" else None
        kwargs = toy_kwargs(
            i,
            prompt=name,
            num_inference_steps=9 if name == "closed" else 3,
            callback_on_step_end=callback,
        )
        born["watched"].append(weakref.ref(kwargs["generator"]))
        deadline_s = 1.0 if name == "late" else None
        ticket = engine.submit(kwargs, deadline_s=deadline_s)
        ticket.on_step = ends(ticket)
        ticket_names[ticket] = name
    del kwargs, ticket
    ended = engine.step()
    runs = [weakref.ref(ticket.run) for ticket in ticket_names]
    ended += step_until(engine, lambda: len(born["late"]) > 2)
    clock.now_s += 2
    for ticket in list(ticket_names):
        if ticket_names[ticket] == "cancelled":
            engine.cancel(ticket)
    ended += step_until(engine, lambda: engine.num_running == 1)
    engine.close()
    ended += engine.step()
    assert {ticket_names[ticket] for ticket in ended} == set(names)
    assert sum(ticket.state is State.DONE for ticket in ended) == 1
    assert born.keys() == {*names, "watched"}
    gc.collect()
    left = {name: [r() for r in refs if r() is not None] for name, refs in born.items()}
    assert not any(left.values()), left
    assert [run() for run in runs] == [None] * 6


def test_an_error_is_kept_with_its_lines_and_without_its_tensors() -> None:
    """And without waiting for the garbage collector: a device's memory may be short of it."""
    kept: list[weakref.ref[Any]] = []

    class Raising(ToyPipeline):
        def denoise(self, *args: torch.Tensor) -> torch.Tensor:
            mine = super().denoise(*args)
            kept.append(weakref.ref(mine))
            try:
                raise KeyError("inner")
            except KeyError as error:
                raise ValueError("outer") from error

    gc.collect()
    gc.disable()
    try:
        with opened(toy(Raising)) as engine:
            ticket = engine.submit(toy_kwargs())
            engine.run()
            assert [ref() for ref in kept] == [None]
    finally:
        gc.enable()
    with pytest.raises(ValueError, match="outer") as caught:
        ticket.result()
    assert "denoise" in [entry.name for entry in caught.traceback]
    assert isinstance(caught.value.__cause__, KeyError)


# One module for all


def test_text_encoder_denoiser_and_decoder_are_all_shared() -> None:
    pipeline, rows = toy(), dict[str, list[int]]()
    for name, module in (
        ("text", pipeline.text_encoder.table),
        ("unet", pipeline.unet.enter),
        ("vae", pipeline.vae.leave),
    ):
        module.register_forward_pre_hook(
            lambda _, args, name=name: rows.setdefault(name, []).append(len(args[0]))
        )
    with opened(pipeline) as engine:
        for i in range(3):
            engine.submit(toy_kwargs(i))
        engine.run()
    # The first of every kind is followed by one alone, to compare.
    assert rows == {"text": [3, 1, 3], "unet": [6, 2, 6, 6], "vae": [3, 1]}


def test_a_decoder_that_returns_an_object_gives_each_request_its_own() -> None:
    class Objects(ToyVAE):
        def decode(self, z: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=super().decode(z).sample, own=[z * 2])

    pipeline = toy(vae=Objects())
    expected = [solo(pipeline, i) for i in range(3)]
    with opened(pipeline) as engine:
        tickets = [engine.submit(toy_kwargs(i)) for i in range(3)]
        engine.run()
    assert all_right(tickets, expected)
