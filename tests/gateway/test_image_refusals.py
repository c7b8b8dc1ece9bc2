"""What the gateway itself says of a request of OpenAI's images API, before anybody draws."""

from __future__ import annotations

import asyncio
import gzip
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


@pytest.mark.parametrize("media", ["text/plain; charset=utf-8", "application/xml"])
def test_what_is_neither_json_nor_a_form_is_named(tmp_path: Path, media: str) -> None:
    status, error, num_received = post(tmp_path, b"a red ring", {"Content-Type": media})
    assert (status, num_received, error["param"]) == (400, 0, "Content-Type")
    assert media.partition(";")[0] in error["message"]
    assert "the body is not JSON" in error["message"]
    # Clients that do not say what they send are common.
    assert post(tmp_path, b'{"prompt": "a ring"}', {"Content-Type": media})[0] == 200


def test_json_that_is_broken_is_not_put_down_to_its_type(tmp_path: Path) -> None:
    status, error, _ = post(tmp_path, b'{"prompt": ', {"Content-Type": JSON})
    assert (status, error["param"]) == (400, None)
    assert error["message"].startswith("the body is not JSON")


def test_a_compressed_body_is_named(tmp_path: Path) -> None:
    body = gzip.compress(b'{"prompt": "a ring"}')
    status, error, num_received = post(
        tmp_path, body, {"Content-Type": JSON, "Content-Encoding": "gzip"}
    )
    assert (status, num_received, error["param"]) == (400, 0, "Content-Encoding")
    assert "'gzip' cannot be read" in error["message"]
