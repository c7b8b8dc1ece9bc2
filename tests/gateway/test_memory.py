"""What a gateway holds does not grow with the requests that it has served."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import json
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.fake_front import Values, in_front_of, running_instances
from tests.support.fake_instance import MODEL, PNG, FakeInstance, Received, running_instance
from tests.support.gateway_apps import gateway_client

NUM_REQUESTS, NUM_ROUNDS = 50, 3
FIELDS = {"prompt": "a ring", "seed": 1, "size": "64x64"}
IMAGES = "/v1/images/generations"
Client = aiohttp.ClientSession
Request = Callable[[Client, int], Awaitable[None]]


async def post(
    client: Client, path: str, status: int = 200, headers: Any = None, **fields: object
) -> bytes:
    async with client.post(path, json={**FIELDS, **fields}, headers=headers) as reply:
        content = await reply.read()
        assert reply.status == status, content
        return content


async def images(client: Client, number: int) -> None:
    await post(client, IMAGES)


async def several(client: Client, number: int) -> None:
    await post(client, IMAGES, n=2)


async def stream(client: Client, number: int) -> None:
    content = await post(client, IMAGES, stream=True, partial_images=1)
    assert b"image_generation.completed" in content


async def edits(client: Client, number: int) -> None:
    await post(client, "/v1/images/edits", image=base64.b64encode(PNG).decode())


async def predictions(client: Client, number: int) -> None:
    await post(client, f"/predictions/{MODEL}", prompt=f"ring {number}")


async def job(client: Client, number: int) -> None:
    """Ends on disk, where it is kept for a day."""
    headers = {"Idempotency-Key": f"job-{number}"}
    posted = json.loads(await post(client, "/v1/jobs", 202, headers))
    while posted["state"] != "succeeded":
        assert posted["state"] in ("queued", "running"), posted
        await asyncio.sleep(0.005)
        async with client.get(f"/v1/jobs/{posted['id']}") as reply:
            posted = await reply.json()


async def refused(client: Client, number: int) -> None:
    await post(client, IMAGES, 400, **{f"unknown_{number}": 1, "size": "large"})
    await post(client, f"/predictions/another_{number}", 404)
    await post(client, f"/nothing/{number}", 404)


async def refused_by_the_instance(client: Client, number: int) -> None:
    await post(client, IMAGES, 400, prompt="refuse")


async def client_leaves(client: Client, number: int) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.02):
            await post(client, IMAGES, prompt="wait")
            raise AssertionError("it was drawn")


KINDS: dict[str, Request] = {
    each.__name__: each
    for each in (
        *(images, several, stream, edits, predictions, job),
        *(refused, refused_by_the_instance, client_leaves),
    )
}


async def answer(fake: FakeInstance, received: Received) -> Any:
    prompt, fields = received.fields["prompt"], received.fields
    if prompt == "refuse":
        return 400, {"error": {"code": "invalid_request", "message": "no", "fields": {}}}, {}
    if prompt == "wait":
        while received.upstream_id not in fake.cancelled:
            await asyncio.sleep(0.005)
    if fields.get("stream"):
        image = base64.b64encode(PNG).decode()
        event = {"content_type": "image/png", "seeds": [fields["seed"]], "image": image}
        return f"event: image\ndata: {json.dumps(event)}\n\n".encode("ascii")
    return None


async def fill_caches(client: Client) -> None:
    """The standard library and aiohttp remember the last URLs that they took apart."""
    for number in range(300):
        async with client.get(f"/healthz?number={number}") as reply:
            await reply.read()


async def forget_timers() -> None:
    """Asyncio keeps timers that were cancelled, until they are many and most of all."""
    loop = asyncio.get_running_loop()
    for _ in range(1000):
        loop.call_later(60, lambda: None).cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def growth(folder: Path, request: Request) -> int:
    """By how many objects memory grew in the round of requests in which it grew least.

    What fills up once (caches, pools of connections) grows in some rounds, a leak in each.
    """
    async with running_instance() as fake, gateway_client(folder, [fake]) as client:
        fake.answer = partial(answer, fake)
        await fill_caches(client)
        held = []
        for each in range(NUM_ROUNDS + 1):
            for at in range(NUM_REQUESTS):
                await request(client, NUM_REQUESTS * each + at)
            await asyncio.sleep(0.05)
            fake.received.clear()
            fake.cancelled.clear()
            await forget_timers()
            gc.collect()
            held.append(sys.getallocatedblocks())
    return min(after - before for before, after in pairwise(held))


@pytest.mark.parametrize("kind", KINDS)
def test_no_request_leaves_an_object_behind(kind: str, tmp_path: Path) -> None:
    assert asyncio.run(asyncio.wait_for(growth(tmp_path, KINDS[kind]), 120)) < NUM_REQUESTS


def test_a_process_collects_what_errors_leave_before_it_is_much(tmp_path: Path) -> None:
    """An error and its traceback hold each other, and all that they came from, its body included.

    Nothing but a full collection finds those that outlived a first look.
    """
    num_requests, at_a_time = 1500, 12

    async def refuse(url: str) -> None:
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(url, connector=connector) as client:
            for _ in range(num_requests // at_a_time):
                await asyncio.gather(*(post(client, IMAGES, 400) for _ in range(at_a_time)))

    with running_instances(1) as fakes, in_front_of(tmp_path, fakes) as gateway:
        refusal = {"error": {"code": "invalid_request", "message": "no", "fields": {}}}
        fakes[0].answer = lambda received: (400, refusal, {})
        before = Values(gateway)
        asyncio.run(asyncio.wait_for(refuse(gateway.url), 120))
        after = Values(gateway)
    for generation in ("0", "1", "2"):
        name, labels = "python_gc_collections_total", {"generation": generation}
        assert after(name, **labels) > before(name, **labels), generation
