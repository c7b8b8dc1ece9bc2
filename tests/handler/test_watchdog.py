"""The watchdog, in processes of its own: pytest-timeout uses the same signal in this one."""

from __future__ import annotations

import signal
import subprocess
import sys

from handler.watchdog import Watchdog

# Waits as a worker does, in recv; a socket's timeout says that the watchdog did not run out.
_WAITING = """
import socket, threading
from handler.watchdog import Watchdog
ours, theirs = socket.socketpair()
ours.settimeout(30)
def on_timeout():
    assert threading.current_thread() is threading.main_thread()
    print("timeout", flush=True)
    theirs.send(b"!")
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _WAITING + code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_its_timeout_is_called_in_the_thread_that_waits() -> None:
    assert run("Watchdog(on_timeout, 0.05).start(); ours.recv(1)") == "timeout\n"


def test_it_times_out_once_and_may_be_started_again() -> None:
    code = "dog = Watchdog(on_timeout, 0.05)\nfor _ in range(2): dog.start(); ours.recv(1)"
    assert run(code) == "timeout\ntimeout\n"


def test_it_does_not_time_out_when_stopped_or_never_started() -> None:
    code = """
dog = Watchdog(on_timeout, 0.05)
dog.start()
dog.stop()
ours.settimeout(0.3)
try:
    ours.recv(1)
except TimeoutError:
    print("silent")
"""
    assert run(code) == "silent\n"


def test_starting_it_again_begins_anew() -> None:
    code = """
import time
dog = Watchdog(on_timeout, 0.3)
started_s = time.monotonic()
dog.start()
while time.monotonic() - started_s < 0.9:
    dog.start()
print("begins")
ours.recv(1)
"""
    assert run(code) == "begins\ntimeout\n"


def test_it_does_nothing_in_another_thread() -> None:
    code = """
def make():
    global dog
    dog = Watchdog(on_timeout, 0.05)
thread = threading.Thread(target=make)
thread.start()
thread.join()
dog.start()
ours.settimeout(0.3)
try:
    ours.recv(1)
except TimeoutError:
    print("silent")
"""
    assert run(code) == "silent\n"


def test_whoever_uses_its_signal_already_keeps_it() -> None:
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        theirs = signal.getsignal(signal.SIGALRM)
        watchdog = Watchdog(lambda: None, 0.01)
        watchdog.start()
        watchdog.stop()
        assert signal.getsignal(signal.SIGALRM) is theirs
    finally:
        signal.signal(signal.SIGALRM, before)
