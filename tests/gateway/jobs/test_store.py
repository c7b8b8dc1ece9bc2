"""gateway.jobs.store: every job ends once, in both databases, on a clock of the test's."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import RateLimited
from gateway.jobs.database import StoreUnavailable
from gateway.jobs.deliveries import Deliveries
from gateway.jobs.job import Claim, Drawn, Job, NewJob, Progress, State, WebhookState
from gateway.jobs.settings import JobSettings
from gateway.jobs.sqlite import SqliteDatabase
from gateway.jobs.store import JobStore
from gateway.picture_store import StoreFull
from handler.errors import Conflict, PipelineFailed, QueueFull
from tests.support.clock import Clock
from tests.support.jobs import OpenStore
from tests.support.postgres import missing_postgres, running_postgres

MODELS = ["toy"]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


def new(name: str, **values: Any) -> NewJob:
    plain = NewJob(
        id=name,
        key_name="",
        idempotency_key=None,
        fingerprint="f",
        model="toy",
        request=b'{"seed": 7}',
        summary="{}",
    )
    return replace(plain, **values)


async def state(store: JobStore, name: str) -> State | None:
    job = await store.get(name)
    return None if job is None else job.state


async def take(store: JobStore) -> Claim:
    claim = await store.take(MODELS)
    assert claim is not None
    return claim


async def known(store: JobStore, name: str) -> Job:
    job = await store.get(name)
    assert job is not None
    return job


def test_from_acceptance_to_its_pictures(open_store: OpenStore, clock: Clock) -> None:
    async def check() -> None:
        async with open_store() as (store, _):
            job, is_new = await store.add(new("a"))
            assert is_new
            assert job.state is State.QUEUED
            clock.now_s += 5
            claim = await take(store)
            assert claim.request == b'{"seed": 7}'
            assert await store.take(MODELS) is None
            assert await store.renew(claim, Progress(1, 3, 20, b"jpeg"))
            job = await known(store, "a")
            assert (job.state, job.progress) == (State.RUNNING, Progress(1, 3, 20, b"jpeg"))
            assert job.started_s == clock.now_s
            pictures = [Drawn("x.png", b"\0one"), Drawn("y.png", b"two")]
            assert await store.succeed(claim, '{"data": []}', pictures)
            job = await known(store, "a")
            assert (job.state, job.result) == (State.SUCCEEDED, '{"data": []}')
            assert job.progress.preview is None
            assert await store.pictures("a") == pictures
            assert await store.picture("a", "y.png") == b"two"
            assert await store.picture("b", "y.png") is None

    run(check())


def test_the_oldest_of_a_model_comes_first(open_store: OpenStore, clock: Clock) -> None:
    async def check() -> None:
        async with open_store() as (store, _):
            for name in ("c", "b", "a"):
                await store.add(new(name))
                clock.now_s += 1
            await store.add(new("other", model="other"))
            assert [(await take(store)).id for _ in range(3)] == ["c", "b", "a"]
            assert await store.take(["third"]) is None
            claim = await store.take(["third", "other"])
            assert claim is not None
            assert claim.id == "other"

    run(check())


def test_a_lease_that_is_not_renewed_is_over(open_store: OpenStore, clock: Clock) -> None:
    async def check() -> None:
        async with open_store(lease_s=10.0) as (store, _):
            await store.add(new("a"))
            first = await take(store)
            clock.now_s += 9
            assert await store.renew(first, Progress())
            clock.now_s += 9
            await store.sweep()
            assert await state(store, "a") is State.RUNNING
            clock.now_s += 1
            await store.sweep()
            second = await take(store)
            assert second.request == first.request
            # Who was too late ends nothing.
            assert not await store.renew(first, Progress())
            assert not await store.succeed(first, "{}", [Drawn("x.png", b"x")])
            assert not await store.fail(first, PipelineFailed("late"))
            await store.put_back(first)
            assert await state(store, "a") is State.RUNNING
            assert await store.succeed(second, "{}", [Drawn("y.png", b"y")])
            assert await store.pictures("a") == [Drawn("y.png", b"y")]

    run(check())


def test_what_ends_its_gateway_again_and_again_waits_in_between(
    open_store: OpenStore, clock: Clock
) -> None:
    async def check() -> None:
        async with open_store(lease_s=10.0) as (store, _):
            await store.add(new("a"))
            waits = []
            for _ in range(10):
                await take(store)
                clock.now_s += 10
                await store.sweep()
                waited_s = 0
                while (claim := await store.take(MODELS)) is None:
                    clock.now_s += 1
                    waited_s += 1
                    await store.sweep()
                await store.put_back(claim)
                waits.append(waited_s)
            assert waits[:2] == [0, 0]
            assert waits[-1] == 30

    run(check())


def test_two_gateways_share_the_jobs(open_store: OpenStore) -> None:
    async def check() -> None:
        async with open_store() as (one, _), open_store() as (other, _):
            for index in range(12):
                await one.add(new(f"job{index:02}"))
            taken: list[str] = []

            async def take_all(store: JobStore) -> None:
                while (claim := await store.take(MODELS)) is not None:
                    taken.append(claim.id)
                    assert await store.succeed(claim, "{}", [Drawn("x.png", b"x")])

            await asyncio.gather(take_all(one), take_all(other))
            assert sorted(taken) == [f"job{index:02}" for index in range(12)]

    run(check())


def test_put_back(open_store: OpenStore, clock: Clock) -> None:
    async def check() -> None:
        async with open_store() as (store, _):
            await store.add(new("a"))
            await store.put_back(await take(store))
            await store.put_back(await take(store), 5.0, has_died=True)
            assert await store.take(MODELS) is None
            clock.now_s += 4
            await store.sweep()
            assert await store.take(MODELS) is None
            clock.now_s += 1
            await store.sweep()
            assert (await take(store)).num_deaths == 1

    run(check())


def test_an_entry_of_the_order_that_is_lost_comes_back(open_store: OpenStore) -> None:
    """A gateway is killed between looking what is next and claiming it."""

    async def check() -> None:
        async with open_store() as (store, database):
            await store.add(new("a"))
            assert await database.next_id(MODELS) == "a"
        async with open_store() as (store, _):
            await store.sweep()
            assert (await take(store)).id == "a"
            assert await store.take(MODELS) is None

    run(check())


def test_cancel(open_store: OpenStore) -> None:
    async def check() -> None:
        async with open_store() as (store, _):
            await store.add(new("queued"))
            await store.cancel("queued")
            assert await store.take(MODELS) is None
            await store.add(new("running"))
            claim = await take(store)
            await store.cancel("running")
            assert not await store.renew(claim, Progress())
            assert not await store.succeed(claim, "{}", [])
            assert await state(store, "running") is State.CANCELLED
            await store.add(new("failed"))
            await store.fail(await take(store), PipelineFailed("it cannot be drawn"))
            await store.cancel("failed")
            job = await known(store, "failed")
            assert job.state is State.FAILED
            assert job.error is not None
            error = json.loads(job.error)
            assert (error["status"], error["message"]) == (500, "it cannot be drawn")

    run(check())


def test_the_same_idempotency_key_is_the_same_job(open_store: OpenStore, clock: Clock) -> None:
    async def check() -> None:
        async with open_store(expires_s=100.0) as (store, _):
            first = new("a", idempotency_key="k")
            added = await asyncio.gather(store.add(first), store.add(replace(first, id="b")))
            assert sorted(is_new for _, is_new in added) == [False, True]
            assert added[0][0].id == added[1][0].id
            with pytest.raises(Conflict) as caught:
                await store.add(replace(first, id="c", fingerprint="g"))
            assert caught.value.fields.keys() == {"Idempotency-Key"}
            _, is_new = await store.add(replace(first, id="d", key_name="somebody else"))
            assert is_new
            assert await store.find("", "unknown", "f") is None
            # It is known for as long as its job.
            await store.cancel(added[0][0].id)
            clock.now_s += 100
            await store.sweep()
            _, is_new = await store.add(replace(first, id="e"))
            assert is_new

    run(check())


def test_how_many_may_wait(open_store: OpenStore) -> None:
    async def check() -> None:
        async with open_store(max_waiting=3, max_waiting_per_key=2) as (store, _):
            await store.add(new("a", key_name="one"))
            await store.add(new("b", key_name="one"))
            with pytest.raises(RateLimited):
                await store.add(new("c", key_name="one"))
            await store.add(new("d", key_name="two"))
            with pytest.raises(QueueFull):
                await store.add(new("e", key_name="three"))
            # Those that are being drawn do not wait.
            await take(store)
            await store.add(new("f", key_name="one"))

    run(check())


def test_what_has_ended_expires(open_store: OpenStore, clock: Clock) -> None:
    async def check() -> None:
        async with open_store(expires_s=100.0) as (store, _):
            await store.add(new("a"))
            await store.succeed(await take(store), "{}", [Drawn("x.png", b"x")])
            await store.add(new("waits"))
            clock.now_s += 99
            await store.sweep()
            assert await state(store, "a") is State.SUCCEEDED
            clock.now_s += 1
            await store.sweep()
            assert await store.get("a") is None
            assert await store.pictures("a") == []
            assert await state(store, "waits") is State.QUEUED

    run(check())


def test_what_waits_for_too_long_fails(open_store: OpenStore, clock: Clock) -> None:
    async def check() -> None:
        async with open_store(max_wait_s=50.0) as (store, _):
            await store.add(new("a"))
            clock.now_s += 49
            await store.sweep()
            assert await state(store, "a") is State.QUEUED
            clock.now_s += 1
            await store.sweep()
            job = await known(store, "a")
            assert job.state is State.FAILED
            assert job.error is not None
            assert json.loads(job.error)["code"] == "no_instance"
            assert await store.take(MODELS) is None

    run(check())


def test_the_store_is_bounded(open_store: OpenStore, clock: Clock) -> None:
    async def check() -> None:
        async with open_store(store_bytes=64 * 1024) as (store, _):
            picture = b"x" * 20_000
            for name in ("a", "b", "c", "d"):
                await store.add(new(name))
                assert await store.succeed(await take(store), "{}", [Drawn("x.png", picture)])
                clock.now_s += 1
            states = [await state(store, name) for name in ("a", "b", "c", "d")]
            assert states == [None, None, State.SUCCEEDED, State.SUCCEEDED]
            # What waits is never deleted for what is new.
            await store.add(new("large", request=b"x" * 40_000))
            with pytest.raises(QueueFull, match="fill the store"):
                await store.add(new("larger", request=b"x" * 40_000))
            claim = await take(store)
            with pytest.raises(StoreFull):
                await store.succeed(claim, "{}", [Drawn("x.png", b"x" * 70_000)])
            assert await state(store, "large") is State.RUNNING
            # Its request, which filled the store, goes with its end.
            await store.fail(claim, PipelineFailed("no"))
            await store.add(new("larger", request=b"x" * 40_000))

    run(check())


def test_webhooks_are_tried_until_they_are_received(open_store: OpenStore, clock: Clock) -> None:
    async def check() -> None:
        settings: dict[str, Any] = {"webhook_tries": 3}
        async with open_store(**settings) as (store, database):
            deliveries = Deliveries(database, JobSettings(**settings))
            await store.add(new("a", webhook_url="https://hooks.example/"))
            await store.add(new("without"))
            assert (await known(store, "a")).webhook_state is WebhookState.WAITING
            assert await deliveries.take() == []
            for _ in range(2):
                await store.succeed(await take(store), "{}", [])
            waits = []
            for number in (1, 2, 3):
                waited_s = 0
                while not (due := await deliveries.take()):
                    clock.now_s += 1
                    waited_s += 1
                waits.append(waited_s)
                assert [(each.job.id, each.url) for each in due] == [
                    ("a", "https://hooks.example/")
                ]
                assert due[0].job.webhook_tries == number
                assert await deliveries.take() == []
                await deliveries.end(due[0], is_received=False)
            assert waits == [0, 2, 6]
            assert (await known(store, "a")).webhook_state is WebhookState.FAILED
            assert (await known(store, "without")).webhook_state is None

            await store.add(new("b", webhook_url="https://hooks.example/"))
            await store.cancel("b")
            (due_b,) = await deliveries.take()
            # Its gateway is killed while it sends: another one sends it again.
            clock.now_s += 61
            (due_b,) = await deliveries.take()
            assert due_b.job.state is State.CANCELLED
            await deliveries.end(due_b, is_received=True)
            clock.now_s += 10_000
            assert await deliveries.take() == []
            assert (await known(store, "b")).webhook_state is WebhookState.DELIVERED

    run(check())


def test_the_next_start_takes_up_what_a_killed_gateway_drew(tmp_path: Path, clock: Clock) -> None:
    """SQLite: nobody else has the file, so that no lease must be waited for."""

    async def check() -> None:
        first = JobStore(SqliteDatabase(tmp_path / "jobs.sqlite", clock), JobSettings())
        await first.open()
        await first.add(new("a"))
        await take(first)
        # One that starts beside it leaves its jobs alone.
        beside = JobStore(SqliteDatabase(tmp_path / "jobs.sqlite", clock), JobSettings())
        await beside.open()
        assert await beside.take(MODELS) is None
        await beside.close()
        await first.close()
        again = JobStore(SqliteDatabase(tmp_path / "jobs.sqlite", clock), JobSettings())
        await again.open()
        assert (await take(again)).id == "a"
        await again.close()
        assert (tmp_path / "jobs.sqlite").stat().st_mode & 0o777 == 0o600

    run(check())


def test_a_transaction_that_is_cancelled_while_it_begins_leaves_none_open(
    tmp_path: Path, clock: Clock
) -> None:
    async def check() -> None:
        database = SqliteDatabase(tmp_path / "jobs.sqlite", clock)
        await database.open()
        other = sqlite3.connect(tmp_path / "jobs.sqlite", timeout=0, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        work = asyncio.create_task(database.next_id(MODELS))
        for _ in range(5):
            await asyncio.sleep(0)
        work.cancel()
        await asyncio.sleep(0)
        other.execute("ROLLBACK")
        with pytest.raises(asyncio.CancelledError):
            await work
        # Whoever else writes to the file can.
        other.execute("BEGIN IMMEDIATE")
        other.execute("ROLLBACK")
        other.close()
        assert await database.next_id(MODELS) is None
        await database.close()

    run(check())


@pytest.mark.slow
@missing_postgres()
def test_a_database_that_is_away(clock: Clock) -> None:
    """It is told as what it is, and in time."""
    postgres = pytest.importorskip("gateway.jobs.postgres")

    async def check() -> None:
        with running_postgres() as url:
            store = JobStore(postgres.PostgresDatabase(url, clock), JobSettings())
            await store.open()
            await store.add(new("a"))
        asked = store.get("a"), store.take(MODELS), store.sweep()
        for answer in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(answer, StoreUnavailable)
            assert answer.status == 503
            assert url not in answer.message
        await store.close()

    run(check())
