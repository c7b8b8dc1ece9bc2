"""Which reading of a call's tensors is tried first, which next, and what is learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from handler.batching.arguments import Part, edges, is_batch, leaves, num_rows, part_of, row_at
from handler.batching.fingerprints import Fingerprints
from handler.batching.invariance import agree, is_conclusive
from handler.batching.layouts import Layouts
from handler.batching.merging import merge, merge_key, was_written

ROWS: Part = "rows"
FOLDED: Part = "folded"
STEP: Part = "step"
SHARED: Part = "shared"

# Parts


@pytest.mark.parametrize(
    ("name", "shape", "rows", "part"),
    [
        ("sample", (2, 4), 2, ROWS),
        ("text", (6, 4), 2, FOLDED),
        ("text", (7, 4), 2, SHARED),
        ("text", (1, 4), 2, SHARED),
        ("mask", (1, 4), 1, ROWS),
        ("table", (9, 4), 1, FOLDED),
        ("ids", (9,), 1, SHARED),
        ("ids", (2,), 2, ROWS),
        ("img_ids", (9, 3), 1, SHARED),
        ("img_ids", (1, 3), 1, SHARED),
        ("timestep", (), 2, STEP),
        ("timestep", (1,), 2, STEP),
        ("timestep", (2,), 2, STEP),
        ("timestep", (2, 5), 2, ROWS),
        ("scale", (), 2, SHARED),
        ("empty", (0, 4), 2, SHARED),
    ],
)
def test_the_part_of_a_tensor(name: str, shape: tuple[int, ...], rows: int, part: Part) -> None:
    assert part_of((name,), name, torch.zeros(shape), rows, {}) == part


def test_what_was_learned_decides_where_shapes_do_not() -> None:
    for rows in (1, 2):
        known = {("mask",): SHARED, ("sample",): SHARED}
        assert part_of(("mask",), "mask", torch.zeros(1, 4), rows, known) == SHARED
    assert part_of(("a",), "a", torch.zeros(6, 4), 2, {("a",): SHARED}) == SHARED
    assert part_of(("a", 0), "a", torch.zeros(6, 4), 2, {("a",): SHARED}) == FOLDED
    assert part_of(("a",), "a", torch.zeros(6, 4), 2, None) == SHARED


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ({"ids": torch.zeros(39), "sample": torch.zeros(2, 4)}, 2),
        ({"ids": torch.zeros(39), "tokens": [torch.zeros(64, 4)]}, 1),
        ({"ids": torch.zeros(39), "timestep": torch.zeros(1)}, 39),
        ({"ids": torch.zeros(39), "position_ids": torch.zeros(3, 39)}, 39),
    ],
)
def test_one_dimension_is_a_batch_only_where_nothing_else_is(
    arguments: dict[str, Any], rows: int
) -> None:
    assert num_rows(arguments) == rows


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(20, 4, 8, 8)], True),
        ([(20, 4, 8, 8), (20, 6, 8)], True),
        ([(20, 4, 8, 8), (40, 6, 8), (20, 5)], True),
        ([(64, 4), (7, 8)], False),
        ([(64, 4), (39,)], False),
        ([(64, 4), (1,), ()], True),
    ],
)
def test_a_batch_is_told_by_the_other_tensors(
    shapes: list[tuple[int, ...]], expected: bool
) -> None:
    arguments = {f"argument_{i}": torch.zeros(shape) for i, shape in enumerate(shapes)}
    rows = num_rows(arguments)
    assert rows is not None
    assert is_batch(arguments, rows) is expected


# Readings


def call(index: int, *, text: float | None = None, mask: float = 0.0) -> dict[str, Any]:
    return {
        "sample": torch.full((1, 4), float(index)),
        "text": torch.full((3, 2), float(index) if text is None else text),
        "mask": torch.full((1, 5), mask),
    }


def test_what_is_equal_in_all_calls_is_likely_shared() -> None:
    layouts = Layouts(Fingerprints())
    assert layouts.likely({}, [call(0), call(1)], [1, 1]) == {("text",): FOLDED}
    equal = [call(0, text=5.0), call(1, text=5.0)]
    assert layouts.likely({}, equal, [1, 1]) == {("text",): SHARED}
    known = {("text",): FOLDED}
    assert layouts.likely(known, equal, [1, 1]) == known


def test_other_readings_are_each_tried_once_a_module() -> None:
    layouts = Layouts(Fingerprints())
    equal = [call(0, text=5.0), call(1, text=5.0)]
    readings = list(layouts.others("unet", {}, equal, [1, 1]))
    assert readings == [
        {("text",): FOLDED},
        {("text",): SHARED, ("mask",): SHARED},
    ]
    assert list(layouts.others("unet", {}, equal, [1, 1])) == []
    assert len(list(layouts.others("controlnet", {}, equal, [1, 1]))) == 2
    different = [call(0, mask=1.0), call(1, mask=2.0)]
    assert list(layouts.others("vae", {}, different, [1, 1])) == []


def test_the_batch_itself_is_never_read_as_shared() -> None:
    layouts = Layouts(Fingerprints())
    same = [{"sample": torch.zeros(1, 4)}, {"sample": torch.zeros(1, 4)}]
    assert list(layouts.others("unet", {}, same, [1, 1])) == []


def test_what_is_learned_is_the_modules() -> None:
    layouts = Layouts(Fingerprints())
    layouts.learn("unet", {("mask",): SHARED})
    assert layouts.of("unet") == {("mask",): SHARED}
    assert layouts.of("other") == {}


# Merged by a layout


def test_folded_rows_are_joined_padded_and_compared_at_their_ends() -> None:
    calls = [{"sample": torch.zeros(n, 2), "text": torch.arange(3.0 * n)[:, None]} for n in (1, 2)]
    keys = [merge_key(c, n, Fingerprints(), {}) for c, n in zip(calls, (1, 2), strict=True)]
    assert keys[0] == keys[1]
    assert keys[0] != merge_key({**calls[0], "text": torch.zeros(4, 1)}, 1, Fingerprints(), {})
    merged = merge(calls, [1, 2], pad_to=4, layout={})
    assert merged["sample"].shape == (4, 2)
    assert merged["text"].flatten().tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert {("text", 0), ("text", -1)} <= edges(calls[1], 2, {})
    assert [row_at(calls[1], ("text", end)).item() for end in (0, -1)] == [0, 5]
    assert ("text", 0) not in edges(calls[1], 2), "without a layout it is shared"


def test_copies_are_not_the_callers_and_tell_what_was_written() -> None:
    calls = [{"sample": torch.zeros(1, 2), "table": torch.zeros(5)} for _ in range(2)]
    merged = merge(calls, [1, 1], copies=True)
    assert not was_written(merged)
    merged["table"].add_(1)
    assert was_written(merged)
    assert calls[0]["table"].sum() == 0
    assert merge(calls, [1, 1])["table"] is calls[0]["table"]
    merged = merge(calls, [1, 1], copies=True)
    merged["sample"][0] = 1
    assert was_written(merged)


def test_leaves_are_found_in_containers() -> None:
    arguments = {"sample": torch.zeros(2, 1), "added": {"text": [torch.zeros(4, 1)], "flag": True}}
    found = [(leaf.path, leaf.part) for leaf in leaves(arguments, 2, {})]
    assert found == [(("sample",), ROWS), (("added", "text", 0), FOLDED)]


# What is no number


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("together", "alone", "equal"),
    [
        ([1.0, NAN], [1.0, NAN], True),
        ([1.0, NAN], [1.0, 2.0], False),
        ([1.0, 2.0], [1.0, NAN], False),
        ([1.0, INF], [1.0, INF], True),
        ([1.0, INF], [1.0, -INF], False),
        ([1.0, INF], [1.0, NAN], False),
        ([1.5, NAN], [1.0, NAN], False),
        ([1.5, INF], [1.0, INF], False),
        ([NAN, NAN], [NAN, NAN], True),
    ],
)
def test_a_nan_equals_a_nan_and_hides_nothing_else(
    together: list[float], alone: list[float], equal: bool
) -> None:
    assert agree(torch.tensor(together), torch.tensor(alone)) is equal


def test_shapes_are_compared_before_numbers() -> None:
    assert not agree(torch.full((2, 3), NAN), torch.full((3, 2), NAN))


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (torch.tensor([[1.0, NAN], [NAN, 2.0]]), True),
        (torch.tensor([[1.0, 2.0], [NAN, INF]]), False),
        (torch.tensor(NAN), False),
        (torch.tensor([[1, 2]]), True),
        (torch.zeros(0, 3), True),
        ({"a": torch.zeros(1), "b": (torch.tensor([INF]),)}, False),
    ],
)
def test_a_row_without_a_finite_number_proves_nothing(output: Any, expected: bool) -> None:
    assert is_conclusive(output) is expected
