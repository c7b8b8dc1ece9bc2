"""Where this repository lies: handler sources, configuration, the embedded pipeline."""

from __future__ import annotations

from pathlib import Path

__all__ = ["REPOSITORY"]

REPOSITORY = Path(__file__).resolve().parent.parent
