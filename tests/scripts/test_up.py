"""What stands in front of instances: what it is told of them, and when it is started anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.archive.writer import ArchivePlan, write_archive
from scripts.cli import main, make_parser
from scripts.up import grpc_instances
from tests.support.archives import save_pipeline


def test_instances_of_a_fleet_that_are_down_get_grpc_once_they_are_back(tmp_path: Path) -> None:
    write_archive(ArchivePlan(save_pipeline(tmp_path / "pipeline"), "tiny"), tmp_path / "tiny.mar")
    arguments = make_parser().parse_args(
        [
            *("up", "--store", str(tmp_path), "--run-dir", str(tmp_path / "run")),
            *("--instances", "2", "--port", "18080", "--grpc-port", "17070"),
        ]
    )
    first, second = grpc_instances(arguments)
    assert first.model == second.model == "tiny"
    assert first.name != second.name
    assert len({first.grpc_port, second.grpc_port, first.http_port, second.http_port}) == 4
    assert first.http_port == 18080


def test_one_instance_that_is_down_gets_none(tmp_path: Path) -> None:
    arguments = make_parser().parse_args(["up", "--run-dir", str(tmp_path / "run")])
    assert grpc_instances(arguments) == ()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ("", "`require_keys: true`"),
        ("require_keys: false", "`require_keys: true`"),
        ("require_keys: true", "gRPC passes the gateway by"),
    ],
)
def test_nobody_comes_in_from_other_machines_without_a_key(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: str,
    problem: str,
) -> None:
    (tmp_path / "gateway.yaml").write_text(settings)
    up = ["up", "--store", str(tmp_path), "--run-dir", str(tmp_path / "run")]
    haproxy = ["--haproxy", "--haproxy-address", "0.0.0.0"]
    assert main([*up, *haproxy, "--gateway-config", str(tmp_path / "gateway.yaml")]) != 0
    assert problem in capsys.readouterr().err
    assert not list(tmp_path.glob("*.mar"))
