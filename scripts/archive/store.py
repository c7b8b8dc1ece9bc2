"""Chooses an archive of the store, for commands that are given a name or nothing."""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.archive.manifest import TORCHSERVE_MANIFEST_NAME
from scripts.errors import UsageError
from scripts.hints import option, to_run

__all__ = ["add_archive", "choose_archive", "chosen_archive"]


def choose_archive(store: Path, name: str | None) -> Path:
    """Return the store's archive called `name` (a .mar or a folder), or its only one.

    Raises: UsageError.
    """
    found = [
        (path.name, path)
        for path in sorted(store.glob("*/"))
        if (path / TORCHSERVE_MANIFEST_NAME).exists()
    ]
    found += [(path.stem, path) for path in sorted(store.glob("*.mar"))]
    names = sorted({each for each, _ in found})
    if name and name not in names:
        raise UsageError(
            f"{store} has no archive called {name}; it has: {', '.join(names) or 'none'}"
        )
    if not found:
        raise UsageError(f"{store} has no archive; `{to_run('pack')}` builds the embedded one")
    if not name and len(names) > 1:
        raise UsageError(
            f"{store} has several archives; choose one with {option('name')}: {', '.join(names)}"
        )
    chosen = [path for each, path in found if each == (name or names[0])]
    if len(chosen) > 1:
        raise UsageError(f"{chosen[0]} and {chosen[1]} have one name: remove the older one")
    return chosen[0]


def add_archive(parser: argparse.ArgumentParser) -> None:
    """Let `parser` take a path, or a store and the name of an archive in it."""
    parser.add_argument(
        "archive",
        type=Path,
        nargs="?",
        metavar="ARCHIVE",
        help="a .mar, or a folder (default: the only one in the store)",
    )
    store = Path("model-store")
    parser.add_argument(
        "--store", type=Path, default=store, metavar="FOLDER", help=f"default: {store}"
    )
    parser.add_argument("--name", help="which of the store's archives, when there are several")


def chosen_archive(arguments: argparse.Namespace) -> Path:
    """Return the archive that `arguments` name. Raises: UsageError, where it is not there."""
    path: Path | None = arguments.archive
    if path is None:
        return choose_archive(arguments.store, arguments.name)
    if arguments.name:
        raise UsageError(f"{path} and --name {arguments.name}: give one of them")
    if not path.exists():
        raise UsageError(f"{path}: no such archive; `{to_run('pack')}` packs one")
    return path
