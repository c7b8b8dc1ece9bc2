"""What docs/integrations.md shows works as it stands, on the test's own address."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import BadRequestError
from PIL import Image

from scripts.repository import REPOSITORY
from scripts.torchserve.options import Options, Ports
from scripts.torchserve.process import TorchServer
from tests.support.client import Answer, curl, pixels, post_json
from tests.support.pictures import as_base64, encoded
from tests.support.toy_archive import write_toy_archive

PAGE = (REPOSITORY / "docs" / "integrations.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found
    return found


def test_the_page_runs(server: TorchServer, tmp_path: Path) -> None:
    (program,) = (each.replace("http://127.0.0.1:8080", server.url) for each in blocks("python"))
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=120)
    with Image.open(tmp_path / "ring.png") as image:
        assert image.size == (768, 768)

    script = "\n".join(blocks("bash")).replace("http://127.0.0.1:8080", server.url)
    run = ["bash", "-euo", "pipefail", "-c", script.replace("curl ", "curl -f --noproxy '*' ")]
    subprocess.run(run, cwd=tmp_path, check=True, timeout=120)
    with Image.open(tmp_path / "invocations.png") as image:
        assert image.format == "PNG"
    first, second = json.loads((tmp_path / "predictions.json").read_text())["predictions"]
    assert first["seeds"] == second["seeds"] == [7]
    assert len(first["images"]) == len(second["images"]) == 1


def test_hugging_faces_parameters_mean_what_ours_do(url: str) -> None:
    fields = {
        "negative_prompt": "blue",
        "width": 256,
        "height": 192,
        "num_inference_steps": 3,
        "guidance_scale": 5.0,
        "scheduler": "ddim",
        "seed": 7,
    }
    image = InferenceClient(model=url).text_to_image("a red ring", **fields)
    assert image.size == (256, 192)
    answer = post_json(url, {"prompt": "a red ring", **fields})
    assert (pixels(answer.body) == image).all()
    seeded_otherwise = InferenceClient(model=url).text_to_image(
        "a red ring", **fields | {"seed": 8}
    )
    assert not (pixels(answer.body) == seeded_otherwise).all()


def test_hugging_faces_image_to_image(url: str, tmp_path: Path) -> None:
    file = tmp_path / "in.png"
    file.write_bytes(encoded((256, 192)))
    fields = {"strength": 0.8, "num_inference_steps": 4, "seed": 7, "negative_prompt": "blue"}
    client = InferenceClient(model=url)
    body = {"prompt": "a red ring", "image": as_base64(file.read_bytes()), **fields}
    expected = pixels(post_json(url, body).body)
    for sent in (file, str(file), file.read_bytes()):
        image = client.image_to_image(sent, prompt="a red ring", **fields)
        assert image.size == (256, 192)
        assert (expected == image).all()
    size = {"width": 128, "height": 64}
    resized = client.image_to_image(file, prompt="a red ring", target_size=size, **fields)
    assert resized.size == (128, 64)
    with pytest.raises(BadRequestError, match="the body is a picture"):
        client.image_to_image(file)


def test_hugging_faces_client_raises_what_is_wrong(url: str) -> None:
    with pytest.raises(BadRequestError, match=r"num_inference_steps.*1 to 1000"):
        InferenceClient(model=url).text_to_image("a red ring", num_inference_steps=0)


def test_sagemakers_other_route(server: TorchServer) -> None:
    path = f"/models/{server.model_name}/invoke"
    answer = post_json(server.url + path, {"inputs": "a red ring", "parameters": {"seed": 7}})
    assert (answer.status, answer.headers["x-seed"]) == (200, "7")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServer]:
    """A server with the page's settings of CORS."""
    folder = tmp_path_factory.mktemp("shared")
    (text,) = blocks("properties")
    properties = dict(line.split("=", 1) for line in text.splitlines())
    options = Options(
        write_toy_archive(folder), folder / "run", Ports.free(), properties=properties
    )
    with TorchServer(options).running(timeout_s=120) as server:
        yield server


def cors_headers(answer: Answer) -> dict[str, str]:
    prefix = "access-control-"
    return {
        name.removeprefix(prefix): value
        for name, value in answer.headers.items()
        if name.startswith(prefix)
    }


def test_a_page_of_the_allowed_origin_may_read_replies(shared: TorchServer) -> None:
    expected = {
        "allow-origin": "https://app.example",
        "allow-methods": "POST, OPTIONS",
        "allow-headers": "Content-Type, Authorization, X-Request-Id",
    }
    origin = ("-H", "Origin: https://app.example")
    preflight = curl(
        shared.predictions_url,
        *("-X", "OPTIONS", *origin, "-H", "Access-Control-Request-Method: POST"),
    )
    assert preflight.status == 200
    drawn = curl(shared.predictions_url, *origin, "-d", "data=x")
    assert drawn.status == 200
    failed = curl(shared.predictions_url, *origin, "-d", "data=%")
    assert failed.status == 500
    assert [cors_headers(each) for each in (preflight, drawn, failed)] == [expected] * 3


def test_without_the_settings_no_page_may(url: str) -> None:
    answer = post_json(url, {"prompt": "a red ring"}, "-H", "Origin: https://app.example")
    assert (answer.status, cors_headers(answer)) == (200, {})
