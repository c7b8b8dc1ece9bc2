"""What a message tells the user to run next: make in a clone, the command where it is installed."""

from __future__ import annotations

import shlex

from scripts.repository import REPOSITORY

__all__ = ["option", "to_run"]

_IS_CLONE = (REPOSITORY / "Makefile").is_file()
_TARGETS = {"pack": "archive"}


def to_run(command: str, **options: str) -> str:
    """Return how to call `command` with `options`, which are called as their flags.

    >>> to_run("pack", model_id="org/name")
    'make archive MODEL_ID=org/name'
    """
    if _IS_CLONE:
        words = [f"make {_TARGETS.get(command, command)}"]
    else:
        words = [f"diffusers-torchserve {command}"]
    for name, value in options.items():
        words.append(option(name) + ("" if _IS_CLONE else " ") + shlex.quote(value))
    return " ".join(words)


def option(name: str) -> str:
    """Return how `name` is given: ``NAME=`` to make, ``--name`` to the command."""
    return f"{name.upper()}=" if _IS_CLONE else f"--{name.replace('_', '-')}"
