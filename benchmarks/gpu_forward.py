"""Where the time of one forward of the denoiser goes on a GPU, and what decoding a picture takes.

    python -m benchmarks.gpu_forward --model sd21 --code dynamic   # as `speed: max` compiles it
    python -m benchmarks.gpu_forward --model sd21 --code static    # compiled for these rows alone
    python -m benchmarks.gpu_forward --model sd21 --code eager

Random weights in the model's exact shapes, float16, its projections fused, convolutions in
channels_last. The forward is captured as a CUDA graph and replayed; the least of twelve replays
counts. Kernels are sorted by name into attention, convolutions, matrix products, Triton's (which
are compiled) and others, which copy and add.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.report import describe_machine
from benchmarks.shapes import MODELS, Model, build
from handler.acceleration.channels_last import put_channels_last

NUM_REPLAYS = 12
NUM_TOKENS = 77
# In this order: convolutions and attention of cuDNN have each other's words in their names.
KINDS = {
    "attention": ("flash", "fmha", "sdpa"),
    "compiled by Triton": ("triton_",),
    "convolution": ("conv", "fprop", "implicit_gemm"),
    "matrix product": ("gemm", "nvjet", "cutlass"),
}


def measure(model: Model, code: str, rows: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a forward of `rows` rows, by kind of kernel too, and of decoding a picture.

    Kinds are told on CUDA alone.
    """
    on_cuda = device.type == "cuda"
    dtype = torch.float16 if on_cuda else torch.float32
    pipeline = build(model, device, dtype)
    put_channels_last({"unet": pipeline.unet})
    pipeline.fuse_qkv_projections()
    inputs = _inputs(model, rows, device, dtype)
    forward = pipeline.unet.forward
    if code != "eager":
        torch.backends.cudnn.benchmark = True
        forward = torch.compile(forward, dynamic=False)
    if code == "dynamic":
        for tensor in inputs:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    sample, step, text = inputs

    def run() -> torch.Tensor:
        output: tuple[torch.Tensor] = forward(
            sample, step, encoder_hidden_states=text, return_dict=False
        )
        return output[0]

    with torch.no_grad():
        started_s = time.perf_counter()
        run()
        start_s = time.perf_counter() - started_s
        replay = _captured(run) if on_cuda else run
        forward_ms = _least_ms(replay, device)
        told: dict[str, Any] = {
            "forward_ms": forward_ms,
            "a_step_of_one_guided_picture_ms": 2 * forward_ms / rows,
            "first_call_s": start_s,
            "decode_ms": {},
        }
        if on_cuda:
            told["kinds_ms"] = _kinds_of(replay)
        latents = torch.randn(1, 4, model.latent_side, model.latent_side, device=device)
        latents = latents.to(dtype)
        for layout in (torch.contiguous_format, torch.channels_last):
            vae = pipeline.vae.to(memory_format=layout)
            name = str(layout).removeprefix("torch.")
            told["decode_ms"][name] = _least_ms(lambda: vae.decode(latents), device)  # noqa: B023
    return told


def _inputs(
    model: Model, rows: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    side = model.latent_side
    sample = torch.randn(rows, 4, side, side, device=device, dtype=dtype)
    text = torch.randn(rows, NUM_TOKENS, model.text_width, device=device, dtype=dtype)
    return sample, torch.full((rows,), 500.0, device=device), text


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _least_ms(work: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    seconds = []
    for _ in range(NUM_REPLAYS):
        wait()
        started_s = time.perf_counter()
        work()
        wait()
        seconds.append(time.perf_counter() - started_s)
    return 1000 * min(seconds)


def _kinds_of(replay: Callable[[], object]) -> dict[str, float]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        replay()
        torch.cuda.synchronize()
    spent: Counter[str] = Counter()
    for event in profile.events():
        spent[kind_of(event.name)] += event.device_time / 1000
    return {kind: round(ms, 2) for kind, ms in spent.most_common() if ms > 0}


def kind_of(kernel: str) -> str:
    """What a kernel of this name does."""
    lower = kernel.lower()
    found = (kind for kind, words in KINDS.items() if any(word in lower for word in words))
    return next(found, "other")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_forward",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="sd21", choices=tuple(MODELS))
    parser.add_argument("--code", default="dynamic", choices=("dynamic", "static", "eager"))
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--device", default="cuda:0")
    arguments = parser.parse_args(argv)
    model, device = MODELS[arguments.model], torch.device(arguments.device)
    told = measure(model, arguments.code, arguments.rows, device)
    settings = {key: str(value) for key, value in vars(arguments).items()}
    print(json.dumps({"machine": describe_machine(), "settings": settings, **told}, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
