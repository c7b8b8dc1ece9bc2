"""The benchmarks' logic, on shapes that take milliseconds: they must run at the first try."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import torch

from benchmarks import cpu, engine, gpu, gpu_forward, load, pictures, report, traffic
from benchmarks.shapes import MODELS, count_flops
from benchmarks.traffic import CLASSES, Outcome, Wish, mixed_wishes, summarise
from tests.support.clock import Clock
from tests.support.compilers import Compiler
from tests.support.pipelines import build

CPU = torch.device("cpu")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (report, load):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path


# Traffic.


def test_poisson_arrivals_have_their_rate_and_know_nothing_of_each_other() -> None:
    times = traffic.poisson_times(5.0, 2000.0, seed=1)
    assert times == sorted(times)
    assert times == traffic.poisson_times(5.0, 2000.0, seed=1)
    assert len(times) / 2000 == pytest.approx(5.0, rel=0.05)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    # Of exponential gaps the standard deviation is the mean; of even ones it is nothing.
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert deviation == pytest.approx(mean, rel=0.1)


def test_bursts_come_at_once_at_the_same_average_rate() -> None:
    times = traffic.burst_times(5.0, 2000.0, size=8, seed=2)
    assert len(times) / 2000 == pytest.approx(5.0, rel=0.15)
    assert len(set(times)) == len(times) / 8


def test_the_mix_is_seeded_and_has_every_class_and_guidance() -> None:
    wishes = mixed_wishes(200, seed=3)
    assert wishes == mixed_wishes(200, seed=3)
    assert wishes != mixed_wishes(200, seed=4)
    assert {wish.kind for wish in wishes} == {wish.kind for wish in CLASSES}
    assert {wish.guidance for wish in wishes} == set(traffic.GUIDANCES)
    assert len({wish.seed for wish in wishes}) == 200
    size = len(CLASSES) * len(traffic.GUIDANCES)
    blocks = [wishes[first : first + size] for first in range(0, 200 - size, size)]
    assert {len({(wish.kind, wish.guidance) for wish in block}) for block in blocks} == {size}


def outcome(kind: Wish, seconds: float, status: int = 200, sent_s: float = 0.0) -> Outcome:
    return Outcome(kind, sent_s, seconds, status, 1000, queue_s=0.5)


def test_a_summary_counts_what_came_in_time() -> None:
    small, _, large = CLASSES
    outcomes = [
        outcome(small, 1.0),
        outcome(small, 1.9),
        outcome(large, 1.9),
        outcome(large, 9.0, sent_s=3.0),
        outcome(large, 0.1, status=503),
        outcome(large, 0.1, status=0),
    ]
    summary = summarise(outcomes, 10.0, {small.kind: 1.0, large.kind: 2.0})
    # The last reply came two seconds after the ten of the arrivals.
    assert summary.throughput_per_s == 4 / 12
    assert summary.offered_per_s == 6 / 10
    assert summary.goodput_per_s == {"1.5": 2 / 12, "2": 3 / 12, "3": 3 / 12, "5": 4 / 12}
    assert summary.errors == {"503": 1, "0": 1}
    assert summary.latency_s["all"]["p50"] == pytest.approx(1.9)
    assert summary.latency_s[small.kind]["p50"] == pytest.approx(1.45)
    assert summary.queue_s is not None
    assert summary.queue_s["p95"] == 0.5
    assert summary.bytes_per_reply == 1000


def test_percentiles() -> None:
    assert traffic.percentile(list(map(float, range(101))), 95) == 95.0
    assert traffic.percentile([3.0], 99) == 3.0
    assert math.isnan(traffic.percentile([], 50))


def test_a_lost_connection_is_an_error_without_a_status() -> None:
    def refuse(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("refused")

    async def send() -> list[Outcome]:
        async with httpx2.AsyncClient(transport=httpx2.MockTransport(refuse)) as client:
            return await traffic.send_at(client, "http://x", CLASSES[:1], [0.0])

    (lost,) = asyncio.run(send())
    assert (lost.status, lost.is_ok) == (0, False)


# Load.


class Server:
    """Answers at once, and remembers what it was asked."""

    def __init__(self, num_bytes: int) -> None:
        self.asked: list[dict[str, Any]] = []
        self.num_bytes = num_bytes

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(json.loads(request.content))
        timing = "queue;dur=12.5, denoise;dur=3.0"
        return httpx2.Response(
            200, content=b"x" * self.num_bytes, headers={"Server-Timing": timing}
        )


def test_every_system_is_measured_alone_saturated_and_under_every_load(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "FILL_S", 0.0)
    servers = {name: Server(80) for name in (load.IN_FLIGHT, load.UNBATCHED)}
    servers |= {name: Server(2000) for name in load.UPSTREAM}

    async def measure() -> dict[str, load.Measured]:
        async with contextlib.AsyncExitStack() as stack:
            targets = {
                name: load.Target(await stack.enter_async_context(client_of(server)), "http://x")
                for name, server in servers.items()
            }
            return await load.measure(
                targets, num_rounds=2, window_s=0.5, fractions=[0.01, 0.7, 50.0], seconds=0.05
            )

    measured = asyncio.run(measure())
    mine = measured[load.IN_FLIGHT]
    assert set(mine.solo_s) == {wish.kind for wish in CLASSES}
    assert {len(seconds) for seconds in mine.solo_s.values()} == {2}
    assert len(mine.capacities_per_s) == 2
    assert min(mine.capacities_per_s) > 0
    # Fifty times its capacity is spared it.
    assert set(mine.loads) == {"poisson 0.01", "poisson 0.7", "bursts 0.7"}
    (queue_s,) = {s.queue_s["p50"] for s in mine.loads.values() if s.queue_s and s.num_requests > 1}
    assert queue_s == 0.0125
    # Everybody is asked the same in the same order, however far each gets.
    solo = len(CLASSES) * 2
    first = [server.asked[: solo + load.NUM_CLIENTS] for server in servers.values()]
    assert all(asked == first[0] for asked in first)
    assert {f"{a['height']}px/{a['steps']}" for a in first[0]} == set(mine.solo_s)

    figures = load.figures_of(measured)
    bytes_ratio = next(f for f in figures if f.name.startswith("bytes"))
    assert bytes_ratio.value.median == 80 / 2000
    assert bytes_ratio.holds
    load.draw(measured, results / "load.png")
    assert (results / "load.png").read_bytes().startswith(b"\x89PNG")


def client_of(server: Callable[[httpx2.Request], httpx2.Response]) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.MockTransport(server))


def test_saturated_counts_the_replies_of_its_window_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies while the line fills, and those to what is under way at the end, do not count."""
    clock, num_clients = Clock(), 20
    monkeypatch.setattr(traffic, "time", SimpleNamespace(perf_counter=clock))
    num_replies = 0

    async def reply(request: httpx2.Request) -> httpx2.Response:
        """One after another, 64 a second."""
        nonlocal num_replies
        await asyncio.sleep(0)
        num_replies += 1
        clock.now_s += 1 / 64
        return httpx2.Response(200)

    async def saturate() -> float:
        async with httpx2.AsyncClient(transport=httpx2.MockTransport(reply)) as client:
            return await traffic.saturate(
                client, "http://x", mixed_wishes(1000), num_clients, fill_s=0.5, window_s=2.0
            )

    assert asyncio.run(saturate()) == 64
    assert num_replies == 64 * 2.5 + num_clients


