"""Which archive a command line is about: the one it names, or the one that serve would take."""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.console import UsageError
from scripts.serve import choose_archive
from scripts.torchserve.options import ServerError

__all__ = ["add_archive", "chosen_archive"]


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
        try:
            return choose_archive(arguments.store, arguments.name)
        except ServerError as error:
            raise UsageError(str(error)) from error
    if arguments.name:
        raise UsageError(f"{path} and --name {arguments.name}: give one of them")
    if not path.exists():
        raise UsageError(f"{path}: no such archive; `make archive` packs one")
    return path
