"""Packing two sizes in one forward: right in both ways, so that their cost may be compared."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.mixed_sizes import WAYS, Mix, TinyDiT, apart, inputs_of, measure

SMALL = Mix("small", ((2, 16), (3, 9)))


@pytest.mark.parametrize("way", WAYS)
def test_packed_forwards_give_what_forwards_apart_give(way: str) -> None:
    model, inputs = TinyDiT(width=32), inputs_of(SMALL, 32)
    expected = apart(model, inputs)
    for packed, own in zip(WAYS[way](model, inputs), expected, strict=True):
        assert (packed - own).abs().max() < 1e-5
    # Without the bounds between pictures it would be another picture.
    line, steps = torch.cat([x.flatten(0, 1) for x in inputs.tokens])[None], torch.cat(inputs.steps)
    owner = torch.tensor([0] * 16 + [1] * 16 + [2] * 9 + [3] * 9 + [4] * 9)
    together = model(line, steps, owner=owner)[0, :32].view_as(expected[0])
    assert (together - expected[0]).abs().max() > 1e-3


def test_every_round_counts_but_the_first() -> None:
    ticks = itertools.count()
    figures = measure([SMALL], rounds=3, width=32, clock=lambda: float(next(ticks)))
    assert [figure.value.values for figure in figures[:2]] == [(1.0,) * 3] * 2
