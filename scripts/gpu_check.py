"""Check the CUDA path on the machine that it runs on: tests, a real server, short benchmarks.

Each step is a process of its own with a time limit. One that fails, or is ended at its limit, is
named in the table at the end, and the next one runs. What they print and measure is in a folder
from the moment on that it is there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.command import Command
from scripts.console import DONE, FAILED
from scripts.errors import UsageError
from scripts.repository import REPOSITORY

__all__ = ["STEPS", "Outcome", "Step", "main", "run_steps"]

TOTAL_S = 480.0
# A server that is told to end gives its ports back first.
_GRACE_S = 10.0
_LEAST_S = 3.0
_EXAMPLES = """\
examples:
  %(prog)s                                    all steps on the GPU, at most eight minutes
  %(prog)s --only machine,tests,benchmarks    on a machine that has neither Java nor TorchServe
  %(prog)s --device cpu                       the same steps, small, anywhere
"""


@dataclass(frozen=True, slots=True)
class Step:
    """One process of this Python, and for how long it may run.

    In `arguments`, words in braces stand for what the device decides.
    """

    name: str
    arguments: tuple[str, ...]
    limit_s: float
    compiles: bool = False
    """Whether a compiler takes most of its time: reaching the limit then says little."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a step."""

    name: str
    result: str
    """``ok``, ``failed``, ``ended at its limit`` or ``no time left``."""
    seconds: float
    limit_s: float
    told: str
    """The last line that it printed."""

    @property
    def is_ok(self) -> bool:
        """Whether it ended by itself, and well."""
        return self.result == "ok"


_PYTEST = ("-m", "pytest", "-q", "-rsP", "-p", "no:cacheprovider", "-W", "default", "{tests}")
_BENCHMARK = ("-m", "benchmarks.gpu", "{size}", "--device", "{device}", "--folder", "{folder}")
_OURS = ("-m", "scripts.gpu_steps", "--device", "{device}", "--folder", "{folder}")
_COMPILING = "compiled or speed_max"

STEPS = (
    Step("machine", (*_OURS, "machine"), 30),
    Step("tests", (*_PYTEST, "-m", "{marker}", "-k", f"not ({_COMPILING})"), 110),
    Step("server", (*_OURS, "server"), 75),
    Step(
        "benchmarks",
        (
            *(*_BENCHMARK, "--models", "{models}", "--speed", "safe", "--name", "gpu-safe"),
            *("--systems", "eager,in-flight,short-request"),
        ),
        80,
    ),
    Step("compiled-tests", (*_PYTEST, "-m", "{marker}", "-k", _COMPILING), 70, compiles=True),
    Step(
        "compiled-benchmarks",
        (
            *(*_BENCHMARK, "--models", "{model}", "--speed", "{fastest}", "--name", "gpu-max"),
            *("--systems", "compiled,in-flight"),
        ),
        110,
        compiles=True,
    ),
)
_ON = {
    "cuda": {"marker": "gpu", "size": "--short", "fastest": "max"}
    | {"models": "sd21,sd15,sdxl", "model": "sd21"},
    # The speed is that of the dry run: nothing is compiled on a machine that only tries the steps.
    "cpu": {"marker": "not gpu", "size": "--tiny", "fastest": "safe"}
    | {"models": "tiny", "model": "tiny"},
}


def run_steps(
    steps: Sequence[Step],
    folder: Path,
    words: Mapping[str, str],
    *,
    total_s: float = TOTAL_S,
    limit_s: float | None = None,
) -> list[Outcome]:
    """Run `steps` one after the other; write ``log.txt`` and ``report.json`` as they end.

    `limit_s` takes the place of each step's own limit.
    """
    ends_s = time.monotonic() + total_s
    outcomes: list[Outcome] = []
    for step in steps:
        left_s = ends_s - time.monotonic() - _GRACE_S
        allowed_s = min(limit_s or step.limit_s, left_s)
        hint = ", most of it for a compiler" if step.compiles else ""
        print(f"{step.name}: at most {max(0.0, allowed_s):.0f} s{hint} ...", flush=True)
        if allowed_s < _LEAST_S and limit_s is None:
            outcomes.append(Outcome(step.name, "no time left", 0.0, step.limit_s, ""))
        else:
            outcomes.append(_run(step, folder, words, allowed_s))
        print(f"{step.name}: {outcomes[-1].result}, {outcomes[-1].seconds:.1f} s", flush=True)
        _write_report(folder, outcomes)
    return outcomes


