"""Nothing that a client sends is in any log, whatever TorchServe makes of it."""

from __future__ import annotations

import re
import socket
import time
from pathlib import Path

import pytest

from scripts.torchserve.process import TorchServer
from tests.support.client import curl, post_json

SECRET = "Zq7secretXk"
FORM = "application/x-www-form-urlencoded"
PART = "--x\r\nContent-Disposition: form-data; name="
HEAD = "Host: x\r\nConnection: close\r\n"


def post(
    content_type: str, body: str, method: str = "POST", path: str = "{path}", headers: str = ""
) -> str:
    return (
        f"{method} {path} HTTP/1.1\r\n{HEAD}Content-Type: {content_type}\r\n{headers}"
        f"Content-Length: {{length}}\r\n\r\n{body}"
    )


def multipart(body: str) -> str:
    return post("multipart/form-data; boundary=x", body)


# What is sent, as Latin-1: {s} is the secret, {path} the model's, {length} that of the body.
INFERENCE = {
    "form with a percent sign": post(FORM, "prompt={s} 100% off"),
    "form with a broken escape": post(FORM, "prompt={s}%zz"),
    "form with a broken name": post(FORM, "{s}%=1"),
    "form of an unknown charset": post(FORM + "; charset={s}", "prompt={s}"),
    "form without a value": post(FORM, "{s}"),
    "form to another route": post(FORM, "x={s}%", path="/explanations/stable_diffusion"),
    "form to SageMaker's route": post(FORM, "model_name={s}&data=%{s}", path="/invocations"),
    "multipart without a boundary": post("multipart/form-data", "--x\r\n{s}"),
    "multipart of another boundary": post("multipart/form-data; boundary={s}", PART + '"{s}'),
    "multipart of an unknown encoding": multipart(
        PART + '"{s}"\r\nContent-Transfer-Encoding: {s}\r\n\r\n{s}\r\n--x--\r\n'
    ),
    "multipart of an unknown charset": multipart(
        PART + '"p"\r\nContent-Type: text/plain; charset={s}\r\n\r\n{s}\r\n--x--\r\n'
    ),
    "multipart of a wrong length": multipart(
        PART + '"p"; filename="{s}"\r\nContent-Length: {s}\r\n\r\n{s}\r\n--x--\r\n'
    ),
    "multipart cut off": multipart(PART + '"p"\r\n\r\n{s}'),
    "broken JSON": post("application/json", '{{"prompt": "{s}'),
    "JSON that is not UTF-8": post("application/json", "\xff\xfe{s}"),
    "broken KServe 1": post(
        "application/json", '{{"instances":"{s}"', path="/v1/models/stable_diffusion:predict"
    ),
    "broken KServe 2": post(
        "application/json", '{{"inputs":"{s}"', path="/v2/models/stable_diffusion/infer"
    ),
    "text that is not UTF-8": post("text/plain", "\xff\xfe{s}"),
    "unknown field": post("application/json", '{{"prompt": "{s}", "{s}": "{s}"}}'),
    "invalid values": post("application/json", '{{"prompt": "{s}", "scheduler": "{s}"}}'),
    "drawn": post("application/json", '{{"prompt": "{s}", "steps": 1, "request_id": "{s}"}}'),
    "cancelled": post("application/json", '{{"cancel": "{s}"}}'),
    "headers": post(
        "application/json", '{{"prompt": "a"}}', headers="X-Request-Id: {s}\r\nAccept: {s}\r\n"
    ),
    "query": post("text/plain", "a", path="{path}?prompt={s}"),
    "query that is not encoded well": post("text/plain", "a", path="{path}?prompt=%zz{s}"),
    "query that ends like a line of the log": post("text/plain", "a", path='{path}?x="{s}" 200 1'),
    "lower-case method": post("text/plain", "a", method="post", path="{path}?prompt={s}"),
    "unknown method": post("text/plain", "a", method="{s}", path="{path}?prompt={s}"),
    "method with an escape sequence": "G\x1b[31mET /{s}?{s} HTTP/1.1\r\n\r\n",
    "path with an escape sequence": "GET /ping\x1b]0;{s}\x07 HTTP/1.1\r\n\r\n",
    "unknown path": "GET /{s} HTTP/1.1\r\n" + HEAD + "\r\n",
    "unknown model": post("text/plain", "{s}", path="/predictions/{s}"),
    "unknown version": post("text/plain", "{s}", path="{path}/{s}?x={s}"),
    "more path than there is": "GET /ping/{s} HTTP/1.1\r\n" + HEAD + "\r\n",
    "path with a broken escape": "GET /predictions/%zz{s} HTTP/1.1\r\n" + HEAD + "\r\n",
    "no path": "GET {s} HTTP/1.1\r\n" + HEAD + "\r\n",
    "star": "GET * HTTP/1.1\r\nHost: {s}\r\n\r\n",
    "CONNECT": "CONNECT {s}:80 HTTP/1.1\r\n\r\n",
    "unknown protocol": "GET /ping {s}/1.1\r\n\r\n",
    "unknown version of HTTP": "GET /ping?{s} HTTP/{s}\r\n\r\n",
    "HTTP/2": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n{s}",
    "not HTTP": "{s}\r\n\r\n",
    "long header": "GET /ping HTTP/1.1\r\nX: " + "{s}" * 2000 + "\r\n\r\n",
    "long path": "GET /" + "{s}" * 2000 + " HTTP/1.1\r\n\r\n",
    "broken header": "POST {path} HTTP/1.1\r\n{s}\r\n: {s}\r\n\r\n",
    "wrong length": "POST {path} HTTP/1.1\r\nContent-Length: {s}\r\n\r\nabc",
    "wrong chunk": "POST {path} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{s}\r\nabc",
    "unknown expectation": "POST {path} HTTP/1.1\r\nExpect: {s}\r\nContent-Length: 3\r\n\r\nabc",
    "given up": "POST {path} HTTP/1.1\r\n" + HEAD + "Content-Length: 99\r\n\r\n{s}",
}
METRICS = {
    "query": "GET /metrics?name[]={s} HTTP/1.1\r\n" + HEAD + "\r\n",
    "broken": "{s} /metrics?%zz{s} HTTP/1.1\r\n" + HEAD + "\r\n",
}
GRPC = {
    "HTTP/1.1": "POST {path}?prompt={s} HTTP/1.1\r\n" + HEAD + "\r\n",
    "garbage": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + "{s}" * 50,
}


