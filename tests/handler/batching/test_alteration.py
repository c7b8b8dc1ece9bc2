"""Arguments made to differ: other values, of the same kind, in the places that were asked for."""

from __future__ import annotations

import pytest
import torch

from handler.batching.alteration import altered
from handler.batching.arguments import edges


def everywhere(**arguments: object) -> tuple[dict[str, object], set[str]]:
    """`arguments` altered wherever they have rows, and the parameters that were."""
    rows = next(len(v) for v in arguments.values() if isinstance(v, torch.Tensor) and v.ndim > 1)
    changed, places = altered(arguments, edges(arguments, rows))
    return changed, {str(place[0]) for place in places}


SAMPLE = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sample", torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(1)).half()),
        ("time_ids", torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * 3)),
        ("guidance", torch.full((3,), 7.5)),
        ("strength", torch.zeros(3)),
        ("timestep", torch.tensor([981, 981, 981])),
        ("timestep", torch.tensor([0, 0, 0])),
        ("sigma", torch.tensor([0.5, 0.5, 0.5])),
        ("input_ids", torch.tensor([[49406, 320, 49407, 49407]] * 3)),
        ("class_labels", torch.tensor([5, 5, 5])),
        ("attention_mask", torch.ones(3, 8, dtype=torch.int64)),
        ("attention_mask", torch.zeros(3, 8, dtype=torch.bool)),
    ],
)
def test_the_first_and_the_last_row_become_others(name: str, value: torch.Tensor) -> None:
    before = value.clone()
    changed, names = everywhere(sample_=SAMPLE, **{name: value})
    other = changed[name]
    assert name in names
    assert isinstance(other, torch.Tensor)
    assert (other.dtype, other.shape) == (value.dtype, value.shape)
    differ = (other != value).reshape(3, -1).any(1).tolist()
    assert differ == [True, False, True]
    assert torch.equal(value, before)


def test_whole_numbers_stay_among_those_that_were_there() -> None:
    ids = torch.tensor([[49406, 320, 1125, 49407]] * 3)
    changed, _ = everywhere(sample_=SAMPLE, input_ids=ids)
    assert set(changed["input_ids"].unique().tolist()) <= {0, *ids.unique().tolist()}  # type: ignore[attr-defined]


def test_steps_stay_on_the_schedule() -> None:
    changed, _ = everywhere(sample_=SAMPLE, timestep=torch.tensor(981))
    assert 0 <= int(changed["timestep"]) < 981  # type: ignore[call-overload]


def test_what_has_no_other_value_that_is_sure_to_be_valid_stays() -> None:
    changed, names = everywhere(sample=SAMPLE, class_labels=torch.zeros(3, dtype=torch.int64))
    assert names == {"sample"}
    assert torch.equal(changed["class_labels"], torch.zeros(3, dtype=torch.int64))  # type: ignore[arg-type]


def test_only_where_it_was_asked_for_and_inside_of_containers() -> None:
    arguments = {"sample": SAMPLE, "added": {"text": SAMPLE + 1, "name": "x"}, "flag": True}
    changed, places = altered(arguments, frozenset({("added", "text", 0)}))
    assert places == {("added", "text", 0)}
    assert changed["sample"] is SAMPLE
    assert changed["flag"] is True
    assert changed["added"]["name"] == "x"
    assert torch.equal(changed["added"]["text"][1:], SAMPLE[1:] + 1)
    assert not torch.equal(changed["added"]["text"][0], SAMPLE[0] + 1)


def test_rows_in_a_list() -> None:
    rows = [torch.randn(2, 3), torch.randn(4, 3)]
    changed, places = altered({"x": rows}, frozenset({("x", 0), ("x", -1)}))
    assert len(places) == 2
    assert all(not torch.equal(a, b) for a, b in zip(changed["x"], rows, strict=True))
