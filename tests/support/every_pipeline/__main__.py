"""The command of the sweep: judge every pipeline class, show it, write the record and the table."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0: done, 1: a class is different or not as recorded, 2: misused."""
    options = _parser().parse_args(argv)
    _be_quiet_and_offline()
    # Only now, since the libraries read the environment when they are imported.
    from tests.support.every_pipeline import record
    from tests.support.every_pipeline.catalogue import pipeline_classes

    names = [name for name in pipeline_classes() if re.search(options.only, name)]
    if not names:
        print(f"no pipeline class matches {options.only!r}", file=sys.stderr)
        return 2
    started = time.perf_counter()
    verdicts = list(_judge_all(names, options.limit))
    counts = Counter(verdict.outcome.value for verdict in verdicts)
    summary = ", ".join(f"{number} {outcome}" for outcome, number in counts.items())
    print(f"{summary}; {time.perf_counter() - started:.0f} s", file=sys.stderr)
    if options.json is not None:
        rows = [{**dataclasses.asdict(v), "outcome": v.outcome.value} for v in verdicts]
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.write:
        before = record.load()
        if options.only == "":
            before = record.Record({}, {})  # a class that is gone leaves the table
        record.save(record.updated(before, verdicts, _versions()))
        return 0
    recorded = record.load().entries
    changed = [
        v for v in verdicts if v.name not in recorded or recorded[v.name].outcome != v.outcome
    ]
    for verdict in changed:
        print(f"not as recorded: {verdict.name}: {verdict.outcome.value}", file=sys.stderr)
    return 1 if changed else 0


def _judge_all(names: Sequence[str], limit_s: float) -> Iterator:
    from tests.support.every_pipeline.catalogue import pipeline_classes
    from tests.support.every_pipeline.families import RECIPES
    from tests.support.every_pipeline.judge import judge
    from tests.support.every_pipeline.recipe import Recipe

    for number, name in enumerate(names, start=1):
        if sys.stderr.isatty():
            print(f"\r\033[K{number}/{len(names)} {name}", end="", file=sys.stderr, flush=True)
        verdict = judge(pipeline_classes()[name], RECIPES.get(name, Recipe()), limit_s)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        print(f"{verdict.outcome.value:17} {verdict.seconds:5.1f} s  {name}  {verdict.why}")
        yield verdict


def _be_quiet_and_offline() -> None:
    os.environ.update(
        TRANSFORMERS_VERBOSITY="error",
        DIFFUSERS_VERBOSITY="error",
        HF_HUB_OFFLINE="1",
        PYTHONWARNINGS="ignore",
    )
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)


def _versions() -> dict[str, str]:
    return {
        name: importlib.metadata.version(name).partition("+")[0]
        for name in ("diffusers", "transformers", "torch")
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.every_pipeline",
        description="Run every pipeline class of diffusers in flight, and compare it with itself.",
    )
    parser.add_argument("--only", default="", metavar="PATTERN", help="classes whose name matches")
    parser.add_argument(
        "--limit", type=float, default=60.0, metavar="SECONDS", help="the longest a class may take"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--write", action="store_true", help="write the record of the test, and docs/pipelines.md"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
