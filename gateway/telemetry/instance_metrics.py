"""GET /metrics/instances: what TorchServe and its workers tell, of every instance, in one reply.

So the metrics address of an instance, which asks nobody for a key, need not be reached from
anywhere but its own machine.
"""

from __future__ import annotations

import asyncio
import logging

import aiohttp
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from gateway.instances import Address

__all__ = ["collect_from"]

logger = logging.getLogger(__name__)

_TIMEOUT_S = 5.0
_MAX_BYTES = 8 * 1024 * 1024


async def collect_from(
    session: aiohttp.ClientSession, instances: list[tuple[str, Address]]
) -> CollectorRegistry:
    """Ask all of them at the same time; those that do not reply are left out.

    Every sample has the label `upstream`, the instance's name.
    """
    asked = [(name, address.metrics) for name, address in instances if address.metrics is not None]
    texts = await asyncio.gather(*(_read(session, url) for _, url in asked))
    families: dict[str, Metric] = {}
    for (name, _), text in zip(asked, texts, strict=True):
        _merge(families, text, name)
    registry = CollectorRegistry()
    registry.register(_Known(families))
    return registry


class _Known(Collector):
    def __init__(self, families: dict[str, Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return list(self._families.values())


async def _read(session: aiohttp.ClientSession, url: str) -> str:
    try:
        async with asyncio.timeout(_TIMEOUT_S), session.get(url) as reply:
            content = await reply.content.read(_MAX_BYTES) if reply.status == 200 else b""
            while reply.status == 200 and len(content) < _MAX_BYTES:
                chunk = await reply.content.read(_MAX_BYTES - len(content))
                if not chunk:
                    break
                content += chunk
            return content.decode("utf-8", "replace")
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        logger.debug("%s: %s", url, error)
        return ""


def _merge(families: dict[str, Metric], text: str, upstream: str) -> None:
    """Add the samples of one instance. Mutates `families`."""
    try:
        found = list(text_string_to_metric_families(text))
    except ValueError:
        logger.warning("the metrics of %s cannot be read", upstream)
        return
    for family in found:
        whole = families.setdefault(
            family.name, Metric(family.name, family.documentation, family.type)
        )
        for sample in family.samples:
            labels = {**sample.labels, "upstream": upstream}
            whole.add_sample(sample.name, labels, sample.value)
