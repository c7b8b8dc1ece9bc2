"""A whole site of its own: two instances, a gateway, HAProxy; and what breaks in it."""

from __future__ import annotations

import os
import random
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import psutil

from scripts.gateway_process import GatewayProcess
from scripts.haproxy_process import HaproxyProcess
from scripts.repository import REPOSITORY
from scripts.torchserve.fleet import FleetRecord
from scripts.torchserve.process import TorchServer
from tests.support.fleets import fleet_arguments
from tests.support.gateways import free_port
from tests.support.instances import processes_of
from tests.support.serving import MODEL, build_quick_archive

__all__ = ["Site", "running_site"]

NUM_INSTANCES = 2
_COMMAND_TIMEOUT_S = 900.0
_BACK_TIMEOUT_S = 300.0
T = TypeVar("T")


class Site:
    """Everything is in `folder`; what is broken here is broken for real."""

    def __init__(self, folder: Path, run_dir: Path, archive_format: str = "mar") -> None:
        """Builds the archive; starts nothing."""
        self.folder, self.run_dir = folder, run_dir
        self.store = folder / "store"
        self.store.mkdir(parents=True, exist_ok=True)
        self._format = archive_format
        self.archive = build_quick_archive(self.store, {}, archive_format)
        self._arguments = [*fleet_arguments(folder), "--instances", str(NUM_INSTANCES)]
        self._arguments[1] = str(run_dir)
        self._gateway_port, self.port, self.metrics_port = free_port(), free_port(), free_port()
        self._gateway_dir = folder / "gateway"
        self.chance = random.Random(0)

    # Up and down.

    def start(self) -> None:
        """Start all of it, as ``make up INSTANCES=2 HAPROXY=1`` does."""
        self._command(
            *("up", *self._arguments),
            *("--gateway-port", str(self._gateway_port), "--gateway-dir", str(self._gateway_dir)),
            *("--haproxy", "--haproxy-port", str(self.port)),
            *("--haproxy-metrics", f"127.0.0.1:{self.metrics_port}"),
        )

    def stop(self) -> None:
        """Stop all of it, as ``make stop`` does."""
        self._command(
            *("stop", "--run-dir", str(self.run_dir), "--gateway-dir", str(self._gateway_dir)),
            *("--drain-s", "20"),
        )

    @property
    def url(self) -> str:
        """Where clients come in."""
        return f"https://localhost:{self.port}"

    @property
    def certificate(self) -> Path:
        """What clients trust."""
        haproxy = HaproxyProcess.find(self._haproxy_dir)
        assert haproxy is not None
        return haproxy.certificate

    def trust(self) -> ssl.SSLContext:
        """A context for clients."""
        return ssl.create_default_context(cafile=str(self.certificate))

    def instance(self, index: int) -> TorchServer:
        """An instance, running or not."""
        found = TorchServer.find(self.run_dir / str(index))
        assert found is not None, f"instance {index} does not run"
        return found

    def num_restarts(self) -> int:
        """How often instances were started again unasked."""
        record = FleetRecord.read(self.run_dir)
        return 0 if record is None else sum(each.num_restarts for each in record.instances)

    def are_ready(self) -> bool:
        """Whether every instance has a READY worker, and the gateway runs."""
        servers = [TorchServer.find(self.run_dir / str(index)) for index in range(NUM_INSTANCES)]
        is_up = GatewayProcess.find(self._gateway_dir) is not None
        return is_up and all(each is not None and each.is_ready() for each in servers)

    def wait_until_ready(self) -> float:
        """Return when all is as it should be: the seconds it took."""
        started_s = time.monotonic()
        while not self.are_ready():
            assert time.monotonic() < started_s + _BACK_TIMEOUT_S, "the site did not come back"
            time.sleep(0.2)
        return time.monotonic() - started_s

    def memory_bytes(self) -> dict[str, int]:
        """What each process holds, by what it is; a share of what is shared."""
        found: dict[str, int] = {}
        for index in range(NUM_INSTANCES):
            if (server := TorchServer.find(self.run_dir / str(index))) is None:
                continue
            with suppress(psutil.Error, AssertionError):
                frontend = psutil.Process(server.pid)
                found[f"frontend {index}"] = _pss(frontend)
                for worker in frontend.children():
                    found[f"worker {index}"] = _pss(worker)
        record, gateway = FleetRecord.read(self.run_dir), GatewayProcess.find(self._gateway_dir)
        with suppress(psutil.Error):
            if record is not None and record.supervisor is not None:
                found["supervisor"] = _pss(record.supervisor)
            if gateway is not None:
                found["gateway"] = _pss(psutil.Process(gateway.pid))
        return found

    def leftovers(self) -> list[str]:
        """What is still there after `stop`: processes and unpacked archives."""
        found = processes_of(self.run_dir) + processes_of(self._gateway_dir)
        left = [" ".join(each.cmdline())[:120] for each in found]
        return left + [str(each) for each in self.run_dir.glob("*/temp/models/*")]

    # What breaks.

    def kill_worker(self) -> None:
        """Its frontend starts another one."""
        server = self.instance(self.chance.randrange(NUM_INSTANCES))
        model = server.model()
        assert model is not None
        os.kill(model.ready_pids[0], signal.SIGKILL)
        _until(server.is_ready, lambda is_ready: not is_ready)

    def kill_jvm(self) -> None:
        """The supervisor starts another server."""
        pid = self.instance(self.chance.randrange(NUM_INSTANCES)).pid
        assert pid is not None
        before = self.num_restarts()
        os.kill(pid, signal.SIGKILL)
        _until(self.num_restarts, lambda number: number > before)

    def stop_instance(self) -> None:
        """Stop an instance's processes, as a machine that swaps: the supervisor notices."""
        server = self.instance(self.chance.randrange(NUM_INSTANCES))
        frontend = psutil.Process(server.pid)
        whole = [frontend, *frontend.children()] if self.chance.random() < 0.5 else [frontend]
        before = self.num_restarts()
        for process in whole:
            process.suspend()
        _until(self.num_restarts, lambda number: number > before)

    def kill_gateway(self) -> None:
        """A service manager starts another one; that is us."""
        gateway = GatewayProcess.find(self._gateway_dir)
        assert gateway is not None
        os.kill(gateway.pid, signal.SIGKILL)
        self.start()

    def fill_disk(self, for_s: float = 20.0) -> None:
        """Fill the disk that the instances' state is on, for a while; kill a server meanwhile."""
        filler = self.run_dir / "0" / "logs" / "filler"
        with suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(1 << 20))
                file.flush()
        time.sleep(for_s / 2)
        self.kill_jvm()
        time.sleep(for_s / 2)
        filler.unlink()

    def replace_archive(self) -> None:
        """Build the archive anew in place of the one that is served, and take it by a restart."""
        build_in = self.folder / "new"
        build_in.mkdir(exist_ok=True)
        new = build_quick_archive(build_in, {}, self._format)
        os.replace(new, self.archive)
        self.restart()

    def restart(self) -> None:
        """One instance after another, as ``make restart`` does."""
        self._command("restart", "--run-dir", str(self.run_dir))

    @property
    def _haproxy_dir(self) -> Path:
        return self.run_dir.with_name(f"{self.run_dir.name}-haproxy")

    def _command(self, *arguments: str) -> None:
        run = subprocess.run(
            [sys.executable, "-m", "diffusers_torchserve", *arguments],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
        )
        assert run.returncode == 0, f"{arguments[0]}: {run.stdout}{run.stderr}"


@contextmanager
def running_site(folder: Path, run_dir: Path) -> Iterator[Site]:
    """Run one inside the block; READY when it begins, stopped when it ends."""
    site = Site(folder, run_dir)
    try:
        site.start()
        yield site
    finally:
        site.stop()


def _until(ask: Callable[[], T], is_enough: Callable[[T], bool]) -> None:
    until_s = time.monotonic() + _BACK_TIMEOUT_S
    while not is_enough(ask()):
        assert time.monotonic() < until_s, "nobody noticed"
        time.sleep(0.2)


def _pss(process: psutil.Process) -> int:
    return int(process.memory_full_info().pss)


assert MODEL == "stable_diffusion"  # clients ask for it by name
