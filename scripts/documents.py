"""Parses the JSON and the YAML that others wrote; changes with what their parsers raise."""

from __future__ import annotations

import json
from typing import Any

import yaml

from handler.errors import ArchiveError, ConfigError

__all__ = ["parse_json", "parse_yaml"]


def parse_json(text: str | bytes, label: str) -> Any:
    """Return what the JSON `text` says. Raises: ArchiveError, which begins with `label`."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"{label} is no JSON: {error}") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number there")


def parse_yaml(text: str | bytes, label: str) -> Any:
    """Return what the YAML `text` says. Raises: ConfigError, which begins with `label`."""
    try:
        return yaml.safe_load(text)
    except Exception as error:
        # PyYAML lets pass what Python raises about a value: any kind of error, as for a 99th day.
        raise ConfigError(f"{label} is no YAML: {error}") from error
