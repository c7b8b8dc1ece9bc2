"""A drain: before a server stops it takes no new requests and finishes those that it has.

Whoever is about to stop the server writes a file, and the worker looks for it in every cycle. They
need no more than that: while nothing is in flight no cycle comes, and the next request starts one.
How many requests are left is asked like any other request, by cancelling the drain's own id, so
that the answer comes after all replies before it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from handler.api.replies import Reply

__all__ = ["DRAIN_FILE_VARIABLE", "Drain", "num_live_in", "num_live_reply"]

DRAIN_FILE_VARIABLE = "DIFFUSERS_DRAIN_FILE"
"""The environment variable that tells a worker where to look for the file."""
# Whoever asked for the drain would have stopped the server long since.
_ABANDONED_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class Drain:
    """Take no new requests, and end at `until_s` those that are still live.

    `until_s` is of ``time.monotonic``, which all processes of a machine share. To cancel `inquiry`
    is to ask how many requests are live.
    """

    until_s: float
    inquiry: str

    @classmethod
    def read(cls, path: Path, now_s: float) -> Drain | None:
        """Return the drain that `path` asks for, None where there is none or nobody waits for it.

        What is not a drain is none: the file is private and is only ever replaced as a whole.
        """
        try:
            drain = cls(**json.loads(path.read_bytes()))
            return None if now_s > drain.until_s + _ABANDONED_AFTER_S else drain
        except (OSError, ValueError, TypeError):
            return None

    def write(self, path: Path) -> None:
        """Ask for this drain, in place of an earlier one."""
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(asdict(self)))
        part.replace(path)


def num_live_reply(num_live: int) -> Reply:
    """Return the answer to a drain's inquiry."""
    return Reply(200, "OK", "application/json", json.dumps({"live": num_live}).encode("ascii"))


def num_live_in(body: bytes) -> int | None:
    """Return the number in such an answer; None when `body` is another reply."""
    try:
        num_live = json.loads(body)["live"]
    except (ValueError, KeyError, TypeError):
        return None
    return num_live if isinstance(num_live, int) else None
