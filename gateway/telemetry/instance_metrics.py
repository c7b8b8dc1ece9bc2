"""What TorchServe and its workers tell, of every instance, in one reply to Prometheus.

So the metrics address of an instance, which asks nobody for a key, need not be reached from
anywhere but its own machine. Lines stay as TorchServe writes them, with one label more.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterable, Iterator

import aiohttp

from gateway.addresses import Address

__all__ = ["collect_from", "merged"]

logger = logging.getLogger(__name__)

_TIMEOUT_S = 5.0
_MAX_BYTES = 8 * 1024 * 1024
_COMMENT = re.compile(r"# (?:HELP|TYPE) (\w+)(?: .*)?")
_SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})?( [^{}]+)")


async def collect_from(
    session: aiohttp.ClientSession, instances: Iterable[tuple[str, Address]]
) -> bytes:
    """Ask all of them at the same time; those that do not reply are left out.

    Every sample has the label `upstream`, the instance's name.
    """
    asked = [(name, each.metrics) for name, each in instances if each.metrics is not None]
    texts = await asyncio.gather(*(_read(session, url) for _, url in asked))
    return merged([(name, text) for (name, _), text in zip(asked, texts, strict=True)]).encode()


async def _read(session: aiohttp.ClientSession, url: str) -> str:
    content = bytearray()
    try:
        async with asyncio.timeout(_TIMEOUT_S), session.get(url) as reply:
            if reply.status != 200:
                return ""
            async for chunk in reply.content.iter_any():
                content += chunk
                if len(content) > _MAX_BYTES:
                    logger.warning("%s: more than %d bytes of metrics", url, _MAX_BYTES)
                    return ""
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        logger.debug("%s: %s", url, error)
        return ""
    return content.decode("utf-8", "replace")


def merged(texts: Iterable[tuple[str, str]]) -> str:
    """Metrics in Prometheus' text format, of several instances by their names, as one text.

    All lines of a metric follow one another, below its description; what is no line of metrics is
    left out.
    """
    families: dict[str, tuple[dict[str, None], list[str]]] = {}
    for upstream, text in texts:
        label = f'upstream="{_escaped(upstream)}"'
        for family, line, is_sample in _lines(text, label):
            comments, samples = families.setdefault(family, ({}, []))
            if is_sample:
                samples.append(line)
            else:
                comments[line] = None
    lines = [
        line for comments, samples in families.values() for line in (*comments, *samples) if samples
    ]
    return "".join(f"{line}\n" for line in lines)


def _lines(text: str, label: str) -> Iterator[tuple[str, str, bool]]:
    """Each line with the metric that it belongs to, and whether it is a sample."""
    family = ""
    for line in text.splitlines():
        if comment := _COMMENT.fullmatch(line):
            family = comment[1]
            yield family, line, False
        elif sample := _SAMPLE.fullmatch(line):
            name, labels, value = sample.groups()
            labels = f"{label},{labels}" if labels else label
            # Of a histogram: its name with an ending.
            of_family = family if family and name.startswith(family) else name
            yield of_family, f"{name}{{{labels}}}{value}", True


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
