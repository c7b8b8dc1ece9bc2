"""The real `openai` client, against the gateway in front of a real TorchServe."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import urllib.request

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent
from PIL import Image

from tests.support.gateways import RunningGateway
from tests.support.serving import MODEL

pytestmark = pytest.mark.server

PROMPT = "a large red heart on a cyan background"


def picture(encoded: str | None) -> Image.Image:
    assert encoded is not None
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def test_one_picture(client: OpenAI) -> None:
    reply = client.images.generate(prompt=PROMPT, model=MODEL)
    assert reply.data is not None
    (image,) = reply.data
    drawn = picture(image.b64_json)
    assert (drawn.format, drawn.size) == ("PNG", (256, 256))
    assert image.url is None
    assert (reply.size, reply.quality, reply.output_format) == ("256x256", "medium", "png")
    assert reply.background == "opaque"
    assert reply.usage is not None
    assert reply.usage.output_tokens == 256
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens
    assert reply._request_id is not None
    assert reply._request_id.startswith("req_")


def test_every_documented_field(client: OpenAI) -> None:
    reply = client.images.generate(
        prompt=PROMPT,
        model=MODEL,
        n=2,
        size="128x192",
        quality="low",
        output_format="jpeg",
        response_format="b64_json",
        background="opaque",
        moderation="low",
        user="somebody",
    )
    assert reply.data is not None
    assert len(reply.data) == 2
    drawn = [picture(each.b64_json) for each in reply.data]
    assert {each.format for each in drawn} == {"JPEG"}
    assert {each.size for each in drawn} == {(128, 192)}
    assert (reply.size, reply.quality, reply.output_format) == ("128x192", "low", "jpeg")
    assert reply.safety_identifier == "somebody"


def test_ten_pictures_have_the_seeds_of_one_request(client: OpenAI) -> None:
    """An instance draws four a request at most."""
    reply = client.images.generate(
        prompt=PROMPT, n=10, size="64x64", extra_body={"seed": 7, "num_inference_steps": 2}
    )
    assert reply.data is not None
    assert [each.model_extra and each.model_extra["seed"] for each in reply.data] == list(
        range(7, 17)
    )
    assert len({each.b64_json for each in reply.data}) == 10


def test_fields_of_the_instances_go_beside_the_standard_ones(
    client: OpenAI, instance: object
) -> None:
    body = {"seed": 3, "num_inference_steps": 3, "guidance_scale": 2, "scheduler": "ddim"}
    first = client.images.generate(prompt=PROMPT, size="64x64", extra_body=body)
    again = client.images.generate(prompt=PROMPT, size="64x64", extra_body=body)
    other = client.images.generate(
        prompt=PROMPT, size="64x64", extra_body={**body, "negative_prompt": "red"}
    )
    assert first.data is not None
    assert again.data is not None
    assert other.data is not None
    assert first.data[0].b64_json == again.data[0].b64_json
    assert first.data[0].b64_json != other.data[0].b64_json


def test_quality_is_steps(client: OpenAI) -> None:
    """4 steps are this instance's own number."""
    for quality, num_steps in (("low", 2), ("auto", 4), ("high", 6), ("hd", 6), ("max", 12)):
        reply = client.images.generate(prompt=PROMPT, size="64x64", quality=quality)  # type: ignore[call-overload]
        text = picture(reply.data[0].b64_json).text["parameters"]
        assert f"Steps: {num_steps}," in text


def test_a_url(client: OpenAI, gateway: RunningGateway) -> None:
    reply = client.images.generate(
        prompt=PROMPT, response_format="url", size="64x64", output_format="webp"
    )
    assert reply.data is not None
    url = reply.data[0].url
    assert url is not None
    assert reply.data[0].b64_json is None
    assert re.fullmatch(re.escape(gateway.url) + r"/pictures/[\w-]{32}\.webp", url)
    with urllib.request.urlopen(url) as fetched:
        assert fetched.headers["content-type"] == "image/webp"
        assert Image.open(io.BytesIO(fetched.read())).size == (64, 64)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(url.replace(url[-20:-10], "AAAAAAAAAA"))


def test_a_stream(client: OpenAI) -> None:
    body = {"seed": 1, "steps": 9}
    stream = client.images.generate(
        prompt=PROMPT, size="128x128", stream=True, partial_images=2, extra_body=body
    )
    events = list(stream)
    partial, completed = events[:-1], events[-1]
    assert [type(each) for each in partial] == [ImageGenPartialImageEvent] * 2
    assert isinstance(completed, ImageGenCompletedEvent)
    for index, each in enumerate(partial):
        assert isinstance(each, ImageGenPartialImageEvent)
        assert each.type == "image_generation.partial_image"
        assert each.partial_image_index == index
        assert (each.size, each.quality, each.output_format) == ("128x128", "auto", "jpeg")
        assert picture(each.b64_json).format == "JPEG"
        assert each.created_at > 0
    assert completed.type == "image_generation.completed"
    assert picture(completed.b64_json).size == (128, 128)
    assert (completed.size, completed.output_format) == ("128x128", "png")
    assert completed.usage.output_tokens == 64
    plain = client.images.generate(prompt=PROMPT, size="128x128", extra_body=body)
    assert plain.data is not None
    assert plain.data[0].b64_json == completed.b64_json


def test_a_stream_of_several_pictures(client: OpenAI) -> None:
    events = list(client.images.generate(prompt=PROMPT, size="64x64", stream=True, n=3))
    assert [each.type for each in events] == ["image_generation.completed"] * 3
    extras = [each.model_extra or {} for each in events]
    assert {each["image_index"] for each in extras} == {0, 1, 2}


