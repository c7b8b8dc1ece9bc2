"""The command line of a TorchServe instance: start, stop, status, logs."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from scripts.archive.store import choose_archive
from scripts.command import add_run_dir
from scripts.console import run_command
from scripts.errors import ServerError
from scripts.hints import to_run
from scripts.torchserve.options import LOOPBACK, Options, Ports, example_prompt
from scripts.torchserve.process import READY_TIMEOUT_S, TorchServer

__all__ = ["add_commands", "add_start_arguments", "curl_line", "main", "start"]

EXAMPLE_PROMPT = "A futuristic cityscape"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0 done, 1 failed, 2 misused."""
    return run_command(_parser(), lambda arguments: arguments.run(arguments), argv)


def start(arguments: argparse.Namespace) -> int:
    """Serve an archive, unless this very instance runs already."""
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
        running.stop()
    try:
        with _progress("Starting TorchServe") as tell:
            server.start()
            server.wait_until_ready(arguments.timeout_s, tell)
    except BaseException:
        server.stop()
        raise
    _introduce(server, "is serving", brief=arguments.brief)
    return 0


def stop(arguments: argparse.Namespace) -> int:
    """Stop the instance; that none runs is no failure."""
    server = TorchServer.find(arguments.run_dir)
    if server is None:
        print("No server is running.")
        return 0
    print(f"Stopping TorchServe (process {server.pid}) ...", flush=True)
    server.stop()
    print("Stopped.")
    return 0


def status(arguments: argparse.Namespace) -> int:
    """Say what is served and how its workers are; 1 when nothing is."""
    server = TorchServer.find(arguments.run_dir)
    if server is None:
        none = f"No server is running; `{to_run('serve')}` starts one."
        print("{}" if arguments.json else none)
        return 1
    workers = server.workers()
    state = {
        "ready": any(worker.get("status") == "READY" for worker in workers),
        "model": server.model_name,
        "version": server.model_version,
        "archive": str(server.options.archive),
        "predictions": server.predictions_url,
        "grpc": f"{LOOPBACK}:{server.options.ports.grpc_inference}",
        "metrics": server.metrics_url,
        "log": str(server.log_file),
        "pid": server.pid,
        "workers": [
            {key: worker.get(key) for key in ("id", "status", "pid", "gpu")} for worker in workers
        ],
    }
    if arguments.json:
        print(json.dumps(state, indent=2))
    else:
        for key, value in state.items():
            print(f"{key:<12} {value if isinstance(value, str) else json.dumps(value)}")
    return 0


def logs(arguments: argparse.Namespace) -> int:
    """Show the log, and go on showing it with --follow."""
    log_file = arguments.run_dir / "logs" / "server.log"
    if not log_file.exists():
        raise ServerError(f"there is no log yet: {log_file}")
    follow = ["-F"] if arguments.follow else []
    tail = ["tail", "-n", str(arguments.lines), *follow, str(log_file)]
    try:
        return subprocess.run(tail, check=False).returncode
    except KeyboardInterrupt:
        return 0


def curl_line(server: TorchServer, fields: dict[str, object], output: str) -> str:
    """Return a command that draws a picture, ready to be pasted into a shell.

    It says whether it got one: an error's JSON would otherwise lie unseen in `output`.
    """
    token = server.token()
    key = f"-H 'Authorization: Bearer {token}' " if token else ""
    return (
        f"curl -sS -w '%{{http_code}} %{{content_type}}\\n' {server.predictions_url} {key}\\\n"
        f"    -H 'Content-Type: application/json' \\\n"
        f"    -d {shlex.quote(json.dumps(fields))} -o {shlex.quote(output)}"
    )


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
    add(stop, "stop it")
    add(status, "say what is served and whether it is ready").add_argument(
        "--json", action="store_true", help="for machines"
    )
    viewer = add(logs, "show its log")
    viewer.add_argument("--lines", type=int, default=50, help="how many (50)")
    viewer.add_argument("--follow", action="store_true", help="go on until interrupted")


def add_start_arguments(starter: argparse.ArgumentParser) -> None:
    """Let `starter` take what `start` needs beside ``--run-dir``, ``--name`` and ``--brief``."""
    starter.add_argument("--store", type=Path, default=Path("model-store"), help="archives' folder")
    starter.add_argument("--port", type=int, default=8080, help="HTTP: this, +1, +2 (8080)")
    starter.add_argument("--grpc-port", type=int, default=7070, help="gRPC: this, +1 (7070)")
    starter.add_argument("--address", default=LOOPBACK, help="another needs --auth on (127.0.0.1)")
    starter.add_argument("--auth", choices=("on", "off"), default="off", help="ask for a key (off)")
    starter.add_argument(
        "--timeout-s", type=float, default=READY_TIMEOUT_S, help="for the worker (1800)"
    )


if __name__ == "__main__":
    sys.exit(main())
