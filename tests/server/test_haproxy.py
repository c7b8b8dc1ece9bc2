"""deploy/haproxy with real instances: TLS, events, gRPC, limits, and what dies behind it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from scripts.cli import main
from scripts.errors import ServerError
from scripts.gateway_process import GatewayProcess
from scripts.haproxy_process import GrpcInstance, HaproxyOptions, HaproxyProcess, instances_text
from scripts.repository import REPOSITORY
from scripts.torchserve.process import TorchServer
from tests.support.client import (
    GRPC_SERVICE,
    Answer,
    curl,
    first_field,
    post_json,
    predictions_request,
)
from tests.support.fleets import fleet_arguments, stopped_fleet
from tests.support.gateways import free_port
from tests.support.ports import free_ports
from tests.support.programs import need
from tests.support.serving import MODEL, build_quick_archive
from tests.support.traffic import until

pytestmark = [pytest.mark.slow]

FIELDS = {"prompt": "a red ring", "size": "64x64", "seed": 1, "num_inference_steps": 3}


class Site:
    """Where clients come in, and what is behind."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_dir = folder, folder / "run"
        self.metrics_port = free_port()
        self._arguments = [
            *("up", *fleet_arguments(folder), "--instances", "2"),
            *("--gateway-port", str(free_port()), "--haproxy", "--haproxy-port", str(free_port())),
            *("--haproxy-metrics", f"127.0.0.1:{self.metrics_port}"),
        ]

    def up(self) -> None:
        """Start what does not run yet."""
        assert main(self._arguments) == 0

    @property
    def haproxy(self) -> HaproxyProcess:
        found = HaproxyProcess.find(self.folder / "run-haproxy")
        assert found is not None
        return found

    @property
    def gateway(self) -> GatewayProcess:
        found = GatewayProcess.find(self.folder / "run-gateway")
        assert found is not None
        return found

    def instance(self, index: int) -> TorchServer:
        found = TorchServer.find(self.run_dir / str(index))
        assert found is not None
        return found

    def post(self, path: str, fields: object, *arguments: str) -> Answer:
        trust = ("--cacert", str(self.haproxy.certificate))
        return post_json(f"{self.haproxy.url}{path}", fields, *trust, *arguments)

    def metric(self, beginning: str) -> float:
        lines = curl(f"http://127.0.0.1:{self.metrics_port}/metrics").body.decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(beginning))

    def num_grpc_up(self) -> float:
        return self.metric('haproxy_server_status{proxy="grpc",server="instance0",state="UP"}') + (
            self.metric('haproxy_server_status{proxy="grpc",server="instance1",state="UP"}')
        )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    need("haproxy", "haproxy")
    need("openssl", "openssl")
    folder = tmp_path_factory.mktemp("site")
    (folder / "store").mkdir()
    build_quick_archive(folder / "store", {}, "dir")
    site = Site(folder)
    with stopped_fleet(site.run_dir):
        try:
            site.up()
            yield site
        finally:
            stop = ["stop", "--run-dir", str(site.run_dir), "--drain-s", "0"]
            assert main(stop) == 0


@pytest.fixture
def channel(site: Site) -> Iterator[grpc.Channel]:
    credentials = grpc.ssl_channel_credentials(site.haproxy.certificate.read_bytes())
    with grpc.secure_channel(site.haproxy.url.removeprefix("https://"), credentials) as channel:
        yield channel


def draw_over_grpc(channel: grpc.Channel) -> bytes:
    fields = {"prompt": b"a red ring", "num_inference_steps": b"3"}
    call = channel.unary_unary(f"{GRPC_SERVICE}/Predictions")
    return first_field(call(predictions_request(MODEL, fields), timeout=60))


