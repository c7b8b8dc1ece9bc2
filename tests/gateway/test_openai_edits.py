"""POST /v1/images/edits with the real `openai` client."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import OpenAI
from PIL import Image

from gateway.openai_edits import instance_mask
from handler.errors import InvalidRequest
from tests.support.client import curl
from tests.support.fake_instance import Received, running_instance
from tests.support.gateway_apps import gateway_client
from tests.support.gateways import RunningGateway

PROMPT = "a large red heart on a cyan background"


def encoded(mode: str = "RGB", size: tuple[int, int] = (64, 64), colour: object = 0) -> bytes:
    written = io.BytesIO()
    Image.new(mode, size, colour).save(written, "PNG")  # type: ignore[arg-type]
    return written.getvalue()


def test_what_is_transparent_is_drawn_anew() -> None:
    mask = Image.new("RGBA", (2, 1), (9, 9, 9, 255))
    mask.putpixel((1, 0), (9, 9, 9, 0))
    written = io.BytesIO()
    mask.save(written, "PNG")
    with Image.open(io.BytesIO(instance_mask(written.getvalue()))) as made:
        assert (made.mode, list(np.asarray(made)[0])) == ("L", [0, 255])


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_an_opaque_mask_is_ours_already(mode: str) -> None:
    mask = encoded(mode, colour="white")
    assert instance_mask(mask) == mask


def test_a_broken_mask_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        instance_mask(encoded("RGBA")[:60])
    assert caught.value.fields == {"mask": "cannot be decoded"}


URI = f"data:image/png;base64,{base64.b64encode(encoded()).decode()}"


def post(folder: Path, fields: dict[str, object]) -> tuple[dict[str, Any], list[Received]]:
    """The reply to an edit, and what the instance got."""

    async def talk() -> tuple[dict[str, Any], list[Received]]:
        async with running_instance() as fake, gateway_client(folder, [fake]) as client:
            body = {"prompt": PROMPT, **fields}
            reply = await client.post("/v1/images/edits", json=body)
            return await reply.json(), fake.received

    return asyncio.run(asyncio.wait_for(talk(), 60))


@pytest.mark.parametrize(
    "fields",
    [
        {"image": URI},
        {"image": [URI]},
        {"image": {"image_url": URI}},
        {"images": [{"image_url": URI}]},
        {"images": URI.partition(",")[2], "mask": {"image_url": URI}},
    ],
)
def test_a_picture_in_json_is_read(tmp_path: Path, fields: dict[str, object]) -> None:
    reply, (received,) = post(tmp_path, fields)
    assert "data" in reply
    assert received.fields["image"] == URI.partition(",")[2]
    assert ("mask_image" in received.fields) == ("mask" in fields)
    assert not {"images", "mask"} & received.fields.keys()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image": [URI, URI]}, "2 pictures were sent; one can be drawn over"),
        ({"images": [{"image_url": URI}], "image": URI}, "2 pictures were sent"),
        ({"image": "https://example.org/a.png"}, "nothing is fetched"),
        ({"images": [{"image_url": "http://example.org/a.png"}]}, "nothing is fetched"),
        ({"images": [{"file_id": "file-1"}]}, "no files are kept here"),
        ({"image": 5}, "its base64 or a data: URI, not 5"),
        ({"image": "a,b c"}, "its base64 or a data: URI, not 'a,b c'"),
        ({"images": []}, "is missing"),
    ],
)
def test_a_picture_in_json_that_cannot_be_read(
    tmp_path: Path, fields: dict[str, object], said: str
) -> None:
    reply, received = post(tmp_path, fields)
    assert reply["error"]["param"] == "image"
    assert said in reply["error"]["message"]
    assert not received


@pytest.mark.server
class TestWithAServer:
    def test_an_edit(self, client: OpenAI) -> None:
        """Little is changed with little strength, and more with more."""
        drawn = client.images.generate(prompt=PROMPT, size="128x128", extra_body={"seed": 1})
        assert drawn.data is not None
        picture = base64.b64decode(drawn.data[0].b64_json or "")
        other = "a small yellow star on a blue background"
        little, much = (
            difference(picture, edited(client, picture, other, strength)) for strength in (0.3, 1.0)
        )
        assert 0 < little < much

    def test_only_what_is_masked_changes(self, client: OpenAI) -> None:
        picture = encoded(colour=(200, 30, 30), size=(128, 128))
        mask = Image.new("RGBA", (128, 128), (0, 0, 0, 255))
        mask.paste((0, 0, 0, 0), (64, 0, 128, 128))
        written = io.BytesIO()
        mask.save(written, "PNG")
        reply = client.images.edit(
            image=picture, mask=written.getvalue(), prompt=PROMPT, extra_body={"strength": 1}
        )
        assert reply.data is not None
        after = array(base64.b64decode(reply.data[0].b64_json or "")).astype(int)
        change = np.abs(after - array(picture)).mean(axis=(0, 2))
        assert change[:48].mean() < change[80:].mean() / 2

    def test_a_stream(self, client: OpenAI) -> None:
        events = list(
            client.images.edit(
                image=encoded(),
                prompt=PROMPT,
                stream=True,
                partial_images=1,
                extra_body={"steps": 8, "strength": 1},
            )
        )
        assert [each.type for each in events] == [
            "image_edit.partial_image",
            "image_edit.completed",
        ]

    @pytest.mark.parametrize(
        ("fields", "param", "said"),
        [
            ({"image": [encoded(), encoded()]}, "image", "one can be drawn over"),
            ({"image": b"GIF89a..."}, "image", "is a GIF"),
            ({"mask": b"nothing"}, "mask", "allowed are PNG, JPEG and WebP"),
            ({"mask": encoded("L", (64, 128))}, "mask", "the same ratio"),
            ({"extra_body": {"strength": 2}}, "strength", "allowed: 0 to 1"),
            ({"input_fidelity": "high"}, "input_fidelity", "one of low"),
            ({"n": 11}, "n", "allowed: 1 to 10"),
        ],
    )
    def test_bad_requests(
        self, client: OpenAI, fields: dict[str, object], param: str, said: str
    ) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.edit(**{"image": encoded(), "prompt": PROMPT, **fields})  # type: ignore[call-overload]
        assert caught.value.param == param
        assert said in caught.value.message

    def test_without_a_picture(self, gateway: RunningGateway) -> None:
        answer = curl(f"{gateway.url}/v1/images/edits", "-F", "prompt=a ring")
        assert answer.status == 400
        assert answer.json()["error"]["param"] == "image"

    def test_base64_in_json(self, gateway: RunningGateway) -> None:
        body = {"prompt": "a ring", "image": base64.b64encode(encoded()).decode(), "steps": 4}
        answer = curl(
            f"{gateway.url}/v1/images/edits",
            *("-H", "Content-Type: application/json", "-d", json.dumps(body)),
        )
        assert answer.status == 200, answer.body
        assert answer.json()["size"] == "64x64"


def edited(client: OpenAI, picture: bytes, prompt: str, strength: float) -> bytes:
    body = {"seed": 2, "strength": strength, "num_inference_steps": 10}
    reply = client.images.edit(image=picture, prompt=prompt, size="128x128", extra_body=body)
    assert reply.data is not None
    return base64.b64decode(reply.data[0].b64_json or "")


def array(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))


def difference(one: bytes, other: bytes) -> float:
    return float(np.abs(array(one).astype(int) - array(other)).mean())
