"""Replies of events, in front of instances that say what the test tells them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.support.fake_instance import running_instance
from tests.support.gateway_apps import gateway_client


def test_a_failure_of_the_gateway_is_logged_and_cancels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def check() -> None:
        broken = b'event: image\ndata: {"nothing": 1}\n\n'
        async with (
            running_instance(answer=lambda _: broken) as fake,
            gateway_client(tmp_path, [fake]) as client,
        ):
            fields, headers = {"prompt": "a", "stream": True}, {"X-Request-Id": "mine"}
            reply = await client.post("/v1/images/generations", json=fields, headers=headers)
            assert "its log says why" in await reply.text()
            while not fake.cancelled:
                await asyncio.sleep(0.01)
            assert fake.cancelled == [fake.received[0].upstream_id]

    asyncio.run(asyncio.wait_for(check(), 20))
    (logged,) = [each for each in caplog.records if each.exc_info is not None]
    assert logged.getMessage() == "request mine"
    assert logged.exc_info is not None
    assert isinstance(logged.exc_info[1], KeyError)
