"""scripts.archive.precision: the same numbers as torch's own conversion, in one pass."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save_file

from handler.errors import ArchiveError
from scripts.archive.precision import PRECISIONS, ConvertedFile, _convert

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


def _bytes(path: Path, dtype: str) -> bytes:
    return b"".join(ConvertedFile(path, dtype).chunks(lambda count: None))


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_rounds_every_bit_pattern_as_torch_does(patterns: list[int]) -> None:
    raw = struct.pack(f"<{len(patterns)}L", *patterns)
    single = torch.frombuffer(bytearray(raw), dtype=torch.float32)
    for name in ("F16", "BF16"):
        found, has_overflow = _convert(raw, "F32", name)
        expected = single.to(DTYPES[name])
        values = torch.frombuffer(bytearray(found), dtype=DTYPES[name])
        assert torch.equal(values.nan_to_num(nan=0.5), expected.nan_to_num(nan=0.5))
        assert torch.equal(values.isnan(), single.isnan())
        assert has_overflow == bool((expected.isinf() & ~single.isinf()).any())


@pytest.mark.parametrize("before", DTYPES)
@pytest.mark.parametrize("after", PRECISIONS.values())
def test_a_file_as_torch_would_save_it(tmp_path: Path, before: str, after: str) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "weight": torch.randn(300, 7, generator=generator).to(DTYPES[before]),
        "scalar": torch.tensor(0.1).to(DTYPES[before]),
        "ids": torch.arange(9),
        "none": torch.empty(0).to(DTYPES[before]),
    }
    save_file(tensors, tmp_path / "file", metadata={"format": "pt"})
    converted = ConvertedFile(tmp_path / "file", after)
    data = b"".join(converted.chunks(lambda count: None))
    assert len(data) == converted.size_bytes
    assert converted.is_changed == (before != after)
    found = load(data)
    for name, tensor in tensors.items():
        expected = tensor.to(DTYPES[after]) if tensor.is_floating_point() else tensor
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected)


def test_a_tensor_of_several_chunks(tmp_path: Path) -> None:
    weight = torch.randn(3, 1 << 20, generator=torch.Generator().manual_seed(0))
    save_file({"weight": weight}, tmp_path / "file")
    assert torch.equal(load(_bytes(tmp_path / "file", "F16"))["weight"], weight.half())


def test_values_beyond_the_range_are_named(tmp_path: Path) -> None:
    save_file({"large": torch.tensor([1.0, 70000.0])}, tmp_path / "file")
    with pytest.raises(ArchiveError, match="large has values beyond the range of F16"):
        _bytes(tmp_path / "file", "F16")


def test_infinities_of_the_source_stay(tmp_path: Path) -> None:
    values = torch.tensor([float("inf"), -float("inf"), float("nan")])
    save_file({"mask": values}, tmp_path / "file")
    found = load(_bytes(tmp_path / "file", "F16"))["mask"]
    assert torch.equal(found.nan_to_num(nan=5), values.half().nan_to_num(nan=5))


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    save_file({"b": torch.ones(3), "a": torch.ones(2)}, tmp_path / "file", metadata={"z": "1"})
    assert _bytes(tmp_path / "file", "F16") == _bytes(tmp_path / "file", "F16")


def test_a_file_that_was_changed_since_it_was_listed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "file")
    mtime_ns = (tmp_path / "file").stat().st_mtime_ns
    converted = ConvertedFile(tmp_path / "file", "F16", mtime_ns=mtime_ns)
    assert b"".join(converted.chunks(lambda count: None))
    os.utime(tmp_path / "file", ns=(mtime_ns + 1, mtime_ns + 1))
    with pytest.raises(ArchiveError, match="file changed while it was packed"):
        b"".join(converted.chunks(lambda count: None))


def test_a_file_within_another(tmp_path: Path) -> None:
    save_file({"a": torch.arange(5.0)}, tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    (tmp_path / "zip").write_bytes(b"before" + data + b"behind")
    converted = ConvertedFile(tmp_path / "zip", "F16", offset=6, size_bytes=len(data))
    assert b"".join(converted.chunks(lambda count: None)) == _bytes(tmp_path / "file", "F16")
