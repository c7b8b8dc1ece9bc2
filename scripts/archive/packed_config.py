"""Makes the configuration that an archive is packed with, out of whichever it is based on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from handler.config import HandlerConfig
from handler.errors import ConfigError
from scripts.archive.fitted_settings import fit_settings, settings_within, with_settings
from scripts.archive.manifest import CONFIG_NAME
from scripts.archive.packing_checks import Examined
from scripts.documents import parse_yaml
from scripts.errors import UsageError
from scripts.repository import REPOSITORY

__all__ = ["pack_config"]


def pack_config(
    own: Path | None,
    kept: tuple[Path, bytes] | None,
    settings: Mapping[str, object],
    examined: Examined | None,
) -> tuple[bytes, HandlerConfig]:
    """Return the configuration file, and what it says, checked as the worker will check it.

    It is the user's `own`, else the one `kept` of another archive (where it is, and its bytes),
    else the shipped one: with comments and all, but for what `settings` and the defaults of the
    model that was `examined` change. One that is kept has such defaults already, which cannot be
    told from the user's will: only `settings` change it.

    Raises: ArchiveError, where the model does not do what it asks for; ConfigError, UsageError.
    """
    path, data, defaults = _base(own, kept, {} if examined is None else examined.defaults)
    config = parse_yaml(data, str(path)) or {}
    if not isinstance(config, dict):
        raise ConfigError(f"{path} does not hold keys and values")
    section = config.get("handler") or {}
    hint = ""
    if isinstance(section, dict):
        if own is None and kept is not None:
            hint = _hint(section, settings)
        changes = fit_settings(section, settings, defaults, is_chosen=own is not None)
        data, section = with_settings(data, changes), {**section, **changes}
    try:
        handler = HandlerConfig.from_mapping(section)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}{hint}") from error
    if examined is not None:
        examined.check_settings(handler)
    return data, handler


def _hint(section: Mapping[str, Any], settings: Mapping[str, object]) -> str:
    """Say which settings a kept configuration needs beside those that limit what it has."""
    needed = settings_within(section, settings)
    flags = " ".join(f"--set {name}={value}" for name, value in needed.items())
    return f"; the archive has defaults beyond that: add {flags}" if flags else ""


def _base(
    own: Path | None, kept: tuple[Path, bytes] | None, defaults: Mapping[str, int | float]
) -> tuple[Path, bytes, Mapping[str, int | float]]:
    """Return the file to start from, its bytes, and the model's defaults that it may get."""
    if own is None and kept is not None:
        return *kept, {}
    path = own or REPOSITORY / "config" / CONFIG_NAME
    if not path.is_file():
        raise UsageError(f"{path} is missing: the model's configuration")
    return path, path.read_bytes(), defaults
