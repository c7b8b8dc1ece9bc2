"""Converts weights to another precision while they are copied.

Needs no torch, so that packing takes less than 200 MB of memory whatever it packs.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handler.errors import ArchiveError
from handler.loading.safetensors_map import DTYPE_BITS, Header, TensorInfo, read_header
from scripts.archive.copying import check_unchanged
from scripts.console import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["PRECISIONS", "ConvertedFile", "convert_header", "is_quantized"]

PRECISIONS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_FLOATS = {"F64", "F32", "BF16", "F16"}
_QUANTIZED = {"F8_E4M3", "F8_E5M2", "I8", "U8"}
_CHUNK_VALUES = 1 << 20


def is_quantized(header: Header) -> bool:
    """Say whether weights are of eight bits or fewer, which only their own library reads."""
    return any(info.dtype in _QUANTIZED for info in header.tensors.values())


def convert_header(header: Header, dtype: str) -> Header:
    """Return `header` with every tensor of floats in `dtype`, packed in the same order."""
    tensors: dict[str, TensorInfo] = {}
    at = 0
    for name, info in sorted(header.tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        kept = dtype if info.dtype in _FLOATS else info.dtype
        size_bytes = info.num_values * DTYPE_BITS[kept] // 8
        tensors[name] = TensorInfo(kept, info.shape, at, at + size_bytes)
        at += size_bytes
    return Header(tensors, header.metadata, 8 + len(_dump(tensors, header.metadata)))


def _dump(tensors: dict[str, TensorInfo], metadata: dict[str, str]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name, info in tensors.items():
        offsets = [info.start, info.end]
        fields[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


class ConvertedFile:
    """The safetensors file `path` as it would be in `dtype` (a safetensors name).

    Or one of `size_bytes` at `offset` of another file. `mtime_ns` is when that was last changed.
    """

    def __init__(
        self,
        path: Path,
        dtype: str,
        *,
        offset: int = 0,
        size_bytes: int | None = None,
        mtime_ns: int | None = None,
    ) -> None:
        self._path, self._offset, self._mtime_ns = path, offset, mtime_ns
        with path.open("rb") as file:
            size_bytes = path.stat().st_size if size_bytes is None else size_bytes
            self._before = read_header(file, size_bytes, str(path), offset)
        self.header = convert_header(self._before, dtype)
        last = max((info.end for info in self.header.tensors.values()), default=0)
        self.size_bytes = self.header.data_offset + last

    @property
    def is_changed(self) -> bool:
        """Whether any tensor is in another precision."""
        return any(
            info.dtype != self.header.tensors[name].dtype
            for name, info in self._before.tensors.items()
        )

    def chunks(self, progress: Progress) -> Iterator[bytes]:
        """Yield the bytes of the converted file.

        Raises: ArchiveError, where a value does not fit the narrower format, or the file changed.
        """
        head = _dump(self.header.tensors, self.header.metadata)
        yield struct.pack("<Q", len(head)) + head
        with self._path.open("rb") as file:
            for name, after in self.header.tensors.items():
                before = self._before.tensors[name]
                file.seek(self._offset + self._before.data_offset + before.start)
                yield from self._tensor(file, name, before, after.dtype, progress)
            check_unchanged(self._path, file.fileno(), self._mtime_ns)

    def _tensor(
        self, file: Any, name: str, before: TensorInfo, dtype: str, progress: Progress
    ) -> Iterator[bytes]:
        value_bytes = DTYPE_BITS[before.dtype] // 8
        left = before.end - before.start
        while left > 0:
            raw = file.read(min(left, _CHUNK_VALUES * value_bytes))
            if not raw:
                raise ArchiveError(f"{self._path} changed while it was packed")
            left -= len(raw)
            progress(len(raw))
            if before.dtype == dtype:
                yield raw
                continue
            converted, has_overflow = _convert(raw, before.dtype, dtype)
            if has_overflow:
                raise ArchiveError(
                    f"{self._path}: {name} has values beyond the range of {dtype}; "
                    "pack it as bfloat16, or leave its precision as it is"
                )
            yield converted


def _convert(raw: bytes, before: str, after: str) -> tuple[bytes, bool]:
    """Convert values; say also whether a finite one became infinite."""
    import numpy as np

    wide: NDArray[Any]
    if before == "BF16":
        wide = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    else:
        names = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
        wide = np.frombuffer(raw, names[before])
    with np.errstate(over="ignore"):
        single = wide.astype("<f4")
        narrow = single if after == "F32" else None
        if after == "F16":
            narrow = single.astype("<f2")
    if narrow is not None:
        has_overflow = bool((np.isinf(narrow) & ~np.isinf(wide)).any())
        return narrow.tobytes(), has_overflow
    bits = _round_to_bf16(single)
    has_overflow = bool((((bits & 0x7FFF) == 0x7F80) & ~np.isinf(wide)).any())
    return bits.tobytes(), has_overflow


def _round_to_bf16(single: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to the nearest bfloat16, ties to even, as torch does; a NaN stays one."""
    import numpy as np

    bits = single.view("<u4")
    rounded = (bits.astype("<u8") + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(single), 0x7FC0, rounded).astype("<u2")
