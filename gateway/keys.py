"""The keys that clients send, and what each may do; only their hashes are kept.

    python -m gateway.keys --name NAME            adds a key to config/keys and shows it once

A key has 256 random bits, so that its SHA-256 alone gives nothing away.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import os
import re
import secrets
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from gateway.file_stamps import file_stamp
from gateway.setting_tables import SettingProblems, read_checked
from handler import config_checks as allow
from handler.config_checks import Check
from handler.errors import ConfigError
from handler.messages import show

__all__ = ["Key", "KeyRing", "add_key", "how_to_make", "main", "read_keys"]

_IS_CLONE = (Path(__file__).parents[1] / "Makefile").is_file()
_DEFAULT_FILE = Path("config/keys")
_PREFIX = "dts-"
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_HEADING = "# The gateway's keys, by name; docs/gateway.md says what each may have.\n"


@dataclass(frozen=True, slots=True)
class Key:
    """A key and its limits; None is no limit."""

    name: str
    hash: str
    requests_per_minute: int | None = None
    concurrency: int | None = None
    """Requests at a time."""
    max_pixels: int | None = None
    """Height × width of one picture."""
    max_steps: int | None = None
    models: tuple[str, ...] | None = None

    @property
    def limits_pictures(self) -> bool:
        """Whether a picture must be measured before it is drawn."""
        return self.max_pixels is not None or self.max_steps is not None


def _texts() -> Check:
    def convert(value: object) -> object:
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            raise ValueError
        return tuple(value)

    return Check("a list of names", "", convert)


def _hash() -> Check:
    def convert(value: object) -> object:
        if not isinstance(value, str) or not _HASH.fullmatch(value):
            raise ValueError
        return value

    return Check("sha256: and 64 hexadecimal digits", "", convert)


_CHECKS: Mapping[str, Check] = {
    "hash": _hash(),
    "requests_per_minute": allow.optional(allow.integer(1, 1_000_000)),
    "concurrency": allow.optional(allow.integer(1, 100_000)),
    "max_pixels": allow.optional(allow.integer(64, 2**28)),
    "max_steps": allow.optional(allow.integer(1, 1000)),
    "models": allow.optional(_texts()),
}


def how_to_make(path: Path) -> str:
    """Return the command that makes a key in a file: in a clone, or where this is installed."""
    command = "make key NAME=…" if _IS_CLONE else "diffusers-torchserve key --name …"
    if path == _DEFAULT_FILE:
        return command
    file = f"--file {shlex.quote(str(path))}"
    return f"{command} ARGS={shlex.quote(file)}" if _IS_CLONE else f"{command} {file}"


def read_keys(path: Path) -> tuple[Key, ...]:
    """Return the keys in a file; none where there is no such file.

    Raises:
        ConfigError: names every problem.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if content is None:
        return ()
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: must be names and their limits, not {show(content)}")
    problems: list[str] = []
    keys = [_read_key(name, entry, path, problems) for name, entry in content.items()]
    if problems:
        raise ConfigError("\n  ".join([f"{path} is wrong:", *problems]))
    return tuple(key for key in keys if key is not None)


def _read_key(name: object, entry: object, path: Path, problems: list[str]) -> Key | None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        problems.append(f"{show(name)}: is not a name; allowed are A-Z a-z 0-9 . _ @ -")
        return None
    if not isinstance(entry, Mapping) or "hash" not in entry:
        problems.append(f"{name}: must have a hash, which `{how_to_make(path)}` writes")
        return None
    try:
        return Key(name, **read_checked(_CHECKS, entry))
    except SettingProblems as wrong:
        problems += [f"{name}: {problem}" for problem in wrong.problems]
        return None


class KeyRing:
    """The keys of a file, read again when it changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: object = None
        self._keys: tuple[Key, ...] = ()
        self.refresh()

    def refresh(self) -> None:
        """Read the file if it has changed. Raises: ConfigError, and the keys stay as they were."""
        seen = file_stamp(self._path)
        if seen != self._seen:
            self._seen = seen
            self._keys = read_keys(self._path)

    def find(self, sent: str) -> Key | None:
        """The key that was sent; takes as long whichever it is, and whether it is one or not."""
        digest = _digest(sent)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.hash, digest):
                found = key
        return found


def add_key(path: Path, name: str, limits: Mapping[str, object]) -> str:
    """Write a new key into a file, readable by its owner alone, and return the key itself.

    Raises:
        ConfigError: the file is wrong, or has a key of this name.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{show(name)} is not a name; allowed are A-Z a-z 0-9 . _ @ -")
    if any(key.name == name for key in read_keys(path)):
        raise ConfigError(
            f"{path} has a key {name} already; remove it there, or choose another name"
        )
    secret = _PREFIX + secrets.token_urlsafe(32)
    entry = {"hash": _digest(secret), **{k: v for k, v in limits.items() if v is not None}}
    text = path.read_text(encoding="utf-8") if path.exists() else _HEADING
    text = text if text.endswith("\n") or not text else text + "\n"
    text += yaml.safe_dump({name: entry}, sort_keys=False)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(
        os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
    ) as f:
        f.write(text)
    try:
        read_keys(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return secret


def _digest(sent: str) -> str:
    return "sha256:" + hashlib.sha256(sent.encode("utf-8", "surrogatepass")).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """Make a key; return 0 done, 1 failed, 2 misused."""
    parser = argparse.ArgumentParser(prog="python -m gateway.keys", description="Make a key.")
    parser.add_argument("--name", required=True, help="whose it is")
    parser.add_argument("--file", type=Path, default=_DEFAULT_FILE, help=str(_DEFAULT_FILE))
    for field in fields(Key):
        if field.name in ("requests_per_minute", "concurrency", "max_pixels", "max_steps"):
            option = "--" + field.name.replace("_", "-")
            parser.add_argument(option, type=int, help="no limit if left out")
    parser.add_argument("--models", nargs="+", help="all if left out")
    try:
        arguments = vars(parser.parse_args(argv))
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    name, path = arguments.pop("name"), arguments.pop("file")
    try:
        secret = add_key(path, name, arguments)
    except (ConfigError, OSError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"{secret}\n", end="")
    print(
        f"That is the key of {name}; it is shown this once. {path} has its hash and its limits.",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
