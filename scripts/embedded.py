"""The embedded pipeline: where it lies, and whether a store's archive of it is current."""

from __future__ import annotations

import hashlib
from pathlib import Path

from scripts.errors import UsageError
from scripts.repository import REPOSITORY

__all__ = [
    "EMBEDDED_NAME",
    "EMBEDDED_PIPELINE",
    "EMBEDDED_PROMPT",
    "embedded_archive",
    "forget_embedded",
    "is_current",
    "mark_embedded",
]

EMBEDDED_NAME = "stable_diffusion"
EMBEDDED_PIPELINE = REPOSITORY / "demo" / "pipeline"
EMBEDDED_PROMPT = "a small yellow star on a blue background"
_MARKER = ".embedded"


def embedded_archive(store: Path) -> Path:
    """Return where the archive of the embedded pipeline is in `store`."""
    return store / f"{EMBEDDED_NAME}.mar"


def is_current(store: Path, *, force: bool = False) -> bool:
    """Say whether `store` has the archive that would be packed now.

    Raises: UsageError, where an archive of the user's own has its name and `force` is not given.
    """
    archive, marker = embedded_archive(store), store / _MARKER
    if not archive.exists():
        return False
    if not marker.exists() and not force:
        raise UsageError(
            f"{archive} is an archive of your own: serve it, or pass --force (make: FORCE=1) to "
            "replace it by the embedded one"
        )
    return not force and marker.read_text() == _sources()


def mark_embedded(store: Path) -> None:
    """Say that the archive in `store` is ours, and what it was made from."""
    (store / _MARKER).write_text(_sources())


def forget_embedded(archive: Path) -> None:
    """Say that `archive`, which has just been packed, is the user's own."""
    if archive == embedded_archive(archive.parent):
        (archive.parent / _MARKER).unlink(missing_ok=True)


def _sources() -> str:
    """Return a digest of all that goes into the archive."""
    digest = hashlib.sha256()
    folders = (REPOSITORY / "handler", EMBEDDED_PIPELINE)
    packed = [path for folder in folders for path in folder.rglob("*")]
    for path in sorted([*packed, REPOSITORY / "config" / "model-config.yaml"]):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(REPOSITORY)}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
