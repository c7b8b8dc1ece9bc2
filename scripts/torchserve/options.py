"""The options of one TorchServe instance: its archive, ports, addresses and configuration."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import random
import socket
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from handler.errors import ArchiveError
from handler.zips.reader import ZipReader
from scripts.archive.manifest import MANIFEST_NAME, TORCHSERVE_MANIFEST_NAME
from scripts.documents import parse_json
from scripts.errors import ServerError
from scripts.hints import to_run
from scripts.repository import REPOSITORY

__all__ = [
    "INSTANCE_MARK",
    "LOOPBACK",
    "UNREACHABLE",
    "Options",
    "Ports",
    "archive_identity",
    "can_bind",
    "example_prompt",
    "has_own_handler",
    "is_loopback",
]

LOOPBACK = "127.0.0.1"
# TorchServe's gRPC APIs cannot be switched off, and one request to that of management can end the
# service for good. Linux lets a socket listen on the broadcast address and connects nobody to it.
UNREACHABLE = "255.255.255.255"
# In the configuration file of every instance: what follows is this instance's own.
INSTANCE_MARK = "# This instance:"


@dataclass(frozen=True, slots=True)
class Ports:
    """The TCP ports of an instance."""

    inference: int = 8080
    metrics: int = 8082
    grpc_inference: int | None = 7070
    """None: gRPC is off."""

    @classmethod
    def starting_at(cls, http: int, grpc: int | None) -> Ports:
        """Return `http`, `http` + 2 and `grpc`. Raises: ServerError when two are the same."""
        ports = cls(http, http + 2, grpc)
        numbers = ports.numbers
        if len(set(numbers)) < len(numbers) or not all(0 < each < 65536 for each in numbers):
            raise ServerError(
                f"PORT={http} (and {http + 2}, for the metrics) and GRPC_PORT={grpc} must be "
                "different ports in 1..65535"
            )
        return ports

    @classmethod
    def free(cls) -> Ports:
        """Return three ports that are free now, below the range that clients' sockets come from."""
        with ExitStack() as held:
            ports: list[int] = []
            while len(ports) < 3:
                candidate = random.SystemRandom().randrange(20_000, 32_000)
                probe = held.enter_context(socket.socket())
                try:
                    probe.bind((LOOPBACK, candidate))
                except OSError:
                    continue
                ports.append(candidate)
            return cls(*ports)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Those that there are."""
        return tuple(port for port in asdict(self).values() if port is not None)

    def taken(self) -> tuple[int, ...]:
        """Return those that another process listens on."""
        return tuple(port for port in self.numbers if not can_bind(port))


@dataclass(frozen=True, slots=True)
class Options:
    """What one instance serves, and where.

    `properties` are written over those of `config`; `environment` over that of whoever starts it.
    Only inference listens on `address`: metrics stay on loopback, management is a Unix socket in
    the state directory.
    """

    archive: Path
    state_dir: Path
    ports: Ports = field(default_factory=Ports)
    address: str = LOOPBACK
    auth: bool = False
    config: Path = REPOSITORY / "config" / "config.properties"
    log_config: Path = REPOSITORY / "config" / "log4j2.xml"
    metrics_config: Path = REPOSITORY / "config" / "metrics.yaml"
    properties: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """Return a digest of all that a running instance depends on, files' contents included.

        The archive counts by size and time: it may have gigabytes. In a folder the manifest is
        what every build writes anew.
        """
        stat = (
            self.archive / TORCHSERVE_MANIFEST_NAME if self.archive.is_dir() else self.archive
        ).stat()
        parts = [
            str(self.archive.resolve()),
            [stat.st_size, stat.st_mtime_ns],
            self.properties_text(Path("/management.sock")),
            self.log_config.read_text(),
            self.metrics_config.read_text(),
            sorted(self.environment.items()),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def management_address(self, management_socket: Path) -> str:
        """Return where the management API listens, ``unix:/path`` or ``http://host:port``.

        That is `management_socket`, except where `properties` say something else or TorchServe
        has no Unix sockets.
        """
        default = f"unix:{management_socket}"
        if sys.platform != "linux":
            default = f"http://{LOOPBACK}:{self.ports.inference + 1}"
        return self.properties.get("management_address", default)

    def properties_text(self, management_socket: Path) -> str:
        """Return the configuration file of this instance: `config`, then what differs."""
        own = {
            "inference_address": f"http://{self.address}:{self.ports.inference}",
            "management_address": self.management_address(management_socket),
            "metrics_address": f"http://{LOOPBACK}:{self.ports.metrics}",
            **self._grpc_properties(),
            "disable_token_authorization": "false" if self.auth else "true",
            "metrics_config": str(self.metrics_config.resolve()),
            **self.properties,
        }
        lines = "".join(f"{key}={_escape(value)}\n" for key, value in own.items())
        return f"{self.config.read_text()}\n{INSTANCE_MARK}\n{lines}"

    def _grpc_properties(self) -> dict[str, str]:
        can_be_unreachable = can_bind(0, UNREACHABLE)
        management = {"grpc_management_address": UNREACHABLE if can_be_unreachable else LOOPBACK}
        if self.ports.grpc_inference is not None:
            return {**management, "grpc_inference_port": str(self.ports.grpc_inference)}
        if not can_be_unreachable:
            raise ServerError("GRPC_PORT=off needs an address that nobody can reach: Linux has one")
        # Port 0 is any port.
        return {
            **management,
            "grpc_inference_address": UNREACHABLE,
            "grpc_inference_port": "0",
        }


def archive_identity(archive: Path) -> tuple[str, str]:
    """Return the model name and version in the manifest of an archive: a .mar or a folder.

    Raises: ServerError when it is not an archive of TorchServe's.
    """
    try:
        model = _read_json(archive, TORCHSERVE_MANIFEST_NAME)["model"]
        name, version = str(model["modelName"]), str(model["modelVersion"])
    except FileNotFoundError:
        raise ServerError(f"{archive} does not exist; `{to_run('pack')}` builds it") from None
    except (OSError, KeyError, TypeError, ArchiveError) as problem:
        raise ServerError(f"{archive} is not a TorchServe archive: {problem}") from problem
    if not (name + version).isprintable():
        raise ServerError(f"{archive} has a name or version that cannot be shown: {model!a}")
    return name, version


def example_prompt(archive: Path) -> str | None:
    """Return what whoever packed `archive` said that it can draw, if they did."""
    try:
        prompt = _read_json(archive, MANIFEST_NAME).get("smoke_prompt")
    except (OSError, AttributeError, ArchiveError):
        return None
    return prompt if isinstance(prompt, str) else None


def has_own_handler(archive: Path) -> bool:
    """Tell whether `archive` was packed by this repository, so that its handler is ours."""
    try:
        return isinstance(_read_json(archive, MANIFEST_NAME), dict)
    except (OSError, ArchiveError):
        return False


def _read_json(archive: Path, name: str) -> Any:
    if archive.is_dir():
        return parse_json((archive / name).read_bytes(), name)
    with archive.open("rb") as file:
        return parse_json(ZipReader(file).read(name), name)


def is_loopback(address: str) -> bool:
    """Tell whether only this machine reaches `address`. Raises: ServerError if it is not IPv4."""
    if address == "localhost":
        return True
    try:
        return ipaddress.IPv4Address(address).is_loopback
    except ipaddress.AddressValueError:
        raise ServerError(
            f"address {address!r} is not an IPv4 address such as 127.0.0.1 or 0.0.0.0"
        ) from None


def _escape(value: str) -> str:
    """Write a value as Java reads .properties: ISO-8859-1, the rest as UTF-16 in hexadecimal."""
    units = value.replace("\\", "\\\\").encode("utf-16-be")
    codes = [int.from_bytes(units[at : at + 2], "big") for at in range(0, len(units), 2)]
    return "".join(chr(code) if 0x20 <= code < 0x7F else f"\\u{code:04x}" for code in codes)


def can_bind(port: int, address: str = LOOPBACK) -> bool:
    """Whether nobody listens on a port of this machine."""
    with socket.socket() as probe:
        # Without this a port whose last connections are in TIME_WAIT looks taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
        return True
