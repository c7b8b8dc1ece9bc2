"""In-flight batching on one GPU, against diffusers one at a time, eager and compiled.

    python -m benchmarks.gpu                       # SD 1.5 512², SD 2.1 768², SDXL 1024²
    python -m benchmarks.gpu --short --speed safe --systems eager,in-flight   # compiles nothing
    python -m benchmarks.gpu --models sd21 --in-flight 16
    python -m benchmarks.gpu --tiny                # a dry run on the CPU, anywhere

Random weights in the models' exact shapes, float16, guided requests of 30, 50 and 70 steps, 50 on
average; every system gets the same ones. Operations are counted from shapes, twice a row where
guidance doubles it. The engine's own share is what its loop spends outside of the model and of the
pipelines' code, as the host sees it.

The file of results is written anew after each run, so that what was measured is kept whatever ends
the rest. A system that fails is named there, and the next one is measured.
"""

from __future__ import annotations

import argparse
import functools
import gc
import re
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_systems import (
    Run,
    Work,
    run_alone,
    run_compiled,
    run_in_flight,
    run_short_request,
)
from benchmarks.report import Figure, Spread, write_report
from benchmarks.shapes import MODELS, Model, build, count_flops
from handler.acceleration.speed import SpeedUp, make_plan
from handler.config import HandlerConfig

STEPS = (30, 50, 70)
STEPS_SHORT = (20, 30, 40)
# What "a picture" means where pictures a second are told.
PICTURE_STEPS = 50
SYSTEMS = ("eager", "compiled", "in-flight", "short-request")
# Dense, half precision, of the chip's name as torch tells it.
PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10G": 70,
    "A10": 125,
    "4090": 165,
}
TARGETS = {
    "SD 1.5": {"speedup": 1.8},
    "SD 2.1": {"speedup": 1.15, "images_per_s": 2.2},
    "SDXL": {"speedup": 1.0, "short": 0.4},
}
"""Of one H100: in flight against compiled one at a time; pictures a second; what a short request
takes of the time that it would wait behind the others."""


def measure(
    model: Model,
    device: torch.device,
    *,
    speed: str,
    in_flight: Sequence[int],
    rounds: int,
    mode: str = "reduce-overhead",
    backend: str = "inductor",
    steps: Sequence[int] = STEPS,
    peak_flops: float | None = None,
    systems: Collection[str] = SYSTEMS,
    tell: Callable[[Run], object] = lambda run: None,
    **tools: Any,
) -> list[Run]:
    """Those of `systems` on one model; what fails is left out of the runs and goes to the log.

    `tell` is called with each run as it ends. `tools` are `SpeedUp`'s compiler and recorder.
    """
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    pipeline = build(model, device, dtype)
    work = Work(model, pipeline, device, count_flops(model), peak_flops, steps)
    count = len(steps) * rounds
    runs: list[Run] = []
    expected: list[np.ndarray[Any, Any]] = []

    def attempt(what: str, system: Callable[[], Run]) -> None:
        _forget_peak_memory()
        try:
            run = system()
        except Exception as error:
            traceback.print_exc()
            run = Run(what, 0.0, 0.0, None, 0.0, failure=f"{type(error).__name__}: {error}")
        else:
            runs.append(run)
            _tell(model, run)
        tell(run)

    def eager() -> Run:
        run, pictures = run_alone(work, "eager, one at a time", count)
        expected.extend(pictures)
        return run

    if "eager" in systems:
        attempt("eager, one at a time", eager)
    if "compiled" in systems:
        attempt("compiled, one at a time", lambda: run_compiled(work, count, mode, backend))
    plan = make_plan(HandlerConfig(speed=speed), pipeline, device, dtype)

    def sped_up(num_in_flight: int) -> SpeedUp:
        torch.compiler.reset()
        return SpeedUp(pipeline, plan, 2 * num_in_flight, **tools)

    def in_company(num: int) -> Run:
        return run_in_flight(work, sped_up(num), num, rounds, expected)

    for num in in_flight if "in-flight" in systems else ():
        attempt(f"in flight, {num}", functools.partial(in_company, num))
    if "short-request" in systems:
        num_long = max(1, min(4, max(in_flight)))
        attempt("a short request", lambda: run_short_request(work, sped_up(num_long + 1), num_long))
    return runs


def figures_of(model: Model, runs: Sequence[Run]) -> list[Figure]:
    """What a model's runs say, and their targets."""
    targets = TARGETS.get(model.name, {})
    figures = []
    for run in runs:
        title = f"{model.name} {model.size_px}px: {run.name}"
        figures.append(Figure(title, Spread((run.images_per_s,)), "images/s"))
        figures.append(Figure(f"{title}: a step", Spread((run.ms_per_step,)), "ms"))
        if run.peak_share is not None:
            figures.append(Figure(f"{title}: of peak", Spread((100 * run.peak_share,)), "%"))
    for run in runs:
        if run.of_waiting is not None:
            name = f"{model.name}: {run.name}, of the time after them"
            figures.append(
                Figure(name, Spread((run.of_waiting,)), "x", at_most=targets.get("short"))
            )
    in_flight = [run for run in runs if run.own_share is not None]
    if not in_flight:
        return figures
    # By steps, of which every system had as many a picture on average but for the last few.
    best = min(run.ms_per_step for run in in_flight)
    for kind, bound in (("compiled", targets.get("speedup")), ("eager", None)):
        for baseline in (run for run in runs if run.name.startswith(kind)):
            gain = Spread((baseline.ms_per_step / best,))
            name = f"{model.name}: in flight / {kind} one at a time"
            figures.append(Figure(name, gain, "x", bound))
    saturated = Spread((1000 / (PICTURE_STEPS * best),))
    name = f"{model.name}: saturated, pictures of {PICTURE_STEPS} steps"
    figures.append(Figure(name, saturated, "images/s", targets.get("images_per_s")))
    own = Spread(tuple(100 * run.own_share for run in in_flight if run.own_share is not None))
    figures.append(Figure(f"{model.name}: the engine's own share", own, "%", at_most=5.0))
    return figures


