"""Parses JSON and YAML that others wrote."""

from __future__ import annotations

from typing import Any

import yaml

from handler.errors import ConfigError
from handler.loading.documents import parse_json

__all__ = ["parse_json", "parse_yaml"]


def parse_yaml(text: str | bytes, label: str) -> Any:
    """Return what the YAML `text` says. Raises: ConfigError, which begins with `label`."""
    try:
        return yaml.safe_load(text)
    except Exception as error:
        # PyYAML lets pass what Python raises about a value: any kind of error, as for a 99th day.
        raise ConfigError(f"{label} is not YAML: {error}") from error
