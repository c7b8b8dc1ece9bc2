from __future__ import annotations

import dataclasses
import itertools
import os
import socket
import zipfile
from pathlib import Path

import pytest
import yaml

from handler.config import HandlerConfig
from scripts.archive.manifest import MANIFEST_NAME, TORCHSERVE_MANIFEST_NAME
from scripts.errors import ServerError
from scripts.repository import REPOSITORY
from scripts.torchserve.options import (
    UNREACHABLE,
    Options,
    Ports,
    archive_identity,
    example_prompt,
    is_loopback,
)
from tests.support.toy_archive import write_toy_archive


def properties(text: str) -> dict[str, str]:
    """Read a .properties text as TorchServe does: the last of equal keys counts."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_free_ports_are_different_ones_that_nobody_listens_on() -> None:
    ports = Ports.free()
    assert len(set(dataclasses.astuple(ports))) == 3
    assert ports.taken() == ()


def test_a_port_that_somebody_listens_on_is_named() -> None:
    ports = Ports.free()
    with socket.socket() as other:
        other.bind(("127.0.0.1", ports.metrics))
        other.listen()
        assert ports.taken() == (ports.metrics,)


def test_a_port_counts_as_free_right_after_its_last_connection() -> None:
    ports = Ports.free()
    with (
        socket.create_server(("127.0.0.1", ports.inference)) as server,
        socket.create_connection(("127.0.0.1", ports.inference)),
    ):
        accepted, _ = server.accept()
        accepted.close()  # The side that closes first is left in TIME_WAIT.
    assert ports.taken() == ()


@pytest.mark.parametrize(
    ("http", "grpc"), [(8080, 8080), (8080, 8082), (0, 7070), (8080, 0), (65534, 7070)]
)
def test_ports_that_overlap_or_do_not_exist_are_refused(http: int, grpc: int) -> None:
    with pytest.raises(ServerError, match="different ports"):
        Ports.starting_at(http, grpc)


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1", True), ("localhost", True), ("127.1.2.3", True), ("0.0.0.0", False)],
)
def test_loopback(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected


@pytest.mark.parametrize("address", ["", "::1", "example.org", "127.0.0.1:8080"])
def test_an_address_that_torchserve_cannot_bind_is_refused(address: str) -> None:
    with pytest.raises(ServerError, match="IPv4"):
        is_loopback(address)


def test_identity_comes_from_the_manifest(tmp_path: Path) -> None:
    assert archive_identity(write_toy_archive(tmp_path, "other")) == ("other", "1.0")


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [('{"smoke_prompt": "a red ring"}', "a red ring"), ("{}", None), ("[", None), ("[]", None)],
)
def test_an_archive_may_say_what_it_can_draw(
    tmp_path: Path, manifest: str, expected: str | None
) -> None:
    archive = write_toy_archive(tmp_path)
    assert example_prompt(archive) is None
    with zipfile.ZipFile(archive, "a") as mar:
        mar.writestr("MAR-INF/PIPELINE.json", manifest)
    assert example_prompt(archive) == expected


def test_what_is_not_an_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.mar").write_bytes(b"not a zip")
    with pytest.raises(ServerError, match=r"broken\.mar is not a TorchServe archive"):
        archive_identity(tmp_path / "broken.mar")
    with pytest.raises(ServerError, match="does not exist; `make archive`"):
        archive_identity(tmp_path / "missing.mar")


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ("[" * 100_000, "is not a TorchServe archive: MAR-INF/MANIFEST.json is not JSON"),
        ("[1]", "is not a TorchServe archive"),
        ('{"model": {"modelName": "a\\u001b[2J", "modelVersion": "1"}}', "cannot be shown"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_named(tmp_path: Path, manifest: str, words: str) -> None:
    with zipfile.ZipFile(tmp_path / "bad.mar", "w") as mar:
        mar.writestr(TORCHSERVE_MANIFEST_NAME, manifest)
        mar.writestr(MANIFEST_NAME, "[" * 100_000)
    with pytest.raises(ServerError, match=words):
        archive_identity(tmp_path / "bad.mar")
    assert example_prompt(tmp_path / "bad.mar") is None


def test_shipped_configuration_is_closed(tmp_path: Path) -> None:
    shipped = properties(Options(tmp_path / "any.mar", tmp_path).config.read_text())
    addresses = {key: value for key, value in shipped.items() if key.endswith("_address")}
    assert len(addresses) == 5
    # Whoever reaches the management API can end the service: a socket, and an address of no use.
    assert addresses.pop("management_address").startswith("unix:")
    assert addresses.pop("grpc_management_address") == UNREACHABLE
    assert all("127.0.0.1" in address for address in addresses.values())
    assert shipped["enable_model_api"] == "false"
    assert shipped["allowed_urls"] == "^$"
    assert shipped["install_py_dep_per_model"] == "false"


def test_every_shipped_property_is_commented(tmp_path: Path) -> None:
    lines = Options(tmp_path / "any.mar", tmp_path).config.read_text().splitlines()
    for before, line in itertools.pairwise(lines):
        assert not line or line.startswith("#") or before.startswith("#"), line


def test_the_largest_allowed_reply_fits(tmp_path: Path) -> None:
    model_config = yaml.safe_load((REPOSITORY / "config" / "model-config.yaml").read_text())
    limits = HandlerConfig.from_mapping(model_config["handler"])
    num_pixels = limits.max_images * limits.max_pixels
    as_array = num_pixels * len("[255,255,255],")
    as_kserve_npy = limits.max_instances * num_pixels * 3 * 4 // 3
    largest_bytes = max(as_array, as_kserve_npy)
    shipped = properties(Options(tmp_path / "any.mar", tmp_path).config.read_text())
    assert int(shipped["max_response_size"]) > 1.05 * largest_bytes
    assert int(shipped["max_request_size"]) >= limits.max_body_bytes


def test_an_instance_overrides_the_shipped_configuration(tmp_path: Path) -> None:
    options = Options(
        tmp_path / "any.mar",
        tmp_path,
        Ports.starting_at(9080, 9070),
        address="0.0.0.0",
        auth=True,
        properties={"job_queue_size": "7"},
    )
    written = properties(options.properties_text(tmp_path / "management.sock"))
    assert written["inference_address"] == "http://0.0.0.0:9080"
    assert written["management_address"] == f"unix:{tmp_path}/management.sock"
    assert written["metrics_address"] == "http://127.0.0.1:9082"
    assert written["grpc_inference_port"] == "9070"
    assert written["disable_token_authorization"] == "false"
    assert Path(written["metrics_config"]).is_absolute()
    assert written["job_queue_size"] == "7"


def test_a_path_is_written_as_java_reads_it(tmp_path: Path) -> None:
    metrics = tmp_path / "späce \\ 🌀" / "metrics.yaml"
    options = Options(tmp_path / "any.mar", tmp_path, metrics_config=metrics)
    text = options.properties_text(tmp_path / "management.sock")
    assert text.isascii()
    assert properties(text)["metrics_config"].endswith(r"/sp\u00e4ce \\ \ud83c\udf00/metrics.yaml")


def test_another_management_address_may_be_chosen(tmp_path: Path) -> None:
    own = {"management_address": "http://127.0.0.1:9081"}
    options = Options(tmp_path / "any.mar", tmp_path, properties=own)
    assert options.management_address(tmp_path / "socket") == "http://127.0.0.1:9081"
    written = properties(options.properties_text(tmp_path / "socket"))
    assert written["management_address"] == "http://127.0.0.1:9081"


def test_nobody_can_connect_to_the_unreachable_address() -> None:
    """What keeps the gRPC management API closed: Linux listens there and connects nobody."""
    with socket.socket() as listening:
        listening.bind((UNREACHABLE, 0))
        listening.listen()
        port = listening.getsockname()[1]
        for address in (UNREACHABLE, "127.0.0.1", "0.0.0.0", f"::ffff:{UNREACHABLE}", "::1"):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            with socket.socket(family) as client:
                client.settimeout(5)
                with pytest.raises(OSError, match=r"unreachable|refused|assign"):
                    client.connect((address, port))


def test_fingerprint_changes_with_whatever_a_running_instance_depends_on(tmp_path: Path) -> None:
    config = tmp_path / "config.properties"
    config.write_text("a=1\n")
    options = Options(write_toy_archive(tmp_path), tmp_path, config=config)
    before = options.fingerprint()
    assert options.fingerprint() == before
    changed = [
        dataclasses.replace(options, auth=True).fingerprint(),
        dataclasses.replace(options, ports=Ports.starting_at(9080, 9070)).fingerprint(),
        dataclasses.replace(options, properties={"b": "2"}).fingerprint(),
    ]
    os.utime(options.archive, ns=(0, 0))
    changed.append(options.fingerprint())
    config.write_text("a=2\n")
    changed.append(options.fingerprint())
    assert len({before, *changed}) == 6
