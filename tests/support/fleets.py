"""Fleets that a test starts by the command line, and what is left of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.fleet import stop_fleet
from scripts.torchserve.fleet import FleetRecord
from scripts.torchserve.options import Ports
from tests.support.instances import processes_of
from tests.support.ports import free_ports

__all__ = ["fleet_arguments", "stopped_fleet"]


def fleet_arguments(folder: Path) -> list[str]:
    """Of a fleet in `folder`/run that serves from `folder`/store; the ports of one folder stay."""
    kept = folder / "ports"
    if not kept.exists():
        http, grpc = free_ports()
        while abs(http - grpc) < 100 or _taken(http + 10, grpc + 10):
            http, grpc = free_ports()
        kept.write_text(f"{http} {grpc}")
    ports = kept.read_text().split()
    return [
        *("--run-dir", str(folder / "run"), "--store", str(folder / "store")),
        *("--port", ports[0], "--grpc-port", ports[1]),
    ]


def _taken(http: int, grpc: int) -> bool:
    return bool(Ports.starting_at(http, grpc).taken())


@contextmanager
def stopped_fleet(run_dir: Path) -> Iterator[None]:
    """Leave no fleet behind, whatever the test did."""
    try:
        yield
    finally:
        if (record := FleetRecord.read(run_dir)) is not None:
            stop_fleet(record, run_dir, 0.0)
        for process in processes_of(run_dir):
            process.kill()
