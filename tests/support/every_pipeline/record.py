"""What the last whole sweep found, kept beside the test that holds it, and its table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.every_pipeline.direct import Outcome
from tests.support.every_pipeline.judge import BOUND, Verdict

__all__ = ["DOCUMENT", "RECORD", "Entry", "Record", "load", "render", "save", "updated"]

_REPOSITORY = Path(__file__).parents[3]
RECORD = _REPOSITORY / "tests" / "handler" / "engine" / "every_pipeline.json"
DOCUMENT = _REPOSITORY / "docs" / "pipelines.md"

_MEANINGS: Mapping[Outcome, str] = {
    Outcome.MERGED: "forwards of its denoiser served several requests at once",
    Outcome.ALONE: "its requests were in flight together, each forward for one of them",
    Outcome.REFUSED: "the engine does not take it, or a request of it fails in flight",
    Outcome.DIFFERENT: "a request in flight gave something else than the pipeline called directly",
    Outcome.NOT_BUILT: "could not be built or called here, or its output says nothing",
}


@dataclass(frozen=True)
class Entry:
    """The outcome of one pipeline class, and why it is no better."""

    outcome: Outcome
    why: str = ""


@dataclass(frozen=True)
class Record:
    """The outcomes by class name, and the versions of the libraries that they hold for."""

    versions: Mapping[str, str]
    entries: Mapping[str, Entry]


def updated(record: Record, verdicts: Sequence[Verdict], versions: Mapping[str, str]) -> Record:
    """`record` with the outcomes of `verdicts` instead of its own for those classes."""
    entries = {**record.entries, **{v.name: Entry(v.outcome, v.why) for v in verdicts}}
    return Record(versions, dict(sorted(entries.items())))


def load() -> Record:
    """The recorded outcomes; none where there is no record yet."""
    if not RECORD.exists():
        return Record({}, {})
    data = json.loads(RECORD.read_text())
    entries = {
        name: Entry(Outcome(entry["outcome"]), entry.get("why", ""))
        for name, entry in data["pipelines"].items()
    }
    return Record(data["versions"], entries)


def save(record: Record) -> None:
    """Write the record and the document made from it."""
    pipelines = {
        name: {"outcome": entry.outcome.value, **({"why": entry.why} if entry.why else {})}
        for name, entry in record.entries.items()
    }
    data = {"versions": dict(record.versions), "pipelines": pipelines}
    RECORD.write_text(json.dumps(data, indent=1) + "\n")
    DOCUMENT.write_text(render(record))


def render(record: Record) -> str:
    """The document: how many of each outcome, and a row for each class."""
    counts = Counter(entry.outcome for entry in record.entries.values())
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    lines = [
        "# Every pipeline of diffusers, in flight",
        "",
        "Each pipeline class is built tiny, with random weights. Requests that differ in seed, "
        "prompt, steps, guidance and scheduler, where it has them, run in flight together; each "
        "output (all its arrays) is compared with that of the same pipeline called directly. Equal "
        f"means: no entry differs by more than {BOUND:g}, of pixels in [0, 1] or of the array's "
        "largest entry. Another seed must change the output by thirty times as much, or the class "
        "counts as not built. Where another prompt changes nothing, equality says nothing of the "
        "prompt's way into the picture, and the table says so.",
        "",
        "Made by `python -m tests.support.every_pipeline --write`, on the CPU in float32, with "
        f"{versions}.",
        "",
        "| outcome | classes | which means |",
        "|---|---|---|",
    ]
    lines += [f"| {o.value} | {counts[o]} | {_MEANINGS[o]} |" for o in Outcome if counts[o]]
    lines += [
        "",
        f"{len(record.entries)} classes in all.",
        "",
        "| class | outcome | why, or what to know |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {entry.outcome.value} | {_in_cell(entry.why)} |"
        for name, entry in record.entries.items()
    ]
    return "\n".join(lines) + "\n"


def _in_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
