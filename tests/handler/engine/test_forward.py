"""One forward for many calls: what it groups, how it pads, and whose error an error is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from handler.engine.forward import Group, is_out_of_memory
from handler.engine.parking import ModuleCall
from tests.support.forward_tools import batched, call, doubled, run, slot_of

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


# Errors


class RefusedError(Exception):
    pass


def refusing(sample: torch.Tensor, timestep: Any) -> torch.Tensor:
    if bool((sample < 0).any()):
        raise RefusedError
    return sample * 2


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("is_proven", [False, True])
def test_only_the_failing_call_fails(place: int, is_proven: bool) -> None:
    forward, slot = batched(), slot_of(refusing)
    good = [call(slot, 1, 2), call(slot, 3)]
    if is_proven:
        run(forward, good)
    slot.module.rows.clear()
    calls = [*good[:place], call(slot, -1), *good[place:]]
    results = run(forward, calls)
    assert isinstance(results.pop(place), RefusedError)
    assert results == [[2, 4], [6]]
    assert sorted(slot.module.rows) == [1, 1, 2, 4], "together, and then each alone"
    slot.module.rows.clear()
    assert run(forward, good) == [[2, 4], [6]]
    assert slot.module.rows[0] == 3, "the others go on together"


def test_two_failing_calls_fail_each_with_its_own_error() -> None:
    forward, slot = batched(), slot_of(refusing)
    first, _, last = run(forward, [call(slot, -1), call(slot, 1), call(slot, -2)])
    assert isinstance(first, RefusedError)
    assert isinstance(last, RefusedError)
    assert first is not last


def test_a_single_call_is_tried_once() -> None:
    forward, slot = batched(), slot_of(refusing)
    assert isinstance(run(forward, [call(slot, -1)])[0], RefusedError)
    assert slot.module.rows == [1]


def test_an_interrupt_is_nobodys_error() -> None:
    def interrupted(sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    forward, slot = batched(), slot_of(interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(forward, [call(slot, 1), call(slot, 2)])


def test_what_prepares_a_forward_fails_for_its_calls_alone() -> None:
    asked: list[int] = []

    def prepare(calls: Sequence[ModuleCall]) -> None:
        asked.append(len(calls))
        if calls[0].ticket.lora_names:
            raise RefusedError

    forward, slot = batched(prepare=prepare), slot_of(doubled)
    results = run(forward, [call(slot, 1), call(slot, 2, adapters={"gone": 1.0}), call(slot, 3)])
    assert isinstance(results.pop(1), RefusedError)
    assert results == [[2], [6]]
    assert asked == [2, 1, 1], "before every forward, the proof's included"


def shapeless() -> torch.Tensor:
    """A tensor of two shapes at once, whose own raises when it is asked for."""
    return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_argument_that_cannot_be_compared_leaves_the_others_together() -> None:
    with pytest.raises(RuntimeError):
        tuple(shapeless().shape)
    forward, slot = batched(), slot_of(doubled)
    calls = [call(slot, 1), call(slot, 2, timestep=shapeless()), call(slot, 3, 4)]
    for _ in range(2):
        slot.module.rows.clear()
        assert run(forward, calls) == [[2], [4], [6, 8]]
        assert slot.module.rows[0] == 3


class Opaque(torch.Tensor):
    """A tensor that cannot be compared."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            raise RefusedError
        return super().__torch_function__(func, types, args, kwargs or {})


def test_calls_whose_results_cannot_be_compared_run_alone() -> None:
    forward = batched()
    slot = slot_of(lambda sample, timestep: (sample * 2).as_subclass(Opaque))
    calls = [call(slot, 1), call(slot, 2)]
    assert run(forward, calls) == [[2], [4]]
    slot.module.rows.clear()
    assert run(forward, calls) == [[2], [4]]
    assert slot.module.rows == [1, 1]


def test_what_cannot_be_proved_ahead_is_proved_when_it_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> Any:
        raise RefusedError

    forward, slot = batched(proves_ahead=True), slot_of(doubled)
    calls = [call(slot, 1), call(slot, 2)]
    with monkeypatch.context() as patch:
        patch.setattr("handler.engine.forward.altered", fail)
        assert run(forward, calls) == [[2], [4]]
    slot.module.rows.clear()
    assert run(forward, calls) == [[2], [4]]
    assert slot.module.rows == [2], "they share a forward as before"


def test_a_lack_of_memory_in_comparing_passes() -> None:
    times = 0

    class Large(torch.Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal times
            if func is torch.Tensor.float and (times := times + 1) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().__torch_function__(func, types, args, kwargs or {})

    forward = batched()
    slot = slot_of(lambda sample, timestep: (sample * 2).as_subclass(Large))
    calls = [call(slot, 1), call(slot, 2)]
    for _ in range(2):
        slot.module.rows.clear()
        assert run(forward, calls) == [[2], [4]]
    assert slot.module.rows[0] == 2
    slot.module.rows.clear()
    run(forward, calls)
    assert slot.module.rows == [2]


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
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
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
