"""Twelve clients of a site, each with requests of its kind; what became of every one.

Nobody tries again: what a client library would hide is counted.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import grpc
import numpy as np

from tests.chaos.site import Site
from tests.support.client import GRPC_SERVICE, first_field, pixels, predictions_request
from tests.support.drawings import as_base64, drawing

__all__ = ["DEADLINE_S", "Clients", "Tally"]

DEADLINE_S = 240.0
"""Longer than the gateway lets a request wait, and an instance draw."""
MODEL = "stable_diffusion"
NUM_SEEDS = 6
# Batches round differently; pictures of two seeds differ by far more.
TOLERANCE = 2
_JOB_POLL_S = 0.3
_AWAY_S = 0.2
Kind = Callable[["Clients", int], Awaitable[bytes]]


class Failed(Exception):
    """A request that ended by an error; the text says which, without what differs each time."""


@dataclass(slots=True)
class Tally:
    """What became of requests."""

    num_requests: int = 0
    num_ok: int = 0
    num_wrong: int = 0
    num_hung: int = 0
    num_unended: int = 0
    """Streams that ended without a last event."""
    errors: Counter[str] = field(default_factory=Counter)
    """By kind of client and what it was told."""
    by_kind: Counter[str] = field(default_factory=Counter)
    longest_s: float = 0.0

    @property
    def num_errors(self) -> int:
        return sum(self.errors.values())

    def add(self, other: Tally) -> None:
        for name in ("num_requests", "num_ok", "num_wrong", "num_hung", "num_unended"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.errors.update(other.errors)
        self.by_kind.update(other.by_kind)
        self.longest_s = max(self.longest_s, other.longest_s)


class Clients:
    """Sends requests to a site until told to stop."""

    def __init__(self, site: Site, session: aiohttp.ClientSession, channel: Any) -> None:
        self._site, self.session, self.channel = site, session, channel
        self._references: dict[tuple[str, int], np.ndarray] = {}
        self._number = 0
        self._is_over = False
        self.tally = Tally()

    @classmethod
    @asynccontextmanager
    async def of(cls, site: Site) -> AsyncIterator[Clients]:
        """Clients with connections to `site`."""
        credentials = grpc.ssl_channel_credentials(site.certificate.read_bytes())
        connector = aiohttp.TCPConnector(ssl=site.trust(), limit=0)
        timeout = aiohttp.ClientTimeout(total=DEADLINE_S)
        async with (
            aiohttp.ClientSession(site.url, connector=connector, timeout=timeout) as session,
            grpc.aio.secure_channel(f"localhost:{site.port}", credentials) as channel,
        ):
            yield cls(site, session, channel)

    async def learn(self) -> None:
        """Draw every picture alone, before anything breaks: what they are compared with."""
        for name, kind in KINDS.items():
            for seed in range(NUM_SEEDS):
                self._references[name, seed] = pixels(await kind(self, seed)).astype(int)
        one, other = (self._references["images", seed] for seed in (0, 1))
        assert np.abs(one - other).max() > TOLERANCE  # or the comparison says nothing

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Let all clients work inside the block; what they have begun ends before it does."""
        self._is_over = False
        names = [name for name, count in CLIENTS.items() for _ in range(count)]
        tasks = [asyncio.create_task(self._work(name, at)) for at, name in enumerate(names)]
        try:
            yield
        finally:
            self._is_over = True
            await asyncio.gather(*tasks)

    async def _work(self, name: str, at: int) -> None:
        seed = at
        while not self._is_over:
            seed = (seed + 1) % NUM_SEEDS
            await self._one(name, seed)

    async def _one(self, name: str, seed: int) -> None:
        tally, started_s = self.tally, time.monotonic()
        tally.num_requests += 1
        tally.by_kind[name] += 1
        try:
            async with asyncio.timeout(DEADLINE_S):
                drawn = await KINDS[name](self, seed)
            difference = np.abs(pixels(drawn).astype(int) - self._references[name, seed]).max()
            if difference > TOLERANCE:
                tally.num_wrong += 1
            else:
                tally.num_ok += 1
        except TimeoutError:
            tally.num_hung += 1
        except Unended:
            tally.num_unended += 1
        except Failed as failed:
            tally.errors[f"{name}: {failed}"] += 1
            await asyncio.sleep(_AWAY_S)
        except (aiohttp.ClientError, OSError) as error:
            tally.errors[f"{name}: {type(error).__name__}"] += 1
            await asyncio.sleep(_AWAY_S)
        except (LookupError, TypeError, ValueError) as error:
            # A reply that is none of ours; the others draw on.
            tally.errors[f"{name}: a reply of another form, {error!r}"] += 1
        tally.longest_s = max(tally.longest_s, time.monotonic() - started_s)

    def next_number(self) -> int:
        self._number += 1
        return self._number


