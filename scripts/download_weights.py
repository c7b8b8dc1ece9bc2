"""The command that downloads a pipeline from the hub."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from scripts.archive.hub import download
from scripts.console import DONE, run_command

__all__ = ["main"]

_EXAMPLES = """\
examples:
  python -m scripts.download_weights org/name --out my-pipeline
  python -m scripts.download_weights org/name --revision v2 --out my-pipeline
  python -m scripts.download_weights org/name --out my-pipeline --full     float32, if it is there
  HF_TOKEN=hf_... python -m scripts.download_weights org/gated --out my-pipeline
  HF_ENDPOINT=https://mirror.example python -m scripts.download_weights org/name --out my-pipeline

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


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="download_weights",
        description="Download a diffusers pipeline: one variant, safetensors only, resumable.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model_id", metavar="ORG/NAME", help="the model on the hub")
    parser.add_argument("--revision", default="main", help="branch, tag or commit (default: main)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to")
    parser.add_argument("--full", action="store_true", help="prefer full precision to fp16")
    return run_command(parser, _run, argv)


if __name__ == "__main__":
    sys.exit(main())