def send(port: int, path: str, text: str) -> bytes:
    """Send one of the texts above as it is; return the beginning of what comes back."""
    body = text.partition("\r\n\r\n")[2].format(s=SECRET, path=path)
    raw = text.format(s=SECRET, path=path, length=len(body)).encode("latin-1")
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.settimeout(3)
        try:
            connection.sendall(raw)
            return connection.recv(4096)
        except OSError:  # It may be closed in our face, or not answered at all.
            return b""


def test_no_log_has_anything_of_a_request(server: TorchServer) -> None:
    ports = server.options.ports
    path = f"/predictions/{server.model_name}"
    sent = [
        *((ports.inference, text) for text in INFERENCE.values()),
        *((ports.metrics, text) for text in METRICS.values()),
        *((ports.grpc_inference, text) for text in GRPC.values()),
    ]
    for port, text in sent:
        send(port, path, text)
    # One of each kind did arrive: refused by TorchServe with 500, by the handler, and drawn.
    percent, broken, drawn = (
        send(ports.inference, path, INFERENCE[kind])
        for kind in ("form with a percent sign", "broken JSON", "drawn")
    )
    statuses = [reply.split()[1] for reply in (percent, broken, drawn)]
    assert statuses == [b"500", b"400", b"200"]
    time.sleep(0.5)
    files = [file for file in server.state_dir.rglob("*") if file.is_file()]
    assert server.log_file in files
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []


def lines_since(log_file: Path, before: int, pattern: str, num_lines: int) -> list[str]:
    """The last lines of the log, once one of them matches."""
    until_s = time.monotonic() + 10
    while time.monotonic() < until_s:
        lines = log_file.read_bytes()[before:].decode().splitlines()
        if len([line for line in lines if re.search(pattern, line)]) >= num_lines:
            return lines
        time.sleep(0.05)
    raise AssertionError(lines)


def test_a_request_that_torchserve_itself_fails_is_two_lines(server: TorchServer, url: str) -> None:
    before = server.log_file.stat().st_size
    assert curl(url, "-d", "prompt=100% of it").status == 500
    error, access = lines_since(server.log_file, before, "ACCESS_LOG", 1)
    assert re.search(r"ERROR HttpRequestHandler thrown in \S+ decodeAttribute$", error)
    assert re.search(r"POST /predictions/stable_diffusion 500 \d+$", access)


@pytest.mark.parametrize("content_type", ["application/json", "text/plain"])
def test_a_body_that_torchserve_cannot_read_is_two_lines(
    server: TorchServer, url: str, tmp_path: Path, content_type: str
) -> None:
    (tmp_path / "noise").write_bytes(b"\xff\xfe\xfd")
    before = server.log_file.stat().st_size
    header = f"Content-Type: {content_type}"
    assert curl(url, "-H", header, "--data-binary", f"@{tmp_path / 'noise'}").status == 400
    lines = lines_since(server.log_file, before, "ACCESS_LOG|MODEL_LOG", 2)
    assert len(lines) == 2, lines
    assert any("MODEL_LOG Failed" in line for line in lines)


def test_requests_are_logged_by_route_and_status(server: TorchServer, url: str) -> None:
    before = server.log_file.stat().st_size
    assert post_json(url, {"prompt": ""}).status == 400
    assert curl(url + "?prompt=a", "-H", "Content-Type: text/plain", "-d", "a").status == 200
    assert curl(f"{server.url}/predictions/nobody", "-d", "data=x").status == 404
    lines = lines_since(server.log_file, before, "ACCESS_LOG", 3)
    said = [line.split("ACCESS_LOG ")[1].split() for line in lines if "ACCESS_LOG" in line]
    assert [words[1:4] for words in said] == [
        ["POST", "/predictions/stable_diffusion", "400"],
        ["POST", "/predictions/stable_diffusion", "200"],
        ["POST", "-", "404"],
    ]
