"""What every command line here shares: exit codes, one-line errors, progress, finished files."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from handler.errors import ServingError

__all__ = [
    "DONE",
    "FAILED",
    "MISUSED",
    "Progress",
    "UsageError",
    "beside",
    "command",
    "printable",
    "progress",
]

DONE, FAILED, MISUSED = 0, 1, 2


class UsageError(ServingError):
    """The command was called wrongly; the message says how to call it."""


class Progress(Protocol):
    """What long work reports to: bytes done since the last call."""

    def __call__(self, num_bytes: int, /) -> object: ...


def command(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int],
    argv: list[str] | None,
) -> int:
    """Parse `argv` and run; return the exit code, with any error as one line on stderr."""
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else MISUSED
    try:
        return run(arguments)
    except UsageError as error:
        return _complain(parser.prog, error, MISUSED)
    except (ServingError, OSError) as error:
        return _complain(parser.prog, error, FAILED)
    except KeyboardInterrupt:
        return _complain(parser.prog, "interrupted; nothing half done counts as finished", FAILED)


def _complain(program: str, error: object, code: int) -> int:
    print(f"{program}: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
    return code


def printable(text: str) -> str:
    """Return `text` without what a terminal would obey: it may come from an archive."""
    return "".join(
        letter if letter.isprintable() or unicodedata.category(letter) == "Zs" else "\ufffd"
        for letter in text
    )


@contextmanager
def progress(label: str, total_bytes: int) -> Iterator[Progress]:
    """Show a bar with throughput where stderr is a terminal, and nothing elsewhere.

    Threads may report at once.
    """
    if not sys.stderr.isatty():
        yield lambda num_bytes: None
        return
    from tqdm import tqdm

    with tqdm(desc=label, total=total_bytes, unit="B", unit_scale=True, unit_divisor=1000) as bar:
        lock = threading.Lock()

        def report(num_bytes: int) -> None:
            with lock:
                bar.update(num_bytes)

        yield report


@contextmanager
def beside(target: Path, *, force: bool) -> Iterator[Path]:
    """Give a path of `target`'s name in a hidden folder beside it; move it into place at the end.

    What is written there is a file or a folder; what else it holds goes with the hidden folder.
    Raises: UsageError, where `target` exists and `force` is not given.
    """
    if target.exists() and not force:
        raise UsageError(f"{target} exists; pass --force to replace it")
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        part = stage / target.name
        yield part
        if target.is_dir() and not target.is_symlink():
            os.replace(target, stage / "replaced")
        os.replace(part, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