def test_models(client: OpenAI) -> None:
    assert [each.id for each in client.models.list()] == [MODEL]
    model = client.models.retrieve(MODEL)
    assert (model.id, model.object) == (MODEL, "model")
    assert model.created > 0
    assert client.models.retrieve("dall-e-3").id == MODEL


def test_a_built_in_name_of_a_client(client: OpenAI) -> None:
    assert client.images.generate(prompt=PROMPT, model="dall-e-3", size="64x64").data


def test_the_async_client(async_client: AsyncOpenAI) -> None:
    async def talk() -> None:
        async with async_client as client:
            replies = await asyncio.gather(
                *(client.images.generate(prompt=PROMPT, size="64x64") for _ in range(8))
            )
            assert all(reply.data and reply.data[0].b64_json for reply in replies)
            stream = await client.images.generate(
                prompt=PROMPT, size="64x64", stream=True, partial_images=1
            )
            assert [event.type async for event in stream] == [
                "image_generation.partial_image",
                "image_generation.completed",
            ]
            assert [each.id async for each in client.models.list()] == [MODEL]
            with pytest.raises(openai.BadRequestError):
                await client.images.generate(prompt=PROMPT, n=11)

    asyncio.run(talk())


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"n": 11}, "n", "allowed: 1 to 10"),
        ({"size": "large"}, "size", "not a size"),
        ({"size": "100x64"}, "size", "not a multiple of"),
        ({"size": "64x64", "extra_body": {"width": 64}}, "size", "given more than once"),
        ({"quality": "best"}, "quality", "one of auto, low"),
        ({"output_format": "gif"}, "output_format", "one of png, jpeg, webp"),
        ({"background": "transparent"}, "background", "one of auto, opaque"),
        ({"moderation": "none"}, "moderation", "one of auto, low"),
        ({"output_compression": 101}, "output_compression", "allowed: 0 to 100"),
        ({"partial_images": 2}, "partial_images", "needs"),
        ({"stream": True, "partial_images": 4}, "partial_images", "allowed: 0 to 3"),
        ({"stream": True, "response_format": "url"}, "response_format", "b64_json"),
        ({"style": "vivid"}, "style", "say it in the prompt"),
        ({"extra_body": {"num_inference_steps": 5000}}, "num_inference_steps", "1 to 1000"),
        ({"extra_body": {"stpes": 5}}, "stpes", "did you mean steps"),
        ({"extra_body": {"seed": "high"}}, "seed", "not an integer"),
        ({"extra_body": {"cancel": "x"}}, "cancel", "DELETE /v1/requests"),
        ({"prompt": ""}, "prompt", "is empty"),
    ],
)
def test_bad_requests(client: OpenAI, fields: dict[str, object], param: str, said: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**{"prompt": PROMPT, **fields})  # type: ignore[call-overload]
    assert caught.value.type == "invalid_request_error"
    assert caught.value.code == "invalid_request"
    assert caught.value.param == param
    assert said in str(caught.value.message)
    assert caught.value.request_id


def test_errors_have_their_classes(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(prompt=PROMPT, model="dall-e-2")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-image-1")
    with pytest.raises(openai.InternalServerError) as late:
        client.with_options(max_retries=2).images.generate(
            prompt=PROMPT, extra_body={"deadline_s": 0.01, "steps": 500}
        )
    assert late.value.status_code == 504
    assert late.value.response.headers["x-should-retry"] == "false"
    assert "x-stainless-retry-count" in late.value.request.headers
    assert late.value.request.headers["x-stainless-retry-count"] == "0"


def test_an_id_that_is_taken(client: OpenAI) -> None:
    mine = {"X-Request-Id": "mine"}

    async def talk() -> None:
        async with AsyncOpenAI(
            base_url=str(client.base_url), api_key="none", max_retries=0
        ) as client_a:
            slow = asyncio.create_task(
                client_a.images.generate(
                    prompt=PROMPT, extra_headers=mine, extra_body={"steps": 1000}
                )
            )
            await asyncio.sleep(0.5)
            with pytest.raises(openai.ConflictError) as taken:
                await client_a.images.generate(prompt=PROMPT, extra_headers=mine)
            assert taken.value.response.headers["x-should-retry"] == "false"
            cancelled = await client_a.delete(
                "/requests/mine",
                cast_to=object,  # type: ignore[arg-type]
            )
            assert cancelled == {"cancelled": "mine"}
            with pytest.raises(openai.APIStatusError) as ended:
                await slow
            assert ended.value.status_code == 499
            assert ended.value.code == "cancelled"

    asyncio.run(talk())


def test_a_stream_is_cancelled_by_its_id(client: OpenAI) -> None:
    async def talk() -> None:
        mine = {"X-Request-Id": "my-stream"}
        async with AsyncOpenAI(
            base_url=str(client.base_url), api_key="none", max_retries=0
        ) as async_client:
            stream = await async_client.images.generate(
                prompt=PROMPT, stream=True, extra_headers=mine, extra_body={"steps": 1000}
            )
            with pytest.raises(openai.ConflictError):
                await async_client.images.generate(prompt=PROMPT, extra_headers=mine)
            await async_client.delete("/requests/my-stream", cast_to=object)
            with pytest.raises(openai.APIError) as ended:
                [event async for event in stream]
            assert ended.value.code == "cancelled"
            with pytest.raises(openai.NotFoundError):
                await async_client.delete("/requests/my-stream", cast_to=object)

    asyncio.run(talk())


def test_an_error_in_a_stream(client: OpenAI) -> None:
    stream = client.images.generate(
        prompt=PROMPT, stream=True, extra_body={"deadline_s": 0.5, "steps": 1000}
    )
    with pytest.raises(openai.APIError) as late:
        list(stream)
    assert late.value.code == "deadline_exceeded"
    assert late.value.type == "server_error"
