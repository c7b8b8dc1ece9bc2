"""What packing and opening cost, against cp and against the upstream way, in one run.

    python -m benchmarks.archive           # Stable Diffusion 2.1's shapes, 2.6 GB: 15 minutes
    python -m benchmarks.archive --small   # the demo's shapes: whether it runs, not how fast
    python -m benchmarks.archive --no-upstream    # only ours and cp: five minutes
    python -m benchmarks.archive --only-packing   # packing, verifying and cp: two minutes

It makes a pipeline of noise in a temporary folder, which takes 20 GB at its fullest and is removed
at the end. Packing takes turns with cp -r, so that a machine that changes its speed changes both;
each goes from page cache to page cache, and is then followed until its bytes are on the disk. It is
measured with the checks of the model and without; the checks take the same time whatever the size.
Servers run with ``speed: off``: what is measured is opening alone.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from blake3 import blake3
from isal.isal_zlib import crc32

from benchmarks.archive_figures import our_figures, packing_figures, upstream_figures
from benchmarks.report import Figure, write_report
from benchmarks.systems import System, one_at_a_time
from scripts.torchserve.options import Options, Ports
from scripts.torchserve.process import TorchServer

_CONFIG = Path("config/model-config.yaml")
_PACKING_ROUNDS = 5
_T = TypeVar("_T")


def step(name: str, folder: Path, *extra: str) -> dict[str, float]:
    """Run one step of benchmarks.archive_steps in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.archive_steps", name, str(folder), *extra],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """Seconds that `action` takes, begun with nothing to be written; and until all is on disk."""
    os.sync()
    begun_s = time.perf_counter()
    action()
    done_s = time.perf_counter()
    os.sync()
    return done_s - begun_s, time.perf_counter() - begun_s


def disk_bytes(*folders: Path) -> int:
    """Bytes that folders take on the disk, a link's target not counted."""
    return sum(
        path.lstat().st_blocks * 512
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    )


@functools.cache
def _bytecode() -> tempfile.TemporaryDirectory[str]:
    """Where compiled modules are kept, which some environments do not keep at all."""
    return tempfile.TemporaryDirectory(prefix="bench-bytecode-")


