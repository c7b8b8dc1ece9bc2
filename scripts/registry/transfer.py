"""Uploads and downloads of blobs that go on where they stopped."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import requests

from scripts.console import Progress
from scripts.errors import RegistryError
from scripts.registry.client import RegistryClient

__all__ = ["Blob", "Stopped", "Uploads", "fetch_blob", "push_blob"]

_CHUNK_BYTES = 1 << 20
_PAUSES_S = (0.5, 2.0, 5.0, 10.0)
_PASSING = (408, 429, 500, 502, 503, 504)
Pause = Callable[[float], object]


class Blob(Protocol):
    """Bytes with a digest, which can be read from any of them on."""

    @property
    def digest(self) -> str:
        """The blob's name."""
        ...

    @property
    def size_bytes(self) -> int:
        """How many bytes it has."""
        ...

    def chunks(self, start: int = 0) -> Iterator[bytes]:
        """Yield its bytes from `start` on."""
        ...


class Stopped(Exception):
    """The transfer was given up because another one failed, or the user wants no more."""


@dataclass(frozen=True, slots=True)
class _Rest:
    """What of a blob is sent: `progress` hears of it; ended where `stopped` is set."""

    blob: Blob
    start: int
    progress: Progress
    stopped: threading.Event

    def __len__(self) -> int:
        return self.blob.size_bytes - self.start

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self.blob.chunks(self.start):
            if self.stopped.is_set():
                raise Stopped
            yield chunk
            self.progress(len(chunk))


@dataclass(slots=True)
class Uploads:
    """The sessions of uploads that are not finished, kept in `path` for the next attempt."""

    path: Path
    _known: dict[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        with suppress(OSError, ValueError):
            known = json.loads(self.path.read_text())
            self._known = {str(key): str(value) for key, value in known.items()}

    def find(self, key: str) -> str | None:
        """Return the address of the session `key`."""
        return self._known.get(key)

    def keep(self, key: str, address: str | None) -> None:
        """Keep the address of the session `key`; None forgets it."""
        with self._lock:
            self._known.pop(key, None)
            if address is not None:
                self._known[key] = address
            if self._known:
                self.path.touch(mode=0o600)
                self.path.write_text(json.dumps(self._known))
            else:
                self.path.unlink(missing_ok=True)


def push_blob(
    client: RegistryClient,
    blob: Blob,
    uploads: Uploads,
    progress: Progress,
    stopped: threading.Event,
    pause: Pause = time.sleep,
) -> None:
    """Upload `blob`, from where the registry has it already.

    Raises: RegistryError, after several attempts.
    """
    key = f"{client.address}@{blob.digest}"
    left = list(_PAUSES_S)
    told = 0  # bytes that `progress` has heard of
    start = 0

    def tell(num_bytes: int) -> None:
        nonlocal told
        told += num_bytes
        progress(num_bytes)

    while True:
        try:
            address, start = _session(client, uploads, key)
            tell(start - told)
            if start < blob.size_bytes:
                address = _send(client, address, _Rest(blob, start, tell, stopped))
            _finish(client, address, blob.digest)
            uploads.keep(key, None)
            return
        except (requests.RequestException, RegistryError) as error:
            if isinstance(error, RegistryError):
                uploads.keep(key, None)  # the registry does not go on with it
                if not start and error.status not in _PASSING:
                    raise
            if not left or stopped.is_set():
                raise _failed(client, "push", error) from error
            pause(left.pop(0))


def _send(client: RegistryClient, address: str, rest: _Rest) -> str:
    """Upload `rest`; return where the upload is finished."""
    headers = {"Content-Type": "application/octet-stream"}
    if rest.start:
        headers["Content-Range"] = f"{rest.start}-{rest.blob.size_bytes - 1}"
    with client.request("PATCH", address, wanted=(202,), headers=headers, body=rest) as reply:
        return _location(reply, address)


def _session(client: RegistryClient, uploads: Uploads, key: str) -> tuple[str, int]:
    """Return the address of an upload and the number of bytes that the registry has of it."""
    known = uploads.find(key)
    if known is not None:
        with client.request("GET", known, wanted=(204, 400, 404, 405)) as reply:
            if reply.status_code == 204:
                # An empty upload says 0-0, as one of a single byte does.
                last = int(reply.headers.get("Range", "0-0").rpartition("-")[2] or 0)
                address = _location(reply, known)
                uploads.keep(key, address)
                return address, last + 1 if last else 0
    with client.request("POST", "blobs/uploads/", wanted=(202,), body=b"") as reply:
        address = _location(reply, None)
        uploads.keep(key, address)
        return address, 0


def _location(reply: requests.Response, otherwise: str | None) -> str:
    where = reply.headers.get("Location") or otherwise
    if where is None:
        raise RegistryError(f"{reply.url}: the registry does not say where an upload goes")
    return requests.compat.urljoin(reply.url, where)


def _finish(client: RegistryClient, address: str, digest: str) -> None:
    mark = "&" if "?" in address else "?"
    with client.request("PUT", f"{address}{mark}digest={digest}", wanted=(201,), body=b""):
        pass


def fetch_blob(
    client: RegistryClient,
    digest: str,
    size_bytes: int,
    write: Callable[[bytes, int], object],
    done: bytes | Iterator[bytes] = b"",
    *,
    stopped: threading.Event,
    pause: Pause = time.sleep,
) -> None:
    """Download a blob of exactly `size_bytes` through ``write(chunk, offset)``; check its digest.

    `done` are its first bytes, which are there already. Raises: RegistryError.
    """
    sha256 = hashlib.sha256()
    at = 0
    for chunk in [done] if isinstance(done, bytes) else done:
        sha256.update(chunk)
        at += len(chunk)
    left = list(_PAUSES_S)
    while at < size_bytes:
        try:
            for chunk in _rest(client, digest, at):
                if stopped.is_set():
                    raise Stopped
                if at + len(chunk) > size_bytes:
                    raise RegistryError(f"{digest} is longer than the {size_bytes} bytes it claims")
                sha256.update(chunk)
                write(chunk, at)
                at += len(chunk)
            if at < size_bytes:
                raise requests.ConnectionError(f"{digest} ends after {at} of {size_bytes} bytes")
        except (requests.RequestException, RegistryError) as error:
            is_final = isinstance(error, RegistryError) and error.status not in _PASSING
            if is_final or not left or stopped.is_set():
                raise _failed(client, "pull", error) from error
            pause(left.pop(0))
    if f"sha256:{sha256.hexdigest()}" != digest:
        raise RegistryError(f"{client.reference}: what the registry sent as {digest} is not that")


def _rest(client: RegistryClient, digest: str, start: int) -> Iterator[bytes]:
    """Yield the bytes of a blob from `start` on, also where the registry sends all of them."""
    headers = {"Range": f"bytes={start}-"} if start else {}
    reply = client.request("GET", f"blobs/{digest}", wanted=(200, 206), headers=headers)
    with reply:
        skipped = start if reply.status_code == 200 else 0
        for chunk in reply.iter_content(_CHUNK_BYTES):
            if skipped >= len(chunk):
                skipped -= len(chunk)
                continue
            yield chunk[skipped:]
            skipped = 0


def _failed(client: RegistryClient, verb: str, error: Exception) -> RegistryError:
    if isinstance(error, RegistryError):
        return error
    return RegistryError(
        f"{client.reference}: {verb} stopped: {error}; the same command goes on from there"
    )
