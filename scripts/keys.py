"""Makes a key for the gateway."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from scripts.command import Command
from scripts.errors import ServerError
from scripts.gateway_process import environment

__all__ = ["KEY"]

_LIMITS = ("requests_per_minute", "concurrency", "max_pixels", "max_steps")
_EXAMPLES = """\
examples:
  %(prog)s --name somebody
  %(prog)s --name somebody --max-steps 50 --models stable_diffusion
"""


def _make_key(arguments: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "gateway.keys", "--name", arguments.name]
    command += ["--file", str(arguments.file)]
    for limit in _LIMITS:
        if (value := getattr(arguments, limit)) is not None:
            command += [f"--{limit.replace('_', '-')}", str(value)]
    if arguments.models:
        command += ["--models", *arguments.models]
    try:
        os.execve(command[0], command, environment())
    except OSError as error:
        raise ServerError(f"no key can be made: {error.strerror}") from error


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", required=True, help="whose it is")
    parser.add_argument("--file", type=Path, default=Path("config/keys"), help="config/keys")
    for limit in _LIMITS:
        parser.add_argument(f"--{limit.replace('_', '-')}", type=int, help="no limit if left out")
    parser.add_argument("--models", nargs="+", help="all if left out")


KEY = Command(
    "key",
    "make a key for the gateway, which is shown this once",
    _make_key,
    _add_arguments,
    examples=_EXAMPLES,
)
