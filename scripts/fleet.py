"""Several instances at once, or one that is supervised: what start, stop, status and restart do."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from scripts.archive.store import choose_archive
from scripts.background import is_suspended, last_lines, start_in_background, wake
from scripts.console import DONE
from scripts.errors import ServerError, UsageError
from scripts.gateway_process import environment
from scripts.hints import option, to_run
from scripts.torchserve.accelerators import chosen_gpus
from scripts.torchserve.draining import GRACE_S, drain
from scripts.torchserve.fleet import FleetRecord, fingerprint, fleet_over, members
from scripts.torchserve.launch import clear_away
from scripts.torchserve.options import Options, Ports
from scripts.torchserve.process import READY_TIMEOUT_S, TorchServer
from scripts.torchserve.state import FLEET_LOG, FLEET_RECORD, FLEET_RESTART, FLEET_STOP, StateDir
from scripts.torchserve.supervisor import Supervision, Supervisor, request_restart, request_stop

__all__ = [
    "is_fleet",
    "planned",
    "refuse_member",
    "refuse_mixing",
    "restart_fleet",
    "run_in_foreground",
    "start_fleet",
    "stop_fleet",
]

_POLL_S = 0.2
_END_S = 90.0


def is_fleet(arguments: argparse.Namespace) -> bool:
    """Whether `arguments` ask for supervised instances."""
    return getattr(arguments, "gpus", None) is not None or (
        getattr(arguments, "instances", None) is not None
    )


def planned(arguments: argparse.Namespace) -> tuple[Options, ...]:
    """Return the instances that `arguments` ask for. Raises: ServerError, UsageError."""
    single = Options(
        archive=choose_archive(arguments.store, arguments.name),
        state_dir=arguments.run_dir.resolve(),
        ports=Ports.starting_at(arguments.port, arguments.grpc_port),
        address=arguments.address,
        auth=arguments.auth == "on",
    )
    gpus = () if getattr(arguments, "gpus", None) is None else chosen_gpus(arguments.gpus)
    instances = getattr(arguments, "instances", None)
    return members(single, gpus=gpus, num_instances=1 if instances is None else instances)


def run_in_foreground(arguments: argparse.Namespace) -> int:
    """Supervise the instances here until a signal."""
    record = FleetRecord.read(arguments.run_dir)
    if record is not None and record.supervisor is not None:
        raise ServerError(
            f"process {record.pid} supervises {arguments.run_dir} already: {to_run('stop')}"
        )
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    Supervisor(
        Supervision(
            arguments.run_dir.resolve(),
            lambda: planned(arguments),
            arguments.drain_s,
            arguments.timeout_s,
        )
    ).run()
    return DONE


def start_fleet(arguments: argparse.Namespace) -> int:
    """Start a supervisor in the background; return when its instances are READY."""
    options = planned(arguments)
    record = FleetRecord.read(arguments.run_dir)
    verb = "is serving"
    if record is not None and record.supervisor is not None:
        if record.started_as == fingerprint(options):
            verb = "is already serving"
        else:
            print(
                "The archive or the settings have changed: stopping all instances, then starting. "
                f"({to_run('restart')} takes a new archive one instance after another.)"
            )
            stop_fleet(record, arguments.run_dir, arguments.drain_s)
            record = None
    else:
        record = None
        _check_place(options, arguments.run_dir.resolve())
    if record is None:
        _launch(arguments, options)
    record = _wait(arguments.run_dir, len(options))
    _introduce(options, record, verb)
    return DONE


def _check_place(options: Sequence[Options], run_dir: Path) -> None:
    """Raise ServerError where the instances cannot be started."""
    StateDir(run_dir).check_ownership()
    other = TorchServer.find(run_dir)
    if other is not None and options[0].state_dir != run_dir:
        raise ServerError(
            f"{other.options.archive.name} is being served at {other.url}; `{to_run('stop')}` first"
        )
    for each in options:
        server = TorchServer(each)
        server.check(TorchServer.find(each.state_dir))


def _launch(arguments: argparse.Namespace, options: Sequence[Options]) -> None:
    """Start the supervisor. Raises: ServerError, when it ends before all are READY."""
    run_dir = arguments.run_dir.resolve()
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    log_file = run_dir / FLEET_LOG
    print(f"Starting {len(options)} instance{'s' * (len(options) > 1)} ...", flush=True)
    command = [sys.executable, "-m", "scripts.serve", *_command(arguments, options)]
    launched, begins_at = start_in_background(command, environment(), log_file)
    try:
        while not _is_settled(FleetRecord.read(run_dir), launched.pid):
            if launched.poll() is not None:
                raise ServerError("no instance could be started", last_lines(log_file, begins_at))
            time.sleep(_POLL_S)
    except BaseException:
        if launched.poll() is None:
            launched.terminate()
            launched.wait()
        raise


def _command(arguments: argparse.Namespace, options: Sequence[Options]) -> list[str]:
    """How the supervisor is called: as `arguments` say, from any folder."""
    gpus = [gpu for each in options if (gpu := each.environment.get("CUDA_VISIBLE_DEVICES"))]
    grpc = arguments.grpc_port
    return [
        *("start", "--foreground", "--run-dir", str(arguments.run_dir.resolve())),
        *("--store", str(arguments.store.resolve())),
        *(("--name", arguments.name) if arguments.name else ()),
        *("--port", str(arguments.port), "--grpc-port", "off" if grpc is None else str(grpc)),
        *("--address", arguments.address, "--auth", arguments.auth),
        *("--timeout-s", str(arguments.timeout_s), "--drain-s", str(arguments.drain_s)),
        *(("--gpus", ",".join(gpus)) if gpus else ("--instances", str(len(options)))),
    ]


def _is_settled(record: FleetRecord | None, pid: int) -> bool:
    """Whether every instance is READY or has failed, and one is READY."""
    states = [] if record is None or record.pid != pid else [e.state for e in record.instances]
    return "ready" in states and all(each in ("ready", "down") for each in states)


def _wait(run_dir: Path, count: int) -> FleetRecord:
    """Return the record once some instance is READY."""
    while True:
        record = FleetRecord.read(run_dir)
        if record is None or record.supervisor is None:
            raise ServerError(f"the supervisor has ended; {run_dir / FLEET_LOG} says why")
        if any(each.state == "ready" for each in record.instances[:count]):
            return record
        time.sleep(_POLL_S)


def _introduce(options: Sequence[Options], record: FleetRecord, verb: str) -> None:
    name = TorchServer(options[0]).model_name
    for each, state in zip(options, record.instances, strict=True):
        server = TorchServer(each)
        device = f" on GPU {state.device}" if state.device else ""
        if state.state == "ready":
            print(f"TorchServe {verb} {name} {server.model_version} at {server.url}{device}")
        else:
            why = f": {state.problem}" if state.problem else ""
            print(f"{server.url}{device} is {state.state}{why}", file=sys.stderr)
    watching = ", ".join(to_run(name) for name in ("status", "restart", "stop"))
    print(watching)


def stop_fleet(record: FleetRecord, run_dir: Path, drain_s: float) -> None:
    """End the supervisor and all its instances, each drained for up to `drain_s`."""
    supervisor = record.supervisor
    if supervisor is not None:
        request_stop(record, run_dir, drain_s)
        wake(supervisor)
        try:
            supervisor.wait(drain_s + GRACE_S + _END_S)
        except psutil.TimeoutExpired:
            supervisor.kill()
    # What a supervisor that was killed has left.
    folders = [Path(each.state_dir) for each in record.instances]
    with ThreadPoolExecutor(len(folders)) as pool:
        list(pool.map(lambda folder: _stop_instance(folder, drain_s), folders))
    for name in (FLEET_STOP, FLEET_RESTART, FLEET_RECORD):
        (run_dir / name).unlink(missing_ok=True)


def _stop_instance(state_dir: Path, drain_s: float) -> None:
    server = TorchServer.find(state_dir)
    if server is not None:
        drain(server, drain_s)
        server.stop()
    clear_away(StateDir(state_dir))


def restart_fleet(
    record: FleetRecord, run_dir: Path, drain_s: float, timeout_s: float = READY_TIMEOUT_S
) -> int:
    """Have the supervisor restart its instances one after another; return when that is done.

    Raises: ServerError, where it cannot, gives up, or nothing changes within `timeout_s`, the time
        to drain an instance aside.
    """
    if record.supervisor is None:
        raise ServerError(f"nothing supervises {run_dir}: {to_run('stop')}, then start it again")
    _check_is_awake(record)
    print(f"Restarting {len(record.instances)} instances, one after another ...", flush=True)
    request_restart(record, run_dir, drain_s)
    shown: dict[str, str] = {}
    changed_s, patience_s = time.monotonic(), drain_s + GRACE_S + _END_S + timeout_s
    while True:
        now = FleetRecord.read(run_dir)
        if now is None or now.supervisor is None:
            raise ServerError(f"the supervisor has ended; {run_dir / FLEET_LOG} says why")
        _check_is_awake(now)
        for each in now.instances:
            if shown.setdefault(each.state_dir, each.state) != each.state:
                shown[each.state_dir], changed_s = each.state, time.monotonic()
                print(f"  {each.state_dir}: {each.state}", flush=True)
        if now.num_rolls > record.num_rolls:
            if now.roll_problem is not None:
                raise ServerError(f"the restart was given up: {now.roll_problem}")
            print("Done.")
            return DONE
        if time.monotonic() - changed_s > patience_s:
            raise ServerError(
                f"nothing has changed for {patience_s:.0f} s; {run_dir / FLEET_LOG} says more"
            )
        time.sleep(_POLL_S)


def _check_is_awake(record: FleetRecord) -> None:
    """Raise ServerError where the supervisor does nothing until somebody lets it go on."""
    if (supervisor := record.supervisor) is not None and is_suspended(supervisor):
        raise ServerError(f"the supervisor is suspended: kill -CONT {record.pid} lets it go on")


def refuse_mixing(arguments: argparse.Namespace) -> None:
    """Raise UsageError, where `arguments` name one instance of a fleet to start alone."""
    record = FleetRecord.read(arguments.run_dir)
    if record is not None and record.supervisor is not None:
        raise UsageError(
            f"{arguments.run_dir} holds a fleet of {len(record.instances)}: `{to_run('stop')}` "
            f"first, or say {option('instances')} or {option('gpus')} again"
        )


def refuse_member(run_dir: Path) -> None:
    """Raise UsageError, where `run_dir` is that of one instance of a supervised fleet.

    Its supervisor would start again what is stopped, and beside what is started.
    """
    if (found := fleet_over(run_dir)) is not None:
        folder, record = found
        raise UsageError(
            f"{run_dir} is one of {len(record.instances)} instances, which process {record.pid} "
            f"supervises: it is started and stopped with them, by {option('run_dir')}{folder}"
        )
