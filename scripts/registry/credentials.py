"""Credentials of a registry, from where ``docker login`` and ``podman login`` put them."""

from __future__ import annotations

import base64
import binascii
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from handler.errors import ArchiveError
from scripts.documents import parse_json
from scripts.errors import RegistryError

__all__ = ["Credentials", "find_credentials"]

_DOCKER_HUB = "https://index.docker.io/v1/"
_IDENTITY_TOKEN = "<token>"  # what a credential helper calls the user of one


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user with a password, or an identity token."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)


def find_credentials(host: str) -> Credentials | None:
    """Return what docker's config.json has for `host`, None where it has nothing.

    The file is ``$DOCKER_CONFIG/config.json``, else ``~/.docker/config.json``; it may name a
    credential helper, which is asked then. Raises: RegistryError, where it cannot be used.
    """
    folder = os.environ.get("DOCKER_CONFIG")
    path = Path(folder) if folder else Path.home() / ".docker"
    path /= "config.json"
    if not path.is_file():
        return None
    try:
        config = parse_json(path.read_bytes(), str(path))
    except ArchiveError as error:
        raise RegistryError(str(error)) from error
    config = config if isinstance(config, dict) else {}
    key = _DOCKER_HUB if host in ("docker.io", "index.docker.io") else host
    helper = _mapping(config.get("credHelpers")).get(key) or config.get("credsStore")
    if isinstance(helper, str) and helper:
        found = _ask_helper(helper, key)
        if found is not None:
            return found
    for name, entry in _mapping(config.get("auths")).items():
        if _bare(name) == _bare(key) and isinstance(entry, dict) and entry:
            return _read_entry(entry, f"{path}: {name}")
    return None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _bare(name: str) -> str:
    """Return the host in an entry's name: it may be an address with a scheme and a path."""
    return name.removeprefix("https://").removeprefix("http://").partition("/")[0]


def _read_entry(entry: Mapping[str, Any], label: str) -> Credentials:
    if token := entry.get("identitytoken"):
        return Credentials(identity_token=str(token))
    if "auth" in entry:
        try:
            text = base64.b64decode(str(entry["auth"]), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError) as error:
            raise RegistryError(f"{label} has an auth that cannot be read: log in again") from error
        username, _, password = text.partition(":")
        return Credentials(username, password.rstrip("\0"))
    return Credentials(str(entry.get("username", "")), str(entry.get("password", "")))


def _ask_helper(helper: str, key: str) -> Credentials | None:
    program = f"docker-credential-{helper}"
    if "/" in helper:
        raise RegistryError(f"docker's config.json names a credential helper {helper!r}")
    try:
        run = subprocess.run(
            [program, "get"], input=key, capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RegistryError(f"{program}, which docker's config.json names: {error}") from error
    if run.returncode != 0:
        return None  # it has nothing for this registry
    try:
        answer = json.loads(run.stdout)
        username, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, KeyError, TypeError) as error:
        raise RegistryError(f"{program} answers what is not a credential") from error
    if username == _IDENTITY_TOKEN:
        return Credentials(identity_token=secret)
    return Credentials(username, secret)
