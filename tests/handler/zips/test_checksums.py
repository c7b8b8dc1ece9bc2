"""isal's CRC-32, on which reading and writing zips rest, is zlib's: of any bytes and any length."""

from __future__ import annotations

import zlib

from hypothesis import given
from hypothesis import strategies as st
from isal.isal_zlib import crc32, crc32_combine

_DATA = st.binary(max_size=300)


@given(_DATA, st.integers(0, 2**32 - 1))
def test_checksums_are_zlibs_from_any_start(data: bytes, start: int) -> None:
    assert crc32(data, start) == zlib.crc32(data, start)


def test_large_buffers_have_zlibs_checksum() -> None:
    """Vector code begins at some length, and has a rest at some others."""
    data = memoryview(bytes(range(256)) * 1024)
    for length in (1 << 16, (1 << 16) + 1, (1 << 18) - 3, 1 << 18):
        assert crc32(data[:length]) == zlib.crc32(data[:length])
        assert crc32(data[1:length]) == zlib.crc32(data[1:length])


@given(_DATA, _DATA)
def test_combined_checksums_are_those_of_both_in_a_row(first: bytes, second: bytes) -> None:
    combined = crc32_combine(zlib.crc32(first), zlib.crc32(second), len(second))
    assert combined == zlib.crc32(first + second)


@given(
    first=st.integers(0, 2**32 - 1),
    second=st.integers(0, 2**32 - 1),
    num_bytes=st.one_of(st.integers(0, 2**40), st.sampled_from([2**31, 2**32, 2**32 + 1, 2**40])),
)
def test_lengths_beyond_memory_are_combined_too(first: int, second: int, num_bytes: int) -> None:
    """Appending n zero bytes multiplies a CRC by x^(8n) modulo the CRC's polynomial."""
    assert crc32_combine(first, second, num_bytes) == _times_x_to(8 * num_bytes, first) ^ second


def _times_x_to(exponent: int, polynomial: int) -> int:
    """Multiply over GF(2) modulo the CRC's polynomial; the highest bit is x^0."""
    square = 1 << 30
    while exponent:
        if exponent & 1:
            polynomial = _product(polynomial, square)
        square = _product(square, square)
        exponent >>= 1
    return polynomial


def _product(a: int, b: int) -> int:
    product = 0
    for shift in range(31, -1, -1):
        if a >> shift & 1:
            product ^= b
        b = b >> 1 ^ 0xEDB88320 if b & 1 else b >> 1
    return product
