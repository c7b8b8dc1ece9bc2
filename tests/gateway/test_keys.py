"""gateway.keys and gateway.limits, alone and through the real client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from openai import AsyncOpenAI, OpenAI

from gateway.errors import Forbidden, ModelNotFound, RateLimited
from gateway.file_stamps import file_stamp
from gateway.keys import Key, KeyRing, add_key, how_to_make, main, read_keys
from gateway.limits import Limiter, check_model, check_picture
from handler.errors import ConfigError
from scripts.torchserve.process import TorchServer
from tests.support.client import curl
from tests.support.fake_instance import running_instance
from tests.support.gateway_apps import gateway_client
from tests.support.gateways import RunningGateway, running_gateway

PROMPT = "a red ring"
SMALL = {"num_inference_steps": 2}


def test_a_key_is_found_by_itself_alone(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    first = add_key(file, "first", {"concurrency": 2, "models": ["toy"]})
    second = add_key(file, "second", {})
    ring = KeyRing(file)
    found = ring.find(first)
    assert found is not None
    assert (found.name, found.concurrency, found.models) == ("first", 2, ("toy",))
    other = ring.find(second)
    assert other is not None
    assert (other.name, other.concurrency, other.models) == ("second", None, None)
    for wrong in ("", first[:-1], first + "x", found.hash, "first", "\ud800"):
        assert ring.find(wrong) is None
    assert first not in file.read_text()


def test_who_may_read_a_file_is_a_change_of_it(tmp_path: Path) -> None:
    """Else a file that could not be read would not be tried again once it can be."""
    file = tmp_path / "keys"
    file.write_text("{}\n")
    file.chmod(0o200)
    before = file_stamp(file)
    file.chmod(0o600)
    assert file_stamp(file) != before


def test_keys_are_read_again_when_the_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    ring = KeyRing(file)
    assert ring.find("") is None
    secret = add_key(file, "late", {})
    ring.refresh()
    assert ring.find(secret) is not None
    file.write_text("late: {}\n")
    with pytest.raises(ConfigError):
        ring.refresh()
    assert ring.find(secret) is not None
    file.unlink()
    ring.refresh()
    assert ring.find(secret) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a list\n", "must be names and their limits"),
        ("somebody: {}\n", "must have a hash"),
        (f"somebody: {{hash: 'sha256:{'0' * 63}'}}\n", "must be sha256: and 64"),
        (f"somebody: {{hash: 'sha256:{'0' * 64}', max_step: 5}}\n", "did you mean max_steps?"),
        (f"somebody: {{hash: 'sha256:{'0' * 64}', concurrency: 0}}\n", "an integer from 1"),
        (f"two words: {{hash: 'sha256:{'0' * 64}'}}\n", "is not a name"),
        ("a: [\n", "cannot be read"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_keys(tmp_path / "keys")


def test_a_limit_that_is_none_leaves_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    add_key(file, "first", {})
    before = file.read_text()
    assert main(["--file", str(file), "--name", "second", "--max-steps", "0"]) == 1
    assert "must be an integer from 1 to 1000" in capsys.readouterr().err
    assert file.read_text() == before
    assert list(tmp_path.iterdir()) == [file]


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_requests_a_minute() -> None:
    clock = Clock()
    limiter, key = Limiter(clock), Key("somebody", "", requests_per_minute=3)
    for _ in range(3):
        with limiter.admit(key):
            pass
    with pytest.raises(RateLimited) as caught, limiter.admit(key):
        pass
    assert caught.value.retry_after_s == 20
    with limiter.admit(Key("other", "", requests_per_minute=3)), limiter.admit(None):
        pass
    clock.now_s = 20.0
    with limiter.admit(key):
        pass
    with pytest.raises(RateLimited), limiter.admit(key):
        pass


def test_requests_at_a_time() -> None:
    limiter, key = Limiter(), Key("somebody", "", concurrency=1)
    with limiter.admit(key), pytest.raises(RateLimited), limiter.admit(key):
        pass
    with limiter.admit(key):
        pass


def test_what_a_key_may_have() -> None:
    key = Key("somebody", "", max_pixels=64 * 64, max_steps=10, models=("toy",))
    check_picture(key, 64, 64, 10)
    with pytest.raises(Forbidden) as caught:
        check_picture(key, 65, 64, 11)
    assert caught.value.fields.keys() == {"size", "num_inference_steps"}
    check_picture(None, 10_000, 10_000, 1000)
    check_model(key, "toy")
    with pytest.raises(ModelNotFound):
        check_model(key, "other")


def test_a_key_that_has_all_its_requests_open_may_ask_and_cancel(tmp_path: Path) -> None:
    key = {"Authorization": f"Bearer {add_key(tmp_path / 'keys', 'single', {'concurrency': 1})}"}

    async def check() -> None:
        never = asyncio.Event()
        async with (
            running_instance(answer=lambda _: never.wait()) as fake,
            gateway_client(tmp_path, [fake]) as client,
        ):
            accepted = await client.post("/v1/jobs", json={"prompt": PROMPT}, headers=key)
            assert accepted.status == 202, await accepted.text()
            job = f"/v1/jobs/{(await accepted.json())['id']}"
            mine = {**key, "X-Request-Id": "mine"}
            path, fields = "/v1/images/generations", {"prompt": PROMPT}
            slow = asyncio.create_task(client.post(path, json=fields, headers=mine))
            while len(fake.received) < 2:
                await asyncio.sleep(0.01)
            assert (await client.post(path, json=fields, headers=key)).status == 429
            for asked in (job, "/v1/models", "/v1/models/toy", "/v2/models/toy"):
                assert (await client.get(asked, headers=key)).status == 200, asked
            for cancelled in (job, "/v1/requests/mine"):
                assert (await client.delete(cancelled, headers=key)).status == 200, cancelled
            assert (await slow).status == 499

    asyncio.run(asyncio.wait_for(check(), 60))


def test_two_keys_may_choose_the_same_id(tmp_path: Path) -> None:
    first, second = (
        {"Authorization": f"Bearer {add_key(tmp_path / 'keys', name, {})}", "X-Request-Id": "mine"}
        for name in ("first", "second")
    )

    async def check() -> None:
        never = asyncio.Event()
        async with (
            running_instance(answer=lambda _: never.wait()) as fake,
            gateway_client(tmp_path, [fake]) as client,
        ):

            def draw(headers: dict[str, str]) -> Any:
                path, fields = "/v1/images/generations", {"prompt": PROMPT}
                return asyncio.create_task(client.post(path, json=fields, headers=headers))

            def cancel(headers: dict[str, str]) -> Any:
                key = {"Authorization": headers["Authorization"]}
                return client.delete("/v1/requests/mine", headers=key)

            drawing = [draw(first), draw(second)]
            while len(fake.received) < 2:
                await asyncio.sleep(0.01)
            assert (await draw(first)).status == 409
            assert (await cancel(second)).status == 200
            assert (await drawing[1]).status == 499
            assert not drawing[0].done()
            assert (await cancel(first)).status == 200
            assert (await drawing[0]).status == 499

    asyncio.run(asyncio.wait_for(check(), 60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keyed")


@pytest.fixture(scope="module")
def secrets(folder: Path) -> dict[str, str]:
    limits: dict[str, dict[str, object]] = {
        "free": {},
        "small": {"max_pixels": 64 * 64, "max_steps": 10},
        "slow": {"requests_per_minute": 1},
        "single": {"concurrency": 1},
        "elsewhere": {"models": ["another"]},
    }
    return {name: add_key(folder / "keys", name, each) for name, each in limits.items()}


@pytest.fixture(scope="module")
def keyed(instance: TorchServer, folder: Path, secrets: dict[str, str]) -> Iterator[RunningGateway]:
    settings = {"require_keys": True, "cors_origins": ["https://app.example"]}
    with running_gateway(folder, [instance.state_dir], **settings) as running:
        yield running


@pytest.mark.server
class TestWithAServer:
    def client(self, keyed: RunningGateway, key: str) -> OpenAI:
        return OpenAI(base_url=f"{keyed.url}/v1", api_key=key, max_retries=0)

    def test_a_key_is_needed(self, keyed: RunningGateway, secrets: dict[str, str]) -> None:
        with self.client(keyed, secrets["free"]) as client:
            assert client.images.generate(prompt=PROMPT, size="64x64", extra_body=SMALL).data
        with self.client(keyed, "wrong") as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                client.images.generate(prompt=PROMPT)
            assert caught.value.code == "invalid_api_key"
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
        bare = curl(f"{keyed.url}/predictions/stable_diffusion", "-d", "prompt=a")
        assert bare.status == 401
        assert bare.headers["www-authenticate"] == "Bearer"

    def test_health_needs_none(self, keyed: RunningGateway) -> None:
        paths = ("healthz", "readyz", "v2/health/live", "v2/health/ready", "docs", "openapi.json")
        for path in (*paths, "v2/models/stable_diffusion/ready"):
            assert curl(f"{keyed.url}/{path}").status == 200

    def test_too_large_for_a_key(self, keyed: RunningGateway, secrets: dict[str, str]) -> None:
        with self.client(keyed, secrets["small"]) as client:
            assert client.images.generate(prompt=PROMPT, size="64x64", extra_body=SMALL).data
            with pytest.raises(openai.PermissionDeniedError) as size:
                client.images.generate(prompt=PROMPT, size="128x64", extra_body=SMALL)
            assert size.value.param == "size"
            with pytest.raises(openai.PermissionDeniedError):
                client.images.generate(prompt=PROMPT, extra_body=SMALL)  # the model's own size
            with pytest.raises(openai.PermissionDeniedError) as steps:
                client.images.generate(prompt=PROMPT, size="64x64", extra_body={"steps": 11})
            assert steps.value.param == "num_inference_steps"
        for sent in (
            ("-d", "prompt=a", "-d", "width=128", "-d", "height=64", "-d", "steps=2"),
            ("-H", "Content-Type: application/json", "-d", '{"prompt": "a", "steps": 11}'),
        ):
            answer = curl(
                f"{keyed.url}/predictions/stable_diffusion",
                *("-H", f"Authorization: Bearer {secrets['small']}", *sent),
            )
            assert answer.status == 403, answer.body

    def test_too_many_a_minute(self, keyed: RunningGateway, secrets: dict[str, str]) -> None:
        with self.client(keyed, secrets["slow"]) as client:
            client.models.list()
            with pytest.raises(openai.RateLimitError) as caught:
                client.models.list()
            assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
            assert caught.value.type == "rate_limit_error"
            assert "x-should-retry" not in caught.value.response.headers

    def test_too_many_at_a_time(self, keyed: RunningGateway, secrets: dict[str, str]) -> None:
        async def talk() -> None:
            key = secrets["single"]
            async with AsyncOpenAI(
                base_url=f"{keyed.url}/v1", api_key=key, max_retries=0
            ) as client:
                slow = asyncio.create_task(
                    client.images.generate(prompt=PROMPT, extra_body={"steps": 1000})
                )
                await asyncio.sleep(0.5)
                with pytest.raises(openai.RateLimitError):
                    await client.images.generate(prompt=PROMPT)
                slow.cancel()
                stream = await _until_free(
                    lambda: client.images.generate(
                        prompt=PROMPT, stream=True, extra_body={"steps": 1000}
                    )
                )
                with pytest.raises(openai.RateLimitError):
                    await client.images.generate(prompt=PROMPT)
                await stream.close()
                await _until_free(client.models.list)

        asyncio.run(talk())

    def test_a_key_sees_its_models_alone(
        self, keyed: RunningGateway, secrets: dict[str, str]
    ) -> None:
        with self.client(keyed, secrets["elsewhere"]) as client:
            assert list(client.models.list()) == []
            with pytest.raises(openai.NotFoundError):
                client.models.retrieve("stable_diffusion")
            with pytest.raises(openai.NotFoundError):
                client.images.generate(prompt=PROMPT)

    def test_nobody_cancels_what_is_anothers(
        self, keyed: RunningGateway, secrets: dict[str, str]
    ) -> None:
        async def talk() -> None:
            url, mine = f"{keyed.url}/v1", {"X-Request-Id": "mine"}
            async with AsyncOpenAI(base_url=url, api_key=secrets["free"], max_retries=0) as client:
                other = client.with_options(api_key=secrets["small"])
                slow = asyncio.create_task(
                    client.images.generate(
                        prompt=PROMPT, extra_headers=mine, extra_body={"steps": 1000}
                    )
                )
                await asyncio.sleep(0.5)
                with pytest.raises(openai.NotFoundError):
                    await other.delete("/requests/mine", cast_to=object)
                assert not slow.done()
                await client.delete("/requests/mine", cast_to=object)
                with pytest.raises(openai.APIStatusError):
                    await slow

        asyncio.run(talk())

    def test_cors(self, keyed: RunningGateway, gateway: RunningGateway) -> None:
        def preflight(url: str, origin: str) -> dict[str, str]:
            answer = curl(
                f"{url}/v1/images/generations",
                *("-X", "OPTIONS", "-H", f"Origin: {origin}"),
                *("-H", "Access-Control-Request-Method: POST"),
                *("-H", "Access-Control-Request-Headers: authorization"),
            )
            return answer.headers

        allowed = "access-control-allow-origin"
        assert preflight(keyed.url, "https://app.example")[allowed] == "https://app.example"
        assert allowed not in preflight(keyed.url, "https://evil.example")
        assert allowed not in preflight(gateway.url, "https://app.example")
        for url in (f"{keyed.url}/v1/models", f"{keyed.url}/healthz"):
            headers = curl(url, "-H", "Origin: https://app.example").headers
            assert headers[allowed] == "https://app.example"

    def test_the_log_has_no_secret(self, keyed: RunningGateway, secrets: dict[str, str]) -> None:
        log = keyed.log
        assert "key free" in log
        assert not any(secret in log for secret in secrets.values())
        assert PROMPT not in log


async def _until_free(ask: Callable[[], Awaitable[Any]]) -> Any:
    """The first answer that is not 429: what was left is over a moment later."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await ask()
            except openai.RateLimitError:
                await asyncio.sleep(0.1)


def test_the_file_is_yaml_that_a_person_may_edit(tmp_path: Path) -> None:
    add_key(tmp_path / "keys", "somebody", {"models": ["a", "b"], "max_steps": 5})
    content = yaml.safe_load((tmp_path / "keys").read_text())
    assert content["somebody"].keys() == {"hash", "models", "max_steps"}


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("config/keys", "make key NAME=…"),
        ("/etc/my keys", """make key NAME=… ARGS='--file '"'"'/etc/my keys'"'"''"""),
        ("/etc/keys", "make key NAME=… ARGS='--file /etc/keys'"),
    ],
)
def test_what_makes_a_key_writes_the_file_that_is_read(file: str, command: str) -> None:
    assert how_to_make(Path(file)) == command
