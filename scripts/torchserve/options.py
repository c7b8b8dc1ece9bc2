"""What one TorchServe instance is before it runs: its archive, ports, address and configuration."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import random
import socket
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
from scripts.repository import REPOSITORY

__all__ = [
    "LOOPBACK",
    "Options",
    "Ports",
    "archive_identity",
    "example_prompt",
    "is_loopback",
]

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Ports:
    """The five TCP ports of an instance."""

    inference: int = 8080
    management: int = 8081
    metrics: int = 8082
    grpc_inference: int = 7070
    grpc_management: int = 7071

    @classmethod
    def starting_at(cls, http: int, grpc: int) -> Ports:
        """Return `http`, +1, +2 and `grpc`, +1. Raises: ServerError when they overlap."""
        ports = cls(http, http + 1, http + 2, grpc, grpc + 1)
        numbers = asdict(ports).values()
        if len(set(numbers)) < 5 or not all(0 < number < 65535 for number in numbers):
            raise ServerError(
                f"PORT={http} (and the two after it) and GRPC_PORT={grpc} (and the "
                "one after it) must be five different ports in 1..65534"
            )
        return ports

    @classmethod
    def free(cls) -> Ports:
        """Return five ports that are free now, below the range that clients' sockets come from."""
        with ExitStack() as held:
            ports: list[int] = []
            while len(ports) < 5:
                candidate = random.SystemRandom().randrange(20_000, 32_000)
                probe = held.enter_context(socket.socket())
                try:
                    probe.bind((LOOPBACK, candidate))
                except OSError:
                    continue
                ports.append(candidate)
            return cls(*ports)

    def taken(self) -> tuple[int, ...]:
        """Return those that another process listens on."""
        return tuple(port for port in asdict(self).values() if not _can_bind(port))


@dataclass(frozen=True, slots=True)
class Options:
    """What one instance serves, and where.

    `properties` are written over those of `config`. Only inference listens on `address`:
    everything else stays on loopback.
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
            self.properties_text(),
            self.log_config.read_text(),
            self.metrics_config.read_text(),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def properties_text(self) -> str:
        """Return the configuration file of this instance: `config`, then what differs."""
        own = {
            "inference_address": f"http://{self.address}:{self.ports.inference}",
            "management_address": f"http://{LOOPBACK}:{self.ports.management}",
            "metrics_address": f"http://{LOOPBACK}:{self.ports.metrics}",
            "grpc_inference_port": str(self.ports.grpc_inference),
            "grpc_management_port": str(self.ports.grpc_management),
            "disable_token_authorization": "false" if self.auth else "true",
            "metrics_config": str(self.metrics_config.resolve()),
            **self.properties,
        }
        lines = "".join(f"{key}={_escape(value)}\n" for key, value in own.items())
        return f"{self.config.read_text()}\n# This instance:\n{lines}"


def archive_identity(archive: Path) -> tuple[str, str]:
    """Return the model name and version in the manifest of an archive: a .mar or a folder.

    Raises: ServerError when it is no archive of TorchServe's.
    """
    try:
        model = _read_json(archive, TORCHSERVE_MANIFEST_NAME)["model"]
        name, version = str(model["modelName"]), str(model["modelVersion"])
    except FileNotFoundError:
        raise ServerError(f"{archive} does not exist; `make archive` builds it") from None
    except (OSError, KeyError, TypeError, ArchiveError) as problem:
        raise ServerError(f"{archive} is no TorchServe archive: {problem}") from problem
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


def _can_bind(port: int) -> bool:
    with socket.socket() as probe:
        # Without this a port whose last connections are in TIME_WAIT looks taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True