def test_the_shipped_configuration_is_valid(site: Site, tmp_path: Path) -> None:
    folder = REPOSITORY / "deploy" / "haproxy"
    files = ["-f", str(folder / "haproxy.cfg"), "-f", str(folder / "instances.cfg")]
    environment = {
        **os.environ,
        "HAPROXY_CERT": str(site.haproxy.certificate),
        "HAPROXY_SOCKET": str(tmp_path / "s"),
    }
    program = shutil.which("haproxy") or "/usr/sbin/haproxy"
    run = subprocess.run(
        [program, "-c", *files], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "ALERT" not in run.stderr
    # A word that it does not know is noticed.
    (tmp_path / "wrong.cfg").write_text((folder / "haproxy.cfg").read_text() + "    servr x\n")
    wrong = ["-f", str(tmp_path / "wrong.cfg"), *files[2:]]
    assert subprocess.run([program, "-c", *wrong], env=environment, check=False).returncode != 0


def test_tls_and_both_versions_of_http(site: Site) -> None:
    for option in ("--http1.1", "--http2"):
        answer = site.post("/v1/images/generations", FIELDS, option)
        assert answer.status == 200
        assert answer.headers["strict-transport-security"]
    over = subprocess.run(
        [
            *("curl", "-sS", "--cacert", str(site.haproxy.certificate)),
            *(f"{site.haproxy.url}/readyz", "-w", " %{http_version}"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert over.stdout == '{"ready": true} 2'
    plain = subprocess.run(
        ["curl", "-sS", "-m", "5", site.haproxy.url.replace("https", "http")],
        capture_output=True,
        check=False,
    )
    assert plain.returncode != 0


def test_events_come_as_they_are_sent(site: Site) -> None:
    """A stream that was buffered would come all at once."""
    fields = {**FIELDS, "num_inference_steps": 150, "stream": True, "partial_images": 3}
    reading = subprocess.Popen(
        [
            *("curl", "-sSN", "--cacert", str(site.haproxy.certificate)),
            *(f"{site.haproxy.url}/v1/images/generations", "-d", json.dumps(fields)),
            *("-H", "Content-Type: application/json"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert reading.stdout is not None
    came_s: dict[str, float] = {}
    with reading.stdout as lines:
        for line in lines:
            if line.startswith("event: "):
                came_s.setdefault(line.split()[1], time.monotonic())
    assert reading.wait(60) == 0
    assert list(came_s) == ["image_generation.partial_image", "image_generation.completed"]
    assert came_s["image_generation.completed"] - came_s["image_generation.partial_image"] > 0.3


def test_grpc_goes_to_both_instances(site: Site, channel: grpc.Channel) -> None:
    assert until(site.num_grpc_up, lambda number: number == 2) == 2
    for _ in range(4):
        assert draw_over_grpc(channel).startswith(b"\x89PNG")
    for name in ("instance0", "instance1"):
        counted = f'haproxy_server_http_responses_total{{proxy="grpc",server="{name}",code="2xx"}}'
        assert site.metric(counted) > 0


def test_checks_leave_no_errors_in_the_log(site: Site) -> None:
    """Without `linger` each ends by a reset, of which TorchServe logs two errors."""
    before = [site.instance(index).log_file.read_text().count(" ERROR ") for index in (0, 1)]
    time.sleep(5)
    after = [site.instance(index).log_file.read_text().count(" ERROR ") for index in (0, 1)]
    assert after == before
    assert site.instance(0).log_file.read_text().count("POST - 404") > 1


def test_what_is_for_those_inside_is_not_shown(site: Site) -> None:
    trusting = ("--cacert", str(site.haproxy.certificate))
    for path in ("/metrics", "/metrics/instances", "/%6Detrics", "/%6Detrics/instances"):
        answer = curl(f"{site.haproxy.url}{path}", *trusting)
        assert (answer.status, answer.json()["error"]["code"]) == (404, "route_not_found"), path


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(site: Site, tmp_path: Path) -> None:
    (tmp_path / "body").write_bytes(bytes(17_825_793))
    answer = curl(
        f"{site.haproxy.url}/v1/images/edits",
        *("--cacert", str(site.haproxy.certificate), "--data-binary", f"@{tmp_path / 'body'}"),
        *("-H", "Expect: 100-continue", "--http1.1"),
    )
    assert answer.status == 413
    assert answer.json()["error"]["code"] == "too_large"


def test_a_gateway_that_is_killed_costs_its_requests_time(site: Site) -> None:
    """They are sent again once another one is there; nobody sees an error."""
    slow = {**FIELDS, "num_inference_steps": 150}
    with ThreadPoolExecutor(4) as pool:
        drawing = [
            pool.submit(site.post, "/v1/images/generations", {**slow, "seed": seed})
            for seed in range(4)
        ]
        requests = 'haproxy_server_current_sessions{proxy="ready"'
        assert until(lambda: site.metric(requests), lambda number: number == 4) == 4
        os.kill(site.gateway.pid, signal.SIGKILL)
        site.up()
        assert [each.result().status for each in drawing] == [200] * 4
    retries = site.metric('haproxy_server_retry_warnings_total{proxy="ready"')
    assert retries > 0


def test_an_instance_that_is_killed_gets_no_calls_until_it_is_back(
    site: Site, channel: grpc.Channel
) -> None:
    assert until(site.num_grpc_up, lambda number: number == 2, 60) == 2
    pid = site.instance(0).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert until(site.num_grpc_up, lambda number: number == 1, 20) == 1
    for _ in range(4):
        assert draw_over_grpc(channel).startswith(b"\x89PNG")
    # HTTP goes through the gateway, which knows at once.
    assert site.post("/v1/images/generations", FIELDS).status == 200
    assert until(site.num_grpc_up, lambda number: number == 2, 120) == 2


def test_a_rolling_restart_loses_no_call(site: Site, channel: grpc.Channel) -> None:
    """Nobody sends gRPC once more: HAProxy must know before an instance is drained."""
    assert until(site.num_grpc_up, lambda number: number == 2, 60) == 2
    is_over = threading.Event()

    def draw_on() -> list[bytes]:
        drawn = []
        while not is_over.is_set():
            drawn.append(draw_over_grpc(channel))
        return drawn

    with ThreadPoolExecutor(3) as pool:
        drawing = [pool.submit(draw_on) for _ in range(3)]
        assert main(["restart", "--run-dir", str(site.run_dir)]) == 0
        is_over.set()
        drawn = [picture for each in drawing for picture in each.result()]
    assert len(drawn) > 10
    assert all(picture.startswith(b"\x89PNG") for picture in drawn)
    assert until(site.num_grpc_up, lambda number: number == 2, 60) == 2


def test_too_many_requests_of_one_address(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Last: it starts HAProxy anew with a limit that a test can reach."""
    site.haproxy.stop(10)
    monkeypatch.setenv("HAPROXY_RATE", "20")
    site.up()
    url = f"{site.haproxy.url}/v1/models"
    (tmp_path / "urls").write_text(f'url = "{url}"\noutput = "/dev/null"\n' * 40)
    run = subprocess.run(
        [
            *("curl", "-sS", "-K", str(tmp_path / "urls"), "-w", "%{http_code}\n"),
            *("--cacert", str(site.haproxy.certificate)),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    statuses = run.stdout.split()
    assert statuses.count("200") == 20
    assert statuses.count("429") == 20
    refused = curl(url, "--cacert", str(site.haproxy.certificate))
    assert refused.json()["error"]["code"] == "rate_limited"
    assert refused.headers["retry-after"] == "10"
    # Who watches it is not counted.
    assert (
        curl(f"{site.haproxy.url}/healthz", "--cacert", str(site.haproxy.certificate)).status == 200
    )


def test_grpc_instances_are_those_of_one_model() -> None:
    models = ("a", "b", "a")
    instances = [
        GrpcInstance(f"instance{at}", 7070 + at, 8080 + at, model)
        for at, model in enumerate(models)
    ]
    text = instances_text(instances)
    assert "uri /predictions/a " in text
    assert "server instance0 127.0.0.1:7070 check port 8080\n" in text
    assert "server instance2 127.0.0.1:7072 check port 8082\n" in text
    assert "7071" not in text


def options_of(folder: Path, port: int, metrics_port: int, certificate: Path) -> HaproxyOptions:
    return HaproxyOptions(folder, "127.0.0.1:9", (), port, f"127.0.0.1:{metrics_port}", certificate)


def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    need("haproxy", "haproxy")
    certificate = tmp_path / "no-certificate.pem"
    certificate.write_text("nothing")
    port, metrics_port = free_ports()
    with pytest.raises(ServerError, match="HAProxy did not start") as caught:
        HaproxyProcess.start(options_of(tmp_path / "state", port, metrics_port, certificate))
    assert "no-certificate.pem" in caught.value.log
    assert HaproxyProcess.find(tmp_path / "state") is None


def test_a_port_that_is_taken_is_not_taken_for_its_own(tmp_path: Path) -> None:
    need("haproxy", "haproxy")
    port, metrics_port = free_ports()
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(ServerError, match=f"taken by another process: port {port}"):
            HaproxyProcess.start(options_of(tmp_path / "state", port, metrics_port, tmp_path / "c"))
