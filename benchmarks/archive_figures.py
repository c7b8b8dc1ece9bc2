"""What `benchmarks.archive` measured, as figures with their targets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.report import Figure, Spread

__all__ = ["our_figures", "upstream_figures"]


def our_figures(raw: dict[str, Any]) -> list[Figure]:
    """What ours needs, against cp and against the weights' size."""
    return [*_packing(raw), *_opening(raw)]


def _packing(raw: dict[str, Any]) -> list[Figure]:
    packing, checksums = raw["packing"], raw["checksums"]
    cp = Spread(tuple(packing["cp_s"]))
    return [
        Figure("pack: ours", Spread(tuple(packing["ours_s"])), "s"),
        Figure("pack: cp -r", cp, "s"),
        Figure("pack: ours / cp -r", _ratios(packing, "s"), "x", at_most=1.5),
        Figure("pack: SHA-256 alone, one core", _one(checksums["sha256_s"]), "s"),
        Figure("pack: CRC-32 alone, one core", _one(checksums["crc32_s"]), "s"),
        Figure("pack: SHA-256 alone / cp -r", _one(checksums["sha256_s"] / cp.median), "x"),
        Figure("pack, on the disk: ours", Spread(tuple(packing["ours_on_disk_s"])), "s"),
        Figure("pack, on the disk: ours / cp -r", _ratios(packing, "on_disk_s"), "x"),
    ]


def _opening(raw: dict[str, Any]) -> list[Figure]:
    weights = raw["weights_bytes"]
    return [
        Figure("open: ours", Spread(tuple(raw["opening"])), "s"),
        *(
            Figure(f"{what} READY: ours, {form}", _all(raw[f"serving_{key}"], f"{clock}_s"), "s")
            for what, clock in (("worker", "worker_ready"), ("server", "ready"))
            for form, key in (
                ("float32", "float32"),
                ("float16", "float16"),
                ("float16, folder", "dir"),
            )
        ),
        Figure(
            "disk while serving / weights: .mar",
            _all(raw["serving_float32"], "disk_bytes", weights),
            "x",
            at_most=2.05,
        ),
        Figure(
            "disk while serving / weights: folder",
            _all(raw["serving_dir"], "disk_bytes", weights),
            "x",
            at_most=1.05,
        ),
        Figure(
            "memory: a second worker / weights",
            _one(raw["second_worker"]["second_adds_bytes"] / weights),
            "x",
            at_most=0.2,
        ),
    ]


def upstream_figures(raw: dict[str, Any]) -> list[Figure]:
    """What the upstream way needs, and how many times ours that is."""
    packing_s = raw["upstream_packing_s"]
    open_s = _all(raw["upstream_opening"], "seconds")
    serving = raw["upstream_float32"]
    return [
        Figure("pack: upstream", _one(packing_s), "s"),
        Figure(
            "pack: upstream / ours", _times(packing_s, raw["packing"]["ours_s"]), "x", at_least=20
        ),
        Figure("open: upstream", open_s, "s"),
        Figure("open: upstream / ours", _times(open_s.median, raw["opening"]), "x", at_least=15),
        *_ready(raw, "float32"),
        *_ready(raw, "float16"),
        Figure("server READY: upstream, float32", _all(serving, "ready_s"), "s"),
        Figure(
            "disk while serving / weights: upstream",
            _all(serving, "disk_bytes", raw["weights_bytes"]),
            "x",
        ),
    ]


def _ready(raw: dict[str, Any], dtype: str) -> list[Figure]:
    upstream_s = _all(raw[f"upstream_{dtype}"], "worker_ready_s")
    ratios = _times(upstream_s.median, _all(raw[f"serving_{dtype}"], "worker_ready_s").values)
    return [
        Figure(f"worker READY: upstream, {dtype}", upstream_s, "s"),
        Figure(f"worker READY: upstream / ours, both {dtype}", ratios, "x", at_least=3),
    ]


def _ratios(packing: dict[str, list[float]], clock: str) -> Spread:
    pairs = zip(packing[f"ours_{clock}"], packing[f"cp_{clock}"], strict=True)
    return Spread(tuple(ours / cp for ours, cp in pairs))


def _times(upstream: float, ours: Iterable[float]) -> Spread:
    return Spread(tuple(upstream / each for each in ours))


def _all(found: Iterable[dict[str, float]], key: str, unit: float = 1.0) -> Spread:
    return Spread(tuple(each[key] / unit for each in found))


def _one(value: float) -> Spread:
    return Spread((value,))
