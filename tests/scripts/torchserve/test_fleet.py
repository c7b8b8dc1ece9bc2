"""scripts.torchserve.fleet: the instances that a fleet has, and its record."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from scripts.background import started_s
from scripts.errors import ServerError, UsageError
from scripts.torchserve.accelerators import bound_to_cores, chosen_gpus
from scripts.torchserve.fleet import FleetRecord, InstanceState, members, run_dirs
from scripts.torchserve.options import Options, Ports
from scripts.torchserve.state import StateDir


@pytest.fixture
def single(tmp_path: Path) -> Options:
    return Options(tmp_path / "toy.mar", tmp_path / "run", Ports(8080, 8082, 7070))


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with the GPUs 0 and 1."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 0\necho 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_one_instance_is_the_fleet(single: Options) -> None:
    assert members(single) == (single,)


def test_each_gpu_has_an_instance_that_sees_no_other(single: Options) -> None:
    first, second = members(single, gpus=("0", "3"))
    assert (first.state_dir, second.state_dir) == (single.state_dir / "0", single.state_dir / "1")
    assert (first.ports, second.ports) == (Ports(8080, 8082, 7070), Ports(8090, 8092, 7080))
    assert first.environment["CUDA_VISIBLE_DEVICES"] == "0"
    assert second.environment["CUDA_VISIBLE_DEVICES"] == "3"
    assert "\nnumber_of_gpu=1\n" in second.properties_text(Path("/socket"))


def test_one_gpu_that_is_named_is_bound(single: Options) -> None:
    (only,) = members(single, gpus=("1",))
    assert only.environment["CUDA_VISIBLE_DEVICES"] == "1"


def test_without_grpc_no_instance_has_it(tmp_path: Path) -> None:
    single = Options(tmp_path / "toy.mar", tmp_path / "run", Ports(8080, 8082, None))
    assert [each.ports.grpc_inference for each in members(single, num_instances=2)] == [None] * 2


def test_ports_that_would_meet_are_refused(tmp_path: Path) -> None:
    single = Options(tmp_path / "toy.mar", tmp_path / "run", Ports(8080, 8082, 8070))
    with pytest.raises(
        ServerError, match="port 8080 would be that of instance 0 and of instance 1"
    ):
        members(single, num_instances=2)
    with pytest.raises(ServerError, match="above 65535"):
        members(Options(tmp_path, tmp_path, Ports(65500, 65502, 7070)), num_instances=9)


@pytest.mark.parametrize("count", [0, -1, 65])
def test_so_many_instances_are_refused(single: Options, count: int) -> None:
    with pytest.raises(UsageError, match="allowed are 1 to 64"):
        members(single, num_instances=count)


def test_instances_on_the_cpu_share_its_cores() -> None:
    num_cores = len(os.sched_getaffinity(0))
    assert bound_to_cores(1, {}) == ({}, {})
    assert bound_to_cores(2, {})[1] == {"OMP_NUM_THREADS": str(max(1, num_cores // 2))}
    assert bound_to_cores(1000, {})[1] == {"OMP_NUM_THREADS": "1"}
    assert bound_to_cores(2, {"OMP_NUM_THREADS": "7"}) == ({}, {})


@pytest.mark.usefixtures("two_gpus")
def test_gpus_by_name() -> None:
    assert chosen_gpus("all", {}) == ("0", "1")
    assert chosen_gpus("all", {"CUDA_VISIBLE_DEVICES": "1"}) == ("1",)
    assert chosen_gpus("1", {}) == ("1",)
    assert chosen_gpus("MIG-1a2b/3, GPU-4c", {}) == ("MIG-1a2b/3", "GPU-4c")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("0,0", "names a GPU twice"),
        ("0,2", "there is no GPU 2; there are 0, 1"),
        ("", "wanted all, or a list"),
        ("0,,1", "wanted all, or a list"),
        ("cuda:0", "wanted all, or a list"),
    ],
)
def test_gpus_that_are_refused(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        chosen_gpus(text, {})


def test_where_there_is_no_gpu_the_cpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match="INSTANCES=2 runs two on the CPU"):
        chosen_gpus("all", {})


def test_a_record_knows_whether_its_supervisor_lives(tmp_path: Path) -> None:
    assert FleetRecord.read(tmp_path) is None
    assert run_dirs(tmp_path) == (tmp_path,)
    own = psutil.Process()
    instances = tuple(InstanceState(str(tmp_path / name)) for name in ("0", "1"))
    alive = FleetRecord(own.pid, started_s(own.pid), "x", instances)
    alive.write(tmp_path)
    assert FleetRecord.read(tmp_path) == alive
    assert alive.supervisor == own
    assert run_dirs(tmp_path) == (tmp_path / "0", tmp_path / "1")
    # Time is set, as it is after the start of many a machine.
    booted_s = psutil.boot_time() + 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psutil._psplatform, "boot_time", lambda: booted_s)
        assert psutil.Process().create_time() == pytest.approx(own.create_time() + 3)
        assert alive.supervisor == own
    # The number was given to somebody else since.
    assert FleetRecord(own.pid, started_s(own.pid) - 1, "x", instances).supervisor is None


def test_a_record_that_is_not_one_is_none(tmp_path: Path) -> None:
    for text in ("", "[]", "{}", '{"instances": [{"no": 1}]}'):
        (tmp_path / "fleet.json").write_text(text)
        assert FleetRecord.read(tmp_path) is None


def test_a_folder_that_held_a_fleet_may_hold_another(tmp_path: Path) -> None:
    StateDir(tmp_path / "run" / "0").prepare()
    (tmp_path / "run" / "fleet.log").touch()
    StateDir(tmp_path / "run").check_ownership()
    (tmp_path / "run" / "mine.txt").touch()
    with pytest.raises(ServerError, match="is not empty"):
        StateDir(tmp_path / "run").check_ownership()
