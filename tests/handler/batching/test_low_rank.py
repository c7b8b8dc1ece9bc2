"""Low-rank additions: each row its own, by definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from handler.batching.low_rank import Convolution, LowRank, Part, UnevenRowsError, add_low_rank

BOUND = 1e-5


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(seed: int, rank: int = 2, bias: bool = False) -> LowRank:
    added = random(5, seed=seed + 50) if bias else None
    return LowRank(random(rank, 3, seed=seed), random(5, rank, seed=seed + 20), 4.0, rank, added)


def convolution(seed: int) -> LowRank:
    how = Convolution(stride=(2, 2), padding=(1, 1), dilation=(1, 1))
    down, up = random(2, 3, 3, 3, seed=seed), random(5, 2, 1, 1, seed=seed + 20)
    return LowRank(down, up, 4.0, 2, None, how)


def embedding(seed: int) -> LowRank:
    down, up = random(2, 7, seed=seed), random(5, 2, seed=seed + 20)
    return LowRank(down, up, 4.0, 2, is_embedding=True, embedding_scale=torch.tensor(3.0))


INPUTS: dict[Any, torch.Tensor] = {
    linear: random(6, 4, 3, seed=9),
    convolution: random(6, 3, 8, 8, seed=9),
    embedding: torch.arange(12).reshape(6, 2) % 7,
}


@pytest.mark.parametrize("make", INPUTS)
@pytest.mark.parametrize("rows_a_row", [1, 2])
def test_each_row_gets_what_it_would_get_alone(make: Any, rows_a_row: int) -> None:
    x, num_rows = INPUTS[make], 6 // rows_a_row
    a, b = make(1), make(2)
    sets = [((a, 1.0),), ((b, 0.5), (a, 2.0)), ((a, -0.3),)][: num_rows // 2 or 1]
    output = random(*(0 * a(x)).shape, seed=4)
    parts = [Part(place, place + 1, adapters) for place, adapters in enumerate(sets)]
    got = add_low_rank(x, output.clone(), num_rows, parts)
    for row in range(num_rows):
        span = slice(row * rows_a_row, (row + 1) * rows_a_row)
        adapters = sets[row] if row < len(sets) else ()
        alone = add_low_rank(x[span], output[span].clone(), 1, [Part(0, 1, tuple(adapters))])
        assert (got[span] - alone).abs().max() < BOUND
        if adapters:
            assert (got[span] - output[span]).abs().max() > 0.1
        else:
            assert torch.equal(got[span], output[span])


def test_the_sum_is_as_defined() -> None:
    """By the formula itself, y + scale · alpha / rank · (x Aᵀ Bᵀ + bias)."""
    adapter, x, output = linear(1, bias=True), random(2, 3, seed=5), random(2, 5, seed=6)
    assert adapter.bias is not None
    added = x @ adapter.down.T @ adapter.up.T + adapter.bias
    parts = [Part(0, 1, ((adapter, adapter.factor(0.5)),))]
    got = add_low_rank(x, output.clone(), 2, parts)
    assert torch.allclose(got[0], output[0] + 0.5 * 4.0 / 2 * added[0], atol=BOUND)
    assert torch.equal(got[1], output[1])


def test_outputs_that_are_not_contiguous_are_added_to_as_well() -> None:
    adapter, x = linear(1), random(4, 6, 3, seed=5)
    output = random(4, 5, 6, seed=6).transpose(1, 2)
    parts = [Part(1, 3, ((adapter, 1.0),))]
    got = add_low_rank(x, output.clone(memory_format=torch.preserve_format), 4, parts)
    assert torch.allclose(got[1:3], output[1:3] + adapter(x[1:3]), atol=BOUND)
    assert torch.equal(got[3], output[3])


def test_rows_that_cannot_be_told_apart_are_refused() -> None:
    adapter = linear(1)
    parts = [Part(0, 1, ((adapter, 1.0),)), Part(1, 4, ())]
    with pytest.raises(UnevenRowsError, match="4 rows"):
        add_low_rank(random(6, 3), random(6, 5), 4, parts)
    whole = add_low_rank(random(6, 3), random(6, 5), 4, [Part(0, 4, ((adapter, 1.0),))])
    assert whole.shape == (6, 5), "all rows have the same"


def test_half_precision_is_kept() -> None:
    adapter = linear(1)
    half = LowRank(adapter.down.bfloat16(), adapter.up.bfloat16(), 4.0, 2)
    x, output = random(2, 3).bfloat16(), random(2, 5).bfloat16()
    for parts in ([Part(0, 2, ((half, 1.0),))], [Part(1, 2, ((half, 1.0),))]):
        assert add_low_rank(x, output.clone(), 2, parts).dtype is torch.bfloat16
