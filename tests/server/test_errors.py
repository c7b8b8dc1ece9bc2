"""Nonsense is answered with a status, a code, every problem by field, and what to do instead."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scripts.torchserve.process import TorchServer
from tests.support.client import curl, post_json

JSON = ("-H", "Content-Type: application/json")
INVALID_FIELDS: dict[str, tuple[dict[str, object], set[str]]] = {
    "no prompt": ({"seed": 1}, {"prompt"}),
    "empty prompt": ({"prompt": "  "}, {"prompt"}),
    "prompt of another type": ({"prompt": 7}, {"prompt"}),
    "two names of one field": ({"prompt": "a", "data": "b"}, {"prompt"}),
    "unknown field": ({"prompt": "a", "stpes": 4}, {"stpes"}),
    "text for an integer": ({"prompt": "a", "steps": "4"}, {"num_inference_steps"}),
    "true for an integer": ({"prompt": "a", "steps": True}, {"num_inference_steps"}),
    "too many steps": ({"prompt": "a", "steps": 100_000}, {"num_inference_steps"}),
    "negative seed": ({"prompt": "a", "seed": -2}, {"seed"}),
    "guidance out of range": ({"prompt": "a", "guidance": 1e9}, {"guidance_scale"}),
    "odd size": ({"prompt": "a", "height": 257}, {"height"}),
    "too large": ({"prompt": "a", "height": 1536, "width": 1536}, {"height"}),
    "unknown scheduler": ({"prompt": "a", "scheduler": "eulr"}, {"scheduler"}),
    "unknown format": ({"prompt": "a", "output_format": "gif"}, {"output_format"}),
    "several images in one": ({"prompt": "a", "num_images": 2}, {"num_images"}),
    "inputs beside and inside parameters": (
        {
            "inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["a"]}],
            "parameters": {"inputs": "x"},
        },
        {"inputs"},
    ),
    "all at once": (
        {"prompt": "", "steps": 0, "guidance": "x", "width": 1, "colour": "red"},
        {"prompt", "num_inference_steps", "guidance_scale", "width", "colour"},
    ),
}


@pytest.mark.parametrize(("fields", "problems"), INVALID_FIELDS.values(), ids=INVALID_FIELDS.keys())
def test_invalid_fields(url: str, fields: dict[str, object], problems: set[str]) -> None:
    answer = post_json(url, fields)
    assert answer.status == 400
    error = answer.error()
    assert error["code"] == "invalid_request"
    assert error["fields"].keys() == problems
    assert error["message"]


def test_the_nearest_known_field_is_named(url: str) -> None:
    fields = post_json(url, {"prompt": "a", "stpes": 4}).error()["fields"]
    assert "steps" in fields["stpes"]


def test_a_bare_form_is_told_how_to_send_a_prompt(url: str) -> None:
    answer = curl(url, "-d", "a prompt")
    assert answer.status == 400
    how_to = answer.error()["fields"]["prompt"]
    assert "application/json" in how_to
    assert "text/plain" in how_to


def test_several_images_are_sent_to_json(url: str) -> None:
    error = post_json(url, {"prompt": "a", "num_images": 2}).error()
    assert "application/json" in error["fields"]["num_images"]


@pytest.mark.parametrize(
    "body",
    ["", "{", '{"prompt": "a"', "[]", "null", "17", '{"prompt": NaN}', "[" * 5000, '{"a": ' * 900],
    ids=lambda body: body[:16] or "nothing",
)
def test_broken_json(url: str, body: str) -> None:
    answer = curl(url, *JSON, "-d", body)
    assert answer.status == 400
    assert answer.error()["code"] == "invalid_request"


def test_nan_is_no_number(url: str) -> None:
    answer = curl(url, *JSON, "-d", '{"prompt": "a", "guidance_scale": NaN}')
    assert answer.status == 400
    assert "guidance_scale" in answer.error()["fields"]


def test_bytes_that_are_no_text(url: str, tmp_path: Path) -> None:
    (tmp_path / "noise").write_bytes(bytes(range(128, 256)))
    answer = curl(url, "-T", str(tmp_path / "noise"))
    assert answer.status == 400
    assert "UTF-8" in answer.error()["message"]


def test_nothing_at_all(url: str) -> None:
    assert curl(url, "-X", "POST").status == 400


def test_a_body_beyond_the_limit_is_413(url: str, tmp_path: Path) -> None:
    (tmp_path / "large").write_text("a" * 19_000_000)
    assert curl(url, "-T", str(tmp_path / "large")).status == 413


def test_an_accept_header_that_nothing_meets(url: str) -> None:
    answer = post_json(url, {"prompt": "a"}, "-H", "Accept: text/html")
    assert answer.status == 400
    assert "Accept" in answer.error()["fields"]


def test_a_prompt_with_a_percent_sign_is_fine_as_text_or_json(url: str) -> None:
    assert curl(url, "-H", "Content-Type: text/plain", "-d", "50% off").status == 200
    assert post_json(url, {"prompt": "50% off"}).status == 200


def test_unknown_model(server: TorchServer) -> None:
    assert curl(f"{server.url}/predictions/nobody", "-d", "data=x").status == 404


def test_one_bad_request_does_not_disturb_the_others(url: str) -> None:
    good = {"prompt": "a green square", "seed": 3}
    alone = post_json(url, good)
    bodies = [good, {"prompt": ""}, good, {"prompt": "a", "steps": -1}, good, good]
    with ThreadPoolExecutor(len(bodies)) as threads:
        answers = list(threads.map(lambda body: post_json(url, body), bodies))
    assert [answer.status for answer in answers] == [200, 400, 200, 400, 200, 200]
    assert all(len(answer.body) > 0 for answer in answers)
    assert alone.status == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/models?url=other.mar"), ("DELETE", "/models/stable_diffusion")],
)
def test_models_cannot_be_changed_over_http(server: TorchServer, method: str, path: str) -> None:
    socket = server.management_address.removeprefix("unix:")
    answer = curl("--unix-socket", socket, f"http://localhost{path}", "-X", method)
    assert answer.status >= 400
    assert server.is_ready()


def test_prompts_are_not_logged(server: TorchServer, url: str) -> None:
    secret = "a heart that nobody may read about"
    answers = [post_json(url, {"prompt": secret}), post_json(url, {"prompt": secret, "steps": 0})]
    assert [answer.status for answer in answers] == [200, 400]
    log = server.log_file.read_text()
    assert "POST /predictions/stable_diffusion" in log
    assert secret not in log
    assert json.dumps(secret) not in log
