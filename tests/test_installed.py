"""The installed command: what the wheel holds, and that it does all of it from any folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from scripts import __version__
from scripts.build_archive import pack_embedded
from scripts.repository import REPOSITORY
from tests.support.ports import free_ports

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*wheel, str(REPOSITORY)], check=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command, installed by pip where nothing else of this repository is."""
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True)
    # The packages that it depends on are those of the tests' own environment.
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return venv / "bin" / "diffusers-torchserve"


def call(command: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [str(command), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


WHAT_RUNS = (
    *("gateway/**/*.py", "gateway/page/*", "handler/**/*.py", "scripts/**/*.py"),
    *("config/*", "demo/pipeline/**/*", "deploy/haproxy/*"),
)


def test_the_wheel_holds_what_runs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    wanted = {
        f"diffusers_torchserve/repository/{path.relative_to(REPOSITORY).as_posix()}"
        for pattern in WHAT_RUNS
        for path in REPOSITORY.glob(pattern)
        if path.is_file()
    }
    not_packed = ("gpu_check", "gpu_steps", "write_docs")
    wanted -= {f"diffusers_torchserve/repository/scripts/{name}.py" for name in not_packed}
    wanted |= {f"diffusers_torchserve/__{name}__.py" for name in ("init", "main")}
    about = f"diffusers_torchserve-{__version__}.dist-info"
    files = ("METADATA", "WHEEL", "entry_points.txt", "licenses/LICENSE", "RECORD")
    assert held == wanted | {f"{about}/{name}" for name in files}
    assert len(wanted) > 100


def test_it_knows_its_version_and_its_commands(command: Path, tmp_path: Path) -> None:
    answer = call(command, tmp_path, "--version")
    assert (answer.returncode, answer.stdout) == (0, f"diffusers-torchserve {__version__}\n")
    answer = call(command, tmp_path, "--help")
    assert answer.returncode == 0
    assert "diffusers-torchserve demo " in answer.stdout
    answer = call(command, tmp_path)
    assert answer.returncode == 2
    assert "the following arguments are required: COMMAND" in answer.stderr


def test_it_says_what_to_run_next_in_its_own_words(command: Path, tmp_path: Path) -> None:
    answer = call(command, tmp_path, "verify")
    assert answer.returncode == 2
    assert "`diffusers-torchserve pack` builds the embedded one" in answer.stderr
    assert "`diffusers-torchserve serve` starts one" in call(command, tmp_path, "status").stdout
    model = call(command, tmp_path, "pack", "--pipeline", "org/name")
    assert "packed by diffusers-torchserve pack --model-id org/name" in model.stderr
    (tmp_path / "model-store").mkdir()
    (tmp_path / "model-store" / "name.mar").touch()
    again = call(command, tmp_path, "pack", "--pipeline", "org/name", "--name", "name")
    assert "replaces it (diffusers-torchserve pack --force)" in again.stderr


def test_shells_complete_it(command: Path, tmp_path: Path) -> None:
    answer = call(command, tmp_path, "completion", "bash")
    assert answer.returncode == 0, answer.stderr
    (tmp_path / "completion").write_text(answer.stdout)
    script = (
        "source completion; COMP_WORDS=(diffusers-torchserve ver); COMP_CWORD=1; "
        "_shtab_diffusers_torchserve; echo ${COMPREPLY[*]}"
    )
    bash = ["bash", "--norc", "-c", script]
    shown = subprocess.run(bash, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shown.stdout == "verify\n"


def test_other_distributions_of_such_names_are_not_taken(command: Path, tmp_path: Path) -> None:
    (site,) = command.parent.parent.glob("lib/python*/site-packages")
    assert {path.name for path in site.iterdir()} & {"handler", "scripts", "config"} == set()
    for name in ("handler", "scripts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong one')\n")
    other = [str(command.parent / "python"), "-m", "diffusers_torchserve", "--version"]
    answer = subprocess.run(other, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.stdout == f"diffusers-torchserve {__version__}\n"


def test_it_packs_what_a_clone_packs(command: Path, tmp_path: Path) -> None:
    answer = call(command, tmp_path, "pack")
    assert answer.returncode == 0, answer.stderr
    packed = tmp_path / "model-store" / "stable_diffusion.mar"
    assert packed.read_bytes() == pack_embedded(tmp_path / "clone").read_bytes()
    assert call(command, tmp_path, "verify").returncode == 0
    facts = json.loads(call(command, tmp_path, "inspect", "--json").stdout)
    assert facts["pipeline"]["class"] == "StableDiffusionPipeline"
    before = packed.stat()
    assert call(command, tmp_path, "pack").returncode == 0
    assert packed.stat() == before


@pytest.mark.server
def test_it_serves_draws_and_stops(command: Path, tmp_path: Path) -> None:
    http, grpc = free_ports()
    ports = ["--port", str(http), "--grpc-port", str(grpc)]
    try:
        answer = call(command, tmp_path, "demo", *ports)
        assert answer.returncode == 0, answer.stderr + answer.stdout
        with Image.open(tmp_path / "demo.png") as picture:
            assert picture.size == (768, 768)
        status = json.loads(call(command, tmp_path, "status", "--json").stdout)
        assert status["ready"]
        assert Path(status["archive"]) == tmp_path / "model-store" / "stable_diffusion.mar"
        assert "is already serving" in call(command, tmp_path, "serve", *ports).stdout
        assert "GET" not in call(command, tmp_path, "logs").stderr
    finally:
        answer = call(command, tmp_path, "stop")
    assert answer.stdout.endswith("Stopped.\n")
    assert {path.name for path in tmp_path.iterdir()} == {".run", "model-store", "demo.png"}
