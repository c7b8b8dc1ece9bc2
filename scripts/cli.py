"""The command ``diffusers-torchserve``: every command in one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts import __version__, serve
from scripts.build_archive import PACK
from scripts.command import Command
from scripts.console import DONE, run_command
from scripts.demo import DEMO
from scripts.download_weights import DOWNLOAD
from scripts.inspect_archive import INSPECT
from scripts.keys import KEY
from scripts.pull_archive import PULL
from scripts.push_archive import PUSH
from scripts.up import GATEWAY, UP
from scripts.verify_archive import VERIFY
from scripts.zip_weights import ZIP

__all__ = ["main", "make_parser"]

_PROGRAM = "diffusers-torchserve"
_EXAMPLES = """\
first steps:
  %(prog)s demo                                   draws demo.png with the embedded toy pipeline
  %(prog)s pack --model-id org/name --name sd     writes model-store/sd.mar
  %(prog)s verify --name sd --smoke               checks it and draws one small picture
  %(prog)s serve --name sd                        prints the curl line that draws
  %(prog)s stop

Archives are in model-store/ and the server's state is in .run/, both below the current folder.
COMMAND --help says more, with examples. Exit code 0: done; 1: failed; 2: called wrongly.
"""
_COMPLETION_EXAMPLES = """\
examples:
  source <(%(prog)s bash)                  bash, now
  %(prog)s bash > ~/.local/share/bash-completion/completions/diffusers-torchserve
  %(prog)s zsh > ~/.zfunc/_diffusers-torchserve        a folder of $fpath
"""


def make_parser(prog: str = _PROGRAM) -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Pack diffusers pipelines as TorchServe archives, serve them, move them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for each in (DEMO, PACK, INSPECT, VERIFY):
        each.add_to(commands.add_parser)
    serve.add_commands(commands.add_parser)
    for each in (UP, GATEWAY, KEY):
        each.add_to(commands.add_parser)
    for each in (PUSH, PULL, DOWNLOAD, ZIP, _COMPLETION):
        each.add_to(commands.add_parser)
    return parser


def _print_completion(arguments: argparse.Namespace) -> int:
    import shtab

    print(shtab.complete(make_parser(), shell=arguments.shell))
    return DONE


_COMPLETION = Command(
    "completion",
    "print a shell's completion script",
    _print_completion,
    lambda parser: parser.add_argument("shell", choices=("bash", "zsh"), help="for which shell"),
    examples=_COMPLETION_EXAMPLES,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0 done, 1 failed, 2 misused."""
    is_installed = Path(sys.argv[0]).name == _PROGRAM
    parser = make_parser(_PROGRAM if is_installed else "python -m diffusers_torchserve")
    return run_command(parser, lambda arguments: arguments.run(arguments), argv)


if __name__ == "__main__":
    sys.exit(main())
