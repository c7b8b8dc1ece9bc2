"""LiteLLM, which other programs reach such APIs through, in front of the gateway."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import re
import subprocess
import sys
from types import ModuleType
from typing import Any

import openai
import pytest
from PIL import Image

from scripts.repository import REPOSITORY
from tests.support.client import pixels
from tests.support.gateways import RunningGateway

pytestmark = pytest.mark.server

STEPS = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def litellm() -> ModuleType:
    # Else it asks the internet for prices when it is imported.
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import litellm

    litellm.suppress_debug_info = True
    return litellm


@pytest.fixture
def settings(gateway: RunningGateway) -> dict[str, Any]:
    """What a configuration of LiteLLM's says of a model."""
    base = {"api_base": f"{gateway.url}/v1", "api_key": "none"}
    return {"model": "openai/stable_diffusion", **base, "max_retries": 0}


def picture_of(reply: Any, index: int = 0) -> bytes:
    return base64.b64decode(reply.data[index].b64_json)


def test_pictures(litellm: ModuleType, settings: dict[str, Any]) -> None:
    fields = {"prompt": "a red ring", "size": "128x64", "extra_body": {"seed": 5, **STEPS}}
    reply = litellm.image_generation(**settings, **fields, n=2)
    assert pixels(picture_of(reply, 1)).shape == (64, 128, 3)
    assert picture_of(reply, 0) != picture_of(reply, 1)
    assert reply.usage.output_tokens == 2 * (128 // 16) * (64 // 16)
    again = asyncio.run(litellm.aimage_generation(**settings, **fields))
    assert (pixels(picture_of(again)).astype(int) - pixels(picture_of(reply))).std() < 1


def test_a_url(litellm: ModuleType, settings: dict[str, Any], gateway: RunningGateway) -> None:
    reply = litellm.image_generation(
        **settings,
        prompt="a ring",
        size="64x64",
        extra_body={"response_format": "url", **STEPS},
    )
    assert reply.data[0].url.startswith(f"{gateway.url}/pictures/")


def test_an_edit(litellm: ModuleType, settings: dict[str, Any]) -> None:
    sent = io.BytesIO()
    sent.name = "in.png"
    Image.new("RGB", (64, 64), "red").save(sent, "PNG")
    sent.seek(0)
    reply = litellm.image_edit(**settings, image=sent, prompt="a ring", extra_body=STEPS)
    assert pixels(picture_of(reply)).shape == (64, 64, 3)


def test_what_the_page_shows(gateway: RunningGateway) -> None:
    page = (REPOSITORY / "docs" / "gateway.md").read_text()
    (program,) = re.findall(r"```python\n(import litellm\n.*?)```", page, re.DOTALL)
    program = program.replace("http://127.0.0.1:8000", gateway.url)
    program += "print(reply.data[0].b64_json)"
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, check=True
    )
    assert pixels(base64.b64decode(run.stdout)).shape == (768, 768, 3)


@pytest.mark.parametrize(
    ("wrong", "error", "said"),
    [
        ({"size": "large"}, openai.BadRequestError, "size"),
        ({"extra_body": {"num_inference_steps": 0}}, openai.BadRequestError, "num_inference_steps"),
        ({"model": "openai/none"}, openai.NotFoundError, "stable_diffusion"),
    ],
)
def test_errors_are_those_of_openais_client(
    litellm: ModuleType,
    settings: dict[str, Any],
    wrong: dict[str, Any],
    error: type[Exception],
    said: str,
) -> None:
    with pytest.raises(error, match=said):
        litellm.image_generation(**{**settings, "prompt": "a ring", **wrong})
