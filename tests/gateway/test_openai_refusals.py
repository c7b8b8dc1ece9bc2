"""What a client of OpenAI's API is told of fields that it cannot send there."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from gateway.openai_fields import OPENAI_FIELDS, WITHOUT_MEANING
from handler.api.schema import PICTURE_NAMES, REPLY_FIELDS
from tests.support.fake_instance import Received, running_instance
from tests.support.gateway_apps import gateway_client


def refused(folder: Path, fields: dict[str, object]) -> dict[str, Any]:
    """The error; an instance says of every field beside the prompt which ones it knows."""
    known = ", ".join(sorted(PICTURE_NAMES | REPLY_FIELDS.keys()))

    def answer(received: Received) -> object:
        problem = f"unknown field; known are {known}"
        error = {
            "code": "invalid_request",
            "message": f"zzz: {problem}",
            "fields": {"zzz": problem},
        }
        return 400, {"error": error}, {}

    async def talk() -> dict[str, Any]:
        async with (
            running_instance(answer=answer) as fake,
            gateway_client(folder, [fake]) as client,
        ):
            reply = await client.post("/v1/images/generations", json={"prompt": "a", **fields})
            assert reply.status == 400
            error: dict[str, Any] = (await reply.json())["error"]
            return error

    return asyncio.run(asyncio.wait_for(talk(), 60))


def test_only_fields_that_may_be_sent_here_are_listed(tmp_path: Path) -> None:
    error = refused(tmp_path, {"zzz": 1})
    for said in (error["message"], error["fields"]["zzz"]):
        names = said.partition("known are ")[2].split(", ")
        assert {"prompt", "seed", "steps", *OPENAI_FIELDS} <= {*names}
        assert not {*names} & WITHOUT_MEANING.keys()


def test_instances_are_kserves(tmp_path: Path) -> None:
    error = refused(tmp_path, {"instances": ["a"]})
    assert error["param"] == "instances"
    assert "it is KServe's, of /v1/models/NAME:predict" in error["message"]
