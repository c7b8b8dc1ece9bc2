"""Arguments merged and split again: what `handler.batching.merging` promises for every value."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from collections.abc import Mapping
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.utils import BaseOutput
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.utils import ModelOutput

from handler.batching.arguments import edges, is_listed, num_rows, row_at
from handler.batching.fingerprints import Fingerprints
from handler.batching.merging import merge, merge_key, output_members, split

Pair = namedtuple("Pair", "left right")


class Kind(Enum):
    FULL = "full"
    LIGHT = "light"


@dataclasses.dataclass
class Plain:
    sample: torch.Tensor
    scale: float = 1.0


@dataclasses.dataclass
class Output(BaseOutput):
    sample: torch.Tensor
    extra: torch.Tensor | None


@dataclasses.dataclass
class Hidden(ModelOutput):
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


def key(arguments: Mapping[str, Any]) -> Any:
    return merge_key(arguments, num_rows(arguments) or 0, Fingerprints())


def rows_of(start: int, rows: int, *shape: int) -> torch.Tensor:
    """Rows that tell from where they are: row i is all start + i."""
    return (torch.arange(rows) + start).reshape(rows, *[1] * len(shape)).expand(rows, *shape) * 1.0


def same(one: Any, other: Any) -> bool:
    """Equal in type, structure and every element."""
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and one.dtype == other.dtype
            and one.shape == other.shape
            and torch.equal(one, other)
        )
    if type(one) is not type(other):
        return False
    ours, theirs = output_members(one), output_members(other)
    if ours is None or theirs is None:
        return bool(one == other)
    return len(ours) == len(theirs) and all(
        a == b and same(x, y) for (a, x), (b, y) in zip(ours, theirs, strict=True)
    )


# Rows


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ({"sample": torch.zeros(3, 4), "timestep": torch.tensor(1)}, 3),
        ({"timestep": torch.tensor(1), "sample": torch.zeros(3, 4)}, 3),
        ({"timestep": torch.zeros(1), "sample": torch.zeros(3, 4)}, 3),
        ({"img_ids": torch.zeros(9, 3), "hidden_states": torch.zeros(2, 9)}, 2),
        ({"timestep": torch.zeros(5)}, 5),
        ({"kwargs": {"sample": torch.zeros(2, 1)}}, 2),
        ({"x": [torch.zeros(16, 4), torch.zeros(16, 6)], "t": torch.zeros(2)}, 2),
        ({"sample": torch.zeros(0, 4)}, 0),
        ({"timestep": torch.tensor(1), "flag": True}, None),
        ({"text": "a", "nothing": None, "empty": []}, None),
        ({}, None),
    ],
)
def test_rows_are_counted(arguments: dict[str, Any], rows: int | None) -> None:
    assert num_rows(arguments) == rows


def test_only_a_leading_list_of_tensors_is_the_batch() -> None:
    tensor, tensors = torch.zeros(2, 3), [torch.zeros(4), torch.zeros(4)]
    assert is_listed({"x": tensors, "t": torch.zeros(2)})
    assert is_listed({"t": torch.zeros(2), "x": tensors})
    assert not is_listed({"sample": tensor, "residuals": tensors})
    assert not is_listed({"x": tuple(tensors)})
    assert not is_listed({"x": []})
    assert not is_listed({})


# Which calls may share a forward


CALL: dict[str, Any] = {
    "sample": torch.zeros(2, 4, 8),
    "timestep": torch.tensor(7),
    "added": {"text_embeds": torch.zeros(2, 5), "extra": None},
    "residuals": (torch.zeros(2, 3), [torch.zeros(2, 6)]),
    "img_ids": torch.arange(6.0).reshape(3, 2),
    "return_dict": False,
    "kind": Kind.FULL,
    "dtype": torch.float32,
    "scale": 0.5,
    "name": "a",
}


def test_calls_that_differ_in_rows_and_contents_of_rows_share() -> None:
    other = {
        **CALL,
        "sample": torch.ones(5, 4, 8),
        "timestep": torch.tensor(3.5),
        "added": {"text_embeds": torch.ones(5, 5), "extra": None},
        "residuals": (torch.ones(5, 3), [torch.ones(5, 6)]),
        "img_ids": CALL["img_ids"].clone(),
    }
    assert key(CALL) == key(other)
    assert hash(key(CALL)) == hash(key(other))


@pytest.mark.parametrize(
    "change",
    [
        {"sample": torch.zeros(2, 4, 9)},
        {"sample": torch.zeros(2, 4)},
        {"sample": torch.zeros(2, 4, 8, dtype=torch.float64)},
        {"sample": torch.zeros(2, 4, 8).to_sparse()},
        {"timestep": torch.zeros(3)},
        {"timestep": 7},
        {"timestep": None},
        {"added": {"text_embeds": torch.zeros(2, 6), "extra": None}},
        {"added": {"text_embeds": torch.zeros(2, 5), "extra": 1}},
        {"added": {"text_embeds": torch.zeros(2, 5)}},
        {"added": {"other": torch.zeros(2, 5), "extra": None}},
        {"residuals": [torch.zeros(2, 3), [torch.zeros(2, 6)]]},
        {"residuals": (torch.zeros(2, 3), [torch.zeros(2, 6), torch.zeros(2, 6)])},
        {"img_ids": torch.arange(6.0).reshape(3, 2) + 1},
        {"img_ids": torch.arange(6).reshape(3, 2)},
        {"return_dict": True},
        {"return_dict": 0},
        {"kind": Kind.LIGHT},
        {"dtype": torch.float16},
        {"scale": 0.25},
        {"scale": torch.tensor(0.5)},
        {"name": "b"},
        {"more": None},
    ],
    ids=str,
)
def test_calls_that_differ_in_anything_else_do_not(change: dict[str, Any]) -> None:
    assert key(CALL) != key({**CALL, **change})


def test_numbers_of_other_types_do_not_share() -> None:
    values = (1, 1.0, True, "1", 1 + 0j)
    assert len({key({"sample": torch.zeros(1, 2), "scale": value}) for value in values}) == 5


def test_objects_share_only_with_themselves() -> None:
    generator, other = torch.Generator(), torch.Generator()
    call = {"sample": torch.zeros(1, 2), "generator": generator}
    assert key(call) == key(dict(call))
    assert key(call) != key({**call, "generator": other})


def test_an_unbatched_dimension_that_equals_the_rows_keeps_calls_apart() -> None:
    """With two rows a (2, 5) table looks batched, with three it cannot be: these do not share."""
    table = torch.zeros(2, 5)
    two = {"sample": torch.zeros(2, 4), "table": table}
    three = {"sample": torch.zeros(3, 4), "table": table}
    assert key(two) != key(three)
    assert key(three) == key({"sample": torch.zeros(4, 4), "table": table.clone()})


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_tensors_known_to_have_no_rows_are_shared_whatever_their_length(rows: int) -> None:
    call = {"hidden_states": torch.zeros(rows, 9), "txt_ids": torch.arange(6.0).reshape(2, 3)}
    other = {**call, "txt_ids": call["txt_ids"] + 1}
    assert key(call) == key({**call, "txt_ids": call["txt_ids"].clone()})
    assert key(call) != key(other)
    merged = merge([call, call], [rows, rows])
    assert merged["txt_ids"] is call["txt_ids"]
    assert len(merged["hidden_states"]) == 2 * rows


def test_lists_of_rows_share_whatever_their_lengths() -> None:
    one = {"x": [torch.zeros(16, 4)], "t": torch.zeros(1)}
    two = {"x": [torch.zeros(7, 4), torch.zeros(9, 4)], "t": torch.zeros(2)}
    wide = {"x": [torch.zeros(16, 5)], "t": torch.zeros(1)}
    assert key(one) == key(two)
    assert key(one) != key(wide)


# Edges


def test_edges_are_the_first_and_last_rows_of_what_is_concatenated() -> None:
    sample = torch.arange(6.0).reshape(3, 2)
    arguments = {
        "sample": sample,
        "timestep": torch.tensor(7),
        "txt_ids": torch.zeros(3, 3),
        "scale": torch.tensor(0.5),
        "name": "plain",
        "kwargs": {"ids": [sample + 10, None]},
    }
    found = {edge: row_at(arguments, edge).tolist() for edge in edges(arguments, 3)}
    assert found == {
        ("sample", 0): [0, 1],
        ("sample", -1): [4, 5],
        ("timestep", 0): 7,
        ("timestep", -1): 7,
        ("kwargs", "ids", 0, 0): [10, 11],
        ("kwargs", "ids", 0, -1): [14, 15],
    }


def test_edges_of_listed_rows_are_its_first_and_last_tensors() -> None:
    rows = [torch.zeros(2), torch.ones(3), torch.full((1,), 2.0)]
    arguments = {"x": rows, "t": torch.tensor([1, 2, 3])}
    found = {edge: row_at(arguments, edge) for edge in edges(arguments, 3)}
    assert found["x", 0] is rows[0]
    assert found["x", -1] is rows[2]
    assert (found["t", 0], found["t", -1]) == (1, 3)


# Merging


def test_rows_stand_in_the_order_of_the_calls() -> None:
    calls = [{"sample": rows_of(10 * i, n, 2)} for i, n in enumerate((2, 1, 3))]
    merged = merge(calls, [2, 1, 3])
    assert merged["sample"][:, 0].tolist() == [0, 1, 10, 20, 21, 22]


@pytest.mark.parametrize("name", ["timestep", "timesteps", "t", "sigma", "noise_level"])
def test_steps_become_one_number_a_row(name: str) -> None:
    calls = [
        {"sample": torch.zeros(2, 3), name: torch.tensor(5)},
        {"sample": torch.zeros(1, 3), name: torch.tensor([6])},
        {"sample": torch.zeros(2, 3), name: torch.tensor([7, 8])},
        {"sample": torch.zeros(3, 3), name: torch.tensor([9])},
    ]
    assert len({key(call) for call in calls}) == 1
    merged = merge(calls, [2, 1, 2, 3], pad_to=10)
    assert merged[name].tolist() == [5, 5, 6, 7, 8, 9, 9, 9, 9, 9]
    assert merged[name].dtype == torch.int64


@pytest.mark.parametrize(
    ("dtypes", "joined"),
    [
        ((torch.int64, torch.int64), torch.int64),
        ((torch.float16, torch.float16), torch.float16),
        ((torch.int64, torch.float32), torch.float32),
        ((torch.int64, torch.float16), torch.float32),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.int64, torch.float64), torch.float64),
    ],
)
def test_steps_of_two_dtypes_are_not_rounded(
    dtypes: tuple[torch.dtype, ...], joined: torch.dtype
) -> None:
    values = [torch.tensor(999, dtype=dtypes[0]), torch.tensor(0.3).to(dtypes[1])]
    calls = [{"sample": torch.zeros(1, 3), "timestep": value} for value in values]
    assert key(calls[0]) == key(calls[1])
    merged = merge(calls, [1, 1])["timestep"]
    assert merged.dtype == joined
    assert merged.double().tolist() == [value.double().item() for value in values]


def test_a_step_is_no_row_tensor_of_another_parameter() -> None:
    """Only parameters known to tell the step are expanded; any other 0-d tensor has to be equal."""
    call = {"sample": torch.zeros(2, 3), "strength": torch.tensor(0.5)}
    assert key(call) != key({**call, "strength": torch.tensor(0.6)})
    assert merge([call, call], [2, 2])["strength"] is call["strength"]


def test_a_step_for_each_token_is_a_row() -> None:
    calls = [{"hidden": rows_of(0, n, 4), "timestep": rows_of(9, n, 6)} for n in (1, 2)]
    assert key(calls[0]) == key(calls[1])
    assert merge(calls, [1, 2])["timestep"].shape == (3, 6)


def test_containers_are_rebuilt_as_they_were() -> None:
    def call(start: int, rows: int) -> dict[str, Any]:
        tensor = rows_of(start, rows, 2)
        return {
            "sample": tensor,
            "dict": {"a": tensor, "b": None},
            "ordered": OrderedDict(x=tensor),
            "list": [tensor, "text", 3],
            "tuple": (tensor, (tensor,)),
            "pair": Pair(tensor, 1.5),
            "plain": Plain(tensor, 2.0),
            "output": Output(sample=tensor, extra=None),
            "empty": ([], {}, ()),
        }

    calls = [call(0, 1), call(10, 2)]
    assert key(calls[0]) == key(calls[1])
    merged = merge(calls, [1, 2])
    expected = call(0, 1)
    joined = torch.cat([rows_of(0, 1, 2), rows_of(10, 2, 2)])

    def replaced(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return joined
        if isinstance(value, Output):
            return Output(sample=joined, extra=None)
        if isinstance(value, Plain):
            return Plain(joined, value.scale)
        if isinstance(value, Pair):
            return Pair(joined, value.right)
        if isinstance(value, Mapping):
            return type(value)((k, replaced(v)) for k, v in value.items())
        if isinstance(value, (list, tuple)):
            return type(value)(replaced(v) for v in value)
        return value

    assert same(merged, replaced(expected))


def test_a_call_by_wrapped_keywords_is_merged_by_their_names() -> None:
    calls = [
        {"args": (rows_of(0, n, 2),), "kwargs": {"timestep": torch.tensor(n), "txt_ids": ids}}
        for n, ids in ((1, torch.zeros(3)), (2, torch.zeros(3)))
    ]
    assert key(calls[0]) == key(calls[1])
    assert merge(calls, [1, 2])["kwargs"]["timestep"].tolist() == [1, 2, 2]


def test_inputs_are_neither_changed_nor_kept() -> None:
    tensor = rows_of(0, 4, 2).T.contiguous().T  # not contiguous
    assert not tensor.is_contiguous()
    merged = merge([{"sample": tensor}], [4], pad_to=6)["sample"]
    merged.zero_()
    assert tensor[:, 0].tolist() == [0, 1, 2, 3]


def test_padding_repeats_the_last_row() -> None:
    calls = [
        {"sample": rows_of(0, 2, 1), "nested": [rows_of(5, 2, 1)], "img_ids": torch.zeros(9)},
        {"sample": rows_of(7, 1, 1), "nested": [rows_of(8, 1, 1)], "img_ids": torch.zeros(9)},
    ]
    merged = merge(calls, [2, 1], pad_to=5)
    assert merged["sample"].flatten().tolist() == [0, 1, 7, 7, 7]
    assert merged["nested"][0].flatten().tolist() == [5, 6, 8, 8, 8]
    assert merged["img_ids"].shape == (9,)


def test_lists_of_rows_are_joined_padded_and_split() -> None:
    calls = [
        {"x": [torch.full((3,), 1.0)], "t": torch.tensor([1]), "cap": [torch.zeros(2)]},
        {
            "x": [torch.full((3,), 2.0), torch.full((4,), 3.0)],
            "t": torch.tensor([2, 3]),
            "cap": [torch.ones(5), torch.ones(6)],
        },
    ]
    merged = merge(calls, [1, 2], pad_to=4)
    assert [len(x) for x in merged["x"]] == [3, 3, 4, 4]
    assert [len(x) for x in merged["cap"]] == [2, 5, 6, 6]
    assert merged["t"].tolist() == [1, 2, 3, 3]
    pieces = split({"sample": merged["x"]}, [1, 2], total=4, listed=True)
    assert same(pieces, [{"sample": call["x"]} for call in calls])
    pieces[1]["sample"][0].zero_()
    assert calls[1]["x"][0].tolist() == [2.0] * 3


def test_a_bucket_smaller_than_the_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="pad_to=2 is less than the 3 rows"):
        merge([{"sample": torch.zeros(3, 1)}], [3], pad_to=2)


def test_calls_without_rows_merge_to_none() -> None:
    calls = [{"sample": torch.zeros(0, 4)}, {"sample": torch.zeros(2, 4)}]
    assert key(calls[0]) == key(calls[1])
    merged = merge(calls, [0, 2])
    assert merged["sample"].shape == (2, 4)
    assert [len(piece) for piece in split(merged["sample"], [0, 2])] == [0, 2]


# Splitting


def test_every_call_gets_its_rows_and_none_of_the_padding() -> None:
    output = rows_of(0, 8, 2)
    pieces = split(output, [2, 1, 3], total=8)
    assert [piece[:, 0].tolist() for piece in pieces] == [[0, 1], [2], [3, 4, 5]]


def test_pieces_own_their_memory() -> None:
    """A pipeline may change its result in place; neither neighbours nor the module may see it."""
    output = {"rows": rows_of(0, 3, 2), "whole": torch.zeros(5), "number": torch.tensor(1.0)}
    pieces = split(output, [1, 2])
    for piece in pieces:
        storage = piece["rows"].untyped_storage()
        assert storage.nbytes() == piece["rows"].nbytes
    pieces[0]["rows"].fill_(-1)
    pieces[0]["whole"].fill_(-1)
    pieces[0]["number"].fill_(-1)
    assert pieces[1]["rows"][:, 0].tolist() == [1, 2]
    assert pieces[1]["whole"].tolist() == [0] * 5
    assert pieces[1]["number"] == 1
    assert output["rows"][:, 0].tolist() == [0, 1, 2]


def test_outputs_are_rebuilt_as_they_were() -> None:
    def output(tensor: torch.Tensor) -> list[Any]:
        return [
            tensor,
            (tensor, None, 3),
            Pair(tensor, [tensor]),
            Plain(tensor, 0.5),
            Output(sample=tensor, extra=None),
            Hidden(last_hidden_state=tensor),
            Hidden(hidden_states=(tensor, tensor)),
            SimpleNamespace(sample=tensor, inner=SimpleNamespace(deep=tensor)),
            OrderedDict(sample=tensor),
            torch.return_types.sort((tensor, tensor)),
        ]

    pieces = split(output(rows_of(0, 3, 2)), [1, 2])
    assert same(pieces[0], output(rows_of(0, 1, 2)))
    assert same(pieces[1], output(rows_of(1, 2, 2)))


def test_what_a_model_output_holds_is_reached_in_every_way() -> None:
    pieces = split(Hidden(last_hidden_state=rows_of(0, 3, 2)), [1, 2])
    for piece, rows in zip(pieces, (1, 2), strict=True):
        assert len(piece.last_hidden_state) == len(piece["last_hidden_state"]) == rows
        assert len(piece[0]) == rows
        assert piece.hidden_states is None


def test_objects_are_split_by_what_they_hold() -> None:
    """A text model's key-value cache comes with its output; each request has its own rows of it."""
    cache = DynamicCache()
    cache.update(torch.ones(3, 2, 4, 8), torch.ones(3, 2, 4, 8), 0)
    whole, module = SimpleNamespace(cache=cache), torch.nn.Linear(3, 3)
    pieces = split({"past": whole, "module": module, "call": len}, [1, 2])
    for piece, rows in zip(pieces, (1, 2), strict=True):
        assert piece["past"].cache.layers[0].keys.shape == (rows, 2, 4, 8)
        assert piece["module"] is module
        assert piece["call"] is len
    pieces[0]["past"].cache.update(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8), 0)
    assert pieces[1]["past"].cache.get_seq_length() == cache.get_seq_length() == 4


