"""Nobody reaches the management API by the network; and a server that stands still is noticed."""

from __future__ import annotations

import itertools
import json
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from scripts import serve
from scripts.torchserve.process import TorchServer
from tests.support.client import curl, grpc_predict, post_json
from tests.support.serving import serve as serving

PROMPT = {"prompt": "a red ring on a white background"}
DESCRIBE = "/models/{name}?customized=true"
GRPC_SERVICE = "/org.pytorch.serve.grpc.management.ManagementAPIsService/"


def listening_ports(pid: int) -> dict[int, str]:
    """Port and address of every TCP socket that a process listens on."""
    return {
        each.laddr.port: each.laddr.ip.removeprefix("::ffff:")
        for each in psutil.Process(pid).net_connections("tcp")
        if each.status == psutil.CONN_LISTEN
    }


def test_both_describe_requests_fail_on_every_port_and_pictures_are_drawn(
    server: TorchServer,
) -> None:
    """One that arrived would end the service for good."""
    assert server.pid is not None
    ports = listening_ports(server.pid)
    open_ports = [port for port, address in ports.items() if address == "127.0.0.1"]
    assert sorted(open_ports) == sorted(
        (
            server.options.ports.inference,
            server.options.ports.metrics,
            server.options.ports.grpc_inference,
        )
    )
    for port, path in itertools.product(
        (server.options.ports.inference, server.options.ports.metrics),
        (DESCRIBE.format(name=server.model_name), "/models", f"/v2/models/{server.model_name}"),
    ):
        assert curl(f"http://127.0.0.1:{port}{path}").status in {404, 405}
    # bytes model_name = 1, bool customized = 3 of management.proto's DescribeModelRequest.
    name = server.model_name.encode()
    request = b"\x0a" + bytes([len(name)]) + name + b"\x18\x01"
    for port, address in itertools.product(ports, ("127.0.0.1", "255.255.255.255")):
        with grpc.insecure_channel(f"{address}:{port}") as channel:
            call = channel.unary_unary(f"{GRPC_SERVICE}DescribeModel")
            with pytest.raises(grpc.RpcError):
                call(request, timeout=3)
    assert post_json(server.predictions_url, PROMPT).status == 200
    fields = {"prompt": b"a red ring"}
    assert grpc_predict(server.options.ports.grpc_inference, server.model_name, fields)


def test_the_socket_is_in_a_private_directory(server: TorchServer) -> None:
    kind, _, path = server.management_address.partition(":")
    assert kind == "unix"
    assert stat.S_ISSOCK(Path(path).stat().st_mode)
    assert Path(path).parent.stat().st_mode & 0o077 == 0
    assert server.state_dir.stat().st_mode & 0o077 == 0
    answer = curl("--unix-socket", path, f"http://localhost/models/{server.model_name}")
    assert answer.json()[0]["workers"][0]["status"] == "READY"


def test_status_says_that_a_server_draws(
    server: TorchServer, capsys: pytest.CaptureFixture[str]
) -> None:
    started_s = time.monotonic()
    assert serve.main(["status", "--json", "--run-dir", str(server.state_dir)]) == 0
    assert time.monotonic() - started_s < 5
    state = json.loads(capsys.readouterr().out)
    assert (state["ready"], state["problem"]) == (True, None)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServer]:
    """A server that this module's tests may break, with a path too long for sockets."""
    folder = tmp_path_factory.mktemp("a place of a name so long that no socket fits in it " * 2)
    yield from serving(folder)


def test_a_second_worker_is_refused_and_the_first_goes_on(
    own: TorchServer, capsys: pytest.CaptureFixture[str]
) -> None:
    (first,) = own.workers()
    socket = own.management_address.removeprefix("unix:")
    scale = f"http://localhost/models/{own.model_name}?min_worker=2&max_worker=2"
    assert curl("--unix-socket", socket, "-X", "PUT", scale).status == 202
    until_s = time.monotonic() + 120
    while not (problem := own.problem()) and time.monotonic() < until_s:
        time.sleep(0.2)
    assert problem is not None
    assert "another worker serves it" in problem
    assert f"cannot serve this model: {problem}" in own.log_file.read_text()
    assert serve.main(["status", "--run-dir", str(own.state_dir)]) == 1
    assert "another worker serves it" in capsys.readouterr().out
    answers = [post_json(own.predictions_url, PROMPT).status for _ in range(12)]
    assert answers == [200] * 12
    assert first in own.workers()
    back = f"http://localhost/models/{own.model_name}?min_worker=1&max_worker=1"
    assert curl("--unix-socket", socket, "-X", "PUT", back).status == 202
    until_s = time.monotonic() + 60
    while own.problem() and time.monotonic() < until_s:
        time.sleep(0.2)
    assert own.problem() is None
    assert post_json(own.predictions_url, PROMPT).status == 200


def test_status_says_that_a_server_stands_still_and_how_to_mend_it(
    own: TorchServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last one on this server: it is of no use afterwards."""
    assert post_json(own.predictions_url, PROMPT).status == 200
    socket = own.management_address.removeprefix("unix:")
    wedge = f"http://localhost{DESCRIBE.format(name=own.model_name)}"
    subprocess.run(["curl", "-s", "-m", "5", "--unix-socket", socket, wedge], check=False)
    assert own.is_ready(), "the frontend itself does not know"
    assert serve.main(["status", "--run-dir", str(own.state_dir)]) == 1
    said = capsys.readouterr().out
    assert "stands still" in said
    assert "make stop, then make serve" in said
