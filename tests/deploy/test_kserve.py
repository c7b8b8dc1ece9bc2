"""deploy/kserve and deploy/llm-d: what can be told of them without their projects."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import kubernetes_validate
import pytest
import yaml

from gateway.settings import Settings
from scripts.repository import REPOSITORY
from tests.deploy.manifests import check

FOLDER = REPOSITORY / "deploy" / "kserve"
MANIFESTS: dict[str, dict[str, Any]] = {
    each["kind"]: each
    for name in ("runtime.yaml", "service.yaml")
    for each in yaml.safe_load_all((FOLDER / name).read_text())
}
RUNTIME = MANIFESTS["ServingRuntime"]["spec"]
PREDICTOR = MANIFESTS["InferenceService"]["spec"]["predictor"]


def as_pod(runtime: dict[str, Any]) -> dict[str, Any]:
    """The pod that KServe makes of a runtime, in what Kubernetes itself checks."""
    spec = {name: runtime[name] for name in ("containers", "volumes")}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec}


def test_all_of_it_is_valid() -> None:
    assert {check(each) for each in MANIFESTS.values()} == {
        *("ServingRuntime", "InferenceService", "ConfigMap")
    }
    assert check(as_pod(RUNTIME)) == "Pod"


def test_a_misspelt_probe_is_noticed() -> None:
    broken = deepcopy(RUNTIME)
    container = broken["containers"][0]
    container["readynessProbe"] = container.pop("readinessProbe")
    with pytest.raises(kubernetes_validate.ValidationError):
        check(as_pod(broken))


def test_the_service_names_the_runtime_and_its_format() -> None:
    model = PREDICTOR["model"]
    assert model["runtime"] == MANIFESTS["ServingRuntime"]["metadata"]["name"]
    formats = [(each["name"], each["version"]) for each in RUNTIME["supportedModelFormats"]]
    assert (model["modelFormat"]["name"], model["modelFormat"]["version"]) in formats
    assert model["protocolVersion"] in RUNTIME["protocolVersions"]


def test_one_container_has_what_kserve_gives_the_model_to() -> None:
    """KServe mounts the model into this container alone, at this place."""
    (container,) = RUNTIME["containers"]
    assert container["name"] == "kserve-container"
    assert container["args"] == ["serve-both", "/mnt/models"]
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": 8000}
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": 8000}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_there_is_time_to_drain() -> None:
    (container,) = RUNTIME["containers"]
    (_, seconds) = container["lifecycle"]["preStop"]["exec"]["command"]
    settings = Settings.from_mapping(yaml.safe_load(MANIFESTS["ConfigMap"]["data"]["gateway.yaml"]))
    assert PREDICTOR["terminationGracePeriodSeconds"] >= int(seconds) + settings.drain_s + 30


def test_nothing_scales_to_zero() -> None:
    assert PREDICTOR["minReplicas"] >= 1
    annotations = MANIFESTS["InferenceService"]["metadata"]["annotations"]
    assert annotations["serving.kserve.io/deploymentMode"] == "RawDeployment"


def test_llm_d_goes_by_what_is_open() -> None:
    values = yaml.safe_load((REPOSITORY / "deploy" / "llm-d" / "values.yaml").read_text())
    router = values["router"]
    chart = yaml.safe_load((REPOSITORY / "deploy" / "chart" / "Chart.yaml").read_text())
    labels = router["modelServers"]["matchLabels"]
    assert labels == {"app.kubernetes.io/name": chart["name"]}
    assert router["modelServers"]["targetPorts"] == [{"number": 8000}]
    epp = router["epp"]
    config = yaml.safe_load(epp["pluginsCustomConfig"][epp["pluginsConfigFile"]])
    declared = {each["type"] for each in config["plugins"]}
    (profile,) = config["schedulingProfiles"]
    used = {each["pluginRef"] for each in profile["plugins"]}
    used |= {each["pluginRef"] for each in config["requestHandler"]["parsers"]}
    assert used == declared
    assert "active-request-scorer" in declared
