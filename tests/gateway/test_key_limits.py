"""A key's largest picture and most steps, whatever form a request is sent in."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gateway.keys import add_key
from tests.support.fake_instance import running_instance
from tests.support.gateway_apps import gateway_client

LIMITS: dict[str, object] = {"max_steps": 100, "max_pixels": 1024 * 1024}
JSON = "application/json"
FORM = "application/x-www-form-urlencoded"
PREDICTIONS, V1 = "/predictions/toy", "/v1/models/toy:predict"
V2 = "/v2/models/toy/infer"
MANY_STEPS = '{"prompt": "a", "steps": 150}'


def tensor(name: str, datatype: str, value: object) -> dict[str, object]:
    return {"name": name, "datatype": datatype, "shape": [1], "data": [value]}


def part(name: str, value: str) -> str:
    return f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'


TENSORS = [tensor("prompt", "BYTES", "a"), tensor("num_inference_steps", "INT32", 150)]
MULTIPART = part("prompt", "a") + part("steps", "150") + "--x--\r\n"


def encoded_picture(width_px: int, height_px: int) -> str:
    """A PNG in base64."""
    written = io.BytesIO()
    Image.new("L", (width_px, height_px)).save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()


def post(
    folder: Path, path: str, content_type: str, body: bytes, config: Path | None = None
) -> tuple[int, Any, int]:
    """Status and body of the reply to a key with limits, and how many requests were passed on."""
    secret = add_key(folder / "keys", "limited", LIMITS)
    headers = {"Authorization": f"Bearer {secret}", "Content-Type": content_type}

    async def talk() -> tuple[int, Any, int]:
        async with running_instance() as fake, gateway_client(folder, [fake], config) as client:
            reply = await client.post(path, data=body, headers=headers)
            content = await reply.read()
            is_json = reply.content_type == JSON
            return reply.status, json.loads(content) if is_json else content, len(fake.received)

    return asyncio.run(asyncio.wait_for(talk(), 60))


@pytest.mark.parametrize(
    ("path", "content_type", "body"),
    [
        (PREDICTIONS, JSON, MANY_STEPS),
        (PREDICTIONS, "application/octet-stream", MANY_STEPS),
        (PREDICTIONS, "text/json", MANY_STEPS),
        (PREDICTIONS, "application/vnd.picture+json", MANY_STEPS),
        (PREDICTIONS, JSON, '{"prompt": "a", "num_inference_steps": null, "steps": 150}'),
        (PREDICTIONS, FORM, "prompt=a&steps=%2B150"),
        (PREDICTIONS, "multipart/form-data; boundary=x", MULTIPART),
        (PREDICTIONS, JSON, '{"prompt": "a", "decoder_num_inference_steps": 150}'),
        ("/hf/toy", JSON, '{"inputs": "a", "parameters": {"num_inference_steps": 150}}'),
        (V1, JSON, '{"instances": ["a", {"prompt": "b", "steps": 150}]}'),
        (V2, JSON, json.dumps({"inputs": TENSORS})),
        (V2, JSON, json.dumps({"inputs": TENSORS[:1], "parameters": {"steps": 150}})),
    ],
)
def test_steps(tmp_path: Path, path: str, content_type: str, body: str) -> None:
    status, reply, num_passed_on = post(tmp_path, path, content_type, body.encode())
    assert (status, num_passed_on) == (403, 0), reply
    assert reply["error"]["fields"].keys() == {"num_inference_steps"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (V1, '{"instances": "many"}'),
        (V2, '{"inputs": [{"name": "steps"}]}'),
        (PREDICTIONS, '["a", "b"]'),
    ],
)
def test_what_cannot_be_measured_is_not_passed_on(tmp_path: Path, path: str, body: str) -> None:
    status, reply, num_passed_on = post(tmp_path, path, JSON, body.encode())
    assert (status, num_passed_on) == (400, 0), reply


@pytest.mark.parametrize("path", [PREDICTIONS, "/hf/toy"])
def test_what_is_within_the_limits_is_drawn(tmp_path: Path, path: str) -> None:
    body = b'{"prompt": "a", "steps": 100, "height": 512, "width": 512}'
    assert post(tmp_path, path, JSON, body)[::2] == (200, 1)


GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
LARGE = {"width": 2048, "height": 1024}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (GENERATIONS, {"target_size": LARGE}),
        (GENERATIONS, LARGE),
        (GENERATIONS, {"image": encoded_picture(2048, 1024)}),
        (GENERATIONS, {"init_images": [encoded_picture(2048, 1024)]}),
        (GENERATIONS, {"control_image": encoded_picture(2048, 1024)}),
        (GENERATIONS, {"width": 2048, "image": encoded_picture(64, 64)}),
        (EDITS, {"image": encoded_picture(2048, 1024)}),
        (PREDICTIONS, {"size": "2048x1024"}),
        (PREDICTIONS, {"target_size": LARGE}),
        (PREDICTIONS, {"image": encoded_picture(2048, 1024)}),
    ],
)
def test_sizes(tmp_path: Path, path: str, fields: dict[str, object]) -> None:
    body = json.dumps({"prompt": "a", **fields}).encode()
    (tmp_path / "model.yaml").write_text("handler: {max_pixels: 4194304}")
    status, reply, num_passed_on = post(tmp_path, path, JSON, body, config=tmp_path / "model.yaml")
    assert (status, num_passed_on) == (403, 0), reply
    assert reply["error"]["fields"].keys() == {"size"}


@pytest.mark.parametrize("path", [GENERATIONS, EDITS])
def test_a_picture_counts_as_it_is_drawn(tmp_path: Path, path: str) -> None:
    """The model's own limits say how large that is, and whether the picture may be sent."""
    body = json.dumps({"prompt": "a", "image": encoded_picture(2048, 1024)}).encode()
    config = tmp_path / "model.yaml"
    config.write_text("handler: {max_pixels: 1048576}")
    assert post(tmp_path, path, JSON, body, config=config)[::2] == (200, 1)
    config.write_text("handler: {max_picture_pixels: 1048576}")
    (tmp_path / "keys").unlink()
    status, reply, _ = post(tmp_path, EDITS, JSON, body, config=config)
    assert (status, reply["error"]["param"]) == (400, "image")
