"""What one command is: its name, its arguments, its help and what it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.console import run_command

__all__ = ["Command", "add_run_dir"]


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand of ``diffusers-torchserve``, which its own module runs alone too.

    `summary` is its line in the list of commands. In `examples`, the end of its help,
    ``%(prog)s`` stands for the command as it was called.
    """

    name: str
    summary: str
    run: Callable[[argparse.Namespace], int]
    add_arguments: Callable[[argparse.ArgumentParser], object] = lambda parser: None
    description: str = ""
    examples: str = ""

    def add_to(self, add_parser: Callable[..., argparse.ArgumentParser]) -> None:
        """Add this command by the `add_parser` of a parser's subparsers."""
        parser = add_parser(self.name, help=self.summary, **self._help())
        self.add_arguments(parser)
        parser.set_defaults(run=self.run)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Return what `argv`, which is right, means for this command."""
        return self._parser(self.name).parse_args(argv)

    def main(self, argv: Sequence[str] | None, prog: str) -> int:
        """Run this command alone, called as `prog`."""
        return run_command(self._parser(prog), self.run, argv)

    def _parser(self, prog: str) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(prog=prog, **self._help())
        self.add_arguments(parser)
        return parser

    def _help(self) -> dict[str, Any]:
        summary = f"{self.summary[:1].upper()}{self.summary[1:]}."
        return {
            "description": self.description or summary,
            "epilog": self.examples,
            "formatter_class": argparse.RawDescriptionHelpFormatter,
        }


def add_run_dir(parser: argparse.ArgumentParser) -> None:
    """Let `parser` take the state directory of a TorchServe instance."""
    run_dir = Path(".run")
    parser.add_argument(
        "--run-dir", type=Path, default=run_dir, help=f"the instance's state (default: {run_dir})"
    )
