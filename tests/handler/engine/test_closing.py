"""What is left afterwards: of a closed engine, of a request, of another engine's pipeline."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from handler.engine import InFlightEngine
from handler.engine.ticket import State, StepEnd, Ticket
from handler.pipelines.shared_state import SharedState
from tests.support.clock import Clock
from tests.support.engine_tools import (
    Strict,
    all_right,
    is_right,
    nan_latents,
    opened,
    solo,
    step_until,
)
from tests.support.toy_pipeline import ToyPipeline, ToyVAE, toy, toy_kwargs

# Closing


def test_a_request_ends_though_what_it_changed_cannot_be_put_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To give a module its precision back takes memory, too."""

    def fail(state: SharedState) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    pipeline = toy()
    expected = [solo(pipeline, seed) for seed in range(2)]
    with opened(pipeline) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(SharedState, "restore", fail)
            tickets = [engine.submit(toy_kwargs(seed)) for seed in range(2)]
            engine.run()
        assert all_right(tickets, expected)
        assert not engine.has_work
    assert "cannot be put back yet" in caplog.text


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
