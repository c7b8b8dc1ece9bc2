"""Jobs through a real gateway and a real TorchServe."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterator

import numpy as np
import pytest

from gateway.keys import add_key
from scripts.torchserve.process import TorchServer
from tests.support.client import pixels
from tests.support.gateways import RunningGateway, running_gateway
from tests.support.jobs import JobClient, Webhooks, picture_of, receiving_webhooks
from tests.support.pictures import encoded
from tests.support.traffic import metrics, until

pytestmark = pytest.mark.server

SMALL = {"size": "64x64", "num_inference_steps": 4}
LONG = {"size": "64x64", "num_inference_steps": 1000}


@pytest.fixture(scope="module")
def gateway(
    instance: TorchServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway")
    settings = {"webhook_hosts": ["127.0.0.0/8", "hooks.example"], "concurrency": 2}
    with running_gateway(folder, [instance.state_dir], jobs=settings) as running:
        yield running


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[JobClient]:
    client = JobClient(gateway.url)
    yield client
    client.cancel_all()


@pytest.fixture
def webhooks() -> Iterator[Webhooks]:
    with receiving_webhooks() as webhooks:
        yield webhooks


def in_flight(server: TorchServer) -> float:
    return metrics(server).get("diffusers_requests_in_flight", 0.0)


def drawn_at_once(client: JobClient, fields: dict[str, object]) -> bytes:
    """The picture of the same request, which is waited for."""
    reply = client.ask("POST", "/v1/images/generations", {"prompt": "a ring", **fields})
    assert reply.status == 200, reply.body
    return base64.b64decode(reply.json()["data"][0]["b64_json"])


def test_a_job_is_accepted_and_drawn(client: JobClient) -> None:
    reply = client.post({**SMALL, "seed": 7})
    accepted = reply.json()
    assert reply.status == 202
    assert reply.headers["location"] == f"/v1/jobs/{accepted['id']}"
    assert accepted["state"] == "queued"
    assert accepted["result"] is accepted["error"] is None
    job = client.ended(accepted["id"])
    assert (job["state"], job["seed"], job["n"]) == ("succeeded", 7, 1)
    assert job["result"]["data"][0]["seed"] == 7
    assert job["result"]["size"] == "64x64"
    assert job["finished_at"] >= job["started_at"] >= job["created_at"]
    assert job["expires_at"] == job["finished_at"] + 86400
    expected = pixels(drawn_at_once(client, {**SMALL, "seed": 7})).astype(int)
    assert np.abs(pixels(picture_of(job)).astype(int) - expected).max() <= 2
    other = pixels(drawn_at_once(client, {**SMALL, "seed": 8})).astype(int)
    assert np.abs(other - expected).max() > 2


def test_its_steps_and_previews_are_seen(client: JobClient) -> None:
    job_id = client.accepted({**SMALL, "num_inference_steps": 200})
    job = until(lambda: client.get(job_id), lambda job: bool(job["preview"]))
    assert job["state"] == "running"
    assert (job["picture"], job["num_steps"]) == (0, 200)
    assert job["step"] >= 50
    assert base64.b64decode(job["preview"]).startswith(b"\xff\xd8")
    later = until(lambda: client.get(job_id), lambda later: later["step"] > job["step"])
    assert later["step"] > job["step"]


def test_no_previews_where_none_are_wanted(client: JobClient) -> None:
    job_id = client.accepted({**SMALL, "num_inference_steps": 200, "partial_images": 0})
    job = until(lambda: client.get(job_id), lambda job: job["step"] > 50)
    assert job["step"] > 50
    assert job["preview"] is None


def test_several_pictures_by_url(client: JobClient) -> None:
    fields = {**SMALL, "n": 3, "seed": 3, "response_format": "url", "output_format": "webp"}
    job = client.ended(client.accepted(fields))
    assert job["state"] == "succeeded", job["error"]
    data = job["result"]["data"]
    assert [each["seed"] for each in data] == [3, 4, 5]
    replies = [client.ask("GET", each["url"]) for each in data]
    assert [reply.status for reply in replies] == [200] * 3
    assert {reply.headers["content-type"] for reply in replies} == {"image/webp"}
    assert len({reply.body for reply in replies}) == 3
    assert client.ask("GET", data[0]["url"][:-6] + "x.webp").status == 404


def test_a_drawn_seed_is_fixed_when_it_is_accepted(client: JobClient) -> None:
    accepted = client.post(SMALL).json()
    job = client.ended(accepted["id"])
    assert job["result"]["data"][0]["seed"] == accepted["seed"]


def test_a_form_with_a_picture_is_an_edit(client: JobClient) -> None:
    picture = encoded((64, 64))
    fields = {"prompt": "a ring", "strength": "0.5", "num_inference_steps": "4", "seed": "1"}
    lines = [
        f'--edge\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    head = b'--edge\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n'
    lines.append(head + b"Content-Type: image/png\r\n\r\n" + picture + b"\r\n--edge--\r\n")
    headers = {"Content-Type": "multipart/form-data; boundary=edge"}
    reply = client.ask("POST", "/v1/jobs", b"".join(lines), **headers)
    assert reply.status == 202, reply.body
    job = client.ended(reply.json()["id"])
    assert pixels(picture_of(job)).shape == (64, 64, 3)


def test_what_the_instance_refuses_is_the_jobs_error(client: JobClient) -> None:
    job = client.ended(client.accepted({**SMALL, "gidance_scale": 3}))
    assert job["state"] == "failed"
    assert job["result"] is None
    assert job["error"]["status"] == 400
    assert "guidance_scale" in job["error"]["fields"]["gidance_scale"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"size": "large"}, "size"),
        ({"stream": True}, "stream"),
        ({"partial_images": 4}, "partial_images"),
        ({"webhook_url": "http://169.254.169.254/"}, "webhook_url"),
        ({"webhook_url": "https://elsewhere.example/"}, "webhook_url"),
        ({"image": "no picture", "prompt": "a ring"}, "image"),
    ],
)
def test_what_is_wrong_is_refused_at_once(
    client: JobClient, fields: dict[str, object], field: str
) -> None:
    reply = client.post(fields)
    assert reply.status == 400
    assert list(reply.json()["error"]["fields"]) == [field]


def test_cancelled_while_it_is_drawn(client: JobClient, instance: TorchServer) -> None:
    job_id = client.accepted(LONG)
    assert until(lambda: client.get(job_id)["step"], bool) > 0
    assert client.ask("DELETE", f"/v1/jobs/{job_id}").json()["state"] == "cancelled"
    assert until(lambda: in_flight(instance), lambda number: number == 0) == 0
    job = client.get(job_id)
    assert (job["state"], job["result"]) == ("cancelled", None)


def test_cancelled_while_it_waits(client: JobClient) -> None:
    """No more than `concurrency` are drawn at a time."""
    drawing = [client.accepted(LONG) for _ in range(2)]
    assert until(
        lambda: [client.get(each)["state"] for each in drawing], lambda s: "queued" not in s
    )
    waiting = client.accepted(SMALL)
    # Who waits for a picture does not wait for jobs.
    assert drawn_at_once(client, SMALL)
    assert client.get(waiting)["state"] == "queued"
    assert client.ask("DELETE", f"/v1/jobs/{waiting}").json()["state"] == "cancelled"
    client.cancel_all()
    assert client.ended(client.accepted(SMALL))["state"] == "succeeded"
    assert client.get(waiting)["started_at"] is None


def test_a_job_that_has_ended_stays_as_it_is(client: JobClient) -> None:
    job = client.ended(client.accepted(SMALL))
    assert client.ask("DELETE", f"/v1/jobs/{job['id']}").json() == job


def test_idempotency_key(client: JobClient) -> None:
    headers = {"Idempotency-Key": "the-key"}
    first = client.post({**SMALL, "seed": 5}, **headers)
    again = client.ask("POST", "/v1/jobs", {"seed": 5, **SMALL, "prompt": "a ring"}, **headers)
    assert again.status == 202
    assert again.json()["id"] == first.json()["id"]
    other = client.post({**SMALL, "seed": 6}, **headers)
    assert other.status == 409
    assert other.headers["x-should-retry"] == "false"
    assert client.post(SMALL, **{"Idempotency-Key": "with space"}).status == 400
    assert client.post({**SMALL, "seed": 5}).json()["id"] != first.json()["id"]


def test_a_job_that_is_posted_again_when_it_has_ended_has_its_pictures(client: JobClient) -> None:
    """As by a client whose gateway was gone before the first reply, and came back later."""
    headers = {"Idempotency-Key": "lost"}
    job = client.ended(client.accepted(SMALL, **headers))
    again = client.post(SMALL, **headers)
    assert again.status == 202
    assert again.json() == job
    assert picture_of(again.json())
    assert "retry-after" not in again.headers


def test_unknown_jobs(client: JobClient) -> None:
    for method in ("GET", "DELETE"):
        assert client.ask(method, f"/v1/jobs/job_{'0' * 32}").status == 404


def test_webhook(gateway: RunningGateway, client: JobClient, webhooks: Webhooks) -> None:
    """Redirects are not followed; what was not received is sent again."""
    webhooks.statuses = [302, 500]
    fields = {**SMALL, "response_format": "url", "webhook_url": f"{webhooks.url}/hook?a=b"}
    job_id = client.accepted(fields)
    assert client.get(job_id)["webhook"] == {"state": "waiting", "tries": 0} or client.ended(job_id)
    job = until(lambda: client.get(job_id), lambda job: job["webhook"]["state"] == "delivered")
    assert job["webhook"] == {"state": "delivered", "tries": 3}
    assert webhooks.paths == ["/hook?a=b"] * 3
    secret = (gateway.folder / "state" / "webhook_secret").read_text().strip()
    for headers, body in webhooks.received:
        assert headers["webhook-id"] == job_id
        assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
        signed = f"{job_id}.{headers['webhook-timestamp']}.".encode() + body
        digest = hmac.new(base64.b64decode(secret[6:]), signed, hashlib.sha256).digest()
        assert headers["webhook-signature"] == "v1," + base64.b64encode(digest).decode()
    content = json.loads(webhooks.received[-1][1])
    assert content["type"] == "image.job.succeeded"
    assert content["data"]["id"] == job_id
    url = content["data"]["result"]["data"][0]["url"]
    assert client.ask("GET", url).body.startswith(b"\x89PNG")


def test_webhook_of_a_job_that_is_cancelled(client: JobClient, webhooks: Webhooks) -> None:
    job_id = client.accepted({**LONG, "webhook_url": webhooks.url})
    client.ask("DELETE", f"/v1/jobs/{job_id}")
    (_, body), *_ = until(lambda: list(webhooks.received), bool)
    assert json.loads(body)["type"] == "image.job.cancelled"


def test_jobs_are_their_keys(
    instance: TorchServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("keys")
    one, other = (add_key(folder / "keys", name, {}) for name in ("one", "other"))
    with running_gateway(folder, [instance.state_dir], require_keys=True) as gateway:
        client = JobClient(gateway.url, one)
        assert JobClient(gateway.url).post(SMALL).status == 401
        job_id = client.accepted({**SMALL, "response_format": "url"})
        path = f"/v1/jobs/{job_id}"
        for method in ("GET", "DELETE"):
            assert JobClient(gateway.url, other).ask(method, path).status == 404
        job = client.ended(job_id)
        # Whoever knows the URL of a picture may fetch it.
        url = job["result"]["data"][0]["url"]
        assert JobClient(gateway.url).ask("GET", url).status == 200
