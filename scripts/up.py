"""TorchServe with the gateway in front of it, and the gateway alone."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import yaml

from scripts.background import BackgroundProcess
from scripts.build_archive import pack_embedded
from scripts.command import Command, add_run_dir
from scripts.console import DONE
from scripts.errors import ServerError
from scripts.fleet import is_fleet, planned
from scripts.gateway_process import (
    DEFAULT_CONFIG,
    GatewayOptions,
    GatewayProcess,
    command_line,
    environment,
)
from scripts.haproxy_process import GrpcInstance, HaproxyOptions, HaproxyProcess
from scripts.hints import option, to_run
from scripts.serve import gateway_dir_of, start
from scripts.serve_arguments import add_fleet_arguments, add_start_arguments
from scripts.torchserve.draining import DRAIN_S
from scripts.torchserve.fleet import run_dirs
from scripts.torchserve.haproxy_socket import haproxy_dir_of, server_name
from scripts.torchserve.options import LOOPBACK, is_loopback
from scripts.torchserve.process import TorchServer

__all__ = ["GATEWAY", "UP", "grpc_instances"]

Running = TypeVar("Running", bound=BackgroundProcess)


def _up(arguments: argparse.Namespace) -> int:
    _check_haproxy(arguments)
    if not arguments.name and not _has_archive(arguments.store):
        pack_embedded(arguments.store)
    arguments.brief, arguments.drain_s = True, DRAIN_S
    start(arguments)
    options = GatewayOptions(
        gateway_dir_of(arguments).resolve(),
        arguments.gateway_config.resolve(),
        arguments.gateway_address,
        arguments.gateway_port,
        tuple(each.resolve() for each in run_dirs(arguments.run_dir)),
    )
    running = _kept(GatewayProcess.find(options.state_dir), options, "The gateway")
    verb = "is already there"
    if running is None:
        running, verb = GatewayProcess.start(options), "answers"
    print(
        f"The gateway {verb} at {running.url}\n\n"
        f"  curl {running.url}/v1/images/generations -H 'Content-Type: application/json' \\\n"
        '      -d \'{"prompt": "a red ring", "response_format": "url"}\'\n\n'
        f"{running.url}/docs lists what it takes. {to_run('stop')} stops both."
    )
    if arguments.haproxy:
        _start_haproxy(arguments, running)
    return DONE


def _kept(
    running: Running | None, options: GatewayOptions | HaproxyOptions, what: str
) -> Running | None:
    """Return what runs with these options; what runs with others is stopped."""
    if running is None or running.started_as == options.fingerprint():
        return running
    print(f"{what}'s settings have changed: restarting.")
    running.stop(DRAIN_S)
    return None


def grpc_instances(arguments: argparse.Namespace) -> tuple[GrpcInstance, ...]:
    """Return the instances that take gRPC, those of a fleet too that are down at the moment."""
    servers: list[TorchServer | None]
    if is_fleet(arguments):
        servers = [TorchServer(each) for each in planned(arguments)]
    else:
        servers = [TorchServer.find(each) for each in run_dirs(arguments.run_dir)]
    return tuple(
        GrpcInstance(
            server_name(index),
            ports.grpc_inference,
            ports.inference,
            each.model_name,
            each.options.auth,
        )
        for index, each in enumerate(servers)
        if each is not None and (ports := each.options.ports).grpc_inference is not None
    )


def _start_haproxy(arguments: argparse.Namespace, gateway: GatewayProcess) -> None:
    """Put HAProxy in front of the gateway, and of the instances for gRPC."""
    instances = grpc_instances(arguments)
    options = HaproxyOptions(
        haproxy_dir_of(arguments.run_dir).resolve(),
        urlsplit(gateway.url).netloc,
        instances,
        arguments.haproxy_port,
        arguments.haproxy_metrics,
        arguments.haproxy_cert,
        arguments.haproxy_address,
    )
    running = _kept(HaproxyProcess.find(options.state_dir), options, "HAProxy")
    verb = "is already there"
    if running is None:
        running, verb = HaproxyProcess.start(options), "answers"
    trust = "" if arguments.haproxy_cert else f"\n\n  curl --cacert {running.certificate} …"
    print(f"HAProxy {verb} at {running.url}, for HTTP and gRPC{trust}")


def _check_haproxy(arguments: argparse.Namespace) -> None:
    """Let nobody in from other machines without a key. Raises: ServerError."""
    address = arguments.haproxy_address
    if not arguments.haproxy or is_loopback(address):
        return
    try:
        settings = yaml.safe_load(arguments.gateway_config.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return  # the gateway says what is wrong with it
    if settings.get("require_keys") is not True:
        raise ServerError(
            f"{option('haproxy_address')} {address}: other machines would reach a gateway that asks"
            f" for no keys; write `require_keys: true` into {arguments.gateway_config}, and make a"
            " key, as docs/gateway.md says"
        )
    if arguments.auth != "on" and arguments.grpc_port is not None:
        raise ServerError(
            f"{option('haproxy_address')} {address}: gRPC passes the gateway by, and the instances"
            f" ask for no keys: {option('auth')}on, or {option('grpc_port')}off"
        )


def _has_archive(store: Path) -> bool:
    return any(store.glob("*.mar")) or any(store.glob("*/MAR-INF"))


def _gateway(arguments: argparse.Namespace) -> int:
    """Become the gateway, so that signals are its own."""
    options = GatewayOptions(
        gateway_dir_of(arguments),
        arguments.gateway_config,
        arguments.gateway_address,
        arguments.gateway_port,
        () if arguments.run_dir is None else run_dirs(arguments.run_dir),
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
    add_fleet_arguments(parser, foreground=False)
    _add_gateway_arguments(parser)
    parser.add_argument("--haproxy", action="store_true", help="put HAProxy with TLS in front")
    parser.add_argument(
        "--haproxy-address",
        default=LOOPBACK,
        help="where it listens (127.0.0.1); any but loopback needs keys",
    )
    parser.add_argument("--haproxy-port", type=int, default=8443, help="its port (8443)")
    parser.add_argument(
        "--haproxy-cert", type=Path, help="certificate, chain and key in one file (one of its own)"
    )
    parser.add_argument(
        "--haproxy-metrics", default="127.0.0.1:8405", help="for Prometheus (127.0.0.1:8405)"
    )


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