def test_a_server_that_draws_nothing_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "FILL_S", 0.0)

    async def measure() -> None:
        async with client_of(lambda request: httpx2.Response(200)) as client:
            targets = {load.IN_FLIGHT: load.Target(client, "http://server")}
            await load.measure(targets, num_rounds=1, window_s=-1.0, fractions=[0.7], seconds=0.01)

    with pytest.raises(RuntimeError, match="drew nothing in -1 s: --window must be longer"):
        asyncio.run(measure())


def test_a_server_that_answers_with_errors_is_not_measured() -> None:
    async def measure() -> None:
        async with client_of(lambda request: httpx2.Response(503)) as client:
            targets = {load.IN_FLIGHT: load.Target(client, "http://server")}
            await load.measure(targets, num_rounds=1, window_s=0.01, fractions=[0.7], seconds=0.01)

    with pytest.raises(RuntimeError, match="http://server answers 503 to"):
        asyncio.run(measure())


# CPU.


def test_the_parts_of_a_request_and_the_ways_to_wait_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with torch.inference_mode():
        parts = {figure.name: figure.value for figure in cpu.measure_parts(1)}
    assert len(parts) == 3 * len(cpu.ROW_COUNTS) + 6
    assert all(spread.median > 0 for spread in parts.values())
    monkeypatch.setattr(cpu, "WAITS", {"passive": {"OMP_WAIT_POLICY": "passive"}})
    alone, beside = cpu.measure_waiting(1)
    assert (alone.name, beside.name) == ("passive, alone", "passive, beside a busy process")
    assert len(alone.value.values) == 1


