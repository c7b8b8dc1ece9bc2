"""The command ``diffusers-torchserve``, installed or in a clone.

In a wheel the project's own packages lie below this one, in ``repository/``, laid out as in a
clone: ``handler`` and ``scripts`` are names that another distribution may have too, so neither is
put into site-packages. This entry puts that folder first on the path, for this process alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["main"]


def main() -> int:
    """Run the command line."""
    here = Path(__file__).resolve().parent
    bundled = here / "repository"
    sys.path.insert(0, str(bundled if bundled.is_dir() else here.parent))
    from scripts.cli import main as run

    return run()
