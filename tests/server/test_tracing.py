"""One trace a request, across a real gateway and a real TorchServe's worker."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from scripts.torchserve.process import TorchServer
from tests.support.client import post_json
from tests.support.gateways import RunningGateway, running_gateway
from tests.support.otlp import Receiver, running_receiver
from tests.support.serving import serve
from tests.support.traffic import until

PROMPT = "what nobody shall read"


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with running_receiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def traced(receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServer]:
    yield from serve(
        tmp_path_factory.mktemp("server"), trace_endpoint=receiver.endpoint, request_log="json"
    )


@pytest.fixture(scope="module")
def gateway(
    traced: TorchServer, receiver: Receiver, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningGateway]:
    folder = tmp_path_factory.mktemp("gateway")
    settings = {"trace_endpoint": receiver.endpoint, "log_format": "json"}
    with running_gateway(folder, [traced.state_dir], **settings) as running:
        yield running


def test_a_request_is_one_trace_from_the_gateway_to_the_png(
    gateway: RunningGateway, traced: TorchServer, receiver: Receiver
) -> None:
    url = f"{gateway.url}/v1/images/generations"
    body = {"prompt": PROMPT, "num_inference_steps": 12}
    answer = post_json(url, body, "-H", "X-Request-Id: mine")
    assert answer.status == 200
    root_name = "POST /v1/images/generations"
    # Gateway and worker send theirs apart; of each, this is the last to end.
    spans = receiver.wait_for(lambda spans: {s.name for s in spans} >= {"draw", root_name})
    (root,) = [span for span in spans if not span.parent_id]
    assert root.name == root_name
    assert {span.trace_id for span in spans} == {root.trace_id}
    by_name = {span.name: span for span in spans}
    assert by_name.keys() == {
        *(root.name, "wait", "instance", "draw", "queue", "encode_text"),
        *("steps 1-10", "steps 11-12", "decode", "encode"),
    }
    assert by_name["instance"].parent_id == root.span_id
    assert by_name["draw"].parent_id == by_name["instance"].span_id
    assert by_name["draw"].service == "diffusers-torchserve"
    assert by_name["steps 1-10"].parent_id == by_name["draw"].span_id
    assert PROMPT.encode() not in receiver.raw
    _check_logs(gateway, traced, root.trace_id, by_name["draw"].attributes["request.client_id"])


def _check_logs(
    gateway: RunningGateway, traced: TorchServer, trace_id: str, upstream_id: str
) -> None:
    """The line of the gateway's, with the client's id, leads to the worker's."""
    # Lines are written as a request ends, which is after its client has the answer.
    written = until(lambda: gateway.log, lambda log: '"mine"' in log)
    lines = [json.loads(line) for line in written.splitlines()]
    (line,) = [each for each in lines if each.get("request_id") == "mine"]
    assert (line["trace_id"], line["upstream_ids"]) == (trace_id, [upstream_id])
    log = until(traced.log_file.read_text, lambda log: upstream_id in log)
    (worker,) = [each for each in log.splitlines() if upstream_id in each]
    told = json.loads(worker[worker.index("{") :])
    assert (told["client_id"], told["outcome"], told["steps"]) == (upstream_id, "ok", 12)
    assert PROMPT not in log + gateway.log
