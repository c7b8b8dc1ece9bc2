"""gRPC: unary and server-streaming calls answer alike, and no call disturbs the others."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from scripts.torchserve.process import TorchServer
from tests.support.client import (
    GRPC_SERVICE,
    grpc_predict,
    grpc_stream_predict,
    post_json,
    predictions_request,
)
from tests.support.traffic import metrics, until, watching

FIELDS = {"prompt": b"a red heart", "seed": b"7", "num_inference_steps": b"6"}
HTTP_FIELDS = {"prompt": "a red heart", "seed": 7, "num_inference_steps": 6}
LONG_HTTP = {**HTTP_FIELDS, "num_inference_steps": 60}


@pytest.fixture(autouse=True)
def same_worker(server: TorchServer) -> Iterator[None]:
    """Whatever a test here does, the worker lives on and draws."""
    before = [worker["pid"] for worker in server.workers()]
    yield
    assert post_json(server.predictions_url, HTTP_FIELDS).status == 200
    assert [worker["pid"] for worker in server.workers()] == before


@pytest.fixture
def port(server: TorchServer) -> int:
    return server.options.ports.grpc_inference


def test_a_streaming_call_gets_one_reply_equal_to_the_unary_ones(
    server: TorchServer, url: str, port: int
) -> None:
    with ThreadPoolExecutor(4) as threads, watching(url, LONG_HTTP) as watched:
        plain = threads.submit(post_json, url, LONG_HTTP)
        streamed = threads.submit(grpc_stream_predict, port, server.model_name, FIELDS)
        unary = threads.submit(grpc_predict, port, server.model_name, FIELDS)
        (reply,) = streamed.result()
        assert unary.result() == reply
        assert reply == post_json(url, HTTP_FIELDS).body
        assert plain.result().status == 200
        assert watched.events()[-1][0] == "image"


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({**FIELDS, "num_inference_steps": b"0"}, "num_inference_steps"),
        ({**FIELDS, "stream": b"true"}, "stream"),
        ({**FIELDS, "prompt": b"\xff"}, "prompt"),
        ({}, "prompt"),
    ],
)
def test_an_error_is_the_same_json_for_both_kinds_of_call(
    server: TorchServer, port: int, fields: dict[str, bytes], wrong: str
) -> None:
    unary = json.loads(grpc_predict(port, server.model_name, fields))
    (reply,) = grpc_stream_predict(port, server.model_name, fields)
    assert json.loads(reply) == unary
    assert unary["error"]["fields"].keys() == {wrong}


def test_many_calls_of_all_kinds_at_once(server: TorchServer, url: str, port: int) -> None:
    bad = {**FIELDS, "num_inference_steps": b"0"}
    with ThreadPoolExecutor(24) as threads:
        streamed = [
            threads.submit(grpc_stream_predict, port, server.model_name, fields)
            for fields in [FIELDS, bad] * 8
        ]
        unary = [threads.submit(grpc_predict, port, server.model_name, FIELDS) for _ in range(4)]
        plain = [threads.submit(post_json, url, HTTP_FIELDS) for _ in range(4)]
        assert all(future.result().status == 200 for future in plain)
        assert all(future.result().startswith(b"\x89PNG") for future in unary)
        for index, future in enumerate(streamed):
            (reply,) = future.result()
            assert reply.startswith(b"{" if index % 2 else b"\x89PNG")


@pytest.mark.parametrize("call", ["Predictions", "StreamPredictions"])
def test_a_client_may_leave_its_call(server: TorchServer, url: str, port: int, call: str) -> None:
    """TorchServe does not tell; the reply to nobody must not harm anybody."""
    drawn = metrics(server).get("diffusers_requests_total{outcome=ok}", 0.0)
    fields = {**FIELDS, "num_inference_steps": b"40"}
    with (
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
        watching(url, LONG_HTTP) as watched,
    ):
        call_of = channel.unary_stream(f"{GRPC_SERVICE}/{call}")
        left = call_of(predictions_request(server.model_name, fields), timeout=60)
        until(lambda: metrics(server)["diffusers_requests_in_flight"], lambda n: n == 2)
        left.cancel()
        assert watched.events()[-1][0] == "image"
        after = until(
            lambda: metrics(server).get("diffusers_requests_total{outcome=ok}", 0.0),
            lambda n: n >= drawn + 2,
        )
        assert after == drawn + 2


@pytest.mark.parametrize("sequence_id", [b"", b"\x22\x01s"], ids=["alone", "in a sequence"])
def test_bidirectional_streaming_is_withdrawn(
    server: TorchServer, url: str, port: int, sequence_id: bytes
) -> None:
    """One call of it would end the service for good, whatever the handler does."""
    message = predictions_request(server.model_name, FIELDS) + sequence_id
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, watching(url, LONG_HTTP) as watched:
        call = channel.stream_stream(f"{GRPC_SERVICE}/StreamPredictions2")
        with pytest.raises(grpc.RpcError) as refused:
            list(call(iter([message]), timeout=30))
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert watched.events()[-1][0] == "image"


def test_a_request_without_any_header_is_still_told_from_a_call(server: TorchServer) -> None:
    """What has no headers is answered as gRPC is; TorchServe adds one to every HTTP request."""
    with socket.create_connection(("127.0.0.1", server.options.ports.inference), 30) as client:
        client.sendall(f"POST /predictions/{server.model_name} HTTP/1.0\r\n\r\n".encode())
        assert b" 400 Bad Request" in client.recv(100)
