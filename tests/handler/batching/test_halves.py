"""Halves of a batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from handler.batching.halves import doubled, second_half


def test_rows_are_halved_wherever_they_stand() -> None:
    arguments: dict[str, Any] = {
        "sample": torch.arange(4.0).reshape(4, 1),
        "timestep": torch.tensor(7),
        "residuals": (torch.arange(4.0), [torch.arange(8.0).reshape(4, 2)]),
        "added": {"text_embeds": torch.arange(4.0).reshape(4, 1), "time_ids": None},
        "scale": 0.5,
        "img_ids": torch.zeros(16, 3),
        "table": torch.zeros(3, 5),
    }
    found = second_half(arguments, 4)
    assert found is not None
    assert found["sample"].tolist() == [[2], [3]]
    assert found["timestep"].tolist() == 7
    assert found["residuals"][0].tolist() == [2, 3]
    assert found["residuals"][1][0].tolist() == [[4, 5], [6, 7]]
    assert found["added"]["text_embeds"].tolist() == [[2], [3]]
    assert found["scale"] == 0.5
    assert found["img_ids"].shape == (16, 3)
    assert found["table"].shape == (3, 5)


def test_a_step_for_each_row_is_halved_and_one_for_all_is_not() -> None:
    sample = torch.zeros(2, 1)
    each = second_half({"sample": sample, "timestep": torch.tensor([1, 2])}, 2)
    one = second_half({"sample": sample, "timestep": torch.tensor([1])}, 2)
    assert each is not None
    assert one is not None
    assert each["timestep"].tolist() == [2]
    assert one["timestep"].tolist() == [1]


@pytest.mark.parametrize(
    "arguments",
    [
        {"sample": torch.zeros(3, 1)},  # an odd number of rows
        {"sample": torch.zeros(2, 1), "frames": torch.zeros(16, 4)},  # a table, or frames?
        {"sample": [torch.zeros(1), torch.zeros(1)]},  # a list of rows
    ],
)
def test_what_one_call_does_not_tell_is_left_whole(arguments: dict[str, Any]) -> None:
    assert second_half(arguments, len(arguments["sample"])) is None


def test_the_second_half_counts_for_both() -> None:
    output = SimpleNamespace(sample=torch.arange(4.0), steps=3)
    whole = doubled(output, 4)
    assert whole.sample.tolist() == [2, 3, 2, 3]
    assert whole.steps == 3
    half = doubled((torch.arange(2.0), torch.zeros(7)), 4)
    assert half[0].tolist() == [0, 1, 0, 1]
    assert half[1].shape == (7,)
