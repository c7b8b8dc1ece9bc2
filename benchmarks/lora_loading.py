"""What a new LoRA costs those who draw meanwhile: their pictures, and their longest tick."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from benchmarks.report import Figure, Spread
from handler.assembly import assemble
from handler.config import HandlerConfig
from handler.garbage import leave_out_what_is_loaded
from handler.loading.lora_files import LoraReader
from handler.loading.pipeline import LoadedPipeline
from handler.service.generation import GenerationService

__all__ = ["measure_loading"]

DEMO = "demo/pipeline"
NUM_DRAWING = 16
NUM_LORAS = 8
RANK = 16
NUM_STEPS = 100
NUM_STEPS_OF_LATE = 3
# Steps in which prompts are encoded and it is proved what may share a forward; then some to time.
NUM_UNUSUAL, NUM_USUAL = 8, 12
SIDE_PX = 96


@dataclass(slots=True)
class _Run:
    """What one service drew, and how long its steps were."""

    pictures: dict[str, Any] = field(default_factory=dict)
    usual_s: float = 0.0
    """Of a step before anybody joins: one forward of all that draw, and nothing else."""
    late_s: list[float] = field(default_factory=list)
    """The longest step from the arrival of each late request to its picture."""

    @property
    def stall(self) -> float:
        """By how many forwards the longest step was longer than usual."""
        return (max(self.late_s) - self.usual_s) / self.usual_s


def measure_loading(rounds: int, *, num_steps: int = NUM_STEPS) -> list[Figure]:
    """Sixteen requests draw; eight more come one after the other, each with a LoRA that is new.

    A step is all that the engine's thread does between two looks at what arrived: a tick, and what
    it does of the reading. The control is the same without any LoRA: that somebody joins takes
    time too.
    """
    stalls, controls, differences = [], [], []
    with TemporaryDirectory() as folder:
        pipeline = DiffusionPipeline.from_pretrained(DEMO)
        names = [f"lora{i}" for i in range(NUM_LORAS)]
        for seed, name in enumerate(names):
            save_file(_lora(pipeline, seed), Path(folder) / f"{name}.safetensors")
        leave_out_what_is_loaded()  # as a worker does
        for _ in range(rounds):
            runs = []
            for loras in ([None] * NUM_LORAS, names):
                # A service of its own each time: what one has read is not new to it.
                with closing(_service(pipeline, Path(folder))) as service:
                    runs.append(_drawn(service, loras, num_steps))
            control, loading = runs
            controls.append(control.stall)
            stalls.append(loading.stall)
            differences.append(
                max(
                    float(np.abs(picture - loading.pictures[name]).max())
                    for name, picture in control.pictures.items()
                )
            )
    return [
        Figure(
            "a new LoRA: longest tick of the others, beyond the usual",
            Spread(tuple(stalls)),
            "forwards",
            at_most=1.0,
        ),
        Figure("the same of a request without LoRA", Spread(tuple(controls)), "forwards"),
        Figure(
            "a new LoRA: largest difference in the others' pictures, of 255",
            Spread(tuple(differences)),
            "levels",
            at_most=1.0,
        ),
    ]


def _drawn(service: GenerationService, loras: Sequence[str | None], num_steps: int) -> _Run:
    run = _Run()
    for i in range(NUM_DRAWING):
        _open(service, f"drawing {i}", seed=i, num_inference_steps=num_steps)
    _steps(service, NUM_UNUSUAL)
    run.usual_s = statistics.median(_steps(service, NUM_USUAL))
    for name in loras:
        named = {} if name is None else {"loras": [name]}
        run.late_s.append(max(_until_drawn(service, named)))
    service.advance()
    for request_id, reply in service.take_replies().items():
        run.pictures[request_id] = np.load(BytesIO(reply.body)).astype(np.int16)
    return run


def _until_drawn(service: GenerationService, fields: Mapping[str, object]) -> Iterator[float]:
    """The seconds of each step from the arrival of a request to its reply."""
    started_s = time.perf_counter()
    _open(service, "late", seed=0, num_inference_steps=NUM_STEPS_OF_LATE, **fields)
    while "late" not in (replies := service.take_replies()):
        service.advance(0.0)
        ended_s = time.perf_counter()
        yield ended_s - started_s
        started_s = ended_s
    if list(replies) != ["late"] or replies["late"].status != 200:
        raise RuntimeError(f"{list(replies)} ended, the late one with {replies['late'].status}")


def _steps(service: GenerationService, number: int) -> list[float]:
    seconds = []
    for _ in range(number):
        started_s = time.perf_counter()
        service.advance(0.0)
        seconds.append(time.perf_counter() - started_s)
    return seconds


def _open(service: GenerationService, request_id: str, **fields: object) -> None:
    service.open(request_id, {"body": {"prompt": "a blue star", **fields}}, {"host": "localhost"})


def _service(pipeline: Any, folder: Path) -> GenerationService:
    config = HandlerConfig.from_mapping(
        {
            "height": SIDE_PX,
            "width": SIDE_PX,
            "max_num_inference_steps": 1000,
            "max_rows": 2 * (NUM_DRAWING + 1),
            "lora_dir": str(folder),
            "default_output": "npy",
        }
    )
    reader = LoraReader(pipeline)
    loaded = LoadedPipeline(pipeline, torch.device("cpu"), torch.float32, lora_reader=reader)
    return assemble(loaded, config, model_name="demo")


def _lora(pipeline: Any, seed: int) -> dict[str, torch.Tensor]:
    """A LoRA of every linear layer, in the names that diffusers writes."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for component in ("unet", "text_encoder"):
        for path, layer in getattr(pipeline, component).named_modules():
            if isinstance(layer, torch.nn.Linear):
                down = torch.randn(RANK, layer.in_features, generator=generator)
                up = torch.randn(layer.out_features, RANK, generator=generator)
                found[f"{component}.{path}.lora_A.weight"] = 0.02 * down
                found[f"{component}.{path}.lora_B.weight"] = 0.02 * up
    return found
