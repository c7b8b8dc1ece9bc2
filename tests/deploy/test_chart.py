"""deploy/chart: what Helm renders of it is valid, safe, and what our programs take."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from gateway.keys import KeyRing
from gateway.settings import Settings
from scripts.cli import make_parser
from scripts.repository import REPOSITORY
from tests.deploy.manifests import check, pod_of
from tests.support.helm import helm

CHART = REPOSITORY / "deploy" / "chart"
DEMO = ("-f", str(CHART / "values-demo.yaml"))
GPU = (
    *("-f", str(CHART / "values-gpu.yaml")),
    *("--set", "archive.pull=registry.example/sd@sha256:0123", "--set", "keys.existingSecret=keys"),
)
WAYS = {
    "demo": DEMO,
    "gpu": GPU,
    "image volume": (
        *("--set", "archive.image=registry.example/sd@sha256:0123"),
        *("--set", "keys.existingSecret=keys", "--set", "autoscaling.kind=hpa"),
    ),
    "claim": (
        *("--set", "archive.claim=models", "--set", "archive.name=sd"),
        *("--set", "keys.existingSecret=keys", "--set", "networkPolicy.enabled=false"),
    ),
    "everything": (
        *GPU,
        *("--set", "archive.pullSecret=login", "--set", "archive.name=sd"),
        *("--set", "metrics.for=prometheus", "--set", "metrics.keySecret.name=prometheus-key"),
        *("--set", "tracing.endpoint=http://collector.observability:4318"),
        *("--set", "imagePullSecrets[0].name=login", "--set", "priorityClassName=high"),
        *("--set", "runtimeClassName=nvidia", "--set", "podLabels.team=a", "--set", "replicas=3"),
        *("--set-json", 'gateway.settings={"aliases": {"dall-e-3": "sd"}, "max_waiting": 64}'),
    ),
}


def render(*arguments: str) -> list[dict[str, Any]]:
    answer = helm("template", "drawing", str(CHART), "--namespace", "art", *arguments)
    assert answer.returncode == 0, answer.stderr
    return [each for each in yaml.safe_load_all(answer.stdout) if each]


def only(rendered: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [each for each in rendered if each["kind"] == kind]
    return found


@pytest.fixture(scope="module", params=WAYS)
def rendered(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return render(*WAYS[request.param])


@pytest.mark.parametrize("way", ["demo", "gpu"])
def test_it_lints(way: str) -> None:
    answer = helm("lint", "--strict", str(CHART), *WAYS[way])
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_everything_is_valid(rendered: list[dict[str, Any]]) -> None:
    kinds = [check(each) for each in rendered]
    assert {"Deployment", "Service", "ConfigMap"} <= set(kinds)


def test_all_can_be_told_from_one_another(rendered: list[dict[str, Any]]) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in rendered]
    assert len(names) == len(set(names))


def test_a_misspelt_probe_is_noticed() -> None:
    """The negative control of what the checks are."""
    deployment = only(render(*DEMO), "Deployment")
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    for wrong in (
        {"readynessProbe": container["readinessProbe"]},
        {"readinessProbe": {"httpGet": {"path": "/readyz", "prot": 8000}}},
        {"readinessProbe": {"httpGet": {"path": "/readyz", "port": "http"}, "periodSeconds": "5"}},
    ):
        broken = deepcopy(deployment)
        del broken["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]
        broken["spec"]["template"]["spec"]["containers"][0] |= wrong
        with pytest.raises(kubernetes_validate.ValidationError):
            check(broken)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give exactly one of embedded, pull, image and claim"),
        ((*DEMO, "--set", "archive.claim=models"), "give exactly one of"),
        (("--set", "archive.claim=models"), "the gateway asks for keys"),
        ((*DEMO, "--set", "keys.existingSecret=keys"), "give existingSecret or plain, not both"),
        ((*DEMO, "--set", "metrics.serviceMonitor.enabled=true"), "nobody may read the metrics"),
        (
            (*DEMO, "--set", "metrics.for=a", "--set", "metrics.serviceMonitor.enabled=true"),
            "Prometheus needs the key that metrics.for names",
        ),
        ((*DEMO, "--set", "gateway.settings.port=80"), "gateway.settings.port: the chart sets it"),
        ((*DEMO, "--set", "replica=2"), "additional properties 'replica' not allowed"),
        ((*DEMO, "--set", "torchserve.gpus=2"), "maximum"),
        ((*DEMO, "--set", "autoscaling.kind=vpa"), "one of 'none', 'hpa', 'keda'"),
    ],
)
def test_what_is_wrong_is_refused(arguments: tuple[str, ...], said: str) -> None:
    answer = helm("template", "drawing", str(CHART), *arguments)
    assert answer.returncode != 0
    assert said in answer.stderr


def test_the_schema_knows_every_value() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert dict(_paths(values)).keys() <= set(_schema_paths(schema))
    assert schema["properties"].keys() - values.keys() == {"global"}


def _paths(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        yield f"{before}{name}", value
        if isinstance(value, dict) and name not in ("requests", "limits", "labels"):
            yield from _paths(value, f"{before}{name}.")


def _schema_paths(schema: dict[str, Any], before: str = "") -> Iterator[str]:
    for name, inner in schema.get("properties", {}).items():
        yield f"{before}{name}"
        yield from _schema_paths(inner, f"{before}{name}.")


def test_containers_may_do_little(rendered: list[dict[str, Any]]) -> None:
    pod = pod_of(only(rendered, "Deployment"))
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in (*pod["initContainers"], *pod["containers"]):
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]


def test_volumes_are_mounted_that_there_are(rendered: list[dict[str, Any]]) -> None:
    pod = pod_of(only(rendered, "Deployment"))
    there = {volume["name"] for volume in pod["volumes"]}
    mounted = {
        mount["name"]
        for container in (*pod["initContainers"], *pod["containers"])
        for mount in container["volumeMounts"]
    }
    assert mounted == there


def test_torchserve_is_a_sidecar_that_ends_after_the_gateway(
    rendered: list[dict[str, Any]],
) -> None:
    pod = pod_of(only(rendered, "Deployment"))
    sidecars = [each for each in pod["initContainers"] if each.get("restartPolicy") == "Always"]
    assert [each["name"] for each in sidecars] == ["torchserve"]
    assert pod["initContainers"][-1] is sidecars[0]
    (gateway,) = pod["containers"]
    (_, seconds) = gateway["lifecycle"]["preStop"]["exec"]["command"]
    settings = yaml.safe_load(_config_of(rendered)["gateway.yaml"])
    needed = int(seconds) + settings["drain_s"]
    assert pod["terminationGracePeriodSeconds"] >= needed + 30


def test_the_probes_are_the_gateways(rendered: list[dict[str, Any]]) -> None:
    (gateway,) = pod_of(only(rendered, "Deployment"))["containers"]
    assert gateway["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert gateway["livenessProbe"]["httpGet"]["path"] == "/healthz"
    # A model that takes minutes to load makes nobody restart the pod.
    assert gateway["startupProbe"]["httpGet"]["path"] == "/healthz"
    (port,) = gateway["ports"]
    assert port == {"name": "http", "containerPort": 8000}


def test_the_gateway_takes_its_settings(rendered: list[dict[str, Any]]) -> None:
    settings = Settings.from_mapping(yaml.safe_load(_config_of(rendered)["gateway.yaml"]))
    assert (settings.address, settings.port, settings.keys_required) == ("0.0.0.0", 8000, True)
    assert settings.log_format == "json"


def test_own_settings_of_the_gateway_are_in_it() -> None:
    content = _config_of(render(*WAYS["everything"]))["gateway.yaml"]
    settings = Settings.from_mapping(yaml.safe_load(content))
    assert (settings.max_waiting, settings.aliases) == (64, {"dall-e-3": "sd"})
    assert settings.metrics_for == "prometheus"


def test_the_log_may_be_text() -> None:
    content = _config_of(render(*DEMO, "--set", "gateway.settings.log_format=text"))["gateway.yaml"]
    assert Settings.from_mapping(yaml.safe_load(content)).log_format == "text"


def test_a_pod_that_begins_anew_with_its_store_fetches_again() -> None:
    (fetching, *_) = pod_of(only(render(*WAYS["gpu"]), "Deployment"))["initContainers"]
    assert make_parser().parse_args(fetching["args"][1:]).force


def _config_of(rendered: list[dict[str, Any]]) -> dict[str, str]:
    (found,) = [
        each["data"]
        for each in rendered
        if each["kind"] == "ConfigMap" and "gateway.yaml" in each["data"]
    ]
    return dict(found)


def test_the_gateway_knows_the_keys(tmp_path: Path) -> None:
    secret = only(render(*DEMO), "Secret")
    text = secret["stringData"]["keys"]
    (tmp_path / "keys").write_text(text)
    found = KeyRing(tmp_path / "keys").find("demo-key-that-everybody-knows")
    assert found is not None
    assert found.name == "demo"
    assert "everybody-knows" not in text


def test_the_command_line_takes_what_the_containers_run(rendered: list[dict[str, Any]]) -> None:
    pod, parser = pod_of(only(rendered, "Deployment")), make_parser()
    for container in (*pod["initContainers"], *pod["containers"]):
        program, *arguments = container["args"]
        assert program == "diffusers-torchserve"
        parser.parse_args(arguments)


def test_one_gpu_a_pod_where_it_is_asked_for() -> None:
    for way, gpus in (("demo", None), ("gpu", 1)):
        pod = pod_of(only(render(*WAYS[way]), "Deployment"))
        limits = pod["initContainers"][-1]["resources"]["limits"]
        assert limits.get("nvidia.com/gpu") == gpus


@pytest.mark.parametrize(
    ("way", "volume"),
    [
        ("demo", {"emptyDir": {"sizeLimit": "1Gi"}}),
        ("gpu", {"emptyDir": {"sizeLimit": "60Gi"}}),
        (
            "image volume",
            {
                "image": {
                    "reference": "registry.example/sd@sha256:0123",
                    "pullPolicy": "IfNotPresent",
                }
            },
        ),
        ("claim", {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}}),
    ],
)
def test_where_the_archive_comes_from(way: str, volume: dict[str, Any]) -> None:
    pod = pod_of(only(render(*WAYS[way]), "Deployment"))
    (store,) = [each for each in pod["volumes"] if each["name"] == "store"]
    assert store == {"name": "store", **volume}
    names = [each["name"] for each in pod["initContainers"]]
    assert ("archive" in names) == (way in ("demo", "gpu"))


def test_what_scales_it() -> None:
    for way, kind in (("gpu", "ScaledObject"), ("image volume", "HorizontalPodAutoscaler")):
        rendered = render(*WAYS[way])
        deployment = only(rendered, "Deployment")
        target = only(rendered, kind)["spec"]["scaleTargetRef"]["name"]
        assert target == deployment["metadata"]["name"]
        # Else every upgrade would undo what the autoscaler did.
        assert "replicas" not in deployment["spec"]
    assert "replicas" in only(render(*DEMO), "Deployment")["spec"]


def test_keda_asks_for_a_metric_of_the_gateways() -> None:
    (trigger,) = only(render(*GPU), "ScaledObject")["spec"]["triggers"]
    assert trigger["metadata"]["query"].startswith('sum(gateway_load{namespace="art"')
    assert trigger["metadata"]["threshold"] == "8"


def test_prometheus_reads_both_paths_and_gets_the_names_that_rules_go_by() -> None:
    rendered = render(*WAYS["everything"])
    endpoints = only(rendered, "ServiceMonitor")["spec"]["endpoints"]
    jobs = {each["path"]: each["relabelings"][0]["replacement"] for each in endpoints}
    assert jobs == {"/metrics": "gateway", "/metrics/instances": "torchserve"}
    for each in endpoints:
        assert each["authorization"]["credentials"] == {"name": "prometheus-key", "key": "key"}
    shipped = yaml.safe_load((REPOSITORY / "deploy/prometheus/prometheus.yml").read_text())
    (torchserve,) = [each for each in shipped["scrape_configs"] if "metric_relabel_configs" in each]
    first, second = torchserve["metric_relabel_configs"]
    (ours,) = [each["metricRelabelings"] for each in endpoints if "metricRelabelings" in each]
    renamed = {"source_labels": "sourceLabels", "target_label": "targetLabel"}
    assert ours == [{renamed.get(k, k): v for k, v in each.items()} for each in (first, second)]


def test_the_rules_and_the_board_are_those_that_are_shipped() -> None:
    rendered = render(*GPU)
    rules = yaml.safe_load((REPOSITORY / "deploy/prometheus/rules.yml").read_text())
    assert only(rendered, "PrometheusRule")["spec"] == rules
    (board,) = [each["data"] for each in rendered if "diffusers.json" in (each.get("data") or {})]
    shipped = (REPOSITORY / "deploy/grafana/diffusers.json").read_text()
    assert json.loads(board["diffusers.json"]) == json.loads(shipped)


def test_only_prometheus_and_the_namespace_are_let_in() -> None:
    (rule,) = only(render(*GPU), "NetworkPolicy")["spec"]["ingress"]
    assert rule["ports"] == [{"port": 8000, "protocol": "TCP"}]
    assert rule["from"] == [
        {"podSelector": {}},
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}},
    ]


def test_what_pods_may_call() -> None:
    ports = {
        way: {
            port["port"]
            for rule in only(render(*WAYS[way]), "NetworkPolicy")["spec"]["egress"]
            for port in rule["ports"]
        }
        for way in ("demo", "gpu", "everything")
    }
    assert ports == {"demo": {53}, "gpu": {53, 443}, "everything": {53, 443, 4318}}


def test_traces_go_where_they_shall() -> None:
    pod = pod_of(only(render(*WAYS["everything"]), "Deployment"))
    for container in (pod["initContainers"][-1], pod["containers"][0]):
        assert container["env"] == [
            {
                "name": "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
                "value": "http://collector.observability:4318/v1/traces",
            }
        ]


def test_versions_are_the_projects() -> None:
    from handler import __version__

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__
    image = pod_of(only(render(*DEMO), "Deployment"))["containers"][0]["image"]
    assert re.fullmatch(rf"diffusers-torchserve:{re.escape(__version__)}", image)
