"""GET /v1/fields, in front of instances that say what they have, or do not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from handler.api.schema import PICTURE_FIELDS
from tests.support.fake_instance import Received, running_instance
from tests.support.gateway_apps import gateway_client

EVERY = PICTURE_FIELDS.keys() - {"num_images"}


def fields(folder: Path, answer: object) -> dict[str, dict[str, Any]]:
    """The fields of pictures in the form, by name."""

    def described(received: Received) -> object:
        assert received.fields == {"describe": True}
        return answer

    async def ask() -> dict[str, dict[str, Any]]:
        async with (
            running_instance(answer=described) as fake,
            gateway_client(folder, [fake]) as client,
        ):
            reply = await client.get("/v1/fields")
            assert reply.status == 200
            found = (await reply.json())["fields"]
            assert fake.received
        return {each["name"]: each for each in found if each["name"] in PICTURE_FIELDS}

    return asyncio.run(asyncio.wait_for(ask(), 60))


def test_what_the_worker_says_it_has(tmp_path: Path) -> None:
    said = {"fields": ["prompt", "seed", "loras"], "loras": ["ink", "wool"], "schedulers": [7]}
    found = fields(tmp_path, (200, said, {}))
    assert found.keys() == {"prompt", "seed", "loras"}
    assert found["loras"]["suggestions"] == ["ink", "wool"]


@pytest.mark.parametrize(
    "answer",
    [
        (400, {"error": {"code": "invalid_request", "message": "unknown field", "fields": {}}}, {}),
        (200, [], {}),
        (200, {"fields": "all"}, {}),
        None,
        "hang up",
    ],
)
def test_every_field_where_it_does_not_say(tmp_path: Path, answer: object) -> None:
    assert fields(tmp_path, answer).keys() == EVERY
