"""Forward wrappers: their order, what they see, what they answer, what they may keep."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from inspect import BoundArguments
from typing import Any

import pytest
import torch

from handler.batching.halves import doubled, second_half
from handler.engine import CompiledForwards, ForwardWrapper
from handler.engine.parking import ModuleCall
from handler.engine.wrappers import UNANSWERED
from tests.support.engine_tools import BOUND, all_right, is_right, opened, solo, step_until
from tests.support.toy_pipeline import toy, toy_kwargs


class EverySecond(ForwardWrapper):
    """A toy step cache: every second step repeats the output of the one before."""

    def __init__(self) -> None:
        self.num_seen = 0

    def before(self, call: ModuleCall) -> Any:
        kept = call.ticket.memory.get(self)
        if kept is None:
            return UNANSWERED
        del call.ticket.memory[self]
        return kept

    def after(self, call: ModuleCall, output: Any) -> None:
        self.num_seen += 1
        call.ticket.memory[self] = (output[0].clone(),)


def skipping(seed: int, **changes: Any) -> torch.Tensor:
    """The picture of the pipeline called directly, when every second step repeats its output."""
    pipeline, kept = toy(), list[Any]()
    forward = pipeline.unet.forward

    def every_second(*args: Any, **kwargs: Any) -> Any:
        if kept:
            return kept.pop()
        kept.append(forward(*args, **kwargs))
        return (kept[0][0].clone(),)

    pipeline.unet.forward = every_second
    return solo(pipeline, seed, **changes)


STEPS = (5, 8, 3, 6)


def test_a_step_cache_gives_the_same_alone_and_in_company() -> None:
    """Requests of other lengths that join at other ticks skip steps of their own."""
    expected = [skipping(i, num_inference_steps=n) for i, n in enumerate(STEPS)]
    cache = EverySecond()
    with opened(toy(), wrappers=[cache]) as engine:
        alone = []
        for i, n in enumerate(STEPS):
            alone.append(engine.submit(toy_kwargs(i, num_inference_steps=n)))
            engine.run()
        assert cache.num_seen == sum((n + 1) // 2 for n in STEPS)
        together = []
        for i, n in enumerate(STEPS):
            together.append(engine.submit(toy_kwargs(i, num_inference_steps=n)))
            engine.step()
        engine.run()
        assert engine.counters.merged_forwards > 0
    assert all_right(alone, expected)
    assert all_right(together, expected)
    plain = [solo(toy(), i, num_inference_steps=n) for i, n in enumerate(STEPS)]
    assert min((e - p).abs().max() for e, p in zip(expected, plain, strict=True)) > 100 * BOUND


def test_who_is_answered_runs_on_into_the_forward_of_the_tick() -> None:
    """Requests at different steps meet in each tick, though each leaves out every second one."""
    rows: list[int] = []
    pipeline = toy()
    pipeline.unet.enter.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    with opened(pipeline, wrappers=[EverySecond()]) as engine:
        first = engine.submit(toy_kwargs(0, num_inference_steps=20))
        step_until(engine, lambda: first.num_steps_done == 1)
        second = engine.submit(toy_kwargs(1, num_inference_steps=20))
        step_until(engine, lambda: second.num_steps_done == 3)
        before = first.num_steps_done, second.num_steps_done
        rows.clear()
        engine.step()
        assert (first.num_steps_done, second.num_steps_done) == (before[0] + 2, before[1] + 2)
        assert rows == [4], "both in one"
        engine.run()
    assert first.num_steps_done == second.num_steps_done == 20


def test_a_call_is_asked_about_once() -> None:
    asked: list[ModuleCall] = []

    class Asking(ForwardWrapper):
        def before(self, call: ModuleCall) -> Any:
            asked.append(call)
            return UNANSWERED

    with opened(toy(), wrappers=[Asking()]) as engine:
        engine.submit(toy_kwargs(0, num_inference_steps=4))
        engine.submit(toy_kwargs(1, num_inference_steps=5))
        engine.run()
    assert len(asked) == len(set(asked)) == 4 + 5


def test_an_exact_request_meets_no_wrapper() -> None:
    cache, pipeline = EverySecond(), toy()
    expected = solo(pipeline, 0)
    with opened(pipeline, wrappers=[cache]) as engine:
        exact = engine.submit(toy_kwargs(0), exact=True)
        engine.run()
    assert torch.equal(exact.result().images, expected)
    assert cache.num_seen == 0


def test_only_denoisers_are_shown() -> None:
    class Watching(ForwardWrapper):
        def __init__(self) -> None:
            self.names: set[str] = set()

        def wrap_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
            self.names.add(type(forward.__self__).__name__)  # type: ignore[attr-defined]
            return forward

        def before(self, call: ModuleCall) -> Any:
            self.names.add(call.slot.name)
            return UNANSWERED

    watching = Watching()
    with opened(toy(), wrappers=[watching]) as engine:
        engine.submit(toy_kwargs(0))
        engine.run()
    assert watching.names == {"ToyUNet", "unet.forward"}


# Memory


class Keeping(ForwardWrapper):
    """Remembers every output, and tells when it is gone."""

    def __init__(self) -> None:
        self.kept: list[weakref.ref[torch.Tensor]] = []

    def after(self, call: ModuleCall, output: Any) -> None:
        copy = output[0].clone()
        self.kept.append(weakref.ref(copy))
        call.ticket.memory.setdefault(self, []).append(copy)

    @property
    def num_alive(self) -> int:
        gc.collect()
        return sum(reference() is not None for reference in self.kept)


@pytest.mark.parametrize("end", ["done", "cancelled", "failed", "closed"])
def test_what_a_wrapper_remembers_is_freed_when_the_ticket_ends(end: str) -> None:
    keeping = Keeping()

    def fail(step: Any) -> None:
        if end == "failed" and step.step == 2:
            raise ValueError

    with opened(toy(), wrappers=[keeping]) as engine:
        ticket = engine.submit(toy_kwargs(0, num_inference_steps=4), on_step=fail)
        other = engine.submit(toy_kwargs(1, num_inference_steps=9))
        step_until(engine, lambda: ticket.num_steps_done == 1)
        assert keeping.num_alive == 2
        if end == "cancelled":
            engine.cancel(ticket)
        step_until(engine, lambda: end == "closed" or ticket.ended)
        if end != "closed":
            assert keeping.num_alive == other.num_steps_done > 0
            assert not ticket.memory
    assert ticket.ended
    assert other.ended
    assert keeping.num_alive == 0


# Fewer rows


def test_a_call_may_run_narrower_than_the_pipeline_sees() -> None:
    """The rows with the prompt alone, twice: as if there were no guidance."""

    class Half(ForwardWrapper):
        def narrow(self, call: ModuleCall) -> ModuleCall:
            half = second_half(call.bound.arguments, call.num_rows)
            assert half is not None
            bound = BoundArguments(call.bound.signature, OrderedDict(half))
            return replace(call, bound=bound, num_rows=call.num_rows // 2)

        def widen(self, call: ModuleCall, output: Any) -> Any:
            return doubled(output, call.num_rows)

    class Seeing(ForwardWrapper):
        def after(self, call: ModuleCall, output: Any) -> None:
            assert len(output[0]) == call.num_rows == 2

    rows: list[int] = []
    pipeline = toy()
    pipeline.unet.enter.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    with opened(pipeline, wrappers=[Half(), Seeing()]) as engine:
        tickets = [engine.submit(toy_kwargs(i, guidance_scale=5.0)) for i in range(2)]
        engine.run()
    assert max(rows) == 2, "one row each, in one forward"
    assert all_right(tickets, [solo(toy(), i, guidance_scale=1.0) for i in range(2)])


# Errors and order


@pytest.mark.parametrize("place", ["before", "narrow", "widen", "after"])
def test_an_error_of_a_wrapper_is_the_tickets(place: str) -> None:
    def fail(self: ForwardWrapper, call: ModuleCall, *output: Any) -> Any:
        if call.ticket.kwargs["prompt"] == "bad":
            raise LookupError("the cache is gone")
        return {"before": UNANSWERED, "narrow": call, "widen": output and output[0]}.get(place)

    kind = type("Failing", (ForwardWrapper,), {place: fail})
    with opened(toy(), wrappers=[kind()]) as engine:
        bad, good = engine.submit(toy_kwargs(0, prompt="bad")), engine.submit(toy_kwargs(1))
        engine.run()
    assert isinstance(bad.error, LookupError)
    assert is_right(good, solo(toy(), 1))


def test_the_first_wrapper_is_nearest_to_the_module() -> None:
    seen: list[str] = []

    class Named(ForwardWrapper):
        def __init__(self, name: str, *, answers: bool = False) -> None:
            self.name, self.answers = name, answers

        def wrap_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                seen.append(f"{self.name} runs")
                return forward(*args, **kwargs)

            return wrapped

        def before(self, call: ModuleCall) -> Any:
            seen.append(f"{self.name} is asked")
            return (torch.zeros(2, 4, 8, 8),) if self.answers else UNANSWERED

        def after(self, call: ModuleCall, output: Any) -> None:
            seen.append(f"{self.name} is told")

    with opened(toy(), wrappers=[Named("inner"), Named("outer")]) as engine:
        engine.submit(toy_kwargs(0, num_inference_steps=1))
        engine.run()
        around = ["outer is asked", "inner is asked", "outer runs", "inner runs"]
        assert seen == [*around, "inner is told", "outer is told"]
    seen.clear()
    wrappers = [Named("inner"), Named("middle", answers=True), Named("outer")]
    with opened(toy(), wrappers=wrappers) as engine:
        engine.submit(toy_kwargs(0, num_inference_steps=1))
        engine.run()
        assert seen == ["outer is asked", "middle is asked", "outer is told"]
        assert engine.counters.forwards == 2 + 1, "two prompts are encoded and a picture decoded"


def test_compiled_code_and_a_step_cache_go_together() -> None:
    compiled: list[int] = []

    def compiler(forward: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            compiled.append(1)
            return forward(*args, **kwargs)

        return counted

    wrappers = [CompiledForwards(compiler), EverySecond()]
    with opened(toy(), wrappers=wrappers) as engine:
        tickets = [engine.submit(toy_kwargs(i, num_inference_steps=6)) for i in range(2)]
        engine.run()
    assert len(compiled) == 3
    assert all_right(tickets, [skipping(i, num_inference_steps=6) for i in range(2)])
