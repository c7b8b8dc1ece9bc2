"""Requests that end before their time: cancelled, or past their deadline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from greenlet import GreenletExit

from handler.engine.ticket import State, StepEnd
from handler.errors import Cancelled, DeadlineExceeded
from tests.support.clock import Clock
from tests.support.engine_tools import all_right, is_right, opened, solo, step_until
from tests.support.toy_pipeline import Denoise, ToyUNet, toy, toy_kwargs, toy_where

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
