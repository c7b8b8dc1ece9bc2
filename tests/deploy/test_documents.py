"""docs/monitoring.md and docs/kubernetes.md say what there is."""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

from gateway.telemetry.metrics import Metrics
from handler.service.metrics import COUNTERS, GAUGES, HISTOGRAMS
from scripts.repository import REPOSITORY

MONITORING = (REPOSITORY / "docs" / "monitoring.md").read_text()
KUBERNETES = (REPOSITORY / "docs" / "kubernetes.md").read_text()
WORKERS = {*COUNTERS, *GAUGES, *HISTOGRAMS}


def of_the_gateway() -> Iterator[str]:
    """The names of all that it tells, with the ending of a counter."""
    source = (REPOSITORY / "gateway" / "telemetry" / "fleet_metrics.py").read_text()
    yield from re.findall(r'"(gateway_\w+)"', source.replace("gateway_instance_starts", ""))
    for name in re.findall(r'gauge\("(\w+)"', source):
        yield f"gateway_instance_{name}"
    yield "gateway_instance_starts_total"
    for family in Metrics().registry.collect():
        if family.name.startswith("gateway_"):
            yield family.name + ("_total" if family.type == "counter" else "")


def named(text: str, prefix: str) -> set[str]:
    return set(re.findall(rf"\b{prefix}_[a-z_]*[a-z]\b", text))


def test_every_metric_that_is_named_is_there() -> None:
    assert named(MONITORING, "gateway") <= {*of_the_gateway(), "gateway_load"}
    there = WORKERS | {"diffusers_torchserve"}
    assert named(MONITORING, "diffusers") <= there


def test_every_metric_of_a_worker_is_described() -> None:
    assert named(MONITORING, "diffusers") >= WORKERS


def test_every_metric_of_the_gateway_is_described() -> None:
    for name in of_the_gateway():
        short = name.removeprefix("gateway_instance")
        assert f"`{name}" in MONITORING or f"`{short}`" in MONITORING, name


def test_every_alert_is_described() -> None:
    groups = yaml.safe_load((REPOSITORY / "deploy/prometheus/rules.yml").read_text())["groups"]
    for group in groups:
        for rule in group["rules"]:
            assert "alert" not in rule or f"`{rule['alert']}`" in MONITORING


def test_values_that_are_named_are_the_charts() -> None:
    values = yaml.safe_load((REPOSITORY / "deploy/chart/values.yaml").read_text())
    for path in re.findall(r"`((?:archive|keys|gateway|autoscaling|metrics)\.[\w.]+)`", KUBERNETES):
        found = values
        for part in path.split("."):
            assert part in found, path
            found = found[part]
