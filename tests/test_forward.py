"""One forward for many calls: what it groups, how it pads, and whose error an error is."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.utils import BaseOutput

from handler import proof
from handler.forward import BatchedForward, Failure, Group, is_out_of_memory
from handler.parking import Parked, Slot
from handler.policy import Cost
from handler.ticket import Ticket


class Recorder(torch.nn.Module):
    """A module with the given body, which remembers the rows of each forward."""

    def __init__(self, body: Callable[[torch.Tensor, Any], Any]) -> None:
        super().__init__()
        self.body = body
        self.rows: list[int] = []

    def forward(self, sample: torch.Tensor, timestep: Any = None, flag: Any = None) -> Any:
        self.rows.append(len(sample))
        return self.body(sample, timestep)


def doubled(sample: torch.Tensor, timestep: Any) -> torch.Tensor:
    return sample * 2


def slot_of(body: Callable[[torch.Tensor, Any], Any]) -> Slot:
    module = Recorder(body)
    return Slot(
        name="unet.forward",
        module=module,
        method="forward",
        is_denoiser=True,
        real=module.forward,
        signature=inspect.signature(module.forward),
        attribute=None,
    )


def call(slot: Slot, *values: float, timestep: Any = None, exact: bool = False, **more: Any) -> Any:
    """A parked call with one row for each value."""
    ticket = Ticket(kwargs={}, cost=Cost(len(values), 0), exact=exact, **more)
    sample = torch.tensor(values, dtype=torch.float32).reshape(-1, 1).expand(-1, 3)
    bound = slot.signature.bind(sample, timestep=timestep)
    return Parked(slot, ticket, bound, len(values))


def batched(max_rows: int = 16, **options: Any) -> BatchedForward:
    return BatchedForward(lambda: 0.0, max_rows, **options)


def run(forward: BatchedForward, calls: Sequence[Parked]) -> list[Any]:
    """The result of each call in order: its first column, or its error."""
    results: dict[int, Any] = {}
    for group in forward.group(calls):
        for each, result in zip(group.calls, forward.run(group), strict=True):
            is_failure = isinstance(result, Failure)
            results[id(each)] = result.error if is_failure else column(result)
    return [results[id(each)] for each in calls]


def column(output: Any) -> list[float]:
    while not isinstance(output, torch.Tensor):
        output = vars(output)["sample"] if hasattr(output, "__dict__") else output[0]
    values: list[float] = output[:, 0].tolist()
    return values


# Grouping


def test_calls_of_a_kind_share_a_forward() -> None:
    forward, slot = batched(), slot_of(doubled)
    calls = [call(slot, 1, 2), call(slot, 3), call(slot, 4, 5)]
    assert run(forward, calls) == [[2, 4], [6], [8, 10]]
    assert slot.module.rows == [5, 2], "together, and once the last alone to compare"
    assert run(forward, calls) == [[2, 4], [6], [8, 10]]
    assert slot.module.rows[2:] == [5]
    counters = forward.counters
    assert (counters.forwards, counters.rows, counters.merged_forwards) == (3, 12, 2)


def test_groups_stand_in_the_order_of_their_first_calls() -> None:
    forward, one, other = batched(max_rows=3), slot_of(doubled), slot_of(doubled)
    calls = [call(one, 1, 2), call(other, 3), call(one, 4), call(one, 5), call(one, 6, exact=True)]
    groups = forward.group(calls)
    assert [group.calls for group in groups] == [
        [calls[0], calls[2]],
        [calls[1]],
        [calls[3]],
        [calls[4]],
    ]
    assert groups[3].key is None


def test_no_group_holds_more_than_the_limit() -> None:
    forward, slot = batched(max_rows=4), slot_of(doubled)
    calls = [call(slot, *range(n)) for n in (3, 2, 1, 4, 9, 1)]
    assert [sum(group.rows) for group in forward.group(calls)] == [3, 3, 4, 9, 1]


def test_calls_under_other_adapters_are_apart() -> None:
    forward, slot = batched(), slot_of(doubled)
    calls = [
        call(slot, 1),
        call(slot, 2, adapters={"a": 1.0, "b": 0.5}),
        call(slot, 3, adapters={"b": 0.5, "a": 1.0}),
        call(slot, 4, adapters={"a": 1.0}),
        call(slot, 5, adapters={}),
    ]
    assert [len(group.calls) for group in forward.group(calls)] == [1, 2, 1, 1]


def test_an_exact_call_is_run_as_it_is() -> None:
    forward, slot = batched(buckets=(8,)), slot_of(doubled)
    assert run(forward, [call(slot, 1, exact=True), call(slot, 2, exact=True)]) == [[2], [4]]
    assert slot.module.rows == [1, 1]


def test_a_call_without_rows_is_run_as_it_is() -> None:
    """Padded, its output of one row would be cut to none."""
    forward, slot = batched(buckets=(4,)), slot_of(lambda sample, timestep: torch.ones(4, 1))
    empty = [call(slot), call(slot)]
    assert run(forward, empty) == [[1] * 4, [1] * 4]
    assert slot.module.rows == [0, 0]


# Padding


def test_forwards_have_bucket_sizes_and_padding_reaches_nobody() -> None:
    forward, slot = batched(buckets=(1, 2, 4, 8)), slot_of(doubled)
    calls = [call(slot, 1, 2), call(slot, 3)]
    for _ in range(2):
        assert run(forward, calls) == [[2, 4], [6]]
    assert slot.module.rows == [4, 1, 4]
    slot.module.rows.clear()
    for n in range(1, 11):
        assert run(forward, [call(slot, *range(n))]) == [[2.0 * i for i in range(n)]]
    assert slot.module.rows == [1, 2, 4, 4, 8, 8, 8, 8, 9, 10]
    assert forward.counters.rows == 3 + 1 + 3 + 55, "padding is not counted"


def test_a_module_that_padding_changes_is_never_padded() -> None:
    """The mean over three rows is not the mean over four, though no company came."""
    slot = slot_of(lambda sample, timestep: sample - sample.mean(0))
    forward = batched(buckets=(4,))
    for _ in range(2):
        assert run(forward, [call(slot, 0, 0, 3)]) == [[-1, -1, 2]]
    assert slot.module.rows == [4, 3, 3]


def test_a_module_that_fails_padded_runs_as_it_is() -> None:
    def at_most_three(sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        if len(sample) > 3:
            raise RuntimeError("too many")
        return sample

    forward, slot = batched(buckets=(4,)), slot_of(at_most_three)
    for _ in range(2):
        assert run(forward, [call(slot, 1, 2, 3)]) == [[1, 2, 3]]
    assert slot.module.rows == [4, 3, 3]


# Modules that mix rows


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

    def calls(*values: tuple[float, float]) -> list[Parked]:
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


# Errors


class GuiltyError(Exception):
    pass


def refusing(sample: torch.Tensor, timestep: Any) -> torch.Tensor:
    if bool((sample < 0).any()):
        raise GuiltyError
    return sample * 2


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("is_proven", [False, True])
def test_only_the_guilty_call_fails(place: int, is_proven: bool) -> None:
    forward, slot = batched(), slot_of(refusing)
    good = [call(slot, 1, 2), call(slot, 3)]
    if is_proven:
        run(forward, good)
    slot.module.rows.clear()
    calls = [*good[:place], call(slot, -1), *good[place:]]
    results = run(forward, calls)
    assert isinstance(results.pop(place), GuiltyError)
    assert results == [[2, 4], [6]]
    assert sorted(slot.module.rows) == [1, 1, 2, 4], "together, and then each alone"
    slot.module.rows.clear()
    assert run(forward, good) == [[2, 4], [6]]
    assert slot.module.rows[0] == 3, "the others go on together"


def test_two_guilty_calls_fail_each_with_its_own_error() -> None:
    forward, slot = batched(), slot_of(refusing)
    first, _, last = run(forward, [call(slot, -1), call(slot, 1), call(slot, -2)])
    assert isinstance(first, GuiltyError)
    assert isinstance(last, GuiltyError)
    assert first is not last


def test_a_single_call_is_tried_once() -> None:
    forward, slot = batched(), slot_of(refusing)
    assert isinstance(run(forward, [call(slot, -1)])[0], GuiltyError)
    assert slot.module.rows == [1]


def test_an_interrupt_is_nobodys_error() -> None:
    def interrupted(sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    forward, slot = batched(), slot_of(interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(forward, [call(slot, 1), call(slot, 2)])


def test_what_prepares_a_forward_fails_for_its_calls_alone() -> None:
    asked: list[int] = []

    def prepare(calls: Sequence[Parked]) -> None:
        asked.append(len(calls))
        if calls[0].ticket.adapters:
            raise GuiltyError

    forward, slot = batched(prepare=prepare), slot_of(doubled)
    results = run(forward, [call(slot, 1), call(slot, 2, adapters={"gone": 1.0}), call(slot, 3)])
    assert isinstance(results.pop(1), GuiltyError)
    assert results == [[2], [6]]
    assert asked == [2, 1, 1], "before every forward, the proof's included"


# Memory


def out_of_memory_above(max_rows: int) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    def body(sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        if len(sample) > max_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate …")
        return sample * 2

    return body


def test_out_of_memory_is_retried_in_halves() -> None:
    forward, slot = batched(), slot_of(out_of_memory_above(2))
    calls = [call(slot, float(i)) for i in range(8)]
    assert run(forward, calls) == [[2.0 * i] for i in range(8)]
    assert slot.module.rows == [8, 4, 2, 1, 2, 4, 2, 2], "what fits is proven"
    assert forward.counters.out_of_memory_retries == 3
    run(forward, calls)
    assert forward.counters.forwards == 9, "no half is found unable to share"


def test_only_the_call_that_does_not_fit_alone_fails() -> None:
    forward, slot = batched(), slot_of(out_of_memory_above(3))
    results = run(forward, [call(slot, 1, 2), call(slot, *range(4)), call(slot, 3), call(slot, 4)])
    assert isinstance(results.pop(1), torch.OutOfMemoryError)
    assert results == [[2, 4], [6], [8]]


def test_padding_that_does_not_fit_is_left_out() -> None:
    forward, slot = batched(buckets=(4,)), slot_of(out_of_memory_above(3))
    for _ in range(2):
        assert run(forward, [call(slot, 1, 2, 3)]) == [[2, 4, 6]]


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
            ),
            True,
        ),
        (RuntimeError("HIP out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
        (KeyError(), False),
    ],
)
def test_memory_errors_are_told_from_others(error: Exception, is_memory: bool) -> None:
    assert is_out_of_memory(error) is is_memory


def test_a_host_that_runs_out_of_memory_says_so() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_a_group_knows_its_rows() -> None:
    slot = slot_of(doubled)
    assert Group("key", [call(slot, 1, 2), call(slot, 3)]).rows == [2, 1]
