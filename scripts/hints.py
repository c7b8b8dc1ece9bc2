"""What a message tells the user to run next: make in a clone, the command where it is installed."""

from __future__ import annotations

import shlex

from scripts.repository import REPOSITORY

__all__ = ["option", "to_run"]

_IS_CLONE = (REPOSITORY / "Makefile").is_file()
_TARGETS = {"pack": "archive"}
_SWITCHES = {"force", "smoke", "sbom"}


def to_run(command: str, flags: str = "", **options: str) -> str:
    """Return how to call `command` with `options`, which are called as their flags.

    A switch has any value. `flags` are those that make has no variable for, quoted for a shell.

    >>> to_run("pack", model_id="org/name")
    'make archive MODEL_ID=org/name'
    >>> to_run("pack", "--no-check", force="1")
    "make archive FORCE=1 ARGS='--no-check'"
    """
    if _IS_CLONE:
        words = [f"make {_TARGETS.get(command, command)}"]
    else:
        words = [f"diffusers-torchserve {command}"]
    for name, value in options.items():
        if _IS_CLONE or name not in _SWITCHES:
            words.append(option(name) + ("" if _IS_CLONE else " ") + shlex.quote(value))
        else:
            words.append(option(name))
    if flags:
        words.append(f"ARGS={shlex.quote(flags)}" if _IS_CLONE else flags)
    return " ".join(words)


def option(name: str) -> str:
    """Return how `name` is given: ``NAME=`` to make, ``--name`` to the command."""
    return f"{name.upper()}=" if _IS_CLONE else f"--{name.replace('_', '-')}"
