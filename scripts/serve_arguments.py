"""What the commands that start and stop servers take."""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.torchserve.draining import DRAIN_S
from scripts.torchserve.options import LOOPBACK
from scripts.torchserve.process import READY_TIMEOUT_S

__all__ = ["add_drain", "add_fleet_arguments", "add_start_arguments"]

_MAX_DRAIN_S = 86400.0


def add_drain(parser: argparse.ArgumentParser) -> None:
    """Let `parser` take how long requests in flight may still take."""
    parser.add_argument(
        "--drain-s",
        type=_seconds,
        default=DRAIN_S,
        help=f"seconds for requests in flight; 0 resets them ({DRAIN_S:.0f})",
    )


def add_start_arguments(starter: argparse.ArgumentParser) -> None:
    """Let `starter` take what `start` needs beside ``--run-dir``, ``--name`` and ``--brief``."""
    starter.add_argument("--store", type=Path, default=Path("model-store"), help="archives' folder")
    starter.add_argument("--port", type=int, default=8080, help="HTTP: this, +1, +2 (8080)")
    starter.add_argument(
        "--grpc-port", type=_grpc_port, default=7070, help="gRPC; off: none (7070)"
    )
    starter.add_argument("--address", default=LOOPBACK, help="another needs --auth on (127.0.0.1)")
    starter.add_argument("--auth", choices=("on", "off"), default="off", help="ask for a key (off)")
    starter.add_argument(
        "--timeout-s", type=float, default=READY_TIMEOUT_S, help="for the worker (1800)"
    )


def add_fleet_arguments(parser: argparse.ArgumentParser, *, foreground: bool) -> None:
    """Let `parser` take what makes a fleet of one instance."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--gpus", help="an instance each: all, or a list such as 0,1; supervised")
    which.add_argument("--instances", type=int, help="as many on the CPU, supervised")
    if foreground:
        parser.add_argument(
            "--foreground",
            action="store_true",
            help="supervise here until a signal, for containers and systemd",
        )


def _seconds(text: str) -> float:
    """Read a duration of a drain. Raises: ArgumentTypeError, ValueError."""
    value = float(text)
    if not 0 <= value <= _MAX_DRAIN_S:
        raise argparse.ArgumentTypeError(f"{text} is not within 0 to {_MAX_DRAIN_S:.0f}")
    return value


def _grpc_port(text: str) -> int | None:
    """Read the port of gRPC; ``off`` is None."""
    return None if text == "off" else int(text)
