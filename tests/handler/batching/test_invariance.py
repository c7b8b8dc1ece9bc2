"""Modules that mix rows are found, and what no group has shown yet is not taken for proven."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.utils import BaseOutput

from handler.batching import invariance as proof
from handler.engine.parking import ModuleCall
from tests.support.forward_tools import batched, call, column, doubled, run, slot_of


@dataclasses.dataclass
class Plain:
    sample: torch.Tensor


@dataclasses.dataclass
class Output(BaseOutput):
    sample: torch.Tensor


WRAPPERS: list[Callable[[torch.Tensor], Any]] = [
    lambda tensor: tensor,
    lambda tensor: (tensor, None),
    lambda tensor: {0: tensor},
    Plain,
    lambda tensor: Output(sample=tensor),
    lambda tensor: SimpleNamespace(sample=tensor),
]

MIXERS: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "subtracts the mean": lambda sample, t: sample - sample.mean(),
    "looks at the first row for all": lambda sample, t: sample + sample[:1],
    "sums the rows up": lambda sample, t: sample.cumsum(0),
    "looks at the first step for all": lambda sample, t: sample * t.reshape(-1)[0],
    "gives one row for all": lambda sample, t: sample.sum(0, keepdim=True),
    "adds the number of rows": lambda sample, t: sample + len(sample),
    "is not a number in company": lambda sample, t: sample / (len(sample) < 3),
}


@pytest.mark.parametrize("wrap", range(len(WRAPPERS)))
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_module_that_mixes_rows_is_found_and_run_alone(mixer: str, wrap: int) -> None:
    body, wrapper = MIXERS[mixer], WRAPPERS[wrap]
    slot = slot_of(lambda sample, timestep: wrapper(body(sample, timestep)))
    calls = [
        call(slot, *v, timestep=torch.tensor(t)) for v, t in (((1, 2), 3), ((5,), 4), ((7,), 2))
    ]
    expected = [column(slot.real(*each.bound.args)) for each in calls]
    forward = batched()
    slot.module.rows.clear()
    assert run(forward, calls) == expected
    assert slot.module.rows[0] == 4, "tried together"
    slot.module.rows.clear()
    assert run(forward, calls) == expected
    assert slot.module.rows == [2, 1, 1], "not tried again"


def step_of_the_first(sample: torch.Tensor, timestep: Any) -> torch.Tensor:
    return sample * timestep.reshape(-1)[0]


def test_what_was_equal_in_all_groups_so_far_was_not_proven() -> None:
    """A module that reads one step for all is right, and shares, until two steps differ."""
    forward, slot = batched(), slot_of(step_of_the_first)
    for t in (3, 5, 3):
        calls = [call(slot, v, timestep=torch.tensor(t)) for v in (1, 2)]
        assert run(forward, calls) == [[t], [2 * t]]
    assert slot.module.rows == [2, 1, 2, 2]
    calls = [call(slot, v, timestep=torch.tensor(t)) for v, t in ((1, 3), (2, 4), (3, 3))]
    for _ in range(2):
        assert run(forward, calls) == [[3], [8], [9]], "the one that differs is the one asked"
    assert slot.module.rows[4:] == [3, 1, 1, 1, 1, 1, 1]


def test_a_kind_is_asked_once_for_each_thing_that_differs() -> None:
    """And then never again, however its groups are made up."""
    forward, slot = batched(), slot_of(lambda sample, timestep: sample * timestep.reshape(-1, 1))

    def rows(*steps: int) -> list[int]:
        slot.module.rows.clear()
        calls = [call(slot, i, timestep=torch.tensor(t)) for i, t in enumerate(steps)]
        assert run(forward, calls) == [[i * t] for i, t in enumerate(steps)]
        return list(slot.module.rows)

    assert rows(1, 1, 1) == [3, 1]
    assert rows(2, 2) == [2]
    assert rows(2, 2, 3) == [3, 1]
    assert rows(1, 2, 3, 4) == [4]
    assert rows(7) == [1]
    assert rows(7, 7) == [2]


@pytest.mark.parametrize("place", [0, 1])
def test_first_and_last_rows_are_proven_each_by_itself(place: int) -> None:
    """With guidance the first row of every call may be the same empty prompt for a long time."""

    def body(sample: torch.Tensor, prompts: Any) -> torch.Tensor:
        return sample + prompts[:1] if place == 0 else sample + prompts[1:2]

    forward, slot = batched(), slot_of(body)

    def ask(*prompts: tuple[float, float]) -> None:
        calls = [
            call(slot, i, i, timestep=torch.tensor(p).reshape(-1, 1)) for i, p in enumerate(prompts)
        ]
        assert run(forward, calls) == [[i + p[place]] * 2 for i, p in enumerate(prompts)]

    other = 1 - place
    first, second = [0.0, 0.0], [0.0, 0.0]
    ask((0, 0), (0, 0))
    second[other] = 5.0
    ask((first[0], first[1]), (second[0], second[1]))
    assert forward.counters.merged_forwards == 2
    second[place] = 7.0
    ask((first[0], first[1]), (second[0], second[1]))


def test_several_differences_take_as_many_witnesses_as_show_them() -> None:
    forward, slot = batched(), slot_of(lambda sample, t: sample * t["a"] + t["b"][0])

    def calls(*values: tuple[float, float]) -> list[ModuleCall]:
        nested = [{"a": torch.tensor([[a]]), "b": [torch.tensor([[b]])]} for a, b in values]
        return [call(slot, i, timestep=t) for i, t in enumerate(nested)]

    assert run(forward, calls((1, 1), (1, 1))) == [[1], [2]]
    assert run(forward, calls((1, 1), (2, 1), (1, 3))) == [[1], [3], [5]]
    assert slot.module.rows == [2, 1, 3, 1, 1]
    assert run(forward, calls((1, 1), (2, 3))) == [[1], [5]]
    assert slot.module.rows[5:] == [2]


def test_calls_of_one_and_of_two_rows_are_compared() -> None:
    forward, slot = batched(), slot_of(step_of_the_first)
    equal = [call(slot, 1, timestep=torch.tensor(3)), call(slot, 2, 3, timestep=torch.tensor([3]))]
    assert run(forward, equal) == [[3], [6, 9]]
    other = [call(slot, 1, timestep=torch.tensor(3)), call(slot, 2, 3, timestep=torch.tensor(4.0))]
    assert run(forward, other) == [[3], [8, 12]]


def test_halves_vouch_for_what_differs_within_them() -> None:
    """Four calls that never run together: steps that differ between the halves prove nothing."""

    def body(sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        if len(sample) > 2:
            raise torch.OutOfMemoryError
        return step_of_the_first(sample, timestep)

    forward, slot = batched(), slot_of(body)
    calls = [call(slot, v, timestep=torch.tensor(t)) for v, t in ((1, 3), (2, 3), (3, 4), (4, 4))]
    assert run(forward, calls) == [[3], [6], [12], [16]]
    assert run(forward, calls[1:3]) == [[6], [12]]


def test_lists_of_other_lengths_in_company_are_no_error() -> None:
    slot = slot_of(lambda sample, timestep: list(sample[:, None]))
    forward = batched()
    for _ in range(2):
        assert run(forward, [call(slot, 1, 2), call(slot, 3)]) == [[1], [3]]
    assert slot.module.rows[-2:] == [2, 1]


def test_a_module_that_cannot_take_company_is_run_alone() -> None:
    def needs_one_step(sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        return sample if timestep > 0 else -sample

    forward, slot = batched(), slot_of(needs_one_step)
    calls = [call(slot, 1, timestep=torch.tensor(1)), call(slot, 2, timestep=torch.tensor(0))]
    for _ in range(2):
        assert run(forward, calls) == [[1], [-2]]
    assert slot.module.rows == [2, 1, 1, 1, 1]


def test_an_output_that_cannot_be_split_is_computed_alone() -> None:
    forward, slot = batched(), slot_of(lambda sample, timestep: iter([sample]))
    calls = [call(slot, 1), call(slot, 2)]
    for _ in range(2):
        results = [next(r) for group in forward.group(calls) for r in forward.run(group)]
        assert [result[0, 0] for result in results] == [1, 2]
    assert slot.module.rows == [2, 1, 1, 1, 1]


def test_rounding_is_no_mixing() -> None:
    slot = slot_of(lambda sample, timestep: sample * (1 + 1e-5 * len(sample)))
    forward = batched()
    calls = [call(slot, 1), call(slot, 2)]
    run(forward, calls)
    run(forward, calls)
    assert slot.module.rows == [2, 1, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_overflow_proves_nothing(bad: float) -> None:
    """A first request whose numbers overflow must not vouch for the module, nor condemn it."""
    slot = slot_of(lambda sample, timestep: sample - sample.mean())
    forward = batched()
    run(forward, [call(slot, 1), call(slot, bad)])
    assert run(forward, [call(slot, 1), call(slot, 3)]) == [[0], [0]]
    keeps_apart = slot_of(doubled)
    run(forward, [call(keeps_apart, 1), call(keeps_apart, bad)])
    keeps_apart.module.rows.clear()
    for _ in range(2):
        assert run(forward, [call(keeps_apart, 1), call(keeps_apart, 3)]) == [[2], [6]]
    assert keeps_apart.module.rows == [2, 1, 2]


def test_what_requests_choose_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "_MAX_KEYS", 10)
    forward, slot = batched(), slot_of(doubled)
    for scale in range(50):
        calls = [call(slot, 1, timestep=str(scale)), call(slot, 2, timestep=str(scale))]
        assert run(forward, calls) == [[2], [4]]
    assert len(forward._proofs._unseen) <= 10
