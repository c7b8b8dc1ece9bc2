from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from scripts.interrupts import signals_as_interrupts, signals_held
from scripts.repository import REPOSITORY
from tests.support.signals import default_signals

BLOCK = """
import sys, time
from scripts.interrupts import signals_as_interrupts
try:
    with signals_as_interrupts():
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            time.sleep(0.5)
            print("closed", flush=True)
except KeyboardInterrupt:
    sys.exit(7)
"""
HELD = """
import os, signal, sys
from scripts.interrupts import signals_as_interrupts, signals_held
try:
    with signals_as_interrupts():
        with signals_held():
            os.kill(os.getpid(), signal.SIGTERM)
            print("whole", flush=True)
        print("too late", flush=True)
except KeyboardInterrupt:
    sys.exit(7)
"""


def child(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_closes_what_is_open_even_if_it_comes_twice(number: signal.Signals) -> None:
    process = child(BLOCK)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    try:
        process.wait(0.2)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    rest, _ = process.communicate(timeout=30)
    assert (rest, process.returncode) == ("closed\n", 7)


def test_a_signal_that_is_held_comes_after_the_block() -> None:
    process = child(HELD)
    said, _ = process.communicate(timeout=30)
    assert (said, process.returncode) == ("whole\n", 7)


@pytest.mark.parametrize("guard", [signals_as_interrupts, signals_held])
def test_handlers_are_as_they_were_afterwards(
    guard: Callable[[], AbstractContextManager[None]],
) -> None:
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with guard():
        pass
    assert [signal.getsignal(number) for number in numbers] == before


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_as_interrupts():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_leave_signals_alone() -> None:
    passed = []

    def run() -> None:
        with signals_as_interrupts(), signals_held():
            passed.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert passed == [True]
