"""Pictures that cannot be used, sent as people send them: a clear 400, and the worker lives on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from handler.config import HandlerConfig
from scripts.torchserve.process import TorchServer
from tests.support.client import Answer, curl, grpc_predict, post_json
from tests.support.pictures import as_base64, encoded, header_only_png, scans_bomb

LIMITS = HandlerConfig()
BROKEN = {
    "truncated": encoded((256, 256))[:-300],
    "bomb": header_only_png(60_000, 60_000),
    "without pixels": header_only_png(0, 0),
    "scans": scans_bomb(500),
    "gif": b"GIF89a" + bytes(500),
    "text": b"this is no picture at all, and it is not base64 either",
    "nothing": b"",
    "too many bytes": encoded() + bytes(LIMITS.max_picture_bytes),
}


@pytest.fixture(scope="module", autouse=True)
def same_worker(server: TorchServer) -> Iterator[None]:
    """Whatever a test here does, the worker lives on and draws."""
    before = [worker["pid"] for worker in server.workers()]
    yield
    assert post_json(server.predictions_url, {"prompt": "a red heart"}).status == 200
    assert [worker["pid"] for worker in server.workers()] == before


def problem(answer: Answer, field: str = "image") -> str:
    assert answer.status == 400, answer.body
    fields = answer.error()["fields"]
    assert fields.keys() == {field}
    return str(fields[field])


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_part(url: str, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "in.png"
    file.write_bytes(content)
    for kind in ("", ";type=application/octet-stream"):
        problem(curl(url, "-F", "prompt=a red heart", "-F", f"image=@{file}{kind}"))


def post_file(url: str, folder: Path, body: dict[str, object]) -> Answer:
    """Post JSON that is longer than a command line may be."""
    file = folder / "body.json"
    file.write_text(json.dumps(body))
    return curl(url, "-H", "Content-Type: application/json", "-d", f"@{file}")


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_picture_in_base64(url: str, tmp_path: Path, content: bytes) -> None:
    body = {"prompt": "a red heart", "image": as_base64(content)}
    problem(post_file(url, tmp_path, body))
    kserve = {"instances": [{"prompt": "a red heart"}, {"prompt": "b", "image": "x"}]}
    problem(post_json(url, kserve), "instances[1].image")


def test_a_url_is_never_fetched(url: str) -> None:
    """Not even its own server's: no connection is made."""
    problem(post_json(url, {"prompt": "a red heart", "image": url}))
    problem(post_json(url, {"prompt": "a red heart", "image": "file:///etc/passwd"}))
    found = problem(post_json(url, {"prompt": "a red heart", "image_url": url}), "image_url")
    assert "no request makes the server fetch anything" in found


def test_a_body_that_is_a_picture(url: str, tmp_path: Path) -> None:
    file = tmp_path / "in.png"
    file.write_bytes(encoded())
    for arguments in (("-T", str(file)), ("-H", "Content-Type: image/png", "-T", str(file))):
        answer = curl(url, "-X", "POST", *arguments)
        assert answer.status == 400
        assert "the body is a picture" in answer.error()["fields"]["prompt"]


def test_over_grpc(server: TorchServer) -> None:
    fields = {"prompt": b"a red heart", "image": BROKEN["truncated"]}
    large = dict.fromkeys(["image", "control_image"], BROKEN["too many bytes"][:-1000])
    for sent in (fields, {**fields, **large}):
        port = server.options.ports.grpc_inference
        reply = json.loads(grpc_predict(port, server.model_name, sent))
        assert reply["error"]["fields"].keys() & {"image", "control_image"}


def test_base64_in_a_form_that_is_urlencoded(url: str, tmp_path: Path) -> None:
    file = tmp_path / "in.b64"
    file.write_text(as_base64(BROKEN["truncated"]))
    arguments = ("--data-urlencode", "prompt=a red heart", "--data-urlencode", f"image@{file}")
    problem(curl(url, *arguments))


def test_the_largest_pictures_reach_the_handler(url: str, tmp_path: Path) -> None:
    """Three of them in base64, which is more than the same as file parts."""
    large = as_base64(BROKEN["text"].ljust(LIMITS.max_picture_bytes, b"\xff"))
    body = {"prompt": "a", "image": large, "mask_image": large, "control_image": large}
    answer = post_file(url, tmp_path, body)
    assert answer.status == 400
    assert {"image", "control_image"} & answer.error()["fields"].keys()
