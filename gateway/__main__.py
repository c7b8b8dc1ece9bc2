"""Runs the gateway: ``python -m gateway``."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from gateway.app import make_app
from gateway.http_protocol import HttpProtocol
from gateway.jobs.service import check_jobs
from gateway.keys import how_to_make, read_keys
from gateway.settings import EVERYBODY, NOBODY, Settings, read_settings
from gateway.telemetry.logs import set_up_logs
from gateway.telemetry.tracing import check_tracing
from handler.errors import ConfigError
from handler.garbage import leave_out_what_is_loaded

__all__ = ["main"]

_TICK_S = 0.5
# The first look is at 10,000 new objects, not at 700. What outlives it, as all does that a request
# needs while it is drawn, is looked at again after 30,000 and after 90,000, which is what Python's
# own 700, 10 and 10 come to: after a million, megabytes of garbage would lie there.
_GC_THRESHOLDS = (10_000, 2, 2)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal; return 0 done, 1 failed, 2 misused."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    try:
        settings = read_settings(
            arguments.config,
            address=arguments.address,
            port=arguments.port,
            run_dirs=arguments.run_dir,
        )
        set_up_logs(settings.log_format)
        _check_keys(settings)
        check_tracing(settings.trace_endpoint)
        arguments.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        asyncio.run(check_jobs(settings.jobs, arguments.state_dir))
        listener = _listen(settings)
    except (ConfigError, OSError) as error:
        print(f"gateway: error: {error}", file=sys.stderr)
        return 1
    host = f"[{settings.address}]" if ":" in settings.address else settings.address
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    # `make up` reads it.
    logging.getLogger("gateway").info("listens at http://%s:%d", host, listener.getsockname()[1])
    leave_out_what_is_loaded()
    gc.set_threshold(*_GC_THRESHOLDS)
    server = _Server(_config(settings, arguments.state_dir))
    server.run(sockets=[listener])
    return 0 if server.started else 1


class _Server(uvicorn.Server):
    """Wakes up twice a second, not ten times, to see whether it shall end."""

    async def main_loop(self) -> None:
        """Return when a signal has come; keep the header Date."""
        while not await self.on_tick(0):
            await asyncio.sleep(_TICK_S)


def _check_keys(settings: Settings) -> None:
    """Raise ConfigError where keys are needed and there is none, or one is named and missing."""
    path = Path(settings.keys_file)
    keys = read_keys(path)
    if settings.keys_required and not keys:
        raise ConfigError(
            f"{settings.address} asks for keys, and {settings.keys_file} has none:"
            f" {how_to_make(path)} makes one"
        )
    reader = settings.metrics_for
    if reader not in (None, EVERYBODY, NOBODY) and all(key.name != reader for key in keys):
        raise ConfigError(
            f"metrics_for: {path} has no key {reader!r}: {how_to_make(path)} makes one"
        )


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.address, settings.port))
    except OSError as error:
        listener.close()
        raise OSError(f"port {settings.port}: {os.strerror(error.errno or 0)}") from error
    return listener


def _config(settings: Settings, state_dir: Path) -> uvicorn.Config:
    return uvicorn.Config(
        make_app(settings, state_dir),
        http=HttpProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,  # ours says which key, and nothing of what was sent
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
        backlog=2048,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m gateway", description=__doc__)
    config = Path("config/gateway.yaml")
    parser.add_argument("--config", type=Path, default=config, help=f"its settings ({config})")
    state_dir = Path(".run-gateway")
    parser.add_argument("--state-dir", type=Path, default=state_dir, help=f"({state_dir})")
    parser.add_argument("--run-dir", action="append", help="in place of run_dirs; may be repeated")
    parser.add_argument("--address", help="in place of address")
    parser.add_argument("--port", type=int, help="in place of port")
    return parser


if __name__ == "__main__":
    sys.exit(main())
