"""gateway.jobs.runner, in front of instances that do what the test says."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.body import Sent
from gateway.gateway import Gateway
from gateway.jobs.job import ENDED, Job, State, WebhookState
from gateway.jobs.requests import fingerprint, read_job
from gateway.jobs.webhooks import read_secret
from gateway.settings import Settings
from handler.errors import ConfigError
from tests.support.fake_instance import PNG, FakeInstance, Received, running_instance

IMAGE = {"content_type": "image/png", "image": base64.b64encode(PNG).decode()}


def drawn(received: Received) -> bytes:
    event = {**IMAGE, "seeds": [received.fields["seed"]]}
    return b"event: image\ndata: " + json.dumps(event).encode() + b"\n\n"


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


@asynccontextmanager
async def running(folder: Path, fake: FakeInstance, **settings: Any) -> AsyncIterator[Gateway]:
    checked = Settings.from_mapping(
        {
            "run_dirs": [],
            "keys_file": str(folder / "keys"),
            "poll_s": 0.05,
            "max_wait_s": 1.0,
            "instances": [fake.settings],
            "jobs": {"lease_s": 2.0, **settings},
        }
    )
    folder.mkdir(exist_ok=True)
    async with Gateway.running(checked, folder) as gateway:
        yield gateway


async def post(gateway: Gateway, **fields: object) -> str:
    sent = Sent({"prompt": "a ring", **fields})
    new = await read_job(
        gateway, sent, None, gateway.jobs.targets, base_url="http://here", idempotency_key=None
    )
    await gateway.jobs.store.add(new)
    gateway.jobs.runner.wake()
    return new.id


async def until(gateway: Gateway, job_id: str, is_enough: Callable[[Job], bool]) -> Job:
    while True:
        job = await gateway.jobs.store.get(job_id)
        assert job is not None
        if is_enough(job):
            return job
        await asyncio.sleep(0.02)


def has_ended(job: Job) -> bool:
    return job.state in ENDED


def test_every_picture_has_its_seed(tmp_path: Path) -> None:
    async def check() -> None:
        async with running_instance(answer=drawn) as fake, running(tmp_path, fake) as gateway:
            job = await until(gateway, await post(gateway, seed=7, n=3), has_ended)
            assert job.state is State.SUCCEEDED
            assert [each.fields["seed"] for each in fake.received] == [7, 8, 9]
            assert all(each.fields["stream"] for each in fake.received)
            pictures = await gateway.jobs.store.pictures(job.id)
            assert [each.content for each in pictures] == [PNG] * 3

    run(check())


def test_a_gateway_that_stops_puts_back_what_it_draws(tmp_path: Path) -> None:
    async def check() -> None:
        never = asyncio.Event()
        async with running_instance(answer=lambda _: never.wait()) as fake:
            async with running(tmp_path, fake) as gateway:
                job_id = await post(gateway)
                await until(gateway, job_id, lambda job: job.state is State.RUNNING)
                while not fake.received:
                    await asyncio.sleep(0.02)
            # It was cancelled on the instance.
            assert fake.cancelled == [fake.received[0].upstream_id]
            fake.answer = drawn
            async with running(tmp_path, fake) as gateway:
                assert (await until(gateway, job_id, has_ended)).state is State.SUCCEEDED
            first, second = fake.received
            assert first.fields == second.fields

    run(check())


def test_a_job_that_fells_its_instances_fails(tmp_path: Path) -> None:
    async def check() -> None:
        def answer(received: Received) -> object:
            return "hang up" if received.fields["prompt"] == "poison" else drawn(received)

        async with running_instance(answer=answer) as fake, running(tmp_path, fake) as gateway:
            poisonous = await post(gateway, prompt="poison")
            other = await post(gateway)
            job = await until(gateway, poisonous, has_ended)
            assert job.state is State.FAILED
            assert job.error is not None
            assert json.loads(job.error)["code"] == "instance_died"
            assert (await until(gateway, other, has_ended)).state is State.SUCCEEDED
            sent = [each.fields["prompt"] for each in fake.received]
            assert sent.count("poison") == 6

    run(check())


def test_a_job_that_fells_devices_fails(tmp_path: Path) -> None:
    lost = {"status": 503, "error": {"code": "device_lost", "message": "lost", "fields": {}}}

    async def check() -> None:
        def answer(received: Received) -> bytes:
            return b"event: error\ndata: " + json.dumps(lost).encode() + b"\n\n"

        async with running_instance(answer=answer) as fake, running(tmp_path, fake) as gateway:
            job = await until(gateway, await post(gateway), has_ended)
            assert job.state is State.FAILED
            assert job.error is not None
            assert json.loads(job.error)["code"] == "device_lost"
            assert len(fake.received) == 3

    run(check())


def test_a_pipeline_need_not_tell_how_many_steps_there_are(tmp_path: Path) -> None:
    step = b'event: step\ndata: {"step": 1, "num_steps": null, "elapsed_s": 0.1}\n\n'

    async def check() -> None:
        def answer(received: Received) -> bytes:
            return step + drawn(received)

        async with running_instance(answer=answer) as fake, running(tmp_path, fake) as gateway:
            job = await until(gateway, await post(gateway), has_ended)
            assert job.state is State.SUCCEEDED

    run(check())


def test_a_job_waits_for_its_instance(tmp_path: Path) -> None:
    """Longer than a request would, while it is away and while it is full."""
    full = (503, {"error": {"code": "queue_full", "message": "full", "fields": {}}}, {})

    async def check() -> None:
        async with running_instance(answer=drawn) as fake, running(tmp_path, fake) as gateway:
            fake.is_ready = False
            while gateway.fleet.is_ready:
                await asyncio.sleep(0.02)
            job_id = await post(gateway)
            await asyncio.sleep(1.5)
            assert not fake.received
            assert (await until(gateway, job_id, lambda _: True)).state is State.QUEUED
            fake.answer = lambda _: full
            fake.is_ready = True
            while len(fake.received) < 2:
                await asyncio.sleep(0.02)
            fake.answer = drawn
            assert (await until(gateway, job_id, has_ended)).state is State.SUCCEEDED

    run(check())


def test_what_was_cancelled_elsewhere_is_drawn_no_more(tmp_path: Path) -> None:
    """Another gateway cancels it in the store: this one learns so when it renews its lease."""

    async def check() -> None:
        never = asyncio.Event()
        async with (
            running_instance(answer=lambda _: never.wait()) as fake,
            running(tmp_path, fake) as gateway,
        ):
            job_id = await post(gateway)
            while not fake.received:
                await asyncio.sleep(0.02)
            await gateway.jobs.store.cancel(job_id)
            while not fake.cancelled:
                await asyncio.sleep(0.02)
            assert fake.cancelled == [fake.received[0].upstream_id]

    run(check())


def test_no_more_are_drawn_at_a_time_than_may_be(tmp_path: Path) -> None:
    async def check() -> None:
        most = 0

        async def answer(received: Received) -> bytes:
            nonlocal most
            most = max(most, fake.open_requests)
            await asyncio.sleep(0.05)
            return drawn(received)

        async with (
            running_instance(answer=answer) as fake,
            running(tmp_path, fake, concurrency=3) as gateway,
        ):
            ids = [await post(gateway, n=2) for _ in range(8)]
            for job_id in ids:
                assert (await until(gateway, job_id, has_ended)).state is State.SUCCEEDED
        assert most == 3

    run(check())


def test_a_job_that_is_claimed_here_again_takes_no_place_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lease was not renewed in time: it is drawn twice until the first drawing learns so."""

    async def check() -> None:
        may_renew, may_end = asyncio.Event(), asyncio.Event()

        async def answer(received: Received) -> bytes:
            await may_end.wait()
            return drawn(received)

        async with (
            running_instance(answer=answer) as fake,
            running(tmp_path, fake, concurrency=2, lease_s=0.5) as gateway,
        ):
            renew = gateway.jobs.store.renew

            async def renew_late(*arguments: Any) -> bool:
                await may_renew.wait()
                return await renew(*arguments)

            monkeypatch.setattr(gateway.jobs.store, "renew", renew_late)
            twice = await post(gateway)
            while len(fake.received) < 2:
                await asyncio.sleep(0.02)
            may_renew.set()
            while not fake.cancelled:
                await asyncio.sleep(0.02)
            assert gateway.jobs.runner.progress(twice) is not None
            may_end.set()
            assert (await until(gateway, twice, has_ended)).state is State.SUCCEEDED
            # Both places are there.
            may_end.clear()
            for _ in range(2):
                await post(gateway)
            while fake.open_requests < 2:
                await asyncio.sleep(0.02)
            may_end.set()

    run(check())


