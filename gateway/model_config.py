"""What an instance's archive says: limits and defaults of requests, and its batch size."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from handler.config import HandlerConfig
from handler.errors import ConfigError

__all__ = ["ModelConfig", "read_model_config"]

_NAME = "model-config.yaml"
_MAX_BYTES = 1024 * 1024
_SHIPPED_BATCH_SIZE = 128


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the gateway needs of a model-config.yaml."""

    handler: HandlerConfig = field(default_factory=HandlerConfig)
    batch_size: int = _SHIPPED_BATCH_SIZE


def read_model_config(source: Path | None) -> ModelConfig:
    """Read it from an archive, an archive's folder or the file itself; defaults where it has none.

    An archive of somebody else's has no section that we know: it has the defaults too.
    """
    try:
        content: Any = None if source is None else yaml.safe_load(_text(source))
        if not isinstance(content, dict):
            return ModelConfig()
        config = HandlerConfig.from_mapping(content.get("handler"))
        batch_size = content.get("batchSize")
    except (OSError, ValueError, KeyError, yaml.YAMLError, zipfile.BadZipFile, ConfigError):
        return ModelConfig()
    if not isinstance(batch_size, int) or batch_size < 1:
        batch_size = _SHIPPED_BATCH_SIZE
    return ModelConfig(config, batch_size)


def _text(source: Path) -> str:
    if source.is_dir():
        source = source / _NAME
    if source.suffix in (".yaml", ".yml"):
        with source.open("rb") as file:
            return file.read(_MAX_BYTES).decode("utf-8")
    with zipfile.ZipFile(source) as archive, archive.open(_NAME) as member:
        return member.read(_MAX_BYTES).decode("utf-8")
