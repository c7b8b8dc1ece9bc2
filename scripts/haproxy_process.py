"""HAProxy in front of the gateway and the instances of a host: start it, find it, stop it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from scripts.background import BackgroundProcess, last_lines, wake
from scripts.errors import ServerError
from scripts.hints import option
from scripts.repository import REPOSITORY
from scripts.torchserve.haproxy_socket import admin_socket
from scripts.torchserve.options import LOOPBACK, can_bind, is_loopback

__all__ = ["GrpcInstance", "HaproxyOptions", "HaproxyProcess", "instances_text"]

_FOLDER = REPOSITORY / "deploy" / "haproxy"
_CONFIG, _INSTANCES = _FOLDER / "haproxy.cfg", _FOLDER / "instances.cfg"
_START_TIMEOUT_S = 15.0
_POLL_S = 0.05
_ALL_ADDRESSES = "0.0.0.0"
_CERTIFICATE_DAYS = 365


@dataclass(frozen=True, slots=True)
class GrpcInstance:
    """An instance that gRPC goes to; `http_port` is asked whether its worker takes requests."""

    name: str
    """What HAProxy calls it."""
    grpc_port: int
    http_port: int
    model: str
    auth: bool = False
    """Whether it asks for keys."""


@dataclass(frozen=True, slots=True)
class HaproxyOptions:
    """What one HAProxy runs with. `certificate`: with its key; None makes one for this host."""

    state_dir: Path
    gateway: str
    """``host:port``."""
    instances: tuple[GrpcInstance, ...]
    port: int = 8443
    metrics: str = "127.0.0.1:8405"
    certificate: Path | None = None
    address: str = LOOPBACK

    def fingerprint(self) -> str:
        """Return a digest of all that a running HAProxy depends on."""
        text = [str(self), _CONFIG.read_text(), instances_text(self.instances)]
        return hashlib.sha256(json.dumps(text).encode()).hexdigest()


def instances_text(instances: Sequence[GrpcInstance]) -> str:
    """Return the file that names the gRPC instances: the shipped one, with these in it.

    Those of another model than the first one's are left out: one backend is of one model.
    """
    text = _INSTANCES.read_text()
    head, _, _ = text.partition("    server ")
    own = [each for each in instances if each.model == instances[0].model]
    if own:
        head = head.replace("/predictions/stable_diffusion", f"/predictions/{own[0].model}")
    lines = [
        f"    server {each.name} {LOOPBACK}:{each.grpc_port} check port {each.http_port}\n"
        for each in own
    ]
    if own and own[0].auth:
        # A check has one text for all of them, and every instance has keys of its own, new ones
        # with each start: what it refuses says at least that its frontend is there.
        head = head.replace("expect status 404", "expect rstatus ^(404|40[013])$")
    return head + "".join(lines)


class HaproxyProcess(BackgroundProcess):
    """One HAProxy in the background, by its state folder; the process is its master."""

    name = "haproxy"

    @property
    def certificate(self) -> Path:
        """The file with its certificate."""
        return Path(self.saved["certificate"])

    @classmethod
    def start(cls, options: HaproxyOptions) -> HaproxyProcess:
        """Start one and return when it listens. Raises: ServerError; nothing is left then."""
        program = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
        if program is None:
            raise ServerError("HAProxy is not installed: apt-get install haproxy (2.6 or later)")
        ports = (options.port, int(options.metrics.rpartition(":")[2]))
        if taken := [str(port) for port in ports if not can_bind(port)]:
            raise ServerError(
                f"taken by another process: port {', '.join(taken)}; stop that one, or choose "
                f"others: {option('haproxy_port')}, {option('haproxy_metrics')}"
            )
        state_dir = options.state_dir
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        certificate = (options.certificate or _own_certificate(state_dir)).resolve()
        instances = state_dir / "instances.cfg"
        instances.write_text(instances_text(options.instances))
        environment = {
            **os.environ,
            "HAPROXY_ADDRESS": options.address,
            "HAPROXY_PORT": str(options.port),
            "HAPROXY_CERT": str(certificate),
            "HAPROXY_GATEWAY": options.gateway,
            "HAPROXY_METRICS": options.metrics,
            "HAPROXY_SOCKET": str(admin_socket(state_dir)),
        }
        return cls.launch(
            [program, "-W", "-f", str(_CONFIG), "-f", str(instances)],
            environment,
            state_dir,
            partial(_wait_until_it_listens, options.address, options.port),
            certificate=str(certificate),
            started_as=options.fingerprint(),
        )

    def end(self, timeout_s: float) -> None:
        """Take no more connections, let requests finish, end; by force after `timeout_s`."""
        family = [self.process]
        with suppress(psutil.NoSuchProcess):  # it may have ended already
            family += self.process.children(recursive=True)
            self.process.send_signal(signal.SIGUSR1)
        for process in family:
            wake(process)
        _, alive = psutil.wait_procs(family, timeout=timeout_s)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=10)


def _own_certificate(state_dir: Path) -> Path:
    """Make a certificate for this host, unless there is one. Raises: ServerError."""
    target = state_dir / "certificate.pem"
    if target.exists():
        return target
    names = f"subjectAltName=DNS:localhost,DNS:{socket.gethostname()},IP:{LOOPBACK}"
    key, certificate = state_dir / ".key.part", state_dir / ".certificate.part"
    command = [
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
        *("-nodes", "-days", str(_CERTIFICATE_DAYS), "-subj", "/CN=localhost", "-addext", names),
        *("-keyout", str(key), "-out", str(certificate)),
    ]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise ServerError("openssl made no certificate", run.stderr)
        both = certificate.read_text() + key.read_text()
        key.write_text(both)
        key.chmod(0o600)
        key.replace(target)
    except FileNotFoundError:
        raise ServerError(
            f"openssl is not installed: apt-get install openssl, or give {option('haproxy_cert')}"
        ) from None
    finally:
        key.unlink(missing_ok=True)
        certificate.unlink(missing_ok=True)
    return target


def _wait_until_it_listens(
    address: str, port: int, launched: subprocess.Popen[bytes], log_file: Path, begins_at: int
) -> str:
    """Return its URL, at which it may not find a gateway yet."""
    is_local = address == _ALL_ADDRESSES or is_loopback(address)
    until_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < until_s:
        if launched.poll() is not None:
            raise ServerError("HAProxy did not start", last_lines(log_file, begins_at))
        with socket.socket() as probe:
            if probe.connect_ex((LOOPBACK if is_local else address, port)) == 0:
                return f"https://{'localhost' if is_local else address}:{port}"
        time.sleep(_POLL_S)
    raise ServerError(f"HAProxy did not listen on port {port}; {log_file} says more")