def test_the_fingerprint_is_that_of_what_was_sent() -> None:
    fields = {"prompt": "a ring", "seed": 1}
    one = fingerprint(Sent(fields, files={"image": (b"a", b"b")}))
    assert one == fingerprint(Sent(dict(reversed(fields.items())), files={"image": (b"a", b"b")}))
    others = [
        Sent({**fields, "seed": 2}, files={"image": (b"a", b"b")}),
        Sent(fields, files={"image": (b"ab",)}),
        Sent(fields, files={"mask": (b"a", b"b")}),
        Sent(fields),
    ]
    assert len({one, *map(fingerprint, others)}) == 5


def test_a_silent_receiver_of_webhooks_delays_no_other(tmp_path: Path) -> None:
    async def check() -> None:
        silent = asyncio.Event()

        async def receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"POST /silent "):
                silent.set()
                await reader.read()  # until the gateway hangs up
            else:
                writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
            writer.close()

        hosts = {"webhook_hosts": ["127.0.0.1"]}
        async with (
            running_instance(answer=drawn) as fake,
            await asyncio.start_server(receive, "127.0.0.1") as server,
            running(tmp_path, fake, **hosts) as gateway,
        ):
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            await post(gateway, webhook_url=f"{url}/silent")
            await silent.wait()
            others = [await post(gateway, webhook_url=f"{url}/other") for _ in range(20)]
            async with asyncio.timeout(5):
                for other in others:
                    await until(
                        gateway,
                        other,
                        lambda job: job.webhook_state is WebhookState.DELIVERED,
                    )

    run(check())


def test_the_secret_of_webhooks(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    made = read_secret(path)
    assert len(made) == 32
    assert read_secret(path) == made
    assert path.stat().st_mode & 0o777 == 0o600
    for text in ("whsec_", "whsec_c2hvcnQ=", "not base64!"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="webhook_secret_file"):
            read_secret(path)
