"""Ray Serve with its own batching: what waits is drawn by one call where its settings are the same.

python ray_batching.py FOLDER PORT PRECISION
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from drawing import draw_together, open_pipeline
from ray import serve
from starlette.requests import Request
from starlette.responses import Response


# Ray tells torch to use as many threads as a replica has of its CPUs: one, where nothing is said.
@serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": os.cpu_count()})
class Drawing:
    """One replica on all cores."""

    def __init__(self, folder: str, precision: str) -> None:
        self.pipeline = open_pipeline(folder, precision)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.05)
    async def draw(self, batch: list[dict[str, Any]]) -> list[bytes]:
        """Batches of at most eight, gathered for 50 ms."""
        return draw_together(self.pipeline, batch)

    async def __call__(self, request: Request) -> Response:
        if request.method == "GET":
            return Response("ok")
        return Response(await self.draw(await request.json()), media_type="image/png")


if __name__ == "__main__":
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
    serve.run(Drawing.bind(sys.argv[1], sys.argv[3]))
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