class Unended(Exception):
    """A stream without a last event."""


def _fields(seed: int) -> dict[str, Any]:
    return {
        "prompt": "a ring",
        "seed": seed,
        "num_inference_steps": 2 + seed,
        "height": 64,
        "width": 64,
    }


def _openai_fields(seed: int) -> dict[str, Any]:
    return {"prompt": "a ring", "seed": seed, "num_inference_steps": 2 + seed, "size": "64x64"}


async def _read(response: aiohttp.ClientResponse, expected: int = 200) -> Any:
    body = await response.read()
    if response.status != expected:
        try:
            error = json.loads(body)["error"]
            raise Failed(f"{response.status} {error.get('code')}")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Failed(f"{response.status} {body[:60]!r}") from None
    return body if response.content_type.startswith("image/") else json.loads(body)


async def _images(clients: Clients, seed: int) -> bytes:
    url = "/v1/images/generations"
    async with clients.session.post(url, json=_openai_fields(seed)) as response:
        return base64.b64decode((await _read(response))["data"][0]["b64_json"])


async def _edits(clients: Clients, seed: int) -> bytes:
    fields = {**_openai_fields(seed), "image": as_base64(drawing(seed)), "strength": 0.9}
    async with clients.session.post("/v1/images/edits", json=fields) as response:
        return base64.b64decode((await _read(response))["data"][0]["b64_json"])


async def _stream(clients: Clients, seed: int) -> bytes:
    fields = {**_openai_fields(seed), "stream": True, "partial_images": 1}
    async with clients.session.post("/v1/images/generations", json=fields) as response:
        if response.status != 200:
            await _read(response)
        ends: list[dict[str, Any]] = []
        try:
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if event.get("type") == "image_generation.completed" or "error" in event:
                        ends.append(event)
        except aiohttp.ClientPayloadError:
            if not ends:
                raise Failed("stream cut off") from None
    if not ends:
        raise Unended
    assert len(ends) == 1, ends
    if "error" in ends[0]:
        raise Failed(f"error event {ends[0]['error'].get('code')}")
    return base64.b64decode(ends[0]["b64_json"])


async def _predictions(clients: Clients, seed: int) -> bytes:
    url = f"/predictions/{MODEL}"
    async with clients.session.post(url, json=_fields(seed)) as response:
        return bytes(await _read(response))


async def _job(clients: Clients, seed: int) -> bytes:
    """A job survives: whoever posts it and polls it tries again while the gateway is away."""
    headers = {"Idempotency-Key": f"chaos-{clients.next_number()}-{time.time_ns()}"}

    async def post() -> Any:
        async with clients.session.post(
            "/v1/jobs", json=_openai_fields(seed), headers=headers
        ) as response:
            return await _read(response, 202)

    async def get() -> Any:
        async with clients.session.get(f"/v1/jobs/{job['id']}") as response:
            return await _read(response)

    job = await _trying(post)
    while job["state"] not in ("succeeded", "failed", "cancelled"):
        await asyncio.sleep(_JOB_POLL_S)
        job = await _trying(get)
    if job["state"] != "succeeded":
        raise Failed(f"job {job['state']}: {(job.get('error') or {}).get('code')}")
    return base64.b64decode(job["result"]["data"][0]["b64_json"])


async def _trying(ask: Callable[[], Awaitable[Any]]) -> Any:
    while True:
        try:
            return await ask()
        except (aiohttp.ClientError, OSError):
            await asyncio.sleep(_AWAY_S)
        except Failed as failed:
            if not str(failed).startswith(("502 gateway_died", "503 no_gateway")):
                raise
            await asyncio.sleep(_AWAY_S)


async def _grpc(clients: Clients, seed: int) -> bytes:
    fields = {name: str(value).encode() for name, value in _fields(seed).items()}
    call = clients.channel.unary_unary(f"{GRPC_SERVICE}/Predictions")
    try:
        drawn = first_field(await call(predictions_request(MODEL, fields), timeout=DEADLINE_S))
    except grpc.aio.AioRpcError as error:
        if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
            raise TimeoutError from error
        raise Failed(f"{error.code().name}") from error
    # What the handler refuses is a reply like any other.
    if drawn.startswith(b"{"):
        raise Failed(f"reply {json.loads(drawn)['error']['code']}")
    return drawn


KINDS: dict[str, Kind] = {
    "images": _images,
    "stream": _stream,
    "edits": _edits,
    "predictions": _predictions,
    "job": _job,
    "grpc": _grpc,
}
CLIENTS = {"images": 4, "stream": 2, "edits": 2, "predictions": 2, "job": 1, "grpc": 1}
