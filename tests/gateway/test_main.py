"""`python -m gateway` with a configuration that cannot be used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from scripts.repository import REPOSITORY
from tests.support.gateways import free_port


@pytest.mark.parametrize(
    ("jobs", "said"),
    [
        ({"webhook_hosts": ["a.example"], "webhook_secret_file": "{}/text"}, "webhook_secret_file"),
        ({"database": "{}/none/jobs.sqlite"}, "jobs.database"),
        ({"database": "{}/text"}, "jobs.database"),
    ],
)
def test_what_jobs_need_is_checked_at_the_start(
    tmp_path: Path, jobs: dict[str, object], said: str
) -> None:
    (tmp_path / "text").write_text("This is a text.\n" * 100)
    jobs = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in jobs.items()}
    settings = {"port": free_port(), "run_dirs": [str(tmp_path / "run")], "jobs": jobs}
    (tmp_path / "gateway.yaml").write_text(yaml.safe_dump(settings))
    run = subprocess.run(
        [
            *(sys.executable, "-m", "gateway", "--config", str(tmp_path / "gateway.yaml")),
            *("--state-dir", str(tmp_path / "state")),
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"gateway: error: {said}: ")
    assert str(tmp_path) in line
