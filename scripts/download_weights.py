"""The command that downloads a pipeline from the hub."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from scripts.archive.hub import download
from scripts.command import Command
from scripts.console import DONE

__all__ = ["DOWNLOAD", "main"]

_EXAMPLES = """\
examples:
  %(prog)s org/name --out my-pipeline
  %(prog)s org/name --revision v2 --out my-pipeline
  %(prog)s org/name --out my-pipeline --full     float32, if it is there
  HF_TOKEN=hf_... %(prog)s org/gated --out my-pipeline
  HF_ENDPOINT=https://mirror.example %(prog)s org/name --out my-pipeline

Only what the pipeline needs is fetched: one variant of its weights, as safetensors (fp16 if the
model has it, else the full one). Interrupted? The same command goes on where it stopped.
"""


def _run(arguments: argparse.Namespace) -> int:
    out = download(
        arguments.model_id,
        revision=arguments.revision,
        out=arguments.out,
        is_full=arguments.full,
    )
    print(f"{out}: done", file=sys.stderr)
    return DONE


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_id", metavar="ORG/NAME", help="the model on the hub")
    parser.add_argument("--revision", default="main", help="branch, tag or commit (default: main)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to")
    parser.add_argument("--full", action="store_true", help="prefer full precision to fp16")


DOWNLOAD = Command(
    "download",
    "download a pipeline from the hub: one variant, safetensors only, resumable",
    _run,
    _add_arguments,
    examples=_EXAMPLES,
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    return DOWNLOAD.main(argv, "download_weights")


if __name__ == "__main__":
    sys.exit(main())
