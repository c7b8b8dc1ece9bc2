"""Previews, which an instance that refuses flagged pictures gives to nobody."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path

import pytest

from tests.support.fake_instance import PNG, Received, running_instance
from tests.support.gateway_apps import gateway_client

STREAM = {"prompt": "a", "stream": True, "partial_images": 2}


def drawn(received: Received) -> bytes:
    image = {"content_type": "image/png", "image": base64.b64encode(PNG).decode(), "seeds": [1]}
    return b"event: image\ndata: " + json.dumps(image).encode() + b"\n\n"


@pytest.mark.parametrize(("safety_checker", "has_previews"), [("refuse", False), ("flag", True)])
def test_none_are_asked_for_where_they_are_refused(
    tmp_path: Path, safety_checker: str, has_previews: bool
) -> None:
    config = tmp_path / "model-config.yaml"
    config.write_text(f'handler: {{safety_checker: "{safety_checker}"}}\n')

    async def check() -> None:
        async with (
            running_instance(answer=drawn) as fake,
            gateway_client(tmp_path, [fake], config) as client,
        ):
            reply = await client.post("/v1/images/generations", json=STREAM)
            assert b"[DONE]" in await reply.read()
            assert (await client.post("/v1/jobs", json={"prompt": "a"})).status == 202
            while len(fake.received) < 2:
                await asyncio.sleep(0.01)
            assert [("previews" in each.fields) for each in fake.received] == [has_previews] * 2

    asyncio.run(asyncio.wait_for(check(), 60))
