"""The gateway and HAProxy that `up` has put in front of the instances: whether they still serve."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from scripts.background import is_suspended, read_saved, running_process
from scripts.gateway_process import answers
from scripts.hints import to_run
from scripts.torchserve.haproxy_socket import haproxy_dir_of

__all__ = ["Front", "forget_ended", "fronts"]


@dataclass(frozen=True, slots=True)
class Front:
    """One of them, as it was started."""

    name: str
    url: str
    pid: int | None
    """None where it has ended."""
    problem: str | None = None
    """Why nothing comes through it."""

    def __str__(self) -> str:
        """Two lines of a table, the second where something is wrong."""
        process = "-" if self.pid is None else self.pid
        line = f"{self.name:<12} {self.url}  process {process}"
        return line if self.problem is None else f"{line}\n{'':<12} {self.problem}"


def fronts(run_dir: Path, gateway_dir: Path) -> list[Front]:
    """Return those that were started and not stopped; takes seconds where one does not answer."""
    return [
        _look(name, saved, record.with_suffix(".log"))
        for name, record, saved in _saved(run_dir, gateway_dir)
    ]


def forget_ended(run_dir: Path, gateway_dir: Path) -> None:
    """Remove what those have left that have ended without having been asked to."""
    for _, record, saved in _saved(run_dir, gateway_dir):
        if _process(saved) is None:
            record.unlink(missing_ok=True)


def _saved(run_dir: Path, gateway_dir: Path) -> Iterator[tuple[str, Path, dict[str, object]]]:
    """The name, the record and its content of each."""
    for name, folder in (("gateway", gateway_dir), ("haproxy", haproxy_dir_of(run_dir))):
        record = folder / f"{name}.json"
        try:
            yield name, record, read_saved(record)
        except (OSError, ValueError):
            continue


def _process(saved: dict[str, object]) -> psutil.Process | None:
    try:
        return running_process(saved)
    except (KeyError, TypeError, ValueError, psutil.Error):
        return None


def _look(name: str, saved: dict[str, object], log: Path) -> Front:
    url, process = str(saved.get("url", "-")), _process(saved)
    if process is None:
        again = f"it has ended: {to_run('up')} starts it again; {log} says why it ended"
        return Front(name, url, None, again)
    problem = None
    if is_suspended(process):
        problem = f"it is suspended: kill -CONT {process.pid} lets it go on"
    elif name == "gateway" and not answers(url):
        problem = f"it does not answer; {log} says more"
    return Front(name, url, int(process.pid), problem)
