"""Prints what has to be installed: ``requirements.py pyproject.toml [EXTRA …]``, a line each."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Print them: nothing of the project is installed, so that they are a layer of an image."""
    path, *extras = sys.argv[1:] if argv is None else argv
    project = tomllib.loads(Path(path).read_text())["project"]
    needed = list(project["dependencies"])
    for extra in extras:
        needed += project["optional-dependencies"][extra]
    print(*dict.fromkeys(needed), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
