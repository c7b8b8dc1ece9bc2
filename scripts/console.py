"""What every command shares: exit codes, one-line errors, progress bars, atomic output."""

from __future__ import annotations

import argparse
import io
import os
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from handler.errors import ServingError
from scripts.disk import full_disk, staging_folder
from scripts.errors import ServerError, UsageError
from scripts.interrupts import signals_as_interrupts

__all__ = [
    "DONE",
    "FAILED",
    "MISUSED",
    "Progress",
    "atomic_output",
    "printable",
    "progress",
    "run_command",
]

DONE, FAILED, MISUSED = 0, 1, 2


class Progress(Protocol):
    """What long work reports to: bytes done since the last call."""

    def __call__(self, num_bytes: int, /) -> object:
        """Take notice of `num_bytes` more that are done."""
        ...


def run_command(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
) -> int:
    """Parse `argv` and run; return the exit code.

    An error is one line on stderr, with the lines of the server's log below it that say why.
    Ctrl-C, SIGTERM and SIGHUP end the command by KeyboardInterrupt, so that no partial output is
    left. Where the reader of stdout has gone, the command ends without a message.
    """
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else MISUSED
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names and licences are of any script
    try:
        with signals_as_interrupts():
            code = run(arguments)
            sys.stdout.flush()
        return code
    except (ServingError, OSError) as error:
        was_lost = _drop_unwritten()
        if isinstance(error, BrokenPipeError) and was_lost:
            return FAILED
        _complain(parser.prog, error.message if isinstance(error, ServerError) else error)
        if isinstance(error, ServerError):
            for line in error.log.splitlines():
                print(printable(line), file=sys.stderr)
        return MISUSED if isinstance(error, UsageError) else FAILED
    except KeyboardInterrupt:
        _complain(parser.prog, "interrupted")
        return FAILED


def _drop_unwritten() -> bool:
    """Forget what stdout still holds and cannot write: Python would try again, and exit by 120.

    Says whether there was any.
    """
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return True
    return False


def _complain(program: str, error: object) -> None:
    print(f"{program}: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)


def printable(text: str) -> str:
    """Return `text` without control characters, which a terminal would obey."""
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
def atomic_output(target: Path, *, force: bool, marker: str | None = None) -> Iterator[Path]:
    """Give a temporary path to write to, which becomes `target` when the context ends.

    What is written there is a file, or a folder with a file `marker` in it. With `force` it
    replaces an existing file, or a folder with such a marker, and nothing else. The path is in a
    hidden folder of its own in `target`'s folder, which is removed with all that is left in it.
    Raises: UsageError, where `target` exists and may not be replaced; ArchiveError, where the disk
    is full.
    """
    _check_replaceable(target, force, marker)
    with staging_folder(target) as stage:
        part, replaced = stage / target.name, stage / "replaced"
        try:
            yield part
        except OSError as error:
            if (full := full_disk(error, target)) is not None:
                raise full from error
            raise
        _check_replaceable(target, force, marker)  # somebody else may have been quicker
        try:
            if target.is_dir():
                os.replace(target, replaced)
            os.replace(part, target)
        except BaseException:
            if replaced.exists():
                os.replace(replaced, target)
            raise


def _check_replaceable(target: Path, force: bool, marker: str | None) -> None:
    if not os.path.lexists(target):
        return
    if not force:
        raise UsageError(f"{target} exists; --force replaces it")
    if marker is None:
        is_alike, wanted = not target.is_dir(), "a file"
    else:
        is_alike = (target / marker).is_file() and not target.is_symlink()
        wanted = f"a folder with {marker}"
    if not is_alike:
        raise UsageError(f"{target} is not {wanted}: --force does not replace it; remove it first")
