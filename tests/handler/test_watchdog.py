"""The alarm, in processes of its own: pytest-timeout uses the same signal in this one."""

from __future__ import annotations

import signal
import subprocess
import sys

from handler.watchdog import SilenceAlarm

# Waits as a worker does, in recv; a socket's timeout says that nothing rang.
_WAITING = """
import socket, threading
from handler.silence import SilenceAlarm
ours, theirs = socket.socketpair()
ours.settimeout(30)
def ring():
    assert threading.current_thread() is threading.main_thread()
    print("rang", flush=True)
    theirs.send(b"!")
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _WAITING + code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_rings_in_the_thread_that_waits() -> None:
    assert run("SilenceAlarm(ring, 0.05).set(); ours.recv(1)") == "rang\n"


def test_it_rings_once_and_may_be_set_again() -> None:
    code = "alarm = SilenceAlarm(ring, 0.05)\nfor _ in range(2): alarm.set(); ours.recv(1)"
    assert run(code) == "rang\nrang\n"


def test_it_does_not_ring_when_cleared_or_never_set() -> None:
    code = """
alarm = SilenceAlarm(ring, 0.05)
alarm.set()
alarm.clear()
ours.settimeout(0.3)
try:
    ours.recv(1)
except TimeoutError:
    print("silent")
"""
    assert run(code) == "silent\n"


def test_setting_it_again_begins_anew() -> None:
    code = """
import time
alarm = SilenceAlarm(ring, 0.3)
started_s = time.monotonic()
alarm.set()
while time.monotonic() - started_s < 0.9:
    alarm.set()
print("begins")
ours.recv(1)
"""
    assert run(code) == "begins\nrang\n"


def test_another_threads_alarm_is_silent() -> None:
    code = """
def start():
    global alarm
    alarm = SilenceAlarm(ring, 0.05)
thread = threading.Thread(target=start)
thread.start()
thread.join()
alarm.set()
ours.settimeout(0.3)
try:
    ours.recv(1)
except TimeoutError:
    print("silent")
"""
    assert run(code) == "silent\n"


def test_whoever_uses_alarms_already_keeps_them() -> None:
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        theirs = signal.getsignal(signal.SIGALRM)
        alarm = SilenceAlarm(lambda: None, 0.01)
        alarm.set()
        alarm.clear()
        assert signal.getsignal(signal.SIGALRM) is theirs
    finally:
        signal.signal(signal.SIGALRM, before)