def slug(chip: str) -> str:
    """The name of a chip as a part of a file's name."""
    short = chip.removeprefix("NVIDIA ").lower()
    return "-".join(re.findall(r"[a-z0-9]+", short)) or "unknown"


def peak_tflops(device_name: str) -> float | None:
    """The chip's dense peak in half precision; None for a chip that is not in the table."""
    found = [name for name in PEAK_TFLOPS if name in device_name]
    return PEAK_TFLOPS[max(found, key=len)] if found else None


def _forget_peak_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _tell(model: Model, run: Run) -> None:
    facts: Mapping[str, Any] = asdict(run)
    told = {k: f"{v:.3g}" for k, v in facts.items() if isinstance(v, float)}
    print(f"{model.name}: {run.name}: {told}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", default="sd15,sd21,sdxl", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--in-flight", default="1,4,8,16", help="requests under way")
    parser.add_argument("--rounds", type=int, default=3, help="times as many are drawn")
    parser.add_argument("--steps", default=",".join(map(str, STEPS)), help="of the requests")
    parser.add_argument("--speed", default="max", choices=("off", "safe", "max"), help="of ours")
    parser.add_argument("--mode", default="reduce-overhead", help="of the compiled baseline")
    parser.add_argument("--backend", default="inductor", help="of the compiled baseline")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--peak-tflops", type=float, help="of the chip, if it is not in the table")
    parser.add_argument("--name", help="of the file of results (gpu-<chip>)")
    parser.add_argument("--folder", type=Path, help="of results (benchmarks/results)")
    parser.add_argument(
        "--short", action="store_true", help="one round, 8 in flight, 20 to 40 steps: minutes"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU: a dry run")
    return parser


def _read(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with what ``--short`` and ``--tiny`` stand for."""
    parser = _parser()
    short = {"in_flight": "8", "rounds": 1, "steps": ",".join(map(str, STEPS_SHORT))}
    tiny = {
        "models": "tiny,tinyxl",
        "device": "cpu",
        "speed": "safe",
        "backend": "eager",
        "in_flight": "2",
        "rounds": 1,
        "steps": "2,3,4",
    }
    first = parser.parse_args(argv)
    parser.set_defaults(**(short if first.short else {}), **(tiny if first.tiny else {}))
    arguments = parser.parse_args(argv)
    for option, known in (("models", MODELS), ("systems", SYSTEMS)):
        given = getattr(arguments, option).split(",")
        if unknown := [name for name in given if name not in known]:
            parser.error(f"--{option} {','.join(unknown)}: known are {', '.join(known)}")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --tiny is a dry run on the CPU")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    arguments = _read(argv)
    if arguments.tiny:
        torch.set_num_threads(1)
    device = torch.device(arguments.device)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = arguments.peak_tflops or peak_tflops(chip)
    settings = {key: str(value) for key, value in vars(arguments).items()}
    runs: dict[str, list[Run]] = {}

    def write(*, is_done: bool = False) -> Path:
        figures = [
            figure
            for name, each in runs.items()
            for figure in figures_of(MODELS[name], [run for run in each if run.failure is None])
        ]
        details: dict[str, Any] = {"settings": settings, "chip": chip, "peak_tflops": peak}
        details |= {MODELS[name].name: [asdict(run) for run in each] for name, each in runs.items()}
        return write_report(
            "gpu",
            figures,
            {**details, "is_complete": is_done},
            file_name=arguments.name or f"gpu-{slug(chip)}",
            folder=arguments.folder,
            is_quiet=not is_done,
        )

    def keep(name: str, run: Run) -> None:
        runs.setdefault(name, []).append(run)
        write()

    for name in arguments.models.split(","):
        measure(
            MODELS[name],
            device,
            speed=arguments.speed,
            in_flight=[int(n) for n in arguments.in_flight.split(",")],
            rounds=arguments.rounds,
            mode=arguments.mode,
            backend=arguments.backend,
            steps=[int(n) for n in arguments.steps.split(",")],
            peak_flops=None if peak is None else peak * 1e12,
            systems=arguments.systems.split(","),
            tell=functools.partial(keep, name),
        )
        _forget_peak_memory()
    print(f"\n{write(is_done=True)}")
    return int(any(run.failure is not None for each in runs.values() for run in each))


if __name__ == "__main__":
    raise SystemExit(main())
