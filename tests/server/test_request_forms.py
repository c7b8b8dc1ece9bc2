"""Every form that a request may have draws the picture that plain JSON with its seed draws."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from scripts.torchserve.process import TorchServer
from tests.support.client import curl, grpc_predict, pixels, post_json

PROMPT = "a red heart on a white background"
JSON = ("-H", "Content-Type: application/json")
V2_TENSOR = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": [PROMPT]}


def body(value: object) -> tuple[str, ...]:
    return (*JSON, "-d", json.dumps(value))


FORMS = {
    "json data": body({"data": PROMPT}),
    "json prompt": body({"prompt": PROMPT}),
    "json text": body({"text": PROMPT}),
    "json inputs with parameters": body(
        {"inputs": PROMPT, "parameters": {"num_inference_steps": 4}}
    ),
    "json string": body(PROMPT),
    "json with a charset": (
        *("-H", "Content-Type: application/json; charset=utf-8"),
        *("-d", json.dumps({"prompt": PROMPT})),
    ),
    "json under another capitalisation": (
        *("-H", "content-type: Application/JSON", "-d", json.dumps({"prompt": PROMPT})),
    ),
    "text": ("-H", "Content-Type: text/plain", "-d", PROMPT),
    "file without a content type": ("-T", "{file}"),
    "posted file without a content type": ("-X", "POST", "-T", "{file}"),
    "urlencoded data": ("--data-urlencode", f"data={PROMPT}"),
    "urlencoded prompt": ("--data-urlencode", f"prompt={PROMPT}"),
    "urlencoded with other fields": (
        *("--data-urlencode", f"prompt={PROMPT}", "-d", "steps=4", "-d", "guidance=7.5"),
    ),
    "multipart data": ("-F", f"data={PROMPT}"),
    "multipart prompt": ("-F", f"prompt={PROMPT}"),
    "multipart with other fields": ("-F", f"prompt={PROMPT}", "-F", "steps=4"),
    "multipart file": ("-F", "prompt=@{file}"),
    "multipart text file": ("-F", "prompt=@{file};type=text/plain"),
}
SEEDED_FORMS = {
    "json": body({"prompt": PROMPT, "seed": 7}),
    "json parameters": body({"inputs": PROMPT, "parameters": {"seed": 7}}),
    "urlencoded": ("--data-urlencode", f"data={PROMPT}", "-d", "seed=7"),
    "multipart": ("-F", f"prompt={PROMPT}", "-F", "seed=7"),
}


@pytest.fixture(scope="module")
def reference(url: str) -> bytes:
    """The picture of PROMPT with the seed 7."""
    answer = post_json(url, {"prompt": PROMPT, "seed": 7})
    assert answer.status == 200, answer.body
    return answer.body


@pytest.mark.parametrize("arguments", FORMS.values(), ids=FORMS.keys())
def test_form(url: str, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    answer = curl(url, *(argument.replace("{file}", str(file)) for argument in arguments))
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"] == "image/png"
    again = post_json(url, {"prompt": PROMPT, "seed": int(answer.headers["x-seed"])})
    assert again.body == answer.body


@pytest.mark.parametrize("arguments", SEEDED_FORMS.values(), ids=SEEDED_FORMS.keys())
def test_form_with_a_seed(url: str, reference: bytes, arguments: tuple[str, ...]) -> None:
    answer = curl(url, *arguments)
    assert answer.status == 200, answer.body
    assert answer.headers["x-seed"] == "7"
    assert answer.body == reference


@pytest.mark.parametrize(
    "change",
    [{"seed": 8}, {"num_inference_steps": 5}, {"guidance_scale": 3.0}, {"scheduler": "euler"}],
    ids=str,
)
def test_every_parameter_counts(url: str, change: dict[str, object]) -> None:
    # At the size that the model is trained for: far below it, every picture is one flat colour.
    full = {"prompt": PROMPT, "seed": 7, "height": 768, "width": 768}
    answer, plain = post_json(url, {**full, **change}), post_json(url, full)
    assert (answer.status, plain.status) == (200, 200), answer.body
    assert not np.array_equal(pixels(answer.body), pixels(plain.body))


def test_size(url: str) -> None:
    answer = post_json(url, {"prompt": PROMPT, "height": 128, "width": 192})
    assert pixels(answer.body).shape == (128, 192, 3)


@pytest.mark.parametrize("path", ["/v1/models/{name}:predict", "/predictions/{name}"])
def test_kserve_v1(server: TorchServer, reference: bytes, path: str) -> None:
    answer = post_json(
        server.url + path.format(name=server.model_name),
        {"instances": [{"data": PROMPT, "seed": 7}, {"data": "a blue ring", "seed": 8}]},
    )
    assert answer.status == 200, answer.body
    assert answer.json().keys() == {"predictions"}
    first, second = answer.json()["predictions"]
    assert (first["seeds"], second["seeds"]) == ([7], [8])
    expected = pixels(reference).astype(int)
    # Two prompts share a forward, whose rounding may differ by one level of 255.
    assert abs(pixels(base64.b64decode(first["images"][0])) - expected).max() <= 1
    assert abs(pixels(base64.b64decode(second["images"][0])) - expected).max() > 1


@pytest.mark.parametrize("path", ["/v2/models/{name}/infer", "/predictions/{name}"])
def test_kserve_v2(server: TorchServer, reference: bytes, path: str) -> None:
    answer = post_json(
        server.url + path.format(name=server.model_name),
        {"id": "my-id", "inputs": [V2_TENSOR], "parameters": {"seed": 7}},
    )
    assert answer.status == 200, answer.body
    reply = answer.json()
    assert (reply["model_name"], reply["id"]) == (server.model_name, "my-id")
    output = reply["outputs"][0]
    assert (output["datatype"], output["shape"]) == ("BYTES", [1])
    assert np.array_equal(pixels(base64.b64decode(output["data"][0])), pixels(reference))


def test_grpc(server: TorchServer, reference: bytes) -> None:
    port = server.options.ports.grpc_inference
    for name in ("data", "prompt"):
        fields = {name: PROMPT.encode(), "seed": b"7"}
        assert grpc_predict(port, server.model_name, fields) == reference


def test_an_error_over_grpc_is_its_json(server: TorchServer) -> None:
    port = server.options.ports.grpc_inference
    reply = grpc_predict(port, server.model_name, {"prompt": PROMPT.encode(), "steps": b"0"})
    # TorchServe gives any reply of the handler the gRPC status OK.
    assert json.loads(reply)["error"]["fields"].keys() == {"num_inference_steps"}


def test_a_stream_over_grpc_is_refused(server: TorchServer) -> None:
    port = server.options.ports.grpc_inference
    fields = {"prompt": PROMPT.encode(), "stream": b"true"}
    reply = json.loads(grpc_predict(port, server.model_name, fields))
    assert reply["error"]["fields"].keys() == {"stream"}
