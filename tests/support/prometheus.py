"""A Prometheus of a test: Debian's, with what we ship, on ports of its own."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scripts.repository import REPOSITORY
from tests.support.gateways import free_port
from tests.support.programs import need

__all__ = ["Prometheus", "running_prometheus"]

_SHIPPED = REPOSITORY / "deploy" / "prometheus"


@dataclass(frozen=True, slots=True)
class Prometheus:
    """Where it answers."""

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression has now. Fails where it is not an expression."""
        return list(self._get("query", query=expression)["result"])

    def targets(self) -> dict[str, str]:
        """The health of each job's target: up, down or unknown."""
        return {
            target["labels"]["job"]: target["health"]
            for target in self._get("targets")["activeTargets"]
        }

    def eventually(self, expression: str, is_so: Callable[[list[float]], bool]) -> list[float]:
        """The values of an expression, once they are as they shall be, or after a while."""
        until_s = time.monotonic() + 30
        while True:
            values = [float(series["value"][1]) for series in self.query(expression)]
            if is_so(values) or time.monotonic() > until_s:
                return values
            time.sleep(0.2)

    def scrape_again(self) -> None:
        """Return when every target has been asked twice more, from beginning to end."""
        counts = "min(count_over_time(up[1h]))"
        (before,) = self.eventually(counts, bool)
        (after,) = self.eventually(counts, lambda found: found[0] >= before + 2)
        assert after >= before + 2

    def _get(self, path: str, **arguments: str) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=10) as reply:
            answer = json.load(reply)
        assert answer["status"] == "success", answer
        return answer["data"]


@contextmanager
def running_prometheus(folder: Path, targets: Mapping[str, str]) -> Iterator[Prometheus]:
    """Run one inside the block, which asks `targets` (by job) every half second."""
    program = need("prometheus", "prometheus")
    config = yaml.safe_load((_SHIPPED / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    config["rule_files"] = [str(_SHIPPED / "rules.yml")]
    for scrape in config["scrape_configs"]:
        scrape["static_configs"] = [{"targets": [targets[scrape["job_name"]]]}]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    prometheus = Prometheus(f"http://127.0.0.1:{port}")
    try:
        _wait(prometheus, targets, process, folder / "log")
        yield prometheus
    finally:
        process.terminate()
        process.wait(30)


def _wait(
    prometheus: Prometheus,
    targets: Mapping[str, str],
    process: subprocess.Popen[bytes],
    log: Path,
) -> None:
    until_s = time.monotonic() + 60
    while True:
        assert process.poll() is None, log.read_text()
        try:
            if prometheus.targets() == dict.fromkeys(targets, "up"):
                return
        except OSError:
            pass
        assert time.monotonic() < until_s, log.read_text()
        time.sleep(0.1)
