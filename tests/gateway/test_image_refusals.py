"""What the gateway itself says of a request of OpenAI's images API, before anybody draws."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_instance import running_instance
from tests.support.gateway_apps import gateway_client

JSON = "application/json"


def post(folder: Path, body: bytes, headers: dict[str, str]) -> tuple[int, Any, int]:
    """Status and error of the reply, and how many requests were passed on."""

    async def talk() -> tuple[int, Any, int]:
        async with running_instance() as fake, gateway_client(folder, [fake]) as client:
            reply = await client.post("/v1/images/generations", data=body, headers=headers)
            return reply.status, (await reply.json()).get("error"), len(fake.received)

    return asyncio.run(asyncio.wait_for(talk(), 60))


@pytest.mark.parametrize(
    ("seed", "n", "high"),
    [
        (2**53 - 1, 10, 2**53 - 10),
        (2**53 - 9, 10, 2**53 - 10),
        (-3, 10, 2**53 - 10),
        (2**53, 1, 2**53 - 1),
    ],
)
def test_seeds_of_which_one_is_out_of_range(tmp_path: Path, seed: int, n: int, high: int) -> None:
    body = json.dumps({"prompt": "a ring", "seed": seed, "n": n}).encode()
    status, error, num_received = post(tmp_path, body, {"Content-Type": JSON})
    assert (status, num_received) == (400, 0)
    assert error["fields"] == {"seed": f"{seed} is out of range; allowed: 0 to {high}"}


def test_the_last_seeds_are_passed_on(tmp_path: Path) -> None:
    body = json.dumps({"prompt": "a ring", "seed": 2**53 - 10, "n": 10}).encode()
    assert post(tmp_path, body, {"Content-Type": JSON})[2] > 0
