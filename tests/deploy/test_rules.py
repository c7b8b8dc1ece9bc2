"""deploy/prometheus: the rules are valid, and every alert fires on what it is for alone."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.repository import REPOSITORY
from tests.support.programs import need

FOLDER = REPOSITORY / "deploy" / "prometheus"
GROUPS = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
ALERTS: list[dict[str, Any]] = [
    rule for group in GROUPS for rule in group["rules"] if "alert" in rule
]
TESTS = yaml.safe_load((FOLDER / "rules_test.yml").read_text())["tests"]


def promtool(*arguments: str, folder: Path = FOLDER) -> subprocess.CompletedProcess[str]:
    program = need("promtool", "prometheus")
    return subprocess.run(
        [program, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def test_the_rules_and_the_configuration_are_valid() -> None:
    for arguments in (("check", "rules", "rules.yml"), ("check", "config", "prometheus.yml")):
        answer = promtool(*arguments)
        assert answer.returncode == 0, answer.stdout + answer.stderr


def test_the_alerts_fire_on_what_they_are_for() -> None:
    answer = promtool("test", "rules", "rules_test.yml")
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_an_alert_that_never_fires_is_noticed(tmp_path: Path) -> None:
    """The negative control: all are silenced, and the case of each of them fails."""
    for name in ("rules.yml", "rules_test.yml"):
        shutil.copy(FOLDER / name, tmp_path)
    rules = yaml.safe_load((tmp_path / "rules.yml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                rule["expr"] = f"({rule['expr']}) > 1e12"
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules))
    answer = promtool("test", "rules", "rules_test.yml", folder=tmp_path)
    assert answer.returncode != 0
    missed = set(re.findall(r'alertname="(\w+)"', answer.stdout + answer.stderr))
    assert missed == {alert["alert"] for alert in ALERTS}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: str(alert["alert"]))
def test_every_alert_says_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    assert alert["annotations"].keys() == {"summary", "runbook"}
    assert len(alert["annotations"]["runbook"]) > 20


def test_what_runbooks_refer_to_is_there() -> None:
    names = {alert["alert"] for alert in ALERTS}
    for alert in ALERTS:
        runbook = alert["annotations"]["runbook"]
        for named in re.findall(r"(?:[Ss]ee|[Aa]s) ([A-Z][a-z]+(?:[A-Z][a-z]+)+)", runbook):
            assert named in names, (alert["alert"], named)


def test_no_case_is_empty() -> None:
    assert all(case["promql_expr_test"] and case["input_series"] for case in TESTS)
