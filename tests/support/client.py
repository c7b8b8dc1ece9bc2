"""Asking the server as its users do: with the real curl, and over gRPC."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from PIL import Image

GRPC_SERVICE = "/org.pytorch.serve.grpc.inference.InferenceAPIsService"

MEDIA_TYPES = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "npy": "application/x-npy",
    "json": "application/json",
    "array": "application/json",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What curl got; header names are lower-cased."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def error(self) -> dict[str, Any]:
        """The error's object; fails when the reply is no error of the handler's."""
        assert self.headers["content-type"].startswith("application/json"), self.body
        error: dict[str, Any] = self.json()["error"]
        assert error.keys() == {"code", "message", "fields"}
        return error


def curl(*arguments: str, timeout_s: float = 60.0) -> Answer:
    """Run curl with `arguments`; any status is an answer, a failed transfer is not."""
    with tempfile.TemporaryDirectory() as folder:
        headers_file, body_file = Path(folder, "headers"), Path(folder, "body")
        run = subprocess.run(
            [
                *("curl", "-sS", "--noproxy", "*", "--max-time", str(timeout_s)),
                *("-D", str(headers_file), "-o", str(body_file), "-w", "%{http_code}"),
                *arguments,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        # With "Expect: 100-continue" there are two heads; the last is the reply's.
        head = headers_file.read_text("latin-1").strip().split("\n\n")[-1]
        pairs = [line.split(":", 1) for line in head.splitlines()[1:] if ":" in line]
        body = body_file.read_bytes() if body_file.exists() else b""
        return Answer(int(run.stdout), {name.lower(): value.strip() for name, value in pairs}, body)


def post_json(url: str, body: object, *arguments: str) -> Answer:
    """Post `body` as JSON."""
    return curl(url, "-H", "Content-Type: application/json", "-d", json.dumps(body), *arguments)


def pixels(picture: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Decode an encoded picture: (H, W, 3), uint8."""
    with Image.open(io.BytesIO(picture)) as image:
        assert image.mode == "RGB"
        return np.asarray(image, dtype=np.uint8)


def grpc_predict(port: int, model_name: str, fields: dict[str, bytes]) -> bytes:
    """Call the unary `Predictions`. Raises: grpc.RpcError."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        reply: bytes = channel.unary_unary(f"{GRPC_SERVICE}/Predictions")(
            predictions_request(model_name, fields), timeout=60
        )
    return first_field(reply)


def grpc_stream_predict(port: int, model_name: str, fields: dict[str, bytes]) -> list[bytes]:
    """Call the server-streaming `StreamPredictions`; all replies. Raises: grpc.RpcError."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        replies = channel.unary_stream(f"{GRPC_SERVICE}/StreamPredictions")(
            predictions_request(model_name, fields), timeout=60
        )
        return [first_field(reply) for reply in replies]


def predictions_request(model_name: str, fields: dict[str, bytes]) -> bytes:
    """Encode inference.proto's PredictionsRequest: model_name = 1, map<string, bytes> input = 3."""
    entries = (
        _length_delimited(1, name.encode()) + _length_delimited(2, value)
        for name, value in fields.items()
    )
    return _length_delimited(1, model_name.encode()) + b"".join(
        _length_delimited(3, entry) for entry in entries
    )


def _length_delimited(field_number: int, value: bytes) -> bytes:
    return _varint(field_number << 3 | 2) + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def first_field(message: bytes) -> bytes:
    """Decode PredictionResponse: bytes prediction = 1, and nothing else."""
    if not message:
        return b""
    assert message[0] == (1 << 3 | 2)
    size, shift, at = 0, 0, 1
    while True:
        size |= (message[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if message[at - 1] < 0x80:
            break
    assert at + size == len(message)
    return message[at:]


def decode(output_format: str, body: bytes) -> np.ndarray:
    if output_format == "npy":
        return np.load(io.BytesIO(body), allow_pickle=False)
    if output_format == "array":
        return np.array(json.loads(body), dtype="uint8")
    if output_format == "json":
        return pixels(base64.b64decode(json.loads(body)["images"][0]))
    return pixels(body)
