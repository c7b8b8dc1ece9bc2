"""What TorchServe's own frontend answers by 500, or reads without bounds."""

from __future__ import annotations

import json
import socket
import time

import pytest

from tests.support.client import curl, pixels
from tests.support.gateways import RunningGateway

pytestmark = pytest.mark.server


def talk(gateway: RunningGateway, *sent: bytes, timeout_s: float = 20) -> bytes:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=timeout_s) as connection:
        for each in sent:
            connection.sendall(each)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
            head, _, body = received.partition(b"\r\n\r\n")
            if b"content-length: " in head.lower():
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                if len(body) >= length:
                    break
        return received


def test_percent_signs_in_forms(gateway: RunningGateway) -> None:
    form = "prompt=100% a red ring, 5%&width=64&height=64&steps=2&seed=1"
    answer = curl(f"{gateway.url}/predictions/stable_diffusion", "-d", form)
    assert answer.status == 200, answer.body
    assert b"100% a red ring, 5%" in answer.body
    assert answer.headers["x-seed"] == "1"
    answer = curl(f"{gateway.url}/v1/images/generations", "-d", form)
    assert answer.status == 200, answer.body


def test_a_form_is_read_as_one(gateway: RunningGateway) -> None:
    form = ["prompt=a ring & a star", "size=64x64", "n=2", "steps=2", "seed=5", "guidance=1.5"]
    arguments = [word for each in form for word in ("--data-urlencode", each)]
    answer = curl(f"{gateway.url}/v1/images/generations", *arguments)
    assert answer.status == 200, answer.body
    assert [each["seed"] for each in answer.json()["data"]] == [5, 6]
    answer = curl(f"{gateway.url}/v1/images/generations", "-F", "prompt=a ring", "-F", "n=many")
    assert answer.status == 400
    assert answer.json()["error"]["fields"] == {"n": "'many' is not an integer; allowed: 1 to 10"}


def test_curls_json_without_a_content_type(gateway: RunningGateway) -> None:
    body = json.dumps({"prompt": "a ring", "size": "64x64", "steps": 2})
    assert curl(f"{gateway.url}/v1/images/generations", "-d", body).status == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"prompt": ', "is not JSON"),
        ('"a ring"', "must be a JSON object"),
        ("\xff\xfe", "is not JSON"),
    ],
)
def test_bodies_that_are_no_object(gateway: RunningGateway, body: str, said: str) -> None:
    content = body.encode("latin-1")
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    answer = talk(gateway, head + b"Content-Length: %d\r\n\r\n" % len(content), content)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert said in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_a_method_in_lower_case(gateway: RunningGateway) -> None:
    answer = talk(gateway, b"get /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_http")
    assert "capitals" in error["message"]


@pytest.mark.parametrize("line", ["GET *", "CONNECT x:80", "GET http://[::1"])
def test_odd_request_lines_are_no_fault_of_ours(gateway: RunningGateway, line: str) -> None:
    answer = talk(gateway, f"{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 404 ", b"HTTP/1.1 405 ")), answer


def test_an_http2_preface(gateway: RunningGateway) -> None:
    answer = talk(gateway, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    assert not answer or answer.startswith(b"HTTP/1.1 4")


def test_a_body_that_says_it_is_too_large_is_not_read(gateway: RunningGateway) -> None:
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n"
    answer = talk(gateway, head)
    assert answer.startswith(b"HTTP/1.1 413 ")
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert error["code"] == "too_large"
    assert "1048576" in error["message"]


def test_a_body_without_an_end_is_not_read_on(gateway: RunningGateway) -> None:
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    answer = talk(gateway, head, *[chunk] * 20)
    assert answer.startswith(b"HTTP/1.1 413 ")
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=20) as connection:
        connection.sendall(head)
        started_s = time.monotonic()
        assert _is_cut_off(connection, chunk, started_s + 15)
        assert time.monotonic() - started_s < 15


def _is_cut_off(connection: socket.socket, chunk: bytes, until_s: float) -> bool:
    while time.monotonic() < until_s:
        try:
            connection.sendall(chunk)
        except ConnectionError:
            return True
    return False


def test_paths_and_methods_that_are_not_there(gateway: RunningGateway) -> None:
    missing = curl(f"{gateway.url}/v1/chat/completions", "-d", "{}")
    assert missing.status == 404
    assert missing.json()["error"]["code"] == "unknown_url"
    wrong = curl(f"{gateway.url}/v1/images/generations")
    assert wrong.status == 405
    assert "POST" in wrong.json()["error"]["message"]


def test_an_id_that_is_none(gateway: RunningGateway) -> None:
    answer = curl(f"{gateway.url}/v1/models", "-H", "X-Request-Id: two words")
    assert answer.status == 400
    assert answer.json()["error"]["param"] == "X-Request-Id"
    answer = curl(f"{gateway.url}/v1/models", "-H", "X-Request-Id: mine")
    assert answer.headers["x-request-id"] == "mine"


def test_the_same_picture_as_from_the_instance_itself(gateway: RunningGateway) -> None:
    """Over every path that leads to it."""
    fields = {"prompt": "a ring", "seed": 4, "width": 64, "height": 64, "steps": 3}
    plain = curl(
        f"{gateway.url}/predictions/stable_diffusion",
        *("-H", "Content-Type: application/json; charset=utf-8", "-d", json.dumps(fields)),
    )
    assert plain.status == 200, plain.body
    jpeg = curl(
        f"{gateway.url}/hf/stable_diffusion",
        *("-H", "Content-Type: application/json", "-H", "Accept: image/jpeg"),
        *("-d", json.dumps(fields)),
    )
    assert jpeg.headers["content-type"] == "image/jpeg"
    assert pixels(plain.body).shape == pixels(jpeg.body).shape == (64, 64, 3)
