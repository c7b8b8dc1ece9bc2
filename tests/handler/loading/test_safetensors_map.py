"""handler.loading.safetensors_map: headers that lie are refused, tensors are what was saved."""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize, safe_open
from safetensors.torch import save, save_file

from handler.errors import ArchiveError
from handler.loading.model_dir import Extent
from handler.loading.safetensors_map import (
    DTYPE_BITS,
    map_tensors,
    parse_header,
    read_header,
    read_tensors,
)

TENSORS = {
    "matrix": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "half": torch.ones(5, dtype=torch.float16),
    "brain": torch.ones(2, 2, dtype=torch.bfloat16),
    "flag": torch.tensor([True, False]),
    "count": torch.tensor(7),
    "none": torch.empty(0, 3),
}


def _file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _refusal(data: bytes) -> str:
    with pytest.raises(ArchiveError) as caught:
        read_header(io.BytesIO(data), len(data), "test.safetensors")
    return str(caught.value)


@pytest.mark.parametrize("offset", [0, 1, 64, 5000])
def test_maps_what_was_saved(tmp_path: Path, offset: int) -> None:
    data = save(TENSORS, metadata={"format": "pt"})
    path = tmp_path / "file"
    path.write_bytes(bytes(offset) + data + b"tail")
    found = map_tensors(Extent(path, offset, len(data)), "file")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def test_what_was_read_does_not_change_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    expected = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1, dtype=torch.int8)}
    save_file(expected, path)
    tensors = read_tensors(path, "weights")
    path.write_bytes(b"")  # as `cp` begins; whoever had mapped it would end by SIGBUS
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    with pytest.raises(ArchiveError):
        read_tensors(path, "weights")


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file({"weight": torch.zeros(1000)}, path)
    before = path.read_bytes()
    found = map_tensors(Extent(path, 0, len(before)), "file")
    found["weight"].fill_(1)
    assert found["weight"].sum() == 1000
    assert path.read_bytes() == before


def test_mapping_copies_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file({"weight": torch.zeros(8_000_000)}, path)
    tracemalloc.start()
    found = map_tensors(Extent(path, 0, path.stat().st_size), "file")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    address = found["weight"].data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        if first <= address < last:
            assert line.endswith(str(path))
            return
    raise AssertionError("the tensor lies in no mapping")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "too short"),
        (b"1234567", "too short"),
        (struct.pack("<Q", 1 << 60), "claims a header of"),
        (struct.pack("<Q", 100) + b"{}", "claims a header of 100"),
        (_file(b"{"), "is not JSON"),
        (_file(b"\xff\xfe"), "is not JSON"),
        (_file("{}".encode("utf-16")), "is not JSON"),
        (_file(b"[" * 100_000), "is not JSON"),
        (_file([]), "it is not a JSON object"),
        (_file({"__metadata__": {"a": 1}}), "__metadata__ is not text"),
        (_file(b'{"a": 1, "a": 2}'), "listed twice"),
        (_file({"a": {"dtype": "U8"}}), "lacks the keys"),
        (_file({"a": {**_entry(), "more": 1}}, bytes(4)), "lacks the keys"),
        (_file({"a": _entry(dtype="I128")}, bytes(4)), "unknown dtype 'I128'"),
        (_file({"a": _entry(dtype=["U8"])}, bytes(4)), "unknown dtype"),
        (_file({"a": _entry(shape=[-4])}, bytes(4)), "not counts"),
        (_file({"a": _entry(shape=[True])}, bytes(4)), "not counts"),
        (_file({"a": _entry(shape=[4.0])}, bytes(4)), "not counts"),
        (_file({"a": _entry(shape="4")}, bytes(4)), "not counts"),
        (_file({"a": _entry(offsets=[0])}, bytes(4)), "not counts"),
        (_file({"a": _entry(shape=[1] * 65, offsets=[0, 1])}, bytes(1)), "not counts"),
        (_file({"a": _entry(shape=[5])}, bytes(4)), "does not fill"),
        (_file({"a": _entry(shape=[2**62, 2**62])}, bytes(4)), "does not fill"),
        (_file({"a": _entry(offsets=[4, 0])}, bytes(4)), "does not fill"),
        (_file({"a": _entry(), "b": _entry()}, bytes(4)), "b begins at 0, where 4 is next"),
        (_file({"a": _entry(), "b": _entry(offsets=[5, 9])}, bytes(9)), "where 4 is next"),
        (_file({"a": _entry()}, bytes(3)), "take 4 bytes of 3"),
        (_file({"a": _entry()}, bytes(5)), "take 4 bytes of 5"),
    ],
)
def test_refuses_headers_that_lie(data: bytes, words: str) -> None:
    message = _refusal(data)
    assert words in message
    assert message.startswith("test.safetensors: ")


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_covered(data: bytes) -> None:
    try:
        header = parse_header(lambda count: data[:count], len(data), "fuzz")
    except ArchiveError:
        return
    covered = sum(info.end - info.start for info in header.tensors.values())
    assert header.data_offset + covered == len(data)


_NUMBERS = st.one_of(st.integers(-2, 40), st.sampled_from([2**31, 2**63, 2**64, 1.5, None, "1"]))


@given(
    st.dictionaries(
        st.text(max_size=3),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from([*DTYPE_BITS, "?", None]),
                "shape": st.lists(_NUMBERS, max_size=3),
                "data_offsets": st.lists(_NUMBERS, min_size=2, max_size=2),
            }
        ),
        max_size=3,
    ),
    st.integers(0, 60),
)
def test_any_header_is_refused_or_true(entries: dict[str, Any], size: int) -> None:
    """What we accept, safetensors' own reader accepts: there is nothing to disagree about."""
    data = _file(entries, bytes(size))
    try:
        header = read_header(io.BytesIO(data), len(data), "fuzz")
    except ArchiveError:
        return
    for info in header.tensors.values():
        assert 0 <= info.start <= info.end <= size
        assert info.num_values * DTYPE_BITS[info.dtype] == (info.end - info.start) * 8
    assert {name for name, _ in deserialize(data)} == header.tensors.keys()


def test_agrees_with_the_library(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "file", metadata={"b": "2", "a": "1"})
    with (tmp_path / "file").open("rb") as file:
        header = read_header(file, (tmp_path / "file").stat().st_size, "file")
    with safe_open(tmp_path / "file", "pt") as theirs:
        assert header.metadata == theirs.metadata()
        assert set(header.tensors) == set(theirs.keys())
        for name, info in header.tensors.items():
            assert list(info.shape) == theirs.get_slice(name).get_shape()
            assert info.dtype == theirs.get_slice(name).get_dtype()
    assert header.num_parameters == sum(tensor.numel() for tensor in TENSORS.values())
