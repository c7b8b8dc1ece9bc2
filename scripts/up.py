"""TorchServe with the gateway in front of it, and the gateway alone."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from scripts.build_archive import pack_embedded
from scripts.command import Command, add_run_dir
from scripts.console import DONE
from scripts.errors import ServerError
from scripts.gateway_process import (
    DEFAULT_CONFIG,
    GatewayOptions,
    GatewayProcess,
    command_line,
    environment,
)
from scripts.hints import to_run
from scripts.serve import add_start_arguments, gateway_dir_of, start
from scripts.torchserve.draining import DRAIN_S

__all__ = ["GATEWAY", "UP"]


def _up(arguments: argparse.Namespace) -> int:
    if not arguments.name and not _has_archive(arguments.store):
        pack_embedded(arguments.store)
    arguments.brief = True
    start(arguments)
    options = GatewayOptions(
        gateway_dir_of(arguments).resolve(),
        arguments.gateway_config.resolve(),
        arguments.gateway_address,
        arguments.gateway_port,
        arguments.run_dir.resolve(),
    )
    running = GatewayProcess.find(options.state_dir)
    if running is not None and running.started_as != options.fingerprint():
        print("The gateway's settings have changed: restarting.")
        running.stop(DRAIN_S)
        running = None
    verb = "is already there"
    if running is None:
        running, verb = GatewayProcess.start(options), "answers"
    print(
        f"The gateway {verb} at {running.url}\n\n"
        f"  curl {running.url}/v1/images/generations -H 'Content-Type: application/json' \\\n"
        '      -d \'{"prompt": "a red ring", "response_format": "url"}\'\n\n'
        f"{running.url}/docs lists what it takes. {to_run('stop')} stops both."
    )
    return DONE


def _has_archive(store: Path) -> bool:
    return any(store.glob("*.mar")) or any(store.glob("*/MAR-INF"))


def _gateway(arguments: argparse.Namespace) -> int:
    """Become the gateway, so that signals are its own."""
    options = GatewayOptions(
        gateway_dir_of(arguments),
        arguments.gateway_config,
        arguments.gateway_address,
        arguments.gateway_port,
        arguments.run_dir,
    )
    command = command_line(options)
    try:
        os.execve(command[0], command, environment())
    except OSError as error:
        raise ServerError(f"the gateway cannot be started: {error.strerror}") from error


def _add_gateway_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gateway-dir", type=Path, help="the gateway's state (default: RUN_DIR with -gateway)"
    )
    parser.add_argument(
        "--gateway-config",
        type=Path,
        default=DEFAULT_CONFIG,
        help="its settings (config/gateway.yaml)",
    )
    parser.add_argument("--gateway-address", help="where it listens; any but loopback needs keys")
    parser.add_argument("--gateway-port", type=int, help="in place of its settings' port")


def _add_up_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_dir(parser)
    parser.add_argument("--name", help="which archive, when there are several")
    add_start_arguments(parser)
    _add_gateway_arguments(parser)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run-dir", type=Path, help="of the one instance; left out: run_dirs of its settings"
    )
    _add_gateway_arguments(parser)


UP = Command(
    "up",
    "serve an archive, with the gateway in front of it; both keep running",
    _up,
    _add_up_arguments,
)
GATEWAY = Command(
    "gateway", "run the gateway alone, in the foreground, until a signal", _gateway, _add_arguments
)
