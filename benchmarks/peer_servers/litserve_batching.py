"""LitServe with its own batching: what waits is drawn by one call where its settings are the same.

python litserve_batching.py FOLDER PORT PRECISION
"""

import sys
from typing import Any

import litserve
from drawing import draw_together, open_pipeline
from fastapi import Response


class DrawingApi(litserve.LitAPI):
    """Batches of at most eight, gathered for 50 ms."""

    def setup(self, device: str) -> None:
        self.pipeline = open_pipeline(sys.argv[1], sys.argv[3])

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        return request

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return inputs

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def predict(self, batch: list[dict[str, Any]]) -> list[bytes]:
        return draw_together(self.pipeline, batch)

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="image/png")


if __name__ == "__main__":
    api = DrawingApi(max_batch_size=8, batch_timeout=0.05)
    server = litserve.LitServer(api, accelerator="cpu", timeout=600)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False)