def run_script(name: str, *arguments: str) -> None:
    """Run a command of ours, the interpreter's start included, its modules compiled before."""
    environment = {
        **os.environ,
        "PYTHONPYCACHEPREFIX": _bytecode().name,
    }
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run(
        [sys.executable, "-m", f"scripts.{name}", *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )


def pack(pipeline: Path, out: Path, *extra: str) -> None:
    """Pack by the command line."""
    where = ("--pipeline", str(pipeline), "--name", "bench", "--out", str(out))
    run_script("build_archive", *where, *extra)


def tell(found: _T) -> _T:
    """Show a result at once: the next steps take minutes, and may fail."""
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def copy_away(pipeline: Path, target: Path) -> None:
    """Copy and remove, so that the pages which the next writer gets are there.

    Under a hypervisor the first touch of a page costs several times what copying it does.
    """
    subprocess.run(["cp", "-r", pipeline, target], check=True)
    shutil.rmtree(target)


def measure_packing(pipeline: Path, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of cp -r and of ours, by turns, and until both are on the disk; of verifying too."""
    found: dict[str, list[float]] = {}
    copy, store = folder / "copy", folder / "store"
    actions: dict[str, Callable[[], object]] = {
        "cp": lambda: subprocess.run(["cp", "-r", pipeline, copy], check=True),
        "ours": lambda: pack(pipeline, store, "--no-check"),
        "checked": lambda: pack(pipeline, store),
    }
    run_script("build_archive", "--help")
    for _ in range(rounds):
        for name, action in actions.items():
            shutil.rmtree(store, ignore_errors=True)
            copy_away(pipeline, copy)
            took_s, on_disk_s = timed(action)
            found.setdefault(f"{name}_s", []).append(took_s)
            found.setdefault(f"{name}_on_disk_s", []).append(on_disk_s)
            shutil.rmtree(copy, ignore_errors=True)
        archive = store / "bench.mar"
        for name, flags in (("verify_s", ["--quick"]), ("verify_models_s", [])):
            verify = functools.partial(run_script, "verify_archive", str(archive), *flags)
            found.setdefault(name, []).append(timed(verify)[0])
        found.setdefault("archive_bytes", []).append(archive.stat().st_size)
    return found


def measure_checksums(num_bytes: float) -> dict[str, float]:
    """Seconds that one core needs for the checksums alone, of bytes that are in its cache."""
    chunk = os.urandom(256 << 10)
    num_chunks = 1000
    found = {}
    for name, update in (
        ("blake3_s", blake3().update),
        ("sha256_s", hashlib.sha256().update),
        ("crc32_s", crc32),
    ):
        begun_s = time.perf_counter()
        for _ in range(num_chunks):
            update(chunk)
        took_s = time.perf_counter() - begun_s
        found[name] = took_s * num_bytes / (num_chunks * len(chunk))
    return found


def measure_upstream_packing(pipeline: Path, folder: Path) -> tuple[float, System]:
    """Seconds of the upstream example's two deflates, and what they made."""
    made: list[System] = []
    took_s, _ = timed(
        lambda: made.append(one_at_a_time("upstream", pipeline, folder, num_workers=1, settings={}))
    )
    (folder / "upstream" / "model.zip").unlink()
    return took_s, made[0]


def in_float16(upstream: Path, target: Path) -> Path:
    """The upstream archive with another precision in its configuration; not deflated again."""
    with zipfile.ZipFile(upstream) as source, zipfile.ZipFile(target, "x") as out:
        for name in source.namelist():
            if name == _CONFIG.name:
                config = yaml.safe_load(source.read(name))
                config["handler"]["dtype"] = "float16"
                out.writestr(name, yaml.safe_dump(config))
                continue
            with source.open(name) as member, out.open(name, "w", force_zip64=True) as copy:
                shutil.copyfileobj(member, copy, 1 << 20)
    return target


def measure_opening(archive: Path, folder: Path, which: str, rounds: int) -> list[dict[str, float]]:
    """Open what TorchServe would have unpacked, `rounds` times."""
    model_dir = folder / f"unpacked-{which}"
    shutil.unpack_archive(archive, model_dir, "zip")
    os.sync()
    found = []
    for _ in range(rounds):
        found.append(step(which, model_dir))
        shutil.rmtree(model_dir / "model", ignore_errors=True)
    shutil.rmtree(model_dir)
    return found


@contextmanager
def serving(archive: Path, state_dir: Path) -> Iterator[tuple[TorchServer, float, float]]:
    """Serve an archive: the server, and seconds to READY, of the worker's process and of it all."""
    os.sync()
    begun_s = time.time()
    server = TorchServer(Options(archive, state_dir, Ports.free()), identity=("bench", "1.0"))
    with server.running(timeout_s=900):
        ready_s = time.time()
        worker_s = process_age_s(int(str(server.workers()[0]["pid"])))
        yield server, worker_s, ready_s - begun_s


def process_age_s(pid: int) -> float:
    """Seconds since a process began, by the clock that does not jump."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def measure_serving(archive: Path, folder: Path, rounds: int) -> list[dict[str, float]]:
    """Seconds to READY, and the disk while serving: the archive and all that the server made."""
    state_dir = folder / "state"
    parts = [archive] if archive.is_dir() else []
    archive_bytes = 0 if parts else archive.stat().st_blocks * 512
    found = []
    for _ in range(rounds):
        with serving(archive, state_dir) as (_, worker_s, whole_s):
            used = archive_bytes + disk_bytes(state_dir, *parts)
        shutil.rmtree(state_dir)
        found.append({"worker_ready_s": worker_s, "ready_s": whole_s, "disk_bytes": used})
    return found


def pss_bytes(pids: list[int]) -> int:
    """Memory of processes, a page that several share counted once."""
    total = 0
    for pid in pids:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += int(rollup.split("\nPss:")[1].split()[0]) * 1024
    return total


def measure_second_worker(archive: Path, folder: Path) -> dict[str, float]:
    """Memory that a second process with the same weights adds, every weight read in both."""
    model_dir = folder / "shared"
    shutil.unpack_archive(archive, model_dir, "zip")
    command = [sys.executable, "-m", "benchmarks.archive_steps", "hold", str(model_dir)]
    running: list[subprocess.Popen[bytes]] = []
    memory = []
    try:
        for _ in range(2):
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            running.append(process)
            assert process.stdout is not None
            process.stdout.readline()
            memory.append(pss_bytes([each.pid for each in running]))
    finally:
        for process in running:
            process.communicate(b"\n")
        shutil.rmtree(model_dir)
    return {"first_bytes": memory[0], "second_adds_bytes": memory[1] - memory[0]}


def with_dtype(folder: Path, dtype: str) -> Path:
    """The shipped configuration with a precision, and with nothing done beyond opening."""
    config = yaml.safe_load(_CONFIG.read_text())
    config["handler"].update(dtype=dtype, speed="off")
    path = folder / f"{dtype}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def measure(
    folder: Path, *, is_small: bool, rounds: int, with_upstream: bool, only_packing: bool
) -> tuple[list[Figure], dict[str, Any]]:
    """Run everything in `folder`; return the figures and what they were computed from."""
    pipeline = folder / "pipeline"
    weights = step("make", pipeline, *(["small"] if is_small else []))["bytes"]
    raw: dict[str, Any] = {"weights_bytes": weights, "load_before": os.getloadavg()[0]}
    raw["checksums"] = tell(measure_checksums(weights))
    raw["packing"] = tell(measure_packing(pipeline, folder, max(rounds, _PACKING_ROUNDS)))
    if only_packing:
        raw["load_after"] = os.getloadavg()[0]
        return packing_figures(raw), raw
    store = folder / "store"
    ours = store / "bench.mar"
    raw["opening"] = tell(
        [each["seconds"] for each in measure_opening(ours, folder, "open", rounds)]
    )
    raw["second_worker"] = tell(measure_second_worker(ours, folder))
    for name, dtype, extra in (
        ("serving_float32", "float32", ()),
        ("serving_float16", "float16", ()),
        ("serving_dir", "float16", ("--format", "dir")),
    ):
        shutil.rmtree(store)
        config = str(with_dtype(folder, dtype))
        pack(pipeline, store, "--no-check", "--config", config, *extra)
        archive = store / "bench" if extra else ours
        raw[name] = tell(measure_serving(archive, folder, rounds))
    shutil.rmtree(store)
    if with_upstream:
        raw["upstream_packing_s"], upstream = measure_upstream_packing(pipeline, folder)
        tell(raw["upstream_packing_s"])
        opened = measure_opening(upstream.archive, folder, "open-upstream", rounds)
        raw["upstream_opening"] = tell(opened)
        raw["upstream_float32"] = tell(measure_serving(upstream.archive, folder, rounds))
        in_half = in_float16(upstream.archive, folder / "bench-float16.mar")
        raw["upstream_float16"] = tell(measure_serving(in_half, folder, rounds))
    raw["load_after"] = os.getloadavg()[0]
    return [*our_figures(raw), *(upstream_figures(raw) if with_upstream else ())], raw


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--small", action="store_true", help="a small pipeline, to try it out")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3; packing at least 5")
    less = parser.add_mutually_exclusive_group()
    less.add_argument("--no-upstream", action="store_true", help="leave the upstream way out")
    less.add_argument("--only-packing", action="store_true", help="packing and verifying alone")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        figures, raw = measure(
            Path(folder),
            is_small=arguments.small,
            rounds=arguments.rounds,
            with_upstream=not arguments.no_upstream,
            only_packing=arguments.only_packing,
        )
    file_name = "archive" + "-small" * arguments.small
    file_name += "-ours" * arguments.no_upstream + "-packing" * arguments.only_packing
    write_report("archive", figures, {"raw": raw}, file_name=file_name)


if __name__ == "__main__":
    main()
