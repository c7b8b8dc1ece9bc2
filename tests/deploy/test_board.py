"""deploy/grafana: every expression on the board has values in a real Prometheus, after traffic."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from deploy.grafana.build import BOARD, board_json
from scripts.repository import REPOSITORY
from scripts.torchserve.process import TorchServer
from tests.support.client import curl, post_json
from tests.support.gateways import RunningGateway, running_gateway
from tests.support.loras import kohya_lora
from tests.support.prometheus import Prometheus, running_prometheus
from tests.support.serving import MODEL, serve
from tests.support.traffic import watching

pytestmark = [pytest.mark.server, pytest.mark.slow]

CONTENT = json.loads(BOARD.read_text())
TARGETS = [
    (panel["title"], target["expr"])
    for panel in CONTENT["panels"]
    for target in panel.get("targets", ())
]
RULES = [
    rule
    for group in yaml.safe_load((REPOSITORY / "deploy/prometheus/rules.yml").read_text())["groups"]
    for rule in group["rules"]
]
# As Grafana fills them in.
VARIABLES = {"$__rate_interval": "5m", "$model": ".*"}
# Not what rules record, whose names have colons.
OURS = re.compile(r"(?<![:\w])(?:gateway|diffusers|process)_[a-z0-9_]+(?![:\w])")


def test_the_board_is_what_its_script_makes() -> None:
    assert board_json() == BOARD.read_text(), "python -m deploy.grafana.build"


def test_every_panel_asks_something_and_says_what_it_is() -> None:
    panels = [panel for panel in CONTENT["panels"] if panel["type"] != "row"]
    assert len(panels) > 20
    assert all(panel["targets"] and panel["description"] for panel in panels)
    titles = [panel["title"] for panel in panels]
    assert len(titles) == len(set(titles))


@pytest.mark.parametrize("name", ["Requests2XX", "ts_", "QueueTime", "PredictionTime"])
def test_what_misleads_is_not_on_it(name: str) -> None:
    """Nor in a rule. TorchServe counts probes as requests, and all that is live as queued."""
    expressions = [*(expr for _, expr in TARGETS), *(rule["expr"] for rule in RULES)]
    assert not [each for each in expressions if re.search(rf"\b{name}", each)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServer]:
    folder = tmp_path_factory.mktemp("loras")
    pipeline: Any = DiffusionPipeline.from_pretrained(REPOSITORY / "demo" / "pipeline")
    layers = kohya_lora({"lora_unet": pipeline.unet}, ends=("to_q", "to_v"))
    save_file(layers, folder / "ink.safetensors")
    yield from serve(tmp_path_factory.mktemp("server"), lora_dir=str(folder))


@pytest.fixture(scope="module")
def gateway(
    server: TorchServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), [server.state_dir]) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(
    server: TorchServer, gateway: RunningGateway, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """It has seen requests of all kinds, the first of them before it was asked anything."""
    targets = {
        "gateway": gateway.url.removeprefix("http://"),
        "torchserve": gateway.url.removeprefix("http://"),
    }
    traffic(gateway)
    with running_prometheus(tmp_path_factory.mktemp("prometheus"), targets) as running:
        running.scrape_again()
        traffic(gateway)
        running.eventually("sum(diffusers_lora_images_total)", lambda found: found == [2.0])
        running.scrape_again()
        yield running


def traffic(gateway: RunningGateway) -> None:
    """One of everything that is counted."""
    images, predictions = (
        f"{gateway.url}/v1/images/generations",
        f"{gateway.url}/predictions/{MODEL}",
    )
    fields = {"prompt": "a ring", "num_inference_steps": 2}
    assert post_json(images, {"prompt": "a ring"}).status == 200
    assert post_json(predictions, {**fields, "lora": "ink"}).status == 200
    picture = REPOSITORY / "demo" / "circle.png"
    edited = curl(
        f"{gateway.url}/v1/images/edits", "-F", "prompt=a heart", "-F", f"image=@{picture}"
    )
    assert edited.status == 200
    assert post_json(images, {"prompt": ""}).status == 400
    late = {**fields, "num_inference_steps": 1000, "deadline_s": 0.3}
    assert post_json(predictions, late).status == 504
    with watching(predictions, {**fields, "num_inference_steps": 1000}):
        pass


def in_prometheus(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


@pytest.mark.parametrize(("title", "expression"), TARGETS)
def test_every_expression_has_values(prometheus: Prometheus, title: str, expression: str) -> None:
    values = prometheus.eventually(
        in_prometheus(expression), lambda found: any(not math.isnan(each) for each in found)
    )
    assert any(not math.isnan(each) for each in values), f"{title}: {expression}: {values}"


@pytest.mark.parametrize("name", [rule["record"] for rule in RULES if "record" in rule])
def test_every_recorded_rule_has_values(prometheus: Prometheus, name: str) -> None:
    values = prometheus.eventually(name, lambda found: any(not math.isnan(each) for each in found))
    assert any(not math.isnan(each) for each in values)


@pytest.mark.parametrize("alert", [rule["alert"] for rule in RULES if "alert" in rule])
def test_what_alerts_look_at_is_there(prometheus: Prometheus, alert: str) -> None:
    """Names alone: most alerts look at what has not happened."""
    (expression,) = [rule["expr"] for rule in RULES if rule.get("alert") == alert]
    names = set(OURS.findall(expression))
    assert names or ":" in expression or "up{" in expression
    assert all(prometheus.query(name) for name in names)


def test_a_metric_that_is_not_there_would_be_noticed(prometheus: Prometheus) -> None:
    """The negative control."""
    assert prometheus.query("sum by (code) (rate(gateway_requests_totals[15s]))") == []


def test_models_have_one_name_on_both_sides(prometheus: Prometheus) -> None:
    """What the scrape's relabelling is for: rules join gateway and worker by it."""
    for name in ("gateway_load", "diffusers_rows_in_flight"):
        assert [series["metric"]["model"] for series in prometheus.query(name)] == [MODEL]


def test_no_alert_fires_on_a_system_that_draws(prometheus: Prometheus) -> None:
    firing = prometheus.query('ALERTS{alertstate="firing"}')
    # A sixth of the traffic is meant to fail.
    assert {series["metric"]["alertname"] for series in firing} <= {"ManyErrors", "SomeErrors"}


def test_the_files_that_are_shipped_are_used(tmp_path: Path) -> None:
    shipped = yaml.safe_load((REPOSITORY / "deploy/prometheus/prometheus.yml").read_text())
    assert shipped["rule_files"] == ["rules.yml"]
    assert {each["job_name"] for each in shipped["scrape_configs"]} == {"gateway", "torchserve"}


def test_the_gateway_passes_on_what_torchserve_tells(
    server: TorchServer, gateway: RunningGateway
) -> None:
    """Through the parser and back nothing is lost."""
    own = _names(curl(server.metrics_url).body.decode())
    passed_on = _names(curl(f"{gateway.url}/metrics/instances").body.decode())
    assert own <= passed_on
    assert {"diffusers_worker_info", "diffusers_request_seconds_bucket"} <= passed_on


def _names(text: str) -> set[str]:
    return set(re.findall(r"^(\w+)", text, re.MULTILINE))
