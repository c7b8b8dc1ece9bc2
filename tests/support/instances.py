"""Instances that a test starts by the command line, and what is left of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from scripts.torchserve.options import Ports
from scripts.torchserve.process import TorchServer

__all__ = ["consecutive_free_ports", "processes_of", "start_arguments", "stopped_afterwards"]


@contextmanager
def stopped_afterwards(run_dir: Path) -> Iterator[None]:
    """Leave no server behind, whatever the test did."""
    try:
        yield
    finally:
        if (server := TorchServer.find(run_dir)) is not None:
            server.stop()


def start_arguments(folder: Path, ports: tuple[int, int] | None = None) -> list[str]:
    http, grpc = ports or consecutive_free_ports()
    return [
        *("start", "--run-dir", str(folder / "run"), "--store", str(folder / "store")),
        *("--port", str(http), "--grpc-port", str(grpc)),
    ]


def consecutive_free_ports() -> tuple[int, int]:
    while True:
        free = Ports.free()
        if not Ports.starting_at(free.inference, free.grpc_inference).taken():
            return free.inference, free.grpc_inference


def processes_of(run_dir: Path) -> list[psutil.Process]:
    """Everything that runs with this state directory."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = [*process.cmdline(), *process.environ().values()]
            if any(str(run_dir) in word for word in words):
                found.append(process)
    return [process for process in found if process.pid != os.getpid()]
