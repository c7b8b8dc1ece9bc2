"""What packing and opening cost, against cp and against the upstream way, in one run.

    python -m benchmarks.archive           # Stable Diffusion 2.1's shapes, 2.6 GB: ten minutes
    python -m benchmarks.archive --small   # the demo's shapes: whether it runs, not how fast
    python -m benchmarks.archive --no-upstream    # only ours and cp: two minutes

It makes a pipeline of noise in a temporary folder, which takes 20 GB at its fullest and is removed
at the end. Packing takes turns with cp -r, each after a sync, so that a machine that changes its
speed changes both. Servers run with ``speed: off``: what is measured is opening, and by default the
handler also draws a picture before it is READY, which the upstream example does not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil
import yaml

from benchmarks.report import Figure, Spread, write_report
from benchmarks.systems import System, one_at_a_time
from scripts.instance import Options, Ports
from scripts.server import TorchServer

_CONFIG = Path("config/model-config.yaml")
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


def timed(action: Callable[[], object]) -> float:
    """Seconds that `action` takes, after all earlier writes have reached the disk."""
    os.sync()
    begun_s = time.perf_counter()
    action()
    return time.perf_counter() - begun_s


def disk_bytes(*folders: Path) -> int:
    """Bytes that folders take on the disk, a link's target not counted."""
    return sum(
        path.lstat().st_blocks * 512
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    )


def pack(pipeline: Path, out: Path, *extra: str) -> None:
    """Pack as a user does: the command line, the interpreter's start included."""
    command = [sys.executable, "-m", "scripts.build_archive", "--pipeline", str(pipeline)]
    subprocess.run(
        [*command, "--name", "bench", "--out", str(out), *extra],
        check=True,
        stderr=subprocess.DEVNULL,
    )


def tell(found: _T) -> _T:
    """Show a result at once: the next steps take minutes, and may fail."""
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def measure_packing(pipeline: Path, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of cp -r and of ours, by turns."""
    found: dict[str, list[float]] = {"cp_s": [], "ours_s": []}
    copy, store = folder / "copy", folder / "store"
    for _ in range(rounds):
        found["cp_s"].append(
            timed(lambda: subprocess.run(["cp", "-r", pipeline, copy], check=True))
        )
        shutil.rmtree(copy)
        shutil.rmtree(store, ignore_errors=True)
        found["ours_s"].append(timed(lambda: pack(pipeline, store)))
    return found


def measure_upstream_packing(pipeline: Path, folder: Path) -> tuple[float, System]:
    """Seconds of the upstream example's two deflates, and what they made."""
    made: list[System] = []
    took_s = timed(
        lambda: made.append(one_at_a_time("upstream", pipeline, folder, num_workers=1, settings={}))
    )
    (folder / "upstream" / "model.zip").unlink()
    return took_s, made[0]


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
        worker = psutil.Process(int(str(server.workers()[0]["pid"])))
        yield server, ready_s - worker.create_time(), ready_s - begun_s


def measure_serving(archive: Path, folder: Path, which: str) -> dict[str, float]:
    """Seconds to READY, and the disk while serving: the archive and all that the server made."""
    state_dir = folder / f"state-{which}"
    with serving(archive, state_dir) as (_, worker_s, whole_s):
        parts = [archive] if archive.is_dir() else []
        archive_bytes = 0 if parts else archive.stat().st_blocks * 512
        used = archive_bytes + disk_bytes(state_dir, *parts)
    shutil.rmtree(state_dir)
    return {"worker_ready_s": worker_s, "ready_s": whole_s, "disk_bytes": used}


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
    folder: Path, *, is_small: bool, rounds: int, with_upstream: bool
) -> tuple[list[Figure], dict[str, Any]]:
    """Run everything in `folder`; return the figures and what they were computed from."""
    pipeline = folder / "pipeline"
    weights = step("make", pipeline, *(["small"] if is_small else []))["bytes"]
    raw: dict[str, Any] = {"weights_bytes": weights, "load_before": os.getloadavg()[0]}

    raw["packing"] = packing = tell(measure_packing(pipeline, folder, rounds))
    store = folder / "store"
    ours = store / "bench.mar"
    raw["opening"] = tell(
        [each["seconds"] for each in measure_opening(ours, folder, "open", rounds)]
    )
    raw["second_worker"] = second = tell(measure_second_worker(ours, folder))
    for name, dtype, extra in (
        ("serving_float32", "float32", ()),
        ("serving_float16", "float16", ()),
        ("serving_dir", "float16", ("--format", "dir")),
    ):
        shutil.rmtree(store)
        pack(pipeline, store, "--config", str(with_dtype(folder, dtype)), *extra)
        archive = store / "bench" if extra else ours
        raw[name] = tell(measure_serving(archive, folder, name))
    shutil.rmtree(store)
    if with_upstream:
        raw["upstream_packing_s"], upstream = measure_upstream_packing(pipeline, folder)
        tell(raw["upstream_packing_s"])
        opened = measure_opening(upstream.archive, folder, "open-upstream", 1)
        raw["upstream_opening"] = tell(opened)
        raw["upstream_serving"] = tell(measure_serving(upstream.archive, folder, "upstream"))
    raw["load_after"] = os.getloadavg()[0]
    figures = _figures(weights, packing, second, raw)
    return [*figures, *(_upstream_figures(weights, packing, raw) if with_upstream else ())], raw


