"""KServe's routes, Hugging Face's client, health and documents, through the gateway."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from urllib.parse import urlencode

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import BadRequestError
from PIL import Image

from tests.support.client import curl, pixels, post_json
from tests.support.gateways import RunningGateway
from tests.support.traffic import parse_events

pytestmark = pytest.mark.server

SMALL = {"width": 64, "height": 64, "num_inference_steps": 2}


@pytest.mark.parametrize("path", ["predictions/stable_diffusion", "hf/stable_diffusion"])
def test_hugging_faces_client(gateway: RunningGateway, path: str) -> None:
    client = InferenceClient(model=f"{gateway.url}/{path}")
    image = client.text_to_image("a red ring", seed=1, **SMALL)
    assert image.size == (64, 64)
    with pytest.raises(BadRequestError, match="height"):
        client.text_to_image("a red ring", **{**SMALL, "height": 65})


def test_a_form_with_a_file(gateway: RunningGateway, tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (128, 64), "red").save(picture, "PNG")
    (tmp_path / "in.png").write_bytes(picture.getvalue())
    answer = curl(
        f"{gateway.url}/predictions/stable_diffusion",
        *("-F", "prompt=100% a bluer ring é", "-F", f"image=@{tmp_path / 'in.png'}"),
        *("-F", "steps=2", "-F", "strength=1"),
    )
    assert answer.status == 200, answer.body
    assert pixels(answer.body).shape == (64, 128, 3)


def test_kserve_v1(gateway: RunningGateway) -> None:
    state = curl(f"{gateway.url}/v1/models/stable_diffusion").json()
    assert (state["name"], state["ready"]) == ("stable_diffusion", True)
    body = {"instances": ["a ring", {"prompt": "a star"}], "parameters": SMALL}
    reply = post_json(f"{gateway.url}/v1/models/stable_diffusion:predict", body)
    assert reply.status == 200, reply.body
    predictions = reply.json()["predictions"]
    assert len(predictions) == 2
    assert pixels(base64.b64decode(predictions[0]["images"][0])).shape == (64, 64, 3)


def test_kserve_v2(gateway: RunningGateway) -> None:
    for path in ("health/live", "health/ready", "models/stable_diffusion/ready"):
        assert curl(f"{gateway.url}/v2/{path}").status == 200
    assert curl(f"{gateway.url}/v2/models/stable_diffusion").json()["name"] == "stable_diffusion"
    prompts = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a ring"]}
    body = {"inputs": [prompts], "parameters": SMALL}
    reply = post_json(f"{gateway.url}/v2/models/stable_diffusion/infer", body)
    assert reply.status == 200, reply.body
    assert reply.json()["model_name"] == "stable_diffusion"
    assert curl(f"{gateway.url}/v2/models/none/ready").status == 404


def test_errors_of_an_instance_are_its_own(gateway: RunningGateway) -> None:
    reply = post_json(f"{gateway.url}/predictions/stable_diffusion", {"prompt": "a", "stpes": 1})
    assert reply.status == 400
    assert reply.error()["fields"] == {"stpes": "unknown field; did you mean steps?"}
    assert post_json(f"{gateway.url}/predictions/none", {"prompt": "a"}).status == 404


def test_an_instances_own_stream(gateway: RunningGateway) -> None:
    url = f"{gateway.url}/predictions/stable_diffusion"
    fields = {"prompt": "a ring", "previews": 1, **SMALL}
    for arguments in (
        ("-H", "Accept: text/event-stream", "-d", urlencode(fields)),
        ("-d", urlencode({**fields, "stream": "true"})),
        ("-H", "Content-Type: application/json", "-d", json.dumps({**fields, "stream": True})),
    ):
        answer = curl(url, *arguments)
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = parse_events(answer.body.decode())
        assert [name for name, _ in events] == ["step", "preview", "step", "preview", "image"]
        assert events[0][1].keys() == {"step", "num_steps", "elapsed_s"}
    late = curl(url, "-H", "Accept: text/event-stream", "-d", "prompt=a&steps=900&deadline_s=0.5")
    ((_, error),) = [each for each in parse_events(late.body.decode()) if each[0] == "error"]
    assert error["status"] == 504
    wrong = curl(url, "-H", "Accept: text/event-stream", "-d", "prompt=a&steps=0")
    assert wrong.status == 400


def test_what_is_no_stream_is_passed_on_as_it_is(gateway: RunningGateway) -> None:
    """As the instance takes it, whatever the Accept header has in it."""
    base, fields = gateway.url, {"prompt": "a ring", **SMALL}
    events, json_too = "Accept: text/event-stream", "Accept: application/json, text/event-stream"
    picture_rather = "Accept: image/png, text/event-stream;q=0.5"
    name = "stable_diffusion"
    for path, accept, body, kind in (
        (f"/predictions/{name}", events, {**fields, "stream": False}, "image/png"),
        (f"/predictions/{name}", picture_rather, fields, "image/png"),
        (f"/predictions/{name}", events, {"describe": True}, "application/json"),
        (f"/v1/models/{name}:predict", json_too, {"instances": [fields]}, "application/json"),
    ):
        answer = post_json(f"{base}{path}", body, "-H", accept)
        assert answer.status == 200, answer.body
        assert answer.headers["content-type"].startswith(kind)
    assert curl(f"{base}/readyz").json() == {"ready": True}


def test_health(gateway: RunningGateway) -> None:
    assert curl(f"{gateway.url}/healthz").json() == {"live": True}
    assert curl(f"{gateway.url}/readyz").json() == {"ready": True}


def test_the_document_has_what_the_table_has(gateway: RunningGateway) -> None:
    document = curl(f"{gateway.url}/openapi.json").json()
    fields = document["components"]["schemas"]["Generation"]["properties"]
    # The instance's own limits and defaults.
    assert fields["num_inference_steps"]["maximum"] == 1000
    assert fields["num_inference_steps"]["default"] == 4
    assert fields["model"]["enum"] == ["stable_diffusion"]
    assert fields["quality"]["enum"][0] == "auto"
    page = curl(f"{gateway.url}/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert all(f"<td>{name}</td>" in page.body.decode() for name in fields)
    assert b"<script" not in page.body
