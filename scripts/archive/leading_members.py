"""The members that every archive begins with: TorchServe's manifest, the handler, what it needs."""

from __future__ import annotations

import importlib.metadata

from handler.errors import ArchiveError
from scripts.archive.manifest import TORCHSERVE_MANIFEST_NAME, torchserve_manifest
from scripts.repository import REPOSITORY

__all__ = ["leading_members"]

_ENTRY_NAME = "torchserve_entry.py"
_REQUIRED = (
    "accelerate",
    "blake3",
    "diffusers",
    "greenlet",
    "isal",
    "numpy",
    "peft",
    "pillow",
    "safetensors",
    "scipy",
    "torch",
    "torchsde",
    "transformers",
)


def leading_members(name: str, version: str) -> dict[str, bytes]:
    """Return the small members that stand before the weights, by name.

    Raises: ArchiveError, where the handler is not where it belongs.
    """
    package = REPOSITORY / "handler"
    entry = package / _ENTRY_NAME
    if not entry.is_file():
        raise ArchiveError(f"{entry} is missing: the archive's entry module")
    members = {
        TORCHSERVE_MANIFEST_NAME: torchserve_manifest(name, version),
        _ENTRY_NAME: entry.read_bytes(),
        "requirements.txt": _requirements(),
    }
    for path in sorted(package.rglob("*.py")):
        members[path.relative_to(REPOSITORY).as_posix()] = path.read_bytes()
    return members


def _requirements() -> bytes:
    """Return the versions that the archive was made with, as pip reads them."""
    lines = []
    for name in _REQUIRED:
        try:
            version = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
        lines.append(f"{name}=={version}\n")
    return "".join(lines).encode()