# GPU.

DRAWING = ("eager", "compiled", "in-flight")


@pytest.mark.parametrize("name", ["tiny", "tinyxl"])
def test_every_system_of_the_gpu_benchmark_draws_the_same_pictures(name: str) -> None:
    model = MODELS[name]
    runs = gpu.measure(
        model,
        CPU,
        speed="safe",
        in_flight=[1, 3],
        rounds=1,
        steps=(2, 3, 4),
        backend="eager",
        peak_flops=1e9,
        systems=DRAWING,
    )
    names = [run.name for run in runs]
    assert names[0] == "eager, one at a time"
    assert names[2:] == ["in flight, 1", "in flight, 3"]
    for run in runs[2:]:
        assert run.largest_difference is not None
        assert run.largest_difference < 1e-4
        assert run.own_share is not None
        assert 0 < run.own_share < 1
    # A picture's operations, from what it took: the counts behind the share of the peak are right.
    row, decoding = count_flops(model)
    for run in runs:
        assert run.peak_share is not None
        share = run.images_per_s * (2 * 3 * row + decoding) / 1e9
        # The run with one in flight draws one picture, of two steps instead of three on average.
        assert run.peak_share == pytest.approx(share, rel=0.01 if run.name != names[2] else 0.5)
    figures = gpu.figures_of(model, runs)
    assert "the engine's own share" in figures[-1].name
    assert len(figures[-1].value.values) == 2


# Of functools.lru_cache in diffusers, which dynamo looks through.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
def test_the_gpu_benchmark_measures_prepared_forwards() -> None:
    torch._dynamo.reset()
    compiler = Compiler()
    runs = gpu.measure(
        MODELS["tiny"],
        CPU,
        speed="max",
        in_flight=[3],
        rounds=1,
        steps=(2, 3),
        backend="eager",
        systems=DRAWING,
        compiler=compiler,
    )
    assert compiler.num_graphs >= 1
    assert runs[-1].largest_difference is not None
    assert runs[-1].largest_difference < 1e-4