def _figures(
    weights: float, packing: dict[str, list[float]], second: dict[str, float], raw: dict[str, Any]
) -> list[Figure]:
    pairs = zip(packing["ours_s"], packing["cp_s"], strict=True)
    return [
        Figure("pack: ours", Spread(tuple(packing["ours_s"])), "s"),
        Figure("pack: cp -r", Spread(tuple(packing["cp_s"])), "s"),
        Figure("pack: ours / cp -r", Spread(tuple(a / b for a, b in pairs)), "x", at_most=1.5),
        Figure("open: ours", Spread(tuple(raw["opening"])), "s"),
        Figure("worker READY: ours, float32", _one(raw["serving_float32"]["worker_ready_s"]), "s"),
        Figure("worker READY: ours, float16", _one(raw["serving_float16"]["worker_ready_s"]), "s"),
        Figure(
            "disk while serving / weights: .mar",
            _one(raw["serving_float32"]["disk_bytes"] / weights),
            "x",
            at_most=2.05,
        ),
        Figure(
            "disk while serving / weights: folder",
            _one(raw["serving_dir"]["disk_bytes"] / weights),
            "x",
            at_most=1.05,
        ),
        Figure(
            "memory: a second worker / weights",
            _one(second["second_adds_bytes"] / weights),
            "x",
            at_most=0.2,
        ),
    ]


def _upstream_figures(
    weights: float, packing: dict[str, list[float]], raw: dict[str, Any]
) -> list[Figure]:
    packing_s = raw["upstream_packing_s"]
    open_s = raw["upstream_opening"][0]["seconds"]
    ready_s = raw["upstream_serving"]["worker_ready_s"]
    return [
        Figure("pack: upstream", _one(packing_s), "s"),
        Figure(
            "pack: upstream / ours",
            Spread(tuple(packing_s / each for each in packing["ours_s"])),
            "x",
            at_least=20,
        ),
        Figure("open: upstream", _one(open_s), "s"),
        Figure(
            "open: upstream / ours",
            Spread(tuple(open_s / each for each in raw["opening"])),
            "x",
            at_least=15,
        ),
        Figure("worker READY: upstream, float32", _one(ready_s), "s"),
        Figure(
            "worker READY: upstream / ours, both float32",
            _one(ready_s / raw["serving_float32"]["worker_ready_s"]),
            "x",
            at_least=3,
        ),
        Figure(
            "disk while serving / weights: upstream",
            _one(raw["upstream_serving"]["disk_bytes"] / weights),
            "x",
        ),
    ]


def _one(value: float) -> Spread:
    return Spread((value,))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--small", action="store_true", help="a small pipeline, to try it out")
    parser.add_argument("--rounds", type=int, default=3, help="of what is repeated (default: 3)")
    parser.add_argument("--no-upstream", action="store_true", help="leave the upstream way out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        figures, raw = measure(
            Path(folder),
            is_small=arguments.small,
            rounds=arguments.rounds,
            with_upstream=not arguments.no_upstream,
        )
    name = "archive" + "-small" * arguments.small + "-ours" * arguments.no_upstream
    write_report(name, figures, {"raw": raw})


if __name__ == "__main__":
    main()
