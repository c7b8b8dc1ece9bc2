"""The command line of a TorchServe instance: start, stop, status, logs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from scripts.archive.store import choose_archive
from scripts.command import add_run_dir
from scripts.console import run_command
from scripts.errors import ServerError
from scripts.fleet import (
    is_fleet,
    refuse_member,
    refuse_mixing,
    restart_fleet,
    run_in_foreground,
    start_fleet,
    stop_fleet,
)
from scripts.fleet_status import fleet_status
from scripts.fronts import forget_ended, fronts
from scripts.gateway_process import GatewayProcess
from scripts.haproxy_process import HaproxyProcess
from scripts.hints import to_run
from scripts.serve_arguments import add_drain, add_fleet_arguments, add_start_arguments
from scripts.torchserve.curl import curl_line
from scripts.torchserve.draining import drain
from scripts.torchserve.fleet import FleetRecord, fleet_over, run_dirs
from scripts.torchserve.haproxy_socket import haproxy_dir_of
from scripts.torchserve.launch import clear_away
from scripts.torchserve.options import LOOPBACK, Options, Ports, example_prompt
from scripts.torchserve.process import READY_TIMEOUT_S, TorchServer
from scripts.torchserve.state import FLEET_LOG, StateDir

__all__ = [
    "add_commands",
    "gateway_dir_of",
    "main",
    "start",
]

EXAMPLE_PROMPT = "A futuristic cityscape"
# It closes its connections, and tells instances what it has cancelled.
_GATEWAY_GRACE_S = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0 done, 1 failed, 2 misused."""
    return run_command(_parser(), lambda arguments: arguments.run(arguments), argv)


def start(arguments: argparse.Namespace) -> int:
    """Serve an archive, unless this very instance runs already."""
    refuse_member(arguments.run_dir)
    if getattr(arguments, "foreground", False):
        return run_in_foreground(arguments)
    if is_fleet(arguments):
        return start_fleet(arguments)
    refuse_mixing(arguments)
    options = Options(
        archive=choose_archive(arguments.store, arguments.name),
        state_dir=arguments.run_dir,
        ports=Ports.starting_at(arguments.port, arguments.grpc_port),
        address=arguments.address,
        auth=arguments.auth == "on",
    )
    running = TorchServer.find(arguments.run_dir)
    if running is not None and running.started_as == options.fingerprint():
        if not running.is_ready():
            with _progress("Waiting for the worker") as tell:
                running.wait_until_ready(arguments.timeout_s, tell)
        if problem := running.problem():
            raise ServerError(f"{running.model_name} is being served at {running.url}: {problem}")
        _introduce(running, "is already serving", brief=arguments.brief)
        return 0
    server = TorchServer(options)
    if running is not None:
        if running.options.archive != options.archive.resolve():
            raise ServerError(
                f"{running.options.archive.name} is being served at {running.url}; "
                f"`{to_run('stop')}` first, or run a second one: "
                f"{to_run('serve', run_dir='.run/second', port='9080', grpc_port='9070')}"
            )
        server.check(running)
        print("The archive or the settings have changed: restarting.")
        _drain(running, arguments.drain_s)
        running.stop()
    _start(server, arguments.timeout_s)
    _introduce(server, "is serving", brief=arguments.brief)
    return 0


def _start(server: TorchServer, timeout_s: float) -> None:
    try:
        with _progress("Starting TorchServe") as tell:
            server.start()
            server.wait_until_ready(timeout_s, tell)
    except BaseException:
        server.stop()
        raise


