"""The records of the zip format, for reader and writer alike.

Reading and writing are our own because the standard library's `zipfile` does neither as needed:
it takes for one archive what other readers take for another, and it cannot align members, write
several at once, or nest a zip without holding it. Source: PKWARE APPNOTE 6.3.10.
"""

from __future__ import annotations

import struct

__all__ = [
    "CENTRAL",
    "CENTRAL_SIGNATURE",
    "DESCRIPTOR_SIGNATURE",
    "END",
    "END64",
    "END64_LOCATOR",
    "END64_LOCATOR_SIGNATURE",
    "END64_SIGNATURE",
    "END_SIGNATURE",
    "FLAG_DESCRIPTOR",
    "FLAG_ENCRYPTED",
    "FLAG_UTF8",
    "IN_ZIP64",
    "LOCAL",
    "LOCAL_SIGNATURE",
    "UNIX",
    "ZIP64_EXTRA",
]

LOCAL = struct.Struct("<4s5H3L2H")
CENTRAL = struct.Struct("<4s6H3L5H2L")
END = struct.Struct("<4s4H2LH")
END64 = struct.Struct("<4sQ2H2L4Q")
END64_LOCATOR = struct.Struct("<4sLQL")

LOCAL_SIGNATURE = b"PK\3\4"
CENTRAL_SIGNATURE = b"PK\1\2"
END_SIGNATURE = b"PK\5\6"
END64_SIGNATURE = b"PK\6\6"
END64_LOCATOR_SIGNATURE = b"PK\6\7"
DESCRIPTOR_SIGNATURE = b"PK\7\10"

FLAG_ENCRYPTED = 0x1 | 0x40 | 0x2000
FLAG_DESCRIPTOR = 0x8
FLAG_UTF8 = 0x800
UNIX = 3  # the system that a member's attributes are of
ZIP64_EXTRA = 1
IN_ZIP64 = 0xFFFFFFFF  # instead of a size or an offset that needs 64 bits
