"""Takes CRC-32s and puts that of a whole together from those of its parts.

`crc32` is `zlib.crc32` by Intel's ISA-L: 28 to 60 GB/s of one core where zlib has 6.6 GB/s, with
which checking 2.6 GB took 0.4 s of the second that opening them took.
"""

from __future__ import annotations

from functools import cache

from isal.isal_zlib import crc32

__all__ = ["combine_crc32", "crc32"]

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31  # bits are reflected: the highest bit is x^0


def combine_crc32(first: int, second: int, second_bytes: int) -> int:
    """Return the CRC-32 of two byte strings in a row, from theirs and the second's length.

    Appending n zero bytes multiplies the first CRC by x^(8n) modulo the CRC's polynomial.
    Source: M. Adler's crc32_combine in zlib 1.2.13.
    """
    return _multiply(_x_to(8 * second_bytes), first) ^ second


def _multiply(a: int, b: int) -> int:
    """Multiply two polynomials over GF(2), modulo the CRC's."""
    product = 0
    for shift in range(31, -1, -1):
        if a >> shift & 1:
            product ^= b
        b = b >> 1 ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


@cache
def _x_to(exponent: int) -> int:
    result, square = _ONE, _ONE >> 1
    while exponent:
        if exponent & 1:
            result = _multiply(result, square)
        square = _multiply(square, square)
        exponent >>= 1
    return result
