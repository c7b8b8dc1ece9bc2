"""Removes from TorchServe's gRPC service a method that would end the service for good.

One call of ``StreamPredictions2`` with a sequence id, made for stateful models, queues a request
that TorchServe 0.12.0 cannot answer once the client has closed its side: the frontend's thread of
the worker ends with an IllegalStateException and is never started again. It has no switch.

Java looks for classes in the directory that the frontend is started in before it looks into its
own archive. There we put the class that lists the service's methods, in which that one has a
random name: clients get UNIMPLEMENTED.
"""

from __future__ import annotations

import secrets
import zipfile
from pathlib import Path

import ts

from scripts.errors import ServerError

__all__ = ["withdraw_bidirectional_streaming"]

FRONTEND = Path(ts.__file__).parent / "frontend" / "model-server.jar"
SERVICE = "org/pytorch/serve/grpc/inference/InferenceAPIsServiceGrpc.class"
METHOD = b"StreamPredictions2"


def withdraw_bidirectional_streaming(directory: Path) -> None:
    """Write the class into `directory`, in which the frontend is going to be started.

    Raises: ServerError when TorchServe's class is not the expected one.
    """
    with zipfile.ZipFile(FRONTEND) as jar:
        original = jar.read(SERVICE)
    # How a class file holds a text (JVM specification, 4.4.7): tag 1, its length in two bytes.
    head = b"\x01" + len(METHOD).to_bytes(2, "big")
    if original.count(head + METHOD) != 1:
        raise ServerError(f"{FRONTEND} is not that of TorchServe 0.12.0: install the pinned one")
    nobody_knows = secrets.token_hex(len(METHOD) // 2).encode()
    target = directory / SERVICE
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(original.replace(head + METHOD, head + nobody_knows))
