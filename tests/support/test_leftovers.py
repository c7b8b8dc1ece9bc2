"""What a killed process of the tests has started ends with it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

from tests.support.leftovers import is_alive

WAIT_S = 60.0
STARTER = """
import os, signal, subprocess, sys
from tests.support.leftovers import MARK, end_with_this_process

def start(**environment):
    sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
    return subprocess.Popen(
        sleeping, env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    )

end_with_this_process()
others = start(**{name: value for name, value in os.environ.items() if name != MARK})
mine, suspended = start(**os.environ), start(**os.environ)
suspended.send_signal(signal.SIGSTOP)
print(mine.pid, suspended.pid, others.pid, flush=True)
{end}
"""


@pytest.fixture
def processes(request: pytest.FixtureRequest) -> Iterator[list[psutil.Process]]:
    """Two that a process started which ended as the parameter says, and one of somebody else."""
    with subprocess.Popen(
        [sys.executable, "-c", STARTER.replace("{end}", request.param)], stdout=subprocess.PIPE
    ) as starter:
        assert starter.stdout is not None
        found = [psutil.Process(int(pid)) for pid in starter.stdout.readline().split()]
        starter.kill()
    yield found
    for process in found:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.parametrize("processes", ["import time; time.sleep(600)", "sys.exit()"], indirect=True)
def test_what_a_process_started_ends_with_it(processes: list[psutil.Process]) -> None:
    *mine, other = processes
    until_s = time.monotonic() + WAIT_S
    while any(map(is_alive, mine)):
        assert time.monotonic() < until_s
        time.sleep(0.1)
    assert is_alive(other)
