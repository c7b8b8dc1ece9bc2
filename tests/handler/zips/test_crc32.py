"""handler.zips.crc32: its checksums are zlib's."""

from __future__ import annotations

import zlib

from hypothesis import given
from hypothesis import strategies as st

from handler.zips.crc32 import combine_crc32, crc32

_DATA = st.binary(max_size=300)


@given(_DATA, st.integers(0, 2**32 - 1))
def test_a_checksum_is_zlibs_from_any_start(data: bytes, start: int) -> None:
    assert crc32(data, start) == zlib.crc32(data, start)


def test_large_buffers_have_zlibs_checksum() -> None:
    """Vector code begins at some length, and has a rest at some others."""
    data = memoryview(bytes(range(256)) * 1024)
    for length in (1 << 16, (1 << 16) + 1, (1 << 18) - 3, 1 << 18):
        assert crc32(data[:length]) == zlib.crc32(data[:length])
        assert crc32(data[1:length]) == zlib.crc32(data[1:length])


@given(_DATA, _DATA)
def test_combined_checksums_are_those_of_both_in_a_row(first: bytes, second: bytes) -> None:
    combined = combine_crc32(zlib.crc32(first), zlib.crc32(second), len(second))
    assert combined == zlib.crc32(first + second)
