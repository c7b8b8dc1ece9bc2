"""The state of the fleet at the moment in which Prometheus asks: READY, load, capacity."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.body import BodyBudget
from gateway.routing import Fleet

__all__ = ["FleetCollector"]


class FleetCollector(Collector):
    """Reads the fleet when it is asked, so that nothing has to be kept up to date."""

    def __init__(self, fleet: Fleet, bodies: BodyBudget, max_waiting: int) -> None:
        self._fleet = fleet
        self._bodies = bodies
        self._max_waiting = max_waiting

    def describe(self) -> Iterable[Metric]:
        """Nothing: the names are known without asking, and nobody else has them."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Every gauge of the fleet, of each instance, and of what waits."""
        yield from self._of_instances()
        yield from self._of_models()
        yield _gauge(
            "gateway_max_waiting", "Pictures that may wait; beyond that 503.", self._max_waiting
        )
        yield _gauge(
            "gateway_body_bytes", "Bytes of the bodies that are held.", self._bodies.num_bytes
        )
        yield _gauge(
            "gateway_max_body_bytes",
            "Bytes of bodies that may be held; beyond that 503.",
            self._bodies.max_total_bytes,
        )

    def _of_instances(self) -> Iterable[Metric]:
        labels = ["upstream", "model"]

        def gauge(name: str, meaning: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"gateway_instance_{name}", meaning, labels=labels)

        ready = gauge("ready", "Whether the instance's worker is READY.")
        requests = gauge("requests", "Requests that the instance has.")
        max_requests = gauge("max_requests", "Requests that it is given at a time.")
        max_rows = gauge("max_rows", "Rows that its engine batches; a guided picture is two.")
        starts = CounterMetricFamily(
            "gateway_instance_starts",
            "Times that the instance's worker became READY, the first time included.",
            labels=labels,
        )
        for each in self._fleet.instances():
            values = [each.name, each.model]
            ready.add_metric(values, each.is_ready)
            requests.add_metric(values, each.num_requests)
            max_requests.add_metric(values, each.max_requests)
            max_rows.add_metric(values, each.max_rows)
            starts.add_metric(values, each.num_starts)
        return ready, requests, max_requests, max_rows, starts

    def _of_models(self) -> Iterable[Metric]:
        waiting = GaugeMetricFamily(
            "gateway_requests_waiting", "Pictures that wait for an instance.", labels=["model"]
        )
        load = GaugeMetricFamily(
            "gateway_load",
            "Pictures that wait for an instance or have one: what to scale by.",
            labels=["model"],
        )
        for model, num_waiting in self._fleet.num_waiting_by_model().items():
            on_instances = sum(
                each.num_requests for each in self._fleet.instances() if each.model == model
            )
            waiting.add_metric([model], num_waiting)
            load.add_metric([model], num_waiting + on_instances)
        return waiting, load


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(name, meaning, value=value)
