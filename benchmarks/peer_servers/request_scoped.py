"""The way of diffusers' own server example: one pipeline, many threads, a scheduler a request.

    python request_scoped.py FOLDER PORT PRECISION

Rebuilt from its description: modules are shared by all requests, what a call changes (the
scheduler) is made anew for each, tokenizers are used by one at a time. Nothing is batched.
"""

from __future__ import annotations

import asyncio
import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn
from drawing import arguments_of, generator_of, open_pipeline, png_of
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

NUM_THREADS = 4

pipeline = open_pipeline(sys.argv[1], sys.argv[3])
threads = ThreadPoolExecutor(NUM_THREADS)
tokenizing = threading.Lock()


class OneAtATime:
    """A tokenizer that threads may share."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with tokenizing:
            return self._tokenizer(*args, **kwargs)


def draw(fields: dict[str, Any]) -> bytes:
    """One picture, by a copy of the pipeline that shares all modules."""
    scoped = copy.copy(pipeline)
    scoped.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scoped.tokenizer = OneAtATime(pipeline.tokenizer)
    drawn = scoped(fields["prompt"], generator=generator_of(fields), **arguments_of(fields))
    return png_of(drawn.images[0])


async def predict(request: Request) -> Response:
    """Draw in a thread."""
    fields = await request.json()
    content = await asyncio.get_running_loop().run_in_executor(threads, draw, fields)
    return Response(content, media_type="image/png")


async def health(_: Request) -> Response:
    """It is there once the pipeline is."""
    return Response("ok")


if __name__ == "__main__":
    routes = [Route("/predict", predict, methods=["POST"]), Route("/health", health)]
    uvicorn.run(Starlette(routes=routes), host="127.0.0.1", port=int(sys.argv[2]))
