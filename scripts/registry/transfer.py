"""Uploads and downloads of blobs: attempts, and downloads that go on where they stopped."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlencode

import requests

from scripts.console import Progress
from scripts.errors import RegistryError
from scripts.registry.client import RegistryClient

__all__ = ["Blob", "Stopped", "fetch_blob", "push_blob"]

_CHUNK_BYTES = 1 << 20
PAUSES_S = (0.5, 2.0, 5.0, 10.0)
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
class _Body:
    """A blob as it is sent: `progress` hears of it, and it ends where `stopped` is set."""

    blob: Blob
    progress: Progress
    stopped: threading.Event

    def __len__(self) -> int:
        return self.blob.size_bytes

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self.blob.chunks():
            if self.stopped.is_set():
                raise Stopped
            yield chunk
            self.progress(len(chunk))


def push_blob(
    client: RegistryClient,
    blob: Blob,
    progress: Progress,
    stopped: threading.Event,
    pause: Pause = time.sleep,
) -> None:
    """Upload `blob`, in one request after the one that begins it, as containerd does.

    An upload that is cut begins anew: the reference registry (2.8) refuses to go on with one whose
    last request did not end. Raises: RegistryError, after several attempts.
    """
    left = list(PAUSES_S)
    told = 0  # bytes that `progress` has heard of in this attempt

    def tell(num_bytes: int) -> None:
        nonlocal told
        told += num_bytes
        progress(num_bytes)

    while True:
        try:
            with client.request("POST", "blobs/uploads/", wanted=(202,), body=b"") as reply:
                where = requests.compat.urljoin(reply.url, reply.headers["Location"])
            mark = "&" if "?" in where else "?"
            address = f"{where}{mark}{urlencode({'digest': blob.digest})}"
            headers = {"Content-Type": "application/octet-stream"}
            body = _Body(blob, tell, stopped)
            client.request("PUT", address, wanted=(201,), headers=headers, body=body).close()
            return
        except KeyError as error:
            raise RegistryError(f"{client.reference}: it says not where uploads go") from error
        except (requests.RequestException, RegistryError) as error:
            tell(-told)
            _retry("push", client, error, left, stopped, pause)


def _retry(
    verb: str,
    client: RegistryClient,
    error: requests.RequestException | RegistryError,
    left: list[float],
    stopped: threading.Event,
    pause: Pause,
) -> None:
    """Wait before another attempt. Raises: RegistryError, where there is to be none."""
    if isinstance(error, RegistryError) and error.status not in _PASSING:
        raise error
    if not left or stopped.is_set():
        raise RegistryError(
            f"{client.reference}: {verb} stopped: {error}; the same command goes on from there"
        ) from error
    pause(left.pop(0))


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
    left = list(PAUSES_S)
    while at < size_bytes:
        try:
            with closing(_rest(client, digest, at)) as chunks:
                for chunk in chunks:
                    if stopped.is_set():
                        raise Stopped
                    if at + len(chunk) > size_bytes:
                        raise RegistryError(
                            f"{digest} is longer than the {size_bytes} bytes it claims"
                        )
                    sha256.update(chunk)
                    write(chunk, at)
                    at += len(chunk)
            if at < size_bytes:
                raise requests.ConnectionError(f"{digest} ends after {at} of {size_bytes} bytes")
        except (requests.RequestException, RegistryError) as error:
            _retry("pull", client, error, left, stopped, pause)
    if f"sha256:{sha256.hexdigest()}" != digest:
        raise RegistryError(f"{client.reference}: what the registry sent as {digest} is not that")


def _rest(client: RegistryClient, digest: str, start: int) -> Generator[bytes]:
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