def stop(arguments: argparse.Namespace) -> int:
    """Finish what is in flight, then stop the instance, and remove what a killed one left.

    HAProxy and a gateway in front of it are stopped first: what they have sent still finishes.
    """
    refuse_member(arguments.run_dir)
    haproxy = HaproxyProcess.find(haproxy_dir_of(arguments.run_dir).resolve())
    if haproxy is not None:
        print(f"Stopping HAProxy (process {haproxy.pid}) ...", flush=True)
        haproxy.stop(arguments.drain_s + _GATEWAY_GRACE_S)
    gateway = GatewayProcess.find(gateway_dir_of(arguments).resolve())
    if gateway is not None:
        print(f"Stopping the gateway (process {gateway.pid}) ...", flush=True)
        gateway.stop(arguments.drain_s + _GATEWAY_GRACE_S)
    forget_ended(arguments.run_dir, gateway_dir_of(arguments))
    if (fleet := FleetRecord.read(arguments.run_dir)) is not None:
        print(f"Stopping {len(fleet.instances)} instances ...", flush=True)
        stop_fleet(fleet, arguments.run_dir, arguments.drain_s)
        print("Stopped.")
        return 0
    server = TorchServer.find(arguments.run_dir)
    if server is None:
        has_ended_one = clear_away(StateDir(arguments.run_dir))
        print("Stopped." if has_ended_one else "No server is running.")
        return 0
    print(f"Stopping TorchServe (process {server.pid}) ...", flush=True)
    _drain(server, arguments.drain_s)
    server.stop()
    print("Stopped.")
    return 0


def restart(arguments: argparse.Namespace) -> int:
    """Restart what runs, with what the store has now: a fleet one instance after another."""
    refuse_member(arguments.run_dir)
    if (fleet := FleetRecord.read(arguments.run_dir)) is not None:
        return restart_fleet(fleet, arguments.run_dir, arguments.drain_s, arguments.timeout_s)
    running = TorchServer.find(arguments.run_dir)
    if running is None:
        raise ServerError(f"no server is running; `{to_run('serve')}` starts one")
    server = TorchServer(running.options)
    server.check(running)
    _drain(running, arguments.drain_s)
    running.stop()
    _start(server, arguments.timeout_s)
    _introduce(server, "is serving", brief=True)
    return 0


def status(arguments: argparse.Namespace) -> int:
    """Say what is served, whether it draws, and if not why; 1 when it does not."""
    in_front = fronts(arguments.run_dir, gateway_dir_of(arguments))
    if (fleet := FleetRecord.read(arguments.run_dir)) is not None:
        return fleet_status(fleet, in_front, as_json=arguments.json)
    server = TorchServer.find(arguments.run_dir)
    if server is None:
        none = f"No server is running; `{to_run('serve')}` starts one."
        print("{}" if arguments.json else none)
        return 1
    model = server.model()
    problem = server.problem(is_supervised=fleet_over(arguments.run_dir) is not None)
    grpc = server.options.ports.grpc_inference
    workers = [] if model is None else model.workers
    state = {
        "ready": model is not None and model.is_ready,
        "problem": problem,
        "model": server.model_name,
        "version": server.model_version,
        "archive": str(server.options.archive),
        "predictions": server.predictions_url,
        "grpc": None if grpc is None else f"{LOOPBACK}:{grpc}",
        "metrics": server.metrics_url,
        "management": server.management_address,
        "log": str(server.log_file),
        "pid": server.pid,
        "workers": [
            {key: worker.get(key) for key in ("id", "status", "pid", "gpu")} for worker in workers
        ],
    }
    front = {each.name: asdict(each) for each in in_front}
    if arguments.json:
        print(json.dumps({**state, "front": front}, indent=2))
    else:
        for key, value in state.items():
            if value is not None:
                print(f"{key:<12} {value if isinstance(value, str) else json.dumps(value)}")
        for each in in_front:
            print(each)
    return 1 if problem is not None or any(each.problem for each in in_front) else 0


def logs(arguments: argparse.Namespace) -> int:
    """Show the log, and go on showing it with --follow."""
    folders = run_dirs(arguments.run_dir)
    files = [folder / "logs" / "server.log" for folder in folders]
    if folders != (arguments.run_dir,):
        files.insert(0, arguments.run_dir / FLEET_LOG)
    there = [str(file) for file in files if file.exists()]
    if not there:
        raise ServerError(f"there is no log yet: {files[0]}")
    follow = ["-F"] if arguments.follow else []
    tail = ["tail", "-n", str(arguments.lines), *follow, *there]
    try:
        return subprocess.run(tail, check=False).returncode
    except KeyboardInterrupt:
        return 0


