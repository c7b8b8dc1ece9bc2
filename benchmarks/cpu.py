"""Where a request's milliseconds go on a CPU, and what waiting threads cost each other.

    python -m benchmarks.cpu              # about two minutes on two cores
    python -m benchmarks.cpu --compile    # the UNet compiled as well: three minutes more

The parts of one request of the embedded pipeline, as loaded and as `speed: safe` makes it; the
UNet in bfloat16, as `speed: max` has it; and a forward under several ways for OpenMP's threads to
wait, alone on the machine and beside a busy process.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from benchmarks.report import Figure, Spread, write_report
from handler.acceleration.channels_last import put_channels_last
from handler.acceleration.speed import compile_forward
from scripts.torchserve.launch import OPENMP_SPINS

PIPELINE = "demo/pipeline"
SIZE_PX = 768
ROW_COUNTS = (2, 8)
WAITS = {
    "OpenMP's default": {},
    "OMP_WAIT_POLICY=active": {"OMP_WAIT_POLICY": "active"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    f"GOMP_SPINCOUNT={OPENMP_SPINS}": {"GOMP_SPINCOUNT": OPENMP_SPINS},
}


def times_ms(work: Callable[[], object], repeats: int) -> Spread:
    """The milliseconds of every repeat after two that warm up."""
    found = []
    for _ in range(repeats + 2):
        begun_s = time.perf_counter()
        work()
        found.append(1000 * (time.perf_counter() - begun_s))
    return Spread(tuple(found[2:]))


def inputs_of(unet: Any, rows: int) -> list[torch.Tensor]:
    """What a forward of `rows` rows at the defaults' size takes: latents, steps, text."""
    side = unet.config.sample_size
    sample = torch.zeros(rows, unet.config.in_channels, side, side, dtype=unet.dtype)
    text = torch.zeros(rows, 77, unet.config.cross_attention_dim, dtype=unet.dtype)
    return [sample, torch.zeros(rows), text]


def forward_of(unet: Any, rows: int) -> Callable[[], object]:
    """One forward of `rows` rows."""
    inputs = inputs_of(unet, rows)
    return lambda: unet(*inputs)


def compiled_forward_of(unet: Any, rows: int) -> Callable[[], object]:
    """The same by code that is compiled for any number of rows, which takes most of a minute."""
    compiled = compile_forward(unet.forward)
    largest, inputs = inputs_of(unet, max(ROW_COUNTS)), inputs_of(unet, rows)
    for tensor in largest:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    compiled(*largest)
    return lambda: compiled(*inputs)


def measure_parts(repeats: int, *, with_compiled: bool = False) -> list[Figure]:
    """Everything that a request waits for, and the reply that it need not wait for."""
    plain = DiffusionPipeline.from_pretrained(PIPELINE)
    safe = copy.deepcopy(plain)
    put_channels_last({"unet": safe.unet, "vae": safe.vae})
    half = copy.deepcopy(safe.unet).bfloat16()
    unet_config = plain.unet.config
    side = unet_config.sample_size
    latents = torch.zeros(1, unet_config.in_channels, side, side)
    picture = plain("a red circle", height=SIZE_PX, width=SIZE_PX, num_inference_steps=2).images[0]
    pixels = plain.image_processor.preprocess(picture)
    parts: dict[str, Callable[[], object]] = {}
    for rows in ROW_COUNTS:
        for name, unet in (("off", plain.unet), ("safe", safe.unet), ("bfloat16", half)):
            parts[f"UNet, {rows} rows, {name}"] = forward_of(unet, rows)
            if with_compiled and name != "off":
                parts[f"UNet, {rows} rows, {name}, compiled"] = compiled_forward_of(unet, rows)
    parts |= {
        "VAE decoding, off": lambda: plain.vae.decode(latents),
        "VAE decoding, safe": lambda: safe.vae.decode(latents),
        "text encoding": lambda: plain.encode_prompt("a red circle", "cpu", 1, True),
        "to a PIL picture": lambda: plain.image_processor.postprocess(pixels),
        "PNG": lambda: picture.save(BytesIO(), "PNG"),
        "an indented JSON list": lambda: as_list(picture),
    }
    return [
        Figure(name, times_ms(work, min(repeats, 2) if "JSON" in name else repeats), "ms")
        for name, work in parts.items()
    ]


def as_list(picture: Image.Image) -> str:
    """The reply of TorchServe's own example."""
    return json.dumps(np.asarray(picture).tolist(), indent=2)


def measure_waiting(repeats: int) -> list[Figure]:
    """A forward of two rows by all cores, for every way to wait."""
    figures = []
    for company in ("alone", "beside a busy process"):
        for name, variables in WAITS.items():
            with busy_process(company != "alone"):
                figures.append(Figure(f"{name}, {company}", _in_process(variables, repeats), "ms"))
    return figures


@contextmanager
def busy_process(is_wanted: bool) -> Iterator[None]:
    """Something else that needs a core, for as long as the block lasts."""
    if not is_wanted:
        yield
        return
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        busy.kill()
        busy.wait()


def _in_process(variables: dict[str, str], repeats: int) -> Spread:
    """OpenMP reads how to wait when it starts, so each way has a process of its own."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cpu", "--one-forward", "--repeats", str(repeats)],
        env={**ours, **variables},
        check=True,
        capture_output=True,
        text=True,
    )
    return Spread(tuple(json.loads(done.stdout.splitlines()[-1])))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    parser.add_argument("--repeats", type=int, default=30, help="of each part (default: 30)")
    parser.add_argument("--compile", action="store_true", help="measure compiled code as well")
    parser.add_argument("--one-forward", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    with torch.inference_mode():
        if arguments.one_forward:
            unet = DiffusionPipeline.from_pretrained(PIPELINE).unet
            print(json.dumps(times_ms(forward_of(unet, 2), arguments.repeats).values))
            return 0
        torch.set_num_threads(1)
        figures = measure_parts(arguments.repeats, with_compiled=arguments.compile)
    figures += measure_waiting(arguments.repeats)
    path = write_report("cpu", figures, {"threads_of_the_parts": 1})
    print(f"\n{path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
