"""The first picture: packs, serves and draws, with curl, as people do."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from scripts.build_archive import pack_embedded
from scripts.command import Command, add_run_dir
from scripts.console import DONE
from scripts.embedded import EMBEDDED_NAME
from scripts.errors import ServerError
from scripts.hints import to_run
from scripts.serve import start
from scripts.serve_arguments import add_start_arguments
from scripts.torchserve.curl import curl_line, post
from scripts.torchserve.draining import DRAIN_S
from scripts.torchserve.process import TorchServer

__all__ = ["DEMO", "main"]

# What the embedded pipeline can draw: one shape in one colour on a background of another.
FIRST_PROMPT = "a large red heart on a cyan background"
NEXT_PROMPT = "a small yellow star at the top left on a blue background"


def main(argv: Sequence[str] | None = None) -> int:
    """Draw one picture; return 0 done, 1 failed, 2 misused."""
    return DEMO.main(argv, "demo")


def _run(arguments: argparse.Namespace) -> int:
    _check_target(arguments.out)
    pack_embedded(arguments.store)
    arguments.name, arguments.brief, arguments.drain_s = EMBEDDED_NAME, True, DRAIN_S
    start(arguments)
    server = TorchServer.find(arguments.run_dir)
    if server is None:
        raise ServerError(f"the server has ended; its log: {arguments.run_dir / 'logs'}")
    draw(server, {"prompt": arguments.prompt, "seed": arguments.seed}, arguments.out)
    return DONE


def _check_target(out: Path) -> None:
    """Raise ServerError, before anything is drawn, where no picture can be written to `out`."""
    folder = out.resolve().parent
    if out.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ServerError(f"{out} cannot be written: --out is a file in a folder that is there")


def draw(server: TorchServer, fields: dict[str, object], out: Path) -> None:
    """Post `fields` with curl and write the picture to `out`. Raises: ServerError."""
    print(f"Drawing {fields['prompt']!r} ...", flush=True)
    answer = post(server, fields)
    if answer.status != 200:
        reason = answer.body.decode("utf-8", "replace").strip()
        raise ServerError(
            f"the server answered {answer.status}: {reason}; {to_run('logs')} says more"
        )
    with tempfile.NamedTemporaryFile(dir=out.resolve().parent, delete=False) as part:
        part.write(answer.body)
    os.chmod(part.name, 0o644)
    os.replace(part.name, out)
    stages = re.findall(r"(\w+);dur=([\d.]+)", answer.headers.get("server-timing", ""))
    seconds = sum(float(milliseconds) for _, milliseconds in stages) / 1000
    print(f"\n  {out.resolve()}   ({len(answer.body):,} bytes, {seconds:.1f} s)\n")
    print(f"Your turn:\n\n  {curl_line(server, {'prompt': NEXT_PROMPT}, 'mine.png')}\n")
    watching = ", ".join(to_run(name) for name in ("status", "logs", "stop"))
    print(f"The server keeps running: {watching}.")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_dir(parser)
    add_start_arguments(parser)
    parser.add_argument("--prompt", default=FIRST_PROMPT, help="what to draw")
    parser.add_argument("--seed", type=int, default=1, help="the same seed, the same picture (1)")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="default: demo.png")


DEMO = Command(
    "demo",
    "pack the embedded toy pipeline, serve it and draw demo.png; the server keeps running",
    _run,
    _add_arguments,
)


if __name__ == "__main__":
    sys.exit(main())
