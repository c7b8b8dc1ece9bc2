"""Programs that Debian has and pip has not."""

from __future__ import annotations

import os
import shutil

import pytest

__all__ = ["need"]


def need(program: str, package: str) -> str:
    """Return its path; skip where it is missing, fail where CI says that everything is there."""
    path = shutil.which(program)
    if path is not None:
        return path
    problem = f"{program} is missing: apt-get install {package}"
    if os.environ.get("CI"):
        pytest.fail(problem)
    pytest.skip(problem)
