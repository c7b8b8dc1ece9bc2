"""Names of what is in a registry: ``registry/name:tag`` and ``registry/name@sha256:…``."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from scripts.errors import UsageError

__all__ = ["DIGEST", "Reference"]

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# As the OCI distribution specification 1.1 has them.
_NAME = re.compile(
    r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*"
)
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_HOST = re.compile(r"[A-Za-z0-9.-]+(?::[0-9]{1,5})?|\[[0-9a-fA-F:]+\](?::[0-9]{1,5})?")
_DOCKER_HUB = "registry-1.docker.io"


@dataclass(frozen=True, slots=True)
class Reference:
    """What `tag` or `digest` names in the repository `name` of the registry `host`."""

    host: str
    name: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read ``registry/name[:tag][@digest]``. Raises: UsageError."""
        rest, _, digest = text.partition("@")
        host, _, path = rest.partition("/")
        name, colon, tag = path.partition(":")
        is_host = _HOST.fullmatch(host) and ("." in host or ":" in host or host == "localhost")
        if not is_host or not _NAME.fullmatch(name) or len(name) > 255:
            raise UsageError(
                f"{text!r} is not the name of an image: wanted registry/name:tag or "
                "registry/name@sha256:…, such as ghcr.io/me/sd:1.0 (names are in lower case)"
            )
        if colon and not _TAG.fullmatch(tag):
            raise UsageError(f"{text!r}: {tag!r} is not a tag")
        if "@" in text and not DIGEST.fullmatch(digest):
            raise UsageError(f"{text!r}: {digest!r} is not sha256: and 64 hexadecimal digits")
        return cls(host, name, tag or None, digest or None)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.host}/{self.name}{tag}{f'@{self.digest}' if self.digest else ''}"

    @property
    def api_host(self) -> str:
        """Where the registry is asked."""
        return _DOCKER_HUB if self.host in ("docker.io", "index.docker.io") else self.host

    @property
    def is_loopback(self) -> bool:
        """Say whether the registry is on this machine."""
        bare = re.sub(r":[0-9]+$", "", self.host).strip("[]")
        try:
            return bare == "localhost" or ipaddress.ip_address(bare).is_loopback
        except ValueError:
            return False
