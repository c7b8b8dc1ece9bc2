"""What `benchmarks.archive` measured, as figures with their targets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.report import Figure, Spread

__all__ = ["our_figures", "packing_figures", "upstream_figures"]


def our_figures(raw: dict[str, Any]) -> list[Figure]:
    """What ours needs, against cp and against the weights' size."""
    return [*packing_figures(raw), *_opening(raw)]


def packing_figures(raw: dict[str, Any]) -> list[Figure]:
    """What packing and verifying need, with the checks of the model and without, against cp."""
    packing, checksums = raw["packing"], raw["checksums"]
    cp = Spread(tuple(packing["cp_s"]))
    return [
        Figure("pack: ours", Spread(tuple(packing["ours_s"])), "s"),
        Figure("pack: cp -r", cp, "s"),
        Figure("pack: ours / cp -r", _ratios(packing, "ours_s"), "x", at_most=2.0),
        Figure("pack: ours, with checks", Spread(tuple(packing["checked_s"])), "s"),
        Figure("pack: ours, with checks / cp -r", _ratios(packing, "checked_s"), "x", at_most=2.0),
        Figure("pack: BLAKE3 alone, one core", _one(checksums["blake3_s"]), "s"),
        Figure("pack: SHA-256 alone, one core", _one(checksums["sha256_s"]), "s"),
        Figure("pack: CRC-32 alone, one core", _one(checksums["crc32_s"]), "s"),
        Figure("pack, on the disk: ours", Spread(tuple(packing["ours_on_disk_s"])), "s"),
        Figure("pack, on the disk: ours / cp -r", _ratios(packing, "ours_on_disk_s"), "x"),
        Figure("verify: bytes", _rates(packing, "verify_s"), "GB/s", at_least=3),
        Figure("verify: bytes and models", Spread(tuple(packing["verify_models_s"])), "s"),
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


def _ratios(packing: dict[str, list[float]], key: str) -> Spread:
    """How many times cp's of the same round each is."""
    pairs = zip(packing[key], packing[f"cp_{key.partition('_')[2]}"], strict=True)
    return Spread(tuple(ours / cp for ours, cp in pairs))


def _rates(packing: dict[str, list[float]], key: str) -> Spread:
    pairs = zip(packing["archive_bytes"], packing[key], strict=True)
    return Spread(tuple(size_bytes / 1e9 / took_s for size_bytes, took_s in pairs))


def _times(upstream: float, ours: Iterable[float]) -> Spread:
    return Spread(tuple(upstream / each for each in ours))


def _all(found: Iterable[dict[str, float]], key: str, unit: float = 1.0) -> Spread:
    return Spread(tuple(each[key] / unit for each in found))


def _one(value: float) -> Spread:
    return Spread((value,))
