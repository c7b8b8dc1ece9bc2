"""handler.garbage: what is loaded is left out of collections, and what comes then is not."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import gc
from handler.garbage import leave_out_what_is_loaded

loaded = [[] for _ in range(1_000_000)]
leave_out_what_is_loaded()
gc.set_threshold(700, 10, 10)
assert gc.get_freeze_count() > 1_000_000
before = gc.get_stats()[2]["collections"]
new = [[] for _ in range(100_000)]
print(gc.get_stats()[2]["collections"] - before)
"""


def test_full_collections_do_not_wait_for_a_quarter_of_what_was_loaded() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, check=True)
    assert int(run.stdout) > 0
