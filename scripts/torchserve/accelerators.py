"""Which accelerators a fleet is spread over, and how an instance is bound to one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping

from scripts.errors import UsageError
from scripts.hints import option, to_run

__all__ = ["bound_to_cores", "bound_to_gpu", "chosen_gpus"]

_VISIBLE = "CUDA_VISIBLE_DEVICES"
# An index, or what nvidia-smi -L calls a GPU or a part of one.
_GPU = re.compile(r"[0-9]{1,3}|(GPU|MIG)-[0-9A-Za-z/-]+")
_QUERY = ("nvidia-smi", "--query-gpu=index", "--format=csv,noheader")
_QUERY_TIMEOUT_S = 30.0


def chosen_gpus(text: str, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the GPUs that ``all`` or a list such as ``0,1`` means.

    ``all`` are those that this process may use: those of CUDA_VISIBLE_DEVICES where that is set.

    Raises: UsageError, where it is not a list, names one twice, or one that is not there.
    """
    present = _present()
    if text == "all":
        visible = environment.get(_VISIBLE)
        gpus = present if visible is None else tuple(filter(None, visible.split(",")))
        if not gpus:
            raise UsageError(
                f"{option('gpus')}all: nvidia-smi finds no NVIDIA GPU that may be used here; "
                f"{to_run('serve', instances='2')} runs two on the CPU"
            )
        return gpus
    gpus = tuple(each.strip() for each in text.split(","))
    if not all(_GPU.fullmatch(each) for each in gpus):
        raise UsageError(f"{option('gpus')}{text}: wanted all, or a list such as 0,1")
    if len(set(gpus)) < len(gpus):
        raise UsageError(f"{option('gpus')}{text} names a GPU twice")
    missing = [each for each in gpus if each.isdigit() and present and each not in present]
    if missing:
        raise UsageError(
            f"{option('gpus')}{text}: there is no GPU {', '.join(missing)}; "
            f"there are {', '.join(present)}"
        )
    return gpus


def bound_to_gpu(gpu: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return properties and environment of an instance that sees `gpu` and no other.

    TorchServe numbers what it is told there is: one GPU, which is then number 0 for its worker.
    """
    return {"number_of_gpu": "1"}, {_VISIBLE: gpu, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def bound_to_cores(
    num_instances: int, environment: Mapping[str, str] = os.environ
) -> tuple[dict[str, str], dict[str, str]]:
    """Return properties and environment of one of several instances on the CPU.

    Each takes its share of the cores; ``num_threads`` of model-config.yaml says something else.
    """
    if num_instances == 1 or "OMP_NUM_THREADS" in environment:
        return {}, {}
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return {}, {"OMP_NUM_THREADS": str(max(1, num_cores // num_instances))}


def _present() -> tuple[str, ...]:
    """The indices of this machine's GPUs; none where nvidia-smi says nothing."""
    if shutil.which(_QUERY[0]) is None:
        return ()
    try:
        run = subprocess.run(
            _QUERY, capture_output=True, text=True, check=False, timeout=_QUERY_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    lines = [line.strip() for line in run.stdout.splitlines()]
    return tuple(line for line in lines if line.isdigit()) if run.returncode == 0 else ()
