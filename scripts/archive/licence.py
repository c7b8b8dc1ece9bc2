"""Finds the licence of a pipeline in its model card and licence file."""

from __future__ import annotations

from collections.abc import Mapping

from scripts.archive.pipeline_source import PipelineFile

__all__ = ["find_licence"]

_LICENCE_BYTES = 64 << 10


def find_licence(files: Mapping[str, PipelineFile]) -> dict[str, str]:
    """Return what the model card and the licence file among a pipeline's `files` say of it."""
    found: dict[str, str] = {}
    card = _read_text(files, "readme")
    if card.startswith("---"):
        for line in card.split("---")[1].splitlines():
            key, colon, value = line.partition(":")
            if colon and key in ("license", "license_name", "license_link"):
                found[key] = value.strip().strip("\"'")
    text = _read_text(files, "licen") or _section(card)
    if text:
        found["text"] = text
    return found


def _read_text(files: Mapping[str, PipelineFile], prefix: str) -> str:
    for name, file in sorted(files.items()):
        if "/" not in name and name.lower().startswith(prefix):
            return file.read(_LICENCE_BYTES).decode("utf-8", "replace")
    return ""


def _section(card: str) -> str:
    """Return the part of a model card below its heading "License", up to the next heading."""
    kept: list[str] = []
    is_inside = False
    for line in card.splitlines():
        if line.startswith("#"):
            is_inside = line.lstrip("#").strip().lower() in ("license", "licence")
        elif is_inside:
            kept.append(line)
    return "\n".join(kept).strip()