def test_an_object_that_hides_what_it_holds_is_refused() -> None:
    with pytest.raises(TypeError, match="of type list_iterator cannot be split"):
        split((rows_of(0, 3), iter([rows_of(0, 3)])), [1, 2])


# merge and split are each other's inverse

shapes = st.lists(st.integers(0, 3), max_size=3)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64])
leaves = st.tuples(shapes, dtypes, st.booleans())
trees = st.recursive(
    st.one_of(leaves, st.none(), st.integers(), st.booleans(), st.text(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.builds(Pair, inner, inner),
        st.builds(lambda a, b: SimpleNamespace(a=a, b=b), inner, inner),
    ),
    max_leaves=6,
)


def grown(tree: Any, rows: int, generator: torch.Generator) -> Any:
    """`tree` with random tensors of `rows` rows where it has (shape, dtype, is contiguous)."""
    if isinstance(tree, tuple) and not isinstance(tree, Pair):
        shape, dtype, is_contiguous = tree
        values = torch.randint(0, 2, (rows, *shape), generator=generator).to(dtype)
        return values if is_contiguous else values.mT.contiguous().mT if values.ndim > 1 else values
    if isinstance(tree, Pair):
        return Pair(*(grown(member, rows, generator) for member in tree))
    if isinstance(tree, SimpleNamespace):
        return SimpleNamespace(**grown(vars(tree), rows, generator))
    if isinstance(tree, dict):
        return {name: grown(member, rows, generator) for name, member in tree.items()}
    if isinstance(tree, list):
        return [grown(member, rows, generator) for member in tree]
    return tree


def without_objects(tree: Any) -> Any:
    if isinstance(tree, SimpleNamespace):
        return without_objects(vars(tree))
    if isinstance(tree, Pair):
        return Pair(*map(without_objects, tree))
    if isinstance(tree, dict):
        return {name: without_objects(member) for name, member in tree.items()}
    return [without_objects(member) for member in tree] if isinstance(tree, list) else tree


@given(trees, st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 3))
def test_splitting_what_was_merged_gives_it_back(tree: Any, rows: list[int], padding: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tree = without_objects(tree)  # as arguments, objects are never opened
    calls = [{"sample": torch.zeros(n, 1), "argument": grown(tree, n, generator)} for n in rows]
    assert len({key(call) for call in calls}) == 1
    total = sum(rows) + padding
    merged = merge(calls, rows, pad_to=total)
    assert len(merged["sample"]) == total
    assert same(split(merged, rows, total=total), calls)


@given(trees, st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_splitting_an_output_gives_what_each_would_have_got(tree: Any, rows: list[int]) -> None:
    whole = grown(tree, sum(rows), torch.Generator().manual_seed(0))

    def narrowed(value: Any, start: int, n: int) -> Any:
        if isinstance(value, torch.Tensor):
            return value[start : start + n]
        if isinstance(value, Pair):
            return Pair(*(narrowed(member, start, n) for member in value))
        if isinstance(value, SimpleNamespace):
            return SimpleNamespace(**narrowed(vars(value), start, n))
        if isinstance(value, dict):
            return {name: narrowed(member, start, n) for name, member in value.items()}
        return (
            [narrowed(member, start, n) for member in value] if isinstance(value, list) else value
        )

    starts = [sum(rows[:i]) for i in range(len(rows))]
    expected = [narrowed(whole, start, n) for start, n in zip(starts, rows, strict=True)]
    assert same(split(whole, rows), expected)


@pytest.mark.parametrize("step", [torch.tensor(5), torch.tensor([5]), torch.tensor([5.0, 5.0])])
def test_steps_come_to_the_device_of_the_rows(step: torch.Tensor) -> None:
    """Schedulers may keep them on the CPU; meta stands for a device that is another one."""
    calls = [{"sample": torch.empty(2, 3, device="meta"), "timestep": step} for _ in range(2)]
    merged = merge(calls, [2, 2])
    assert merged["timestep"].device == torch.device("meta")
    assert merged["timestep"].shape == (4,)
