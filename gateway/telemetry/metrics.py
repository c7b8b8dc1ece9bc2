"""Counts and times requests, for Prometheus: in a registry of its own, read by /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from gateway.telemetry.facts import Facts
from handler import __version__

__all__ = ["BUCKETS_S", "Metrics"]

BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 180, 300, 450, 600)
"""From a reply that draws nothing to the longest drawing that anybody waits for."""


class Metrics:
    """What happened to requests since the gateway started."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        Gauge(
            "gateway_build_info", "The gateway's version; always 1.", ["version"], registry=registry
        ).labels(__version__).set(1)
        self._requests = Counter(
            "gateway_requests",
            "Requests that ended, by the declared path, the status and the error's code or ok.",
            ["route", "status", "code"],
            registry=registry,
        )
        self._seconds = Histogram(
            "gateway_request_seconds",
            "Seconds from a request's head to the end of its reply.",
            ["route"],
            buckets=BUCKETS_S,
            registry=registry,
        )
        self._open = Gauge(
            "gateway_requests_open", "Requests that are being served.", registry=registry
        )
        self._disconnects = Counter(
            "gateway_disconnects",
            "Requests whose client left before the reply's end.",
            ["route"],
            registry=registry,
        )
        self._wait = Histogram(
            "gateway_wait_seconds",
            "Seconds that a picture waited for an instance to be ready and free.",
            ["model"],
            buckets=BUCKETS_S,
            registry=registry,
        )
        self._draw = Histogram(
            "gateway_draw_seconds",
            "Seconds that an instance had a picture's request, by what came of it:"
            " ok, error, died, not_taken or cancelled.",
            ["model", "outcome"],
            buckets=BUCKETS_S,
            registry=registry,
        )
        self._deaths = Counter(
            "gateway_instance_deaths",
            "Requests over which an instance's worker, or the instance, died.",
            ["upstream"],
            registry=registry,
        )
        self._resent = Counter(
            "gateway_resent",
            "Requests that were sent once more because their instance had died.",
            ["model"],
            registry=registry,
        )
        self._not_taken = Counter(
            "gateway_not_taken",
            "Requests that an instance refused because it was full or about to stop.",
            ["upstream"],
            registry=registry,
        )

    def begun(self, facts: Facts) -> None:
        """Count a request as open."""
        self._open.inc()

    def ended(self, facts: Facts) -> None:
        """Count a request that is over."""
        self._open.dec()
        if facts.is_keyless:
            return
        self._requests.labels(facts.route, str(facts.status), facts.code or "ok").inc()
        self._seconds.labels(facts.route).observe(facts.seconds)
        # Zero at first, so that the first one is an increase and not a series' beginning.
        disconnects = self._disconnects.labels(facts.route)
        if facts.has_left:
            disconnects.inc()

    def waited(self, model: str, seconds: float) -> None:
        """Count a picture that waited until it had an instance, or until it gave up."""
        self._wait.labels(model).observe(seconds)
        self._resent.labels(model)

    def drawn(self, model: str, instance: str, outcome: str, seconds: float) -> None:
        """Count what came of a request to an instance."""
        self._draw.labels(model, outcome).observe(seconds)
        deaths, not_taken = self._deaths.labels(instance), self._not_taken.labels(instance)
        if outcome == "died":
            deaths.inc()
        elif outcome == "not_taken":
            not_taken.inc()

    def resent(self, model: str) -> None:
        """Count a request that is sent once more."""
        self._resent.labels(model).inc()
