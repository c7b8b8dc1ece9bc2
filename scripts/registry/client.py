"""One repository of an OCI registry: requests with authorization, manifests, what is there.

Source: OCI distribution specification 1.1. Why not the package oras (0.2.43): it reads a blob into
memory to upload it, checks no digest of what it downloads, and does not go on where it stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urljoin

import requests

from scripts.errors import RegistryError
from scripts.registry.auth import RegistryAuth
from scripts.registry.credentials import find_credentials
from scripts.registry.reference import Reference

__all__ = ["INDEX_TYPE", "MANIFEST_TYPE", "Body", "Manifest", "RegistryClient", "digest_of"]

MAX_MANIFEST_BYTES = 4 << 20  # what the specification asks registries to take at least
_TIMEOUT_S = (10.0, 120.0)
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"


class Body(Protocol):
    """Bytes that can be sent once or again, in pieces."""

    def __len__(self) -> int:
        """Return how many bytes there are."""
        ...

    def __iter__(self) -> Iterator[bytes]:
        """Yield them from the first one on."""
        ...


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest or an index, as its bytes."""

    data: bytes
    media_type: str

    @property
    def digest(self) -> str:
        """Its name in the registry."""
        return digest_of(self.data)


def digest_of(data: bytes) -> str:
    """Return the digest of `data` as OCI writes it."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class RegistryClient:
    """The repository that `reference` is in; threads may share it.

    Plain HTTP is for registries on this machine, and for others where `is_insecure` says so.
    """

    def __init__(self, reference: Reference, *, is_insecure: bool = False) -> None:
        self.reference = reference
        may_be_plain = is_insecure or reference.is_loopback
        origin = f"{'http' if may_be_plain else 'https'}://{reference.api_host}"
        self.address = f"{origin}/v2/{reference.name}/"
        self._session = requests.Session()
        self._session.trust_env = not reference.is_loopback  # no proxy leads to this machine
        self._session.headers["User-Agent"] = "diffusers-torchserve"
        self._auth = RegistryAuth(
            origin, find_credentials(reference.host), is_insecure=may_be_plain
        )
        self._session.auth = self._auth

    def __enter__(self) -> RegistryClient:
        return self

    def __exit__(self, *error: object) -> None:
        self._session.close()

    def request(
        self,
        method: str,
        address: str,
        *,
        wanted: Collection[int],
        headers: Mapping[str, str] | None = None,
        body: Body | bytes | None = None,
    ) -> requests.Response:
        """Return the reply, which is not read yet, to a request for `address` below the repository.

        Raises:
            RegistryError: its status is not one of `wanted`.
            requests.RequestException: there is none.
        """
        url = urljoin(self.address, address)
        all_headers = {"Accept-Encoding": "identity", **(headers or {})}
        for is_last in (False, True):
            reply = self._session.request(
                method, url, headers=all_headers, data=body, stream=True, timeout=_TIMEOUT_S
            )
            if reply.status_code != 401 or is_last or not self._auth.answer(self._session, reply):
                break
            reply.close()
        if reply.status_code not in wanted:
            raise self._refusal(method, reply)
        return reply

    def has_blob(self, digest: str) -> bool:
        """Say whether the repository holds the blob."""
        with (
            self._reached(),
            self.request("HEAD", f"blobs/{digest}", wanted=(200, 404)) as reply,
        ):
            return reply.status_code == 200

    def manifest(self, name: str) -> Manifest:
        """Return the manifest that `name`, a tag or a digest, names; a digest is checked.

        Raises: RegistryError.
        """
        accept = {"Accept": f"{INDEX_TYPE}, {MANIFEST_TYPE}"}
        with (
            self._reached(),
            self.request("GET", f"manifests/{name}", wanted=(200,), headers=accept) as reply,
        ):
            data = bytearray()
            for chunk in reply.iter_content(64 << 10):
                data += chunk
                if len(data) > MAX_MANIFEST_BYTES:
                    raise RegistryError(f"{self.reference}: its manifest is too large")
            media_type = reply.headers.get("Content-Type", "").partition(";")[0].strip()
        found = Manifest(bytes(data), media_type)
        if name.startswith("sha256:") and found.digest != name:
            raise RegistryError(f"{self.reference}: the registry sent {found.digest}, not {name}")
        return found

    def put_manifest(self, manifest: Manifest, name: str | None = None) -> None:
        """Store `manifest` under `name`, a tag, or else under its digest."""
        where = f"manifests/{name or manifest.digest}"
        headers = {"Content-Type": manifest.media_type}
        with self._reached():
            self.request("PUT", where, wanted=(201,), headers=headers, body=manifest.data).close()

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except requests.RequestException as error:
            raise RegistryError(f"{self.reference.host} is not reached: {error}") from error

    def _refusal(self, method: str, reply: requests.Response) -> RegistryError:
        """Return the error that a reply means, in the registry's words where it has any."""
        reason = reply.reason or ""
        try:
            first = reply.json()["errors"][0]
            reason = f"{first.get('code')}: {first.get('message')}"
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            pass  # not as the specification has it
        except requests.RequestException:
            pass  # it ends before its body does
        status = reply.status_code
        reply.close()
        where = f"{self.reference.host}/{self.reference.name}"
        if status in (401, 403):
            host = self.reference.host
            return RegistryError(
                f"{where}: not allowed ({status} {reason}); log in with: docker login {host}",
                status,
            )
        if status == 404:
            return RegistryError(f"{self.reference}: not found ({reason})", status)
        return RegistryError(f"{where}: {method} got {status} {reason}", status)