def gateway_dir_of(arguments: argparse.Namespace) -> Path:
    """Return the state folder of the gateway that belongs to an instance, unless it is named."""
    if arguments.gateway_dir is not None:
        return Path(arguments.gateway_dir)
    run_dir = Path(arguments.run_dir or ".run")
    return run_dir.with_name(f"{run_dir.name}-gateway")


def _introduce(server: TorchServer, verb: str, *, brief: bool) -> None:
    print(f"TorchServe {verb} {server.model_name} {server.model_version} at {server.url}")
    if server.options.auth:
        print(
            f"Every request needs the key: -H 'Authorization: Bearer {server.token()}'\n"
            f"The keys and when they end: {server.state_dir / 'key_file.json'}"
        )
    if brief:
        return
    prompt = example_prompt(server.options.archive) or EXAMPLE_PROMPT
    example = curl_line(server, {"prompt": prompt}, "picture.png")
    watching = ", ".join(to_run(name) for name in ("status", "logs", "stop"))
    print(f"Draw a picture:\n\n  {example}\n\n{watching}")


def _drain(server: TorchServer, drain_s: float) -> None:
    """Let the server finish its requests; on a terminal show how many are left."""

    def tell(num_live: int, waited_s: float) -> None:
        what = f"\r\033[KFinishing {num_live} request{'s' * (num_live > 1)} ... {waited_s:.0f} s "
        print(what, end="", file=sys.stderr, flush=True)

    is_live = sys.stderr.isatty()
    try:
        drain(server, drain_s, tell if is_live else lambda num_live, waited_s: None)
    except KeyboardInterrupt:
        print("The server goes on serving.", file=sys.stderr)
        raise
    finally:
        if is_live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[float], None]]:
    """Show `what` and the seconds so far on a terminal; one plain line elsewhere."""
    live = sys.stderr.isatty()
    if not live:
        print(f"{what} ...", file=sys.stderr, flush=True)

    def tell(waited_s: float) -> None:
        if live:
            print(f"\r{what} ... {waited_s:.0f} s ", end="", file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        if live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="serve",
        description="Start, stop and watch a TorchServe instance of this repository's.",
        epilog="make serve, make stop, make status and make logs call this.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_commands(commands.add_parser, starter="start")
    return parser


def add_commands(
    add_parser: Callable[..., argparse.ArgumentParser], *, starter: str = "serve"
) -> None:
    """Add the commands by the `add_parser` of a parser's subparsers; `starter` names the first."""

    def add(
        run: Callable[[argparse.Namespace], int], text: str, name: str = ""
    ) -> argparse.ArgumentParser:
        sub = add_parser(name or run.__name__, help=text, description=run.__doc__)
        add_run_dir(sub)
        sub.set_defaults(run=run)
        return sub

    server = add(start, "serve an archive and wait until a worker is READY", starter)
    server.add_argument("--name", help="which archive, when there are several")
    server.add_argument("--brief", action="store_true", help="say no more than the address")
    add_start_arguments(server)
    add_fleet_arguments(server, foreground=True)
    stopper = add(stop, "finish what is in flight, then stop it")
    restarter = add(restart, "restart it; several instances one after another")
    restarter.add_argument("--timeout-s", type=float, default=READY_TIMEOUT_S, help="(1800)")
    for each in (server, stopper, restarter):
        add_drain(each)
    teller = add(status, "say what is served and whether it is ready")
    teller.add_argument("--json", action="store_true", help="for machines")
    for each, what in ((stopper, "stopped"), (teller, "looked at")):
        each.add_argument(
            "--gateway-dir",
            type=Path,
            help=f"of the gateway, which is {what} too (RUN_DIR-gateway)",
        )
    viewer = add(logs, "show its log")
    viewer.add_argument("--lines", type=int, default=50, help="how many (50)")
    viewer.add_argument("--follow", action="store_true", help="go on until interrupted")


if __name__ == "__main__":
    sys.exit(main())
