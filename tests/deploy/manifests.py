"""What is valid in Kubernetes: its own kinds by its schema, others by what we know of them."""

from __future__ import annotations

from typing import Any

import kubernetes_validate

__all__ = ["check", "pod_of"]

VERSION = "1.37"
# Of other projects: what has to be there, since their schemas are not here.
_OTHERS = {
    "ServiceMonitor": ("monitoring.coreos.com/v1", {"selector", "endpoints"}),
    "PrometheusRule": ("monitoring.coreos.com/v1", {"groups"}),
    "ScaledObject": ("keda.sh/v1alpha1", {"scaleTargetRef", "triggers"}),
    "ServingRuntime": ("serving.kserve.io/v1alpha1", {"containers", "supportedModelFormats"}),
    "InferenceService": ("serving.kserve.io/v1beta1", {"predictor"}),
}


def check(manifest: dict[str, Any]) -> str:
    """Raise ValidationError where `manifest` is wrong; return its kind."""
    kind = str(manifest["kind"])
    if kind in _OTHERS:
        version, needed = _OTHERS[kind]
        assert manifest["apiVersion"] == version
        assert manifest["metadata"]["name"]
        assert needed <= manifest["spec"].keys()
    else:
        kubernetes_validate.validate(manifest, VERSION, strict=True)
    return kind


def pod_of(deployment: dict[str, Any]) -> dict[str, Any]:
    """The specification of its pods."""
    return dict(deployment["spec"]["template"]["spec"])
