"""Maps the tensors of safetensors files, wherever in a file they are.

Our own because the safetensors library opens whole files only, not weights inside an archive. The
header is checked before a byte of data is touched: what it claims must be exactly what is there.
Imports torch only where tensors are made, so that scripts read headers cheaply.
Source: the format's description in safetensors 0.8.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, BinaryIO

from handler.errors import ArchiveError
from handler.loading.documents import parse_json

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from handler.loading.model_dir import Extent

__all__ = [
    "DTYPE_BITS",
    "Header",
    "TensorInfo",
    "map_tensors",
    "parse_header",
    "read_header",
    "read_tensors",
]

MAX_HEADER_BYTES = 100_000_000
DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
}
_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: its dtype by its safetensors name, and where its bytes are in the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_values(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header; `data_offset` is where the data begins, counted from the file's start."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_offset: int

    @property
    def num_parameters(self) -> int:
        """How many numbers all tensors hold together."""
        return sum(info.num_values for info in self.tensors.values())


def read_header(file: BinaryIO, size_bytes: int, label: str, offset: int = 0) -> Header:
    """Read and check the header of the safetensors file of `size_bytes` at `offset` of `file`.

    Raises: ArchiveError, where it is damaged or claims what is not there.
    """

    def head(num_bytes: int) -> bytes:
        file.seek(offset)
        return file.read(num_bytes)

    return parse_header(head, size_bytes, label)


def parse_header(head: Callable[[int], bytes], size_bytes: int, label: str) -> Header:
    """Check the header of a safetensors file, of which `head` gives the first bytes.

    Raises: ArchiveError, where it is damaged or claims what is not there.
    """
    start = head(8) if size_bytes >= 8 else b""
    if len(start) < 8:
        raise ArchiveError(f"{label}: too short for a safetensors file")
    length = struct.unpack("<Q", start)[0]
    if length > min(MAX_HEADER_BYTES, size_bytes - 8):
        raise ArchiveError(f"{label}: claims a header of {length} bytes in {size_bytes}")
    text = head(8 + length)[8:]
    pairs = parse_json(text, f"{label}: its safetensors header", is_strict=True)
    try:
        if not isinstance(pairs, dict):
            raise ValueError("it is not a JSON object")
        metadata = _metadata(pairs.pop("__metadata__", None))
        tensors = {str(name): _tensor(name, value) for name, value in pairs.items()}
        _check_cover(tensors, size_bytes - 8 - length)
    except ValueError as error:
        raise ArchiveError(f"{label}: its safetensors header is refused: {error}") from error
    return Header(tensors, metadata, 8 + length)


def _metadata(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("__metadata__ is not text by name")
    return value


def _tensor(name: str, value: object) -> TensorInfo:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} lacks the keys dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"{name} has the unknown dtype {dtype!r}")
    if not _is_counts(shape) or len(shape) > 64 or not _is_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has a shape or offsets that are not counts")
    info = TensorInfo(dtype, tuple(shape), *offsets)
    if info.num_values * DTYPE_BITS[dtype] != (info.end - info.start) * 8:
        raise ValueError(f"{name}: {dtype} {shape} does not fill the bytes {offsets}")
    return info


def _is_counts(value: object) -> bool:
    return isinstance(value, list) and all(
        type(each) is int and 0 <= each < 2**63 for each in value
    )


def _check_cover(tensors: dict[str, TensorInfo], data_bytes: int) -> None:
    """Every byte of the data must belong to exactly one tensor."""
    at = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != at:
            raise ValueError(f"{name} begins at {info.start}, where {at} is next")
        at = info.end
    if at != data_bytes:
        raise ValueError(f"its tensors take {at} bytes of {data_bytes}")


def map_tensors(extent: Extent, label: str) -> dict[str, torch.Tensor]:
    """Map the weights at `extent` into tensors without copying them.

    The mapping is private: a write to a tensor copies its page and never reaches the file.
    Tensors keep it alive. Raises: ArchiveError.
    """
    page_start = extent.offset - extent.offset % mmap.ALLOCATIONGRANULARITY
    with extent.path.open("rb") as file:
        header = read_header(file, extent.size_bytes, label, extent.offset)
        skipped = extent.offset - page_start
        mapped = mmap.mmap(
            file.fileno(),
            skipped + extent.size_bytes,
            access=mmap.ACCESS_COPY,
            offset=page_start,
        )
    return _tensors_in(mapped, skipped + header.data_offset, header)


def read_tensors(path: Path, label: str) -> dict[str, torch.Tensor]:
    """Read the weights of a file whole; what becomes of it then is nothing to the tensors.

    Raises: ArchiveError, OSError.
    """
    with path.open("rb") as file:
        content = bytearray(os.fstat(file.fileno()).st_size)
        header = read_header(file, len(content), label)
        file.seek(0)
        if file.readinto(content) != len(content):
            raise ArchiveError(f"{label} has become shorter while it was read")
    return _tensors_in(content, header.data_offset, header)


def _tensors_in(
    source: mmap.mmap | bytearray, data_offset: int, header: Header
) -> dict[str, torch.Tensor]:
    """The tensors of `header`, their data from `data_offset` on; they keep `source` alive."""
    import torch

    tensors = {}
    for name, info in header.tensors.items():
        dtype = getattr(torch, _TORCH_NAMES[info.dtype])
        if info.num_values == 0:
            tensors[name] = torch.empty(info.shape, dtype=dtype)
            continue
        offset, own = data_offset + info.start, source
        if offset % dtype.itemsize:
            own, offset = bytearray(source[offset : offset + info.end - info.start]), 0
        flat = torch.frombuffer(own, dtype=dtype, count=info.num_values, offset=offset)
        tensors[name] = flat.reshape(info.shape)
    return tensors
