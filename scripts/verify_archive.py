"""The command that checks an archive whole and reports every problem."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from handler.errors import ArchiveError, ServingError
from scripts.archive.bare import as_packed
from scripts.archive.beside import beside
from scripts.archive.checks import check_archive, check_models
from scripts.archive.reader import ArchiveView, open_archive
from scripts.archive.signing import check_signature, signature_path
from scripts.archive.smoke import smoke_problems
from scripts.archive.store import add_archive, chosen_archive
from scripts.command import Command
from scripts.console import DONE, FAILED, printable, progress

__all__ = ["VERIFY", "main", "verify"]

_EXAMPLES = """\
examples:
  %(prog)s model-store/sd.mar
  %(prog)s model-store/sd.mar --key public.pem      the signature too
  %(prog)s model-store/sd.mar --smoke               draws a small picture
  %(prog)s model-store/sd.mar --quick               its bytes alone, at gigabytes a second
  %(prog)s my-pipeline                              a folder, as far as it would be packed
  %(prog)s model-store/sd.mar --json

Checked: the zip's structure, every hash, no pickles, code, links or paths that climb out; that
the pipeline draws pictures from text; its components and LoRAs, whose weights must fit by names and
shapes, none missing and none left over; the versions of diffusers, transformers and torch; the
configuration, by itself and with the pipeline. --smoke draws what the worker
would draw for a small request, but with speed: safe where the archive says max. Exit code 0: all of
it holds; 1: it does not, and every problem is named; 2: called wrongly.
"""


def verify(
    path: Path, *, key: Path | None = None, is_smoke: bool = False, is_quick: bool = False
) -> list[str]:
    """Return every problem of the archive `path`; none means that it is whole.

    Where it `is_quick`, not of its models: whether it is what was packed, and that was checked.
    """
    problems: list[str] = []
    if key is not None:
        try:
            check_signature(path, key, signature_path(path))
        except ServingError as error:
            problems.append(str(error))
    try:
        with open_archive(path) as given, as_packed(given) as (view, notes, refusals):
            for note in notes:
                print(printable(note), file=sys.stderr)
            problems += refusals
            # A picture is drawn in this process, with what the checks of the models import.
            is_slow = not is_smoke and not is_quick
            with (
                beside(partial(_model_problems, view, is_quick), is_slow=is_slow) as models,
                progress("checking", sum(view.model.sizes.values())) as report,
            ):
                problems += [each for each in check_archive(view, report) if each not in problems]
                problems += [each for each in models() if each not in problems]
            if is_smoke and not problems:
                problems += smoke_problems(view)
    except ServingError as error:
        problems.append(str(error))
    return problems


def _model_problems(view: ArchiveView, is_quick: bool) -> list[str]:
    return [] if is_quick else [*check_models(view)]


def _run(arguments: argparse.Namespace) -> int:
    path = chosen_archive(arguments)
    problems = verify(path, key=arguments.key, is_smoke=arguments.smoke, is_quick=arguments.quick)
    if arguments.json:
        print(json.dumps({"archive": str(path), "is_whole": not problems, "problems": problems}))
    elif problems:
        for problem in problems:
            print(printable(problem), file=sys.stderr)
        raise ArchiveError(f"{path}: {len(problems)} problems")
    else:
        print(f"{path}: whole")
    return FAILED if problems else DONE


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_archive(parser)
    parser.add_argument(
        "--key", type=Path, metavar="FILE", help="public key (PEM) of its signature"
    )
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--smoke", action="store_true", help="load it and draw one small picture")
    depth.add_argument(
        "--quick",
        action="store_true",
        help="not its models: whether it is still what was packed, after a copy or a download",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


VERIFY = Command(
    "verify",
    "check an archive without serving it; name every problem",
    _run,
    _add_arguments,
    examples=_EXAMPLES,
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    return VERIFY.main(argv, "verify_archive")


if __name__ == "__main__":
    sys.exit(main())
