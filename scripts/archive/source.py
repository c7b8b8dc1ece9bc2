"""Finds out where a pipeline folder came from."""

from __future__ import annotations

import json
import os
from pathlib import Path

from handler.errors import ArchiveError
from scripts.documents import parse_json

__all__ = ["find_source", "read_source_note", "write_source_note"]

_NOTE = ".source.json"


def write_source_note(folder: Path, model_id: str, revision: str, *, is_complete: bool) -> None:
    """Note in `folder` which model is downloaded into it, and whether all of it is there."""
    note = {"model_id": model_id, "revision": revision, "is_complete": is_complete}
    part = folder / f"{_NOTE}.part"
    part.write_text(json.dumps(note) + "\n")
    os.replace(part, folder / _NOTE)


def read_source_note(folder: Path) -> dict[str, object] | None:
    """Return what `write_source_note` wrote in `folder`; None where it did not."""
    try:
        note = parse_json((folder / _NOTE).read_bytes(), _NOTE)
    except (FileNotFoundError, ArchiveError):
        return None
    return note if isinstance(note, dict) else None


def find_source(folder: Path) -> dict[str, str]:
    """Say where `folder` came from: what download_weights noted, or its place in the hub's cache.

    A plain folder is called a folder and no more: its path would differ from desk to desk.
    """
    note = read_source_note(folder)
    if note is not None:
        return {key: str(note.get(key)) for key in ("model_id", "revision")}
    parts = folder.absolute().parts
    if len(parts) >= 3 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        model_id = parts[-3].removeprefix("models--").replace("--", "/")
        return {"model_id": model_id, "revision": parts[-1]}
    return {"kind": "folder"}
