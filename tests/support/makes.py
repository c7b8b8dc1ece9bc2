"""make, as a person calls it from a shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from scripts.repository import REPOSITORY

__all__ = ["linked_clone", "linked_environment", "make"]


def make(*arguments: str, folder: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """Run it as from a shell: not as a part of the make that runs tests."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def linked_environment(folder: Path) -> Path:
    """A virtual environment that is complete: this one, by links."""
    virtual = folder / "venv"
    virtual.mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (virtual / name).symlink_to(Path(sys.prefix) / name)
    (virtual / ".installed").touch()
    return virtual


def linked_clone(folder: Path) -> Path:
    """What `make clean` needs of the repository, whose caches are to stay."""
    clone = folder / "clone"
    clone.mkdir()
    packages = ("diffusers_torchserve", "handler", "scripts")
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "config", *packages):
        (clone / name).symlink_to(REPOSITORY / name)
    return clone
