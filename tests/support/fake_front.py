"""A gateway as a process in front of fake instances, what it replies, and what it counts."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.support.fake_instance import MODEL, FakeInstance, running_instance
from tests.support.gateways import RunningGateway, running_gateway

__all__ = [
    "BODY",
    "IMAGES",
    "Sent",
    "Values",
    "eventually",
    "in_front_of",
    "running_instances",
    "send",
]

BODY = {"model": MODEL, "prompt": "a ring that nobody shall read of", "n": 1}
IMAGES = "/v1/images/generations"


@dataclass(frozen=True, slots=True)
class Sent:
    status: int
    headers: dict[str, str]
    body: bytes


def send(
    url: str, path: str, body: dict[str, Any] | None = None, headers: dict[str, str] | None = None
) -> Sent:
    request = urllib.request.Request(
        url + path,
        None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json", **(headers or {})},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=30) as reply:
            return Sent(reply.status, dict(reply.headers), reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return Sent(error.code, dict(error.headers), error.read())


class Values:
    """What /metrics said once."""

    def __init__(self, gateway: RunningGateway, path: str = "/metrics") -> None:
        reply = send(gateway.url, path)
        assert reply.status == 200, reply
        self.text = reply.body.decode()
        self.families = list(text_string_to_metric_families(self.text))

    def __call__(self, name: str, **labels: str) -> float:
        """The sum of the samples with these labels; fails where there is none."""
        found = [
            sample.value
            for family in self.families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert found, f"{name} {labels} is not among\n{self.text}"
        return sum(found)


def eventually(gateway: RunningGateway, is_so: Callable[[Values], bool]) -> Values:
    until_s = time.monotonic() + 10
    while not is_so(values := Values(gateway)):
        assert time.monotonic() < until_s, values.text
        time.sleep(0.02)
    return values


@contextmanager
def in_front_of(
    folder: Path, fakes: list[FakeInstance], *, with_metrics: bool = False, **settings: Any
) -> Iterator[RunningGateway]:
    instances = [
        {name: value for name, value in asdict(fake.settings).items() if value is not None}
        | ({"metrics": f"{fake.url}/metrics"} if with_metrics else {})
        for fake in fakes
    ]
    with running_gateway(folder, [], instances=instances, **settings) as gateway:
        yield gateway


@contextmanager
def running_instances(num: int) -> Iterator[list[FakeInstance]]:
    """Run some inside the block."""
    started, stop = threading.Event(), asyncio.Event()
    fakes: list[FakeInstance] = []
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with AsyncExitStack() as stack:
            for _ in range(num):
                fakes.append(await stack.enter_async_context(running_instance()))
            started.set()
            await stop.wait()

    def run() -> None:
        loop.run_until_complete(serve())
        loop.close()

    thread = threading.Thread(target=run, name="fake instances")
    thread.start()
    try:
        assert started.wait(30)
        yield fakes
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
