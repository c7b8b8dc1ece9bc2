"""gateway.forwarding and gateway.routing, in front of instances that do what the test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import InstanceDied, NoInstance, RateLimited, Refused
from gateway.forwarding import Order
from gateway.gateway import Gateway
from gateway.settings import Settings
from handler.errors import QueueFull
from tests.support.fake_instance import (
    MODEL,
    PNG,
    WORKER_DIED,
    FakeInstance,
    Received,
    running_instance,
)

DIED = (500, WORKER_DIED, {})
FULL = (
    503,
    {"error": {"code": "queue_full", "message": "full", "fields": {}}},
    {"Retry-After": "1"},
)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


@asynccontextmanager
async def fleet(
    folder: Path, num_instances: int, **settings: Any
) -> AsyncIterator[tuple[Gateway, list[FakeInstance]]]:
    """A gateway without its HTTP, and its instances."""
    async with AsyncExitStack() as stack:
        fakes = [await stack.enter_async_context(running_instance()) for _ in range(num_instances)]
        checked = Settings.from_mapping(
            {
                "run_dirs": [],
                "keys_file": str(folder / "keys"),
                "poll_s": 0.05,
                "max_wait_s": 5.0,
                "instances": [fake.settings for fake in fakes],
                **settings,
            }
        )
        yield await stack.enter_async_context(Gateway.running(checked, folder)), fakes


def order(prompt: str = "a ring", work: float = 1.0, key: str = "") -> Order:
    content = json.dumps({"prompt": prompt, "seed": 7}).encode()
    return Order(MODEL, lambda: content, work, key)


async def eventually(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_so():
            await asyncio.sleep(0.01)


def test_a_reply_is_passed_on(tmp_path: Path) -> None:
    async def check() -> None:
        async with fleet(tmp_path, 1) as (gateway, (fake,)):
            reply = await gateway.forwarder.send(order())
            assert (reply.status, reply.body, reply.headers["x-seed"]) == (200, PNG, "7")
            assert fake.received[0].path == f"/predictions/{MODEL}"

    run(check())


def test_least_outstanding_work(tmp_path: Path) -> None:
    """Not the fewest requests: one of much work counts for many of little."""

    async def check() -> None:
        async with fleet(tmp_path, 2) as (gateway, fakes):
            done = asyncio.Event()
            for fake in fakes:
                fake.answer = lambda received: wait_for(done)
            large = asyncio.create_task(gateway.forwarder.send(order("large", work=100)))
            await eventually(lambda: sum(fake.open_requests for fake in fakes) == 1)
            busy, idle = sorted(fakes, key=lambda fake: -fake.open_requests)
            small = []
            for count in range(1, 6):
                small.append(asyncio.create_task(gateway.forwarder.send(order("small", work=10))))
                await eventually(lambda count=count: idle.open_requests == count)  # type: ignore[misc]
            assert busy.open_requests == 1
            done.set()
            await asyncio.gather(large, *small)

    run(check())


async def wait_for(event: asyncio.Event) -> None:
    await event.wait()


@pytest.mark.parametrize("death", [DIED, (507, WORKER_DIED, {}), "hang up"])
def test_a_death_is_sent_once_more_elsewhere(tmp_path: Path, death: object) -> None:
    async def check() -> None:
        async with fleet(tmp_path, 2) as (gateway, fakes):
            first: list[Received] = []

            def die_once(received: Received) -> object:
                first.append(received)
                return death if len(first) == 1 else None

            for fake in fakes:
                fake.answer = die_once
            reply = await gateway.forwarder.send(order())
            assert reply.status == 200
            assert [len(fake.received) for fake in fakes] in ([1, 1], [2, 0], [0, 2])
            ids = [each.upstream_id for each in first]
            assert len(set(ids)) == 2
            assert first[0].fields == first[1].fields

    run(check())


def test_what_kills_twice_is_not_sent_again(tmp_path: Path) -> None:
    async def check() -> None:
        async with fleet(tmp_path, 3) as (gateway, fakes):
            for fake in fakes:
                fake.answer = lambda received: (
                    DIED if received.fields["prompt"] == "poison" else None
                )
            with pytest.raises(InstanceDied):
                await gateway.forwarder.send(order("poison"))
            assert sum(len(fake.received) for fake in fakes) == 2
            assert (await gateway.forwarder.send(order())).status == 200

    run(check())


def test_the_only_instance_comes_back(tmp_path: Path) -> None:
    async def check() -> None:
        async with fleet(tmp_path, 1) as (gateway, (fake,)):

            def die_once(received: Received) -> object:
                fake.answer, fake.is_ready = None, False
                return DIED

            fake.answer = die_once
            sending = asyncio.create_task(gateway.forwarder.send(order()))
            await eventually(lambda: not gateway.fleet.is_ready)
            await asyncio.sleep(0.2)
            assert len(fake.received) == 1
            fake.is_ready = True
            assert (await sending).status == 200

    run(check())


def test_what_waits_at_a_dead_worker_is_moved(tmp_path: Path) -> None:
    """The frontend holds requests while its worker is dead, and says nothing."""

    async def check() -> None:
        async with fleet(tmp_path, 2) as (gateway, fakes):
            never = asyncio.Event()
            fakes[0].answer = fakes[1].answer = lambda received: wait_for(never)
            sending = asyncio.create_task(gateway.forwarder.send(order()))
            await eventually(lambda: sum(fake.open_requests for fake in fakes) == 1)
            holder, other = sorted(fakes, key=lambda fake: -fake.open_requests)
            other.answer = None
            holder.is_ready = False
            assert (await sending).status == 200
            # Should the worker come back, it need not draw what nobody waits for.
            await eventually(lambda: bool(holder.cancelled))
            assert holder.cancelled == [holder.received[0].upstream_id]

    run(check())


def test_an_instance_that_stands_still_counts_as_dead_until_it_answers(tmp_path: Path) -> None:
    async def check() -> None:
        async with fleet(tmp_path, 2, silence_s=0.5) as (gateway, (first, second)):
            first.stands_still = True
            reply = await gateway.forwarder.send(order())
            assert (reply.status, reply.headers["x-seed"]) == (200, "7")
            assert [each.fields for each in second.received] == [{"prompt": "a ring", "seed": 7}]
            # It says that it is READY, and gets nothing.
            for _ in range(4):
                await gateway.forwarder.send(order())
                await asyncio.sleep(0.1)
            assert (len(first.received), len(second.received)) == (0, 5)
            first.stands_still = False
            await eventually(lambda: bool(first.cancelled))
            before = len(first.received)

            async def gets_one_again() -> bool:
                await gateway.forwarder.send(order())
                return len(first.received) > before

            async with asyncio.timeout(10):
                while not await gets_one_again():
                    await asyncio.sleep(0.05)

    run(check())


def test_an_instance_that_draws_for_long_and_answers_is_not_dead(tmp_path: Path) -> None:
    async def check() -> None:
        async with fleet(tmp_path, 2, silence_s=0.3) as (gateway, (first, second)):
            first.answer = lambda _: asyncio.sleep(1.5)
            reply = await gateway.forwarder.send(order())
            assert reply.status == 200
            assert (len(first.received), len(second.received)) == (1, 0)
            assert first.cancelled  # it was asked meanwhile

    run(check())


def test_full_instances_are_asked_again(tmp_path: Path) -> None:
    async def check() -> None:
        async with fleet(tmp_path, 1) as (gateway, (fake,)):
            answers = iter([FULL])
            fake.answer = lambda received: next(answers, None)
            assert (await gateway.forwarder.send(order())).status == 200
            assert len(fake.received) == 2

    run(check())


def test_one_that_was_drained_is_asked_as_soon_as_it_is_back(tmp_path: Path) -> None:
    draining = {"error": {"code": "draining", "message": "stops", "fields": {}}}

    async def check() -> None:
        async with fleet(tmp_path, 1) as (gateway, (fake,)):
            fake.answer = lambda received: (503, draining, {"Retry-After": "60"})
            sending = asyncio.create_task(gateway.forwarder.send(order()))
            await eventually(lambda: len(fake.received) == 1)
            fake.is_ready = False
            await eventually(lambda: not gateway.fleet.is_ready)
            fake.answer, fake.is_ready = None, True
            assert (await sending).status == 200

    run(check())


def test_full_for_too_long(tmp_path: Path) -> None:
    async def check() -> None:
        async with fleet(tmp_path, 1, max_wait_s=0.3) as (gateway, (fake,)):
            fake.answer = lambda received: FULL
            with pytest.raises((Refused, NoInstance)) as caught:
                await gateway.forwarder.send(order())
            assert caught.value.status == 503
            assert caught.value.retry_after_s

    run(check())


def test_an_error_of_the_pipeline_is_not_sent_again(tmp_path: Path) -> None:
    async def check() -> None:
        async with fleet(tmp_path, 2) as (gateway, fakes):
            fault = {"error": {"code": "engine_fault", "message": "it raised", "fields": {}}}
            for fake in fakes:
                fake.answer = lambda received: (500, fault, {})
            assert (await gateway.forwarder.send(order())).status == 500
            assert sum(len(fake.received) for fake in fakes) == 1

    run(check())


def test_the_line_is_bounded(tmp_path: Path) -> None:
    async def check() -> None:
        settings = {"max_in_flight": 1, "max_waiting": 3, "max_waiting_per_key": 2}
        async with fleet(tmp_path, 1, **settings) as (gateway, (fake,)):
            done = asyncio.Event()
            fake.answer = lambda received: wait_for(done)
            send = gateway.forwarder.send
            sending = [asyncio.create_task(send(order())) for _ in range(3)]
            await eventually(lambda: gateway.fleet.num_waiting == 2)
            with pytest.raises(RateLimited) as mine:
                await send(order())
            assert mine.value.retry_after_s
            sending.append(asyncio.create_task(send(order(key="other"))))
            await eventually(lambda: gateway.fleet.num_waiting == 3)
            with pytest.raises(QueueFull) as full:
                await send(order(key="third"))
            assert full.value.retry_after_s
            done.set()
            assert {reply.status for reply in await asyncio.gather(*sending)} == {200}

    run(check())


def test_what_died_is_first_in_line_and_never_refused(tmp_path: Path) -> None:
    """It was let in before, and its place in line was taken by others since."""

    async def check() -> None:
        settings = {"max_in_flight": 1, "max_waiting": 2, "max_waiting_per_key": 2}
        async with fleet(tmp_path, 1, **settings) as (gateway, (fake,)):
            dies, drawn = asyncio.Event(), list[str]()

            async def answer(received: Received) -> object:
                if received.fields["prompt"] == "dies" and not dies.is_set():
                    await dies.wait()
                    fake.is_ready = False
                    return DIED
                drawn.append(received.fields["prompt"])
                return None

            fake.answer = answer
            send = gateway.forwarder.send
            sending = []
            for prompt in ("dies", "second", "third"):
                sending.append(asyncio.create_task(send(order(prompt))))
                await asyncio.sleep(0.02)
            await eventually(lambda: gateway.fleet.num_waiting == 2)
            dies.set()
            await eventually(lambda: gateway.fleet.num_waiting == 3)
            fake.is_ready = True
            assert {reply.status for reply in await asyncio.gather(*sending)} == {200}
            assert drawn == ["dies", "second", "third"]

    run(check())


def test_what_is_refused_says_nothing_of_the_pace(tmp_path: Path) -> None:
    async def check() -> None:
        async with fleet(tmp_path, 1) as (gateway, (fake,)):
            refusal = {"error": {"code": "invalid_request", "message": "no", "fields": {}}}
            fake.answer = lambda received: (400, refusal, {})
            unknown = gateway.fleet.retry_after_s(MODEL)
            assert (await gateway.forwarder.send(order(work=1e18))).status == 400
            assert gateway.fleet.retry_after_s(MODEL) == unknown
            fake.answer = None
            await gateway.forwarder.send(order(work=1e18))
            assert gateway.fleet.retry_after_s(MODEL) < unknown

    run(check())


def test_a_reply_that_is_no_stream_is_no_death(tmp_path: Path) -> None:
    async def check() -> None:
        async with fleet(tmp_path, 1) as (gateway, (fake,)):
            with pytest.raises(Refused, match="image/png, no events") as caught:
                await gateway.forwarder.stream(order(), lambda name, data: None)
            assert (caught.value.status, caught.value.code) == (502, "no_stream")
            assert len(fake.received) == 1
            assert gateway.fleet.num_waiting == 0
            assert (await gateway.forwarder.send(order())).status == 200

    run(check())


def test_first_come_first_served(tmp_path: Path) -> None:
    async def check() -> None:
        async with fleet(tmp_path, 1, max_in_flight=1) as (gateway, (fake,)):
            sending = []
            for index in range(6):
                sending.append(asyncio.create_task(gateway.forwarder.send(order(str(index)))))
                await asyncio.sleep(0)
            await asyncio.gather(*sending)
            assert [each.fields["prompt"] for each in fake.received] == list("012345")

    run(check())


def test_what_waits_has_no_body_yet(tmp_path: Path) -> None:
    async def check() -> None:
        async with fleet(tmp_path, 1, max_in_flight=1) as (gateway, (fake,)):
            free, written = asyncio.Event(), list[int]()
            fake.answer = lambda _: wait_for(free)

            def write(number: int) -> bytes:
                written.append(number)
                return b"{}"

            orders = [Order(MODEL, partial(write, number), 1.0) for number in range(5)]
            sending = [asyncio.create_task(gateway.forwarder.send(each)) for each in orders]
            await eventually(lambda: gateway.fleet.num_waiting == 4)
            await eventually(lambda: len(fake.received) == 1)
            assert written == [0]
            free.set()
            await asyncio.gather(*sending)
            assert written == [0, 1, 2, 3, 4]

    run(check())


def test_who_leaves_the_line_leaves_no_gap(tmp_path: Path) -> None:
    async def check() -> None:
        async with fleet(tmp_path, 1, max_in_flight=1) as (gateway, (fake,)):
            done = asyncio.Event()
            fake.answer = lambda received: wait_for(done)
            sending = [asyncio.create_task(gateway.forwarder.send(order())) for _ in range(4)]
            await eventually(lambda: gateway.fleet.num_waiting == 3)
            sending[1].cancel()
            sending[2].cancel()
            await eventually(lambda: gateway.fleet.num_waiting == 1)
            done.set()
            replies = await asyncio.gather(*sending, return_exceptions=True)
            assert [type(each).__name__ for each in replies] == [
                *("Reply", "CancelledError", "CancelledError", "Reply")
            ]
            assert gateway.fleet.num_waiting == 0
            assert (await gateway.forwarder.send(order())).status == 200

    run(check())


def test_nobody_is_there(tmp_path: Path) -> None:
    async def check() -> None:
        async with fleet(tmp_path, 1, max_wait_s=0.2) as (gateway, (fake,)):
            fake.is_ready = False
            await eventually(lambda: not gateway.fleet.is_ready)
            with pytest.raises(NoInstance):
                await gateway.forwarder.send(order())

    run(check())


def events(*named: tuple[str, dict[str, Any]]) -> bytes:
    blocks = [f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in named]
    return (": accepted\n\n" + "".join(blocks)).encode()


STEP = ("step", {"step": 1, "num_steps": 2, "elapsed_s": 0.1})
IMAGE = ("image", {"content_type": "image/png", "seeds": [7], "image": "AAAA"})


def test_a_stream_that_breaks_begins_anew(tmp_path: Path) -> None:
    async def check() -> None:
        async with fleet(tmp_path, 1) as (gateway, (fake,)):
            interrupted = {"status": 503, "error": {"code": "interrupted", "message": "paused"}}
            answers = iter([events(STEP), events(STEP, ("error", interrupted))])
            fake.answer = lambda received: next(answers, events(STEP, STEP, IMAGE))
            seen: list[str] = []
            await_error = gateway.forwarder.stream(order(), lambda name, data: seen.append(name))
            with pytest.raises(InstanceDied):
                await await_error
            assert seen == ["accepted", "step", "step"]
            await gateway.forwarder.stream(order(), lambda name, data: seen.append(name))
            assert seen[3:] == ["accepted", "step", "step", "image"]

    run(check())


def test_an_error_in_a_stream_is_the_clients(tmp_path: Path) -> None:
    async def check() -> None:
        async with fleet(tmp_path, 1) as (gateway, (fake,)):
            late = {"status": 504, "error": {"code": "deadline_exceeded", "message": "late"}}
            fake.answer = lambda received: events(STEP, ("error", late))
            with pytest.raises(Refused) as caught:
                await gateway.forwarder.stream(order(), lambda name, data: None)
            assert (caught.value.status, caught.value.code) == (504, "deadline_exceeded")
            assert len(fake.received) == 1

    run(check())