def test_the_gpu_benchmark_from_its_command_line(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--tiny", "--models", "tiny", "--systems", ",".join(gpu.SYSTEMS)]) == 0
    written = json.loads((results / "gpu-cpu.json").read_text())
    assert [run["name"] for run in written["tiny"]] == [
        "eager, one at a time",
        "compiled (reduce-overhead), one at a time",
        "in flight, 2",
        "2 steps behind 2 x 4",
    ]
    assert written["is_complete"]
    assert written["machine"]["versions"]["torch"] == importlib.metadata.version("torch")
    names = [figure["name"] for figure in written["figures"]]
    assert "tiny: in flight / compiled one at a time" in names
    assert "tiny: 2 steps behind 2 x 4, of the time after them" in names
    assert "tiny: the engine's own share" in capsys.readouterr().out
    (behind,) = (run for run in written["tiny"] if run["of_waiting"] is not None)
    assert behind["of_waiting"] > 0


def test_a_forward_is_measured_alone(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "tiny", "--code", "eager", "--rows", "4", "--device", "cpu"]
    assert gpu_forward.main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["forward_ms"] == pytest.approx(2 * told["a_step_of_one_guided_picture_ms"])
    assert set(told["decode_ms"]) == {"contiguous_format", "channels_last"}


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("triton_poi_fused_convolution_native_group_norm_silu_107", "compiled by Triton"),
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc", "convolution"),
        ("nvjet_sm90_hsh_256x128_64x4_1x2_h_bz_coopA_bias_TNT", "matrix product"),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunc", "other"),
    ],
)
def test_kernels_are_sorted_by_their_names(kernel: str, kind: str) -> None:
    assert gpu_forward.kind_of(kernel) == kind


def test_what_fails_is_named_and_the_rest_is_measured(results: Path) -> None:
    arguments = ["--tiny", "--models", "tiny", "--systems", "eager,compiled,in-flight"]
    assert gpu.main([*arguments, "--backend", "nonsense", "--name", "failing"]) == 1
    written = json.loads((results / "failing.json").read_text())
    failures = [run["failure"] for run in written["tiny"]]
    assert [failure is None for failure in failures] == [True, False, True]
    assert "nonsense" in failures[1]
    assert "tiny: in flight / eager one at a time" in [f["name"] for f in written["figures"]]


def test_results_are_written_as_they_come(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "run_in_flight", stop)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--tiny", "--models", "tiny", "--systems", "eager,in-flight"])
    written = json.loads((results / "gpu-cpu.json").read_text())
    assert [run["name"] for run in written["tiny"]] == ["eager, one at a time"]
    assert not written["is_complete"]


def test_chips_have_files_of_their_own() -> None:
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert gpu.slug("NVIDIA GeForce RTX 4090") == "geforce-rtx-4090"


def test_the_gpu_benchmark_refuses_what_it_does_not_know() -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--models", "sd99", "--device", "cpu"])


def test_peaks_are_found_by_the_longest_name() -> None:
    assert gpu.peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert gpu.peak_tflops("NVIDIA H100 PCIe") == 756
    assert gpu.peak_tflops("NVIDIA L40S") == 362
    assert gpu.peak_tflops("Tesla K80") is None


@pytest.mark.slow
def test_published_shapes_have_their_published_operations() -> None:
    """The UNet of Stable Diffusion 2.1 at 768²: 2.149 T a row, its decoder 5.75 T a picture."""
    row, decoding = count_flops(MODELS["sd21"])
    assert row == pytest.approx(2.149e12, rel=1e-3)
    assert decoding == pytest.approx(5.754e12, rel=1e-3)


def test_what_a_row_costs_is_measured_for_every_size() -> None:
    figures, details = engine.measure_rows(build("stable_diffusion"), 2, sides=(8, 16))
    table = details["unet_ms_a_row_by_rows"]
    assert isinstance(table, dict)
    assert [list(of_size) for of_size in table.values()] == [["1", "2", "4", "8", "16"]] * 2
    for figure, of_size in zip(figures, table.values(), strict=True):
        assert len(figure.value.values) == 2
        assert all(ms > 0 for ms in of_size.values())


# Bodies of the size of pictures.


@pytest.mark.parametrize("num_bytes", pictures.SIZES.values())
def test_a_padded_body_asks_for_the_same_as_a_small_one(num_bytes: int) -> None:
    small, padded = pictures.body_of(7, 0), pictures.body_of(7, num_bytes)
    assert json.loads(padded) == json.loads(small)
    assert len(padded) == max(num_bytes, len(small))
