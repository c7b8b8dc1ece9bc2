"""gateway.instance: a place is given up once, however often its instance is found dead."""

from __future__ import annotations

import asyncio

import pytest

from gateway.addresses import Address, FixedSource
from gateway.instance import Instance, Lease
from gateway.settings import InstanceSettings


def make() -> Lease:
    source = FixedSource(InstanceSettings("http://127.0.0.1:1", "toy"))
    return Lease(Instance(source), Address("http://127.0.0.1:1", "toy", None), 1.0)


def test_a_place_that_is_being_given_up_may_be_given_up_again() -> None:
    async def check() -> None:
        lease, may_end = make(), asyncio.Event()

        async def draw() -> None:
            async with lease.guard():
                try:
                    await asyncio.sleep(60)
                finally:
                    await may_end.wait()  # as a connection that is being closed

        drawing = asyncio.create_task(draw())
        await asyncio.sleep(0)
        lease.lose()
        for _ in range(3):
            await asyncio.sleep(0)
        lease.lose()
        may_end.set()
        with pytest.raises(TimeoutError):
            await drawing

    asyncio.run(asyncio.wait_for(check(), 60))


def test_what_was_given_up_before_it_began_ends_at_once() -> None:
    async def check() -> None:
        lease = make()
        lease.lose()
        with pytest.raises(TimeoutError):
            async with lease.guard():
                await asyncio.sleep(60)

    asyncio.run(asyncio.wait_for(check(), 60))
