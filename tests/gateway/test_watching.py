"""gateway.watching, of instances that do what the test says."""

from __future__ import annotations

import asyncio

from gateway.addresses import Address, FixedSource
from gateway.asking import WorkerCheck
from gateway.instance import Instance
from gateway.settings import InstanceSettings, Settings
from gateway.watching import Watch

SILENT, OTHER = "http://silent:1", "http://other:1"


class Check(WorkerCheck):
    """Says nothing of one instance from its second look on; of the other, what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.is_other_ready = True
        self.num_looks = 0

    async def is_ready(self, address: Address) -> bool | None:
        if address.url == OTHER:
            return self.is_other_ready
        self.num_looks += 1
        if self.num_looks > 1:
            await asyncio.Event().wait()
        return True


def test_one_that_says_nothing_holds_up_no_look_at_another() -> None:
    async def check() -> None:
        silent, other = (
            Instance(FixedSource(InstanceSettings(url, "toy"))) for url in (SILENT, OTHER)
        )
        saying, looked = Check(), asyncio.Event()
        watch = Watch([silent, other], Settings(poll_s=0.05), saying, looked.set)
        await watch.start()
        try:
            assert silent.is_ready
            while saying.num_looks < 2:
                await asyncio.sleep(0.01)
            for is_ready in (False, True):
                saying.is_other_ready = is_ready
                watch.look_now()
                while other.is_ready != is_ready:
                    looked.clear()
                    await looked.wait()
        finally:
            await watch.close()

    asyncio.run(asyncio.wait_for(check(), 10))
