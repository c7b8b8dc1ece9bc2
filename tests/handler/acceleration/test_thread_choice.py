"""Forwards on a chosen number of threads: in effect there and nowhere else, whatever happens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from handler.acceleration.thread_choice import ThreadChoice, thread_choices
from handler.config import HandlerConfig
from handler.engine import ForwardWrapper
from tests.support.engine_tools import all_right, opened, solo
from tests.support.pipelines import build, example_kwargs, image_of
from tests.support.toy_pipeline import toy, toy_kwargs

CPU = torch.device("cpu")
ONE_IS_QUICKER = {1: 1.0, 2: 3.0}
# As in test_families: what is right in float32, and what another request's picture is off by.
BOUND = 1e-4
WRONG = 30 * BOUND


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Timed(ForwardWrapper):
    """Notes the threads of every forward, which takes as long as they say on this clock."""

    def __init__(self, seconds: dict[int, float] = ONE_IS_QUICKER) -> None:
        self.seconds = seconds
        self.now_s = 0.0
        self.threads: list[int] = []

    def __call__(self) -> float:
        return self.now_s

    def wrap_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.threads.append(torch.get_num_threads())
            self.now_s += self.seconds[self.threads[-1]]
            return forward(*args, **kwargs)

        return timed


def chosen(timed: Timed, forward: Callable[..., Any]) -> Callable[..., Any]:
    return ThreadChoice(2, clock=timed).wrap_forward(timed.wrap_forward(forward))


def test_the_number_holds_in_the_forward_and_nowhere_else() -> None:
    timed = Timed()
    forward = chosen(timed, lambda x: x + 1)
    outside = set()
    for _ in range(60):
        assert forward(torch.zeros(2)).tolist() == [1.0, 1.0]
        outside.add(torch.get_num_threads())
    assert timed.threads[0] == 2
    assert timed.threads[-30:].count(1) >= 28
    assert outside == {2}


def test_a_forward_that_fails_leaves_all_threads() -> None:
    timed = Timed()

    def work(x: torch.Tensor) -> torch.Tensor:
        if x.isnan().any():
            raise FloatingPointError("not a number")
        return x

    forward = chosen(timed, work)
    for _ in range(60):
        forward(torch.zeros(2))
    for _ in range(5):
        with pytest.raises(FloatingPointError):
            forward(torch.full((2,), float("nan")))
        assert torch.get_num_threads() == 2
    assert 1 in timed.threads[-5:]


def test_more_rows_are_not_slow_rows() -> None:
    """Of arguments by place and by name."""
    now_s = 0.0
    threads = []

    def work(x: torch.Tensor, *, text: torch.Tensor) -> None:
        nonlocal now_s
        threads.append(torch.get_num_threads())
        now_s += len(x) * len(text) * (2.0 if threads[-1] == 1 else 1.0)

    forward = ThreadChoice(2, clock=lambda: now_s).wrap_forward(work)
    for i in range(600):
        forward(torch.zeros(1 + i % 2 * 9), text=torch.zeros(1 + i % 3 * 5))
    # Tried at times, and never taken: that would be two in a row.
    assert 1 in threads
    assert (1, 1) not in itertools.pairwise(threads)


def test_exact_requests_have_all_threads_and_are_equal_to_the_bit() -> None:
    timed = Timed()
    choice = ThreadChoice(2, clock=timed)
    pipeline = toy()
    expected = [solo(pipeline, seed, num_inference_steps=30) for seed in range(4)]
    of_exact: list[int] = []
    with opened(pipeline, wrappers=[timed, choice]) as engine:
        tickets = [engine.submit(toy_kwargs(seed, num_inference_steps=30)) for seed in range(4)]
        engine.run()
        assert all_right(tickets, expected)
        assert choice.policy.present == 1
        pipeline.unet.enter.register_forward_pre_hook(
            lambda *_: of_exact.append(torch.get_num_threads())
        )
        exact = engine.submit(toy_kwargs(0, num_inference_steps=30), exact=True)
        engine.run()
    assert set(of_exact) == {2}
    assert torch.equal(exact.result().images, expected[0])


@pytest.mark.parametrize("family", ["stable_diffusion", "flux"])
def test_pictures_are_right_while_threads_change(family: str) -> None:
    timed = Timed()
    pipeline = build(family)
    steps = {"num_inference_steps": 8}
    expected = [image_of(pipeline(**example_kwargs(family, i) | steps)) for i in range(3)]
    with opened(pipeline, wrappers=[timed, ThreadChoice(2, clock=timed)]) as engine:
        tickets = [engine.submit(example_kwargs(family, i) | steps) for i in range(3)]
        engine.run()
    pictures = [image_of(ticket.result()) for ticket in tickets]
    assert set(timed.threads) == {1, 2}
    for picture, own in zip(pictures, expected, strict=True):
        assert (picture - own).abs().max() < BOUND
    assert (pictures[0] - expected[1]).abs().max() > WRONG


@pytest.mark.parametrize(
    ("settings", "threads", "device", "is_compiled", "is_left"),
    [
        ({}, 2, CPU, False, True),
        ({"num_threads": 2}, 2, CPU, False, False),
        ({"exact": True}, 2, CPU, False, False),
        ({}, 1, CPU, False, False),
        ({}, 2, torch.device("cuda"), False, False),
        ({"speed": "max"}, 2, CPU, True, False),
    ],
)
def test_who_chooses(
    settings: dict[str, Any],
    threads: int,
    device: torch.device,
    is_compiled: bool,
    is_left: bool,
) -> None:
    torch.set_num_threads(threads)
    config = HandlerConfig.from_mapping(settings)
    assert bool(thread_choices(config, device, is_compiled=is_compiled)) is is_left