def _run(step: Step, folder: Path, words: Mapping[str, str], limit_s: float) -> Outcome:
    command = [sys.executable, *(argument.format(**words) for argument in step.arguments)]
    started_s = time.monotonic()
    with (folder / "log.txt").open("ab+") as log:
        log.write(f"\n===== {step.name}: {' '.join(command)}\n".encode())
        log.flush()
        begins = log.tell()
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        try:
            result = "ok" if process.wait(limit_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            result = "ended at its limit"
        finally:
            _end(process)
        log.seek(begins)
        lines = [line for line in log.read().decode("utf-8", "replace").splitlines() if line]
    seconds = round(time.monotonic() - started_s, 1)
    return Outcome(step.name, result, seconds, limit_s, lines[-1][:200] if lines else "")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a step and all that it started: at first by asking."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _write_report(folder: Path, outcomes: Sequence[Outcome]) -> None:
    report: dict[str, Any] = {"steps": [asdict(outcome) for outcome in outcomes]}
    for name in ("machine", "server", "gpu-safe", "gpu-max"):
        with suppress(OSError, ValueError):
            report[name] = json.loads((folder / f"{name}.json").read_text())
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def _table(folder: Path, outcomes: Sequence[Outcome]) -> str:
    lines = [
        f"{outcome.name:<20} {outcome.result:<18} {outcome.seconds:>6.1f} s   {outcome.told}"
        for outcome in outcomes
    ]
    for name in ("gpu-safe", "gpu-max"):
        with suppress(OSError, ValueError, KeyError):
            for figure in json.loads((folder / f"{name}.json").read_text())["figures"]:
                holds = {True: "yes", False: "NO"}.get(figure["holds"], "")
                told = f"{figure['median']:.3g} {figure['unit']}"
                target = f"{figure['target']:<8}{holds}"
                lines.append(f"{name}  {figure['name']:<64} {told:<16} {target}".rstrip())
    return "\n".join(lines)


def _check(arguments: argparse.Namespace) -> int:
    names = [step.name for step in STEPS]
    wanted = arguments.only.split(",") if arguments.only else names
    if unknown := [name for name in wanted if name not in names]:
        raise UsageError(f"--only {','.join(unknown)}: the steps are {', '.join(names)}")
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (*folder.glob("*.json"), folder / "log.txt"):
        stale.unlink(missing_ok=True)
    words = {
        **_ON[arguments.device],
        "device": arguments.device,
        "folder": str(folder),
        "tests": arguments.tests,
    }
    steps = [step for step in STEPS if step.name in wanted]
    outcomes = run_steps(steps, folder, words, total_s=arguments.total_s, limit_s=arguments.limit_s)
    print(f"\n{_table(folder, outcomes)}\n\n{folder}: log.txt, report.json and each step's results")
    return DONE if all(outcome.is_ok for outcome in outcomes) else FAILED


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(step.name for step in STEPS)
    parser.add_argument("--only", help=f"some of the steps: {names}")
    parser.add_argument("--device", choices=tuple(_ON), default="cuda", help="default: cuda")
    parser.add_argument("--folder", type=Path, default=Path(".gpu-check"), help=".gpu-check")
    parser.add_argument("--total-s", type=float, default=TOTAL_S, help="for all steps (480)")
    parser.add_argument("--limit-s", type=float, help="for each step, in place of its own limit")
    parser.add_argument("--tests", default="tests/gpu", help="which tests (tests/gpu)")


_GPU_CHECK = Command(
    "gpu-check",
    "check the CUDA path on this machine: tests, a real server, short benchmarks",
    _check,
    _add_arguments,
    examples=_EXAMPLES,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps; return 0 if all went well, 1 if not, 2 if called wrongly."""
    return _GPU_CHECK.main(argv, "gpu_check")


if __name__ == "__main__":
    sys.exit(main())
