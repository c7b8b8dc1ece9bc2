"""The host and its device: who waits for whom, and what is left when the device is lost."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from handler.engine import InFlightEngine
from scripts.repository import REPOSITORY
from tests.support.host_waits import host_waits, ours
from tests.support.on_device import kwargs_of, pipeline_of

NUM_REQUESTS = 3


def in_step(name: str, index: int, num_steps: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(index)
    return {**kwargs_of(name, 0, num_inference_steps=num_steps), "generator": generator}


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3"])
def test_a_steady_tick_waits_for_nothing(name: str, device: torch.device) -> None:
    """Beyond what the pipelines and their schedulers ask for themselves."""
    engine = InFlightEngine(pipeline_of(name, device), proves_ahead=True)
    tickets = [engine.submit(in_step(name, i, 12)) for i in range(NUM_REQUESTS)]
    while min(ticket.num_steps_done for ticket in tickets) < 4:
        engine.step()
    merged = engine.counters.merged_forwards
    with host_waits() as waits:
        for _ in range(4):
            engine.step()
    assert engine.counters.merged_forwards == merged + 4
    engine.close()
    assert ours(waits) == []


def test_looking_at_the_device_is_seen(device: torch.device) -> None:
    """The control, also of CUDA's own mode that tells of every wait."""
    values = torch.arange(4, device=device)
    with host_waits() as waits:
        assert values.sum().item() == 6
        assert values.tolist() == [0, 1, 2, 3]
    assert {"item", "tolist"} <= {wait.call for wait in waits}
    assert ("synchronizes" in {wait.call for wait in waits}) == (device.type == "cuda")


@pytest.mark.parametrize("num_requests", [1, 2], ids=["alone", "together"])
def test_new_requests_are_seen_while_the_device_works(
    num_requests: int, device: torch.device
) -> None:
    """The host stays near the device: a tick ends when the one before the last is done."""
    if device.type == "cpu":
        pytest.skip("the CPU runs nothing while the host goes on")
    name = "stable_diffusion_3"  # whose scheduler never waits for the device
    pipeline = pipeline_of(name, device)
    busy = torch.randn(8192, 8192, device=device, dtype=torch.float16)

    def work(*_: Any) -> None:
        for _ in range(40):
            torch.mm(busy, busy)

    engine = InFlightEngine(pipeline, proves_ahead=True)
    hook = pipeline.transformer.pos_embed.register_forward_pre_hook(work)
    tickets = [engine.submit(in_step(name, i, 10)) for i in range(num_requests)]
    while min(ticket.num_steps_done for ticket in tickets) < 3:
        engine.step()
    started_s = time.perf_counter()
    for _ in range(5):
        engine.step()
    host_s = time.perf_counter() - started_s
    torch.cuda.synchronize()
    device_s = time.perf_counter() - started_s
    hook.remove()
    engine.close()
    # Of five ticks at most two are left to the device.
    assert host_s > 0.4 * device_s


ASSERTION = """
import torch
from handler.engine.device_faults import is_device_lost

device = torch.device("cuda")
table = torch.nn.Embedding(4, 4, device=device)
assert not is_device_lost(RuntimeError("CUDA error: invalid argument"))
for attempt in ("the failing call", "any later call"):
    try:
        table(torch.tensor([99], device=device)).sum().item()
        print("no error")
    except RuntimeError as error:
        print(type(error).__name__, is_device_lost(error))
try:
    torch.ones(1, device=device)
    torch.cuda.synchronize()
    print("no error")
except RuntimeError as error:
    print(type(error).__name__, is_device_lost(error), flush=True)
import os
os._exit(0)
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_an_assertion_in_a_kernel_loses_the_device_to_its_process_alone() -> None:
    process = subprocess.run(
        [sys.executable, "-c", ASSERTION],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = process.stdout.split("\n")[:3]
    assert [line.endswith(" True") for line in lines] == [True] * 3, process.stdout + process.stderr
    assert torch.ones(2, device="cuda").sum().item() == 2
