"""What clients saw while a site was broken, and whether that was good enough."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from tests.chaos.clients import Tally

__all__ = ["Report"]

MAX_ERROR_SHARE = 0.005
MAX_GROWTH = 0.10
"""Of a process's memory between the first and the last quarter of the requests in peace."""
# As docs/operations.md lists them: nobody else may be told anything else.
DOCUMENTED = re.compile(
    r"(images|stream|edits|predictions|job): (502 gateway_died|503 no_gateway|502 instance_died)"
    r"|stream: (stream cut off|error event instance_died)"
    r"|grpc: (UNAVAILABLE|INTERNAL|RESOURCE_EXHAUSTED)"
)


@dataclass(slots=True)
class Report:
    """The figures of one run."""

    tally: Tally = field(default_factory=Tally)
    blows: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """By name, the seconds until all was READY again."""
    memory: list[dict[str, int]] = field(default_factory=list)
    num_steady: int = 0
    num_restarts: int = 0
    leftovers: list[str] = field(default_factory=list)

    def note_blow(self, name: str, took_s: float) -> None:
        self.blows[name].append(took_s)

    def blows_line(self) -> str:
        return ", ".join(f"{name} {len(times)}" for name, times in self.blows.items())

    @property
    def error_share(self) -> float:
        return self.tally.num_errors / max(1, self.tally.num_requests)

    @property
    def undocumented(self) -> list[str]:
        return [name for name in self.tally.errors if not DOCUMENTED.fullmatch(name)]

    def growth(self) -> dict[str, float]:
        """By process, how much larger it was at the end of the requests in peace."""
        looks = self.memory[1:]
        if len(looks) < 8:
            return {}
        quarter = len(looks) // 4
        return {
            name: median(late) / median(early) - 1
            for name in looks[-1]
            if (early := [each[name] for each in looks[:quarter] if name in each])
            and (late := [each[name] for each in looks[-quarter:] if name in each])
        }

    @property
    def problems(self) -> list[str]:
        tally = self.tally
        found = [f"{tally.num_wrong} wrong pictures"] * bool(tally.num_wrong)
        found += [f"{tally.num_hung} requests hung"] * bool(tally.num_hung)
        found += [f"{tally.num_unended} streams without an end"] * bool(tally.num_unended)
        if self.error_share > MAX_ERROR_SHARE:
            found.append(f"{self.error_share:.2%} errors; allowed {MAX_ERROR_SHARE:.1%}")
        found += [f"undocumented: {name}" for name in self.undocumented]
        found += [f"left over: {each}" for each in self.leftovers]
        found += [
            f"{name} grew by {share:.0%}"
            for name, share in self.growth().items()
            if share > MAX_GROWTH
        ]
        return found

    @property
    def is_good(self) -> bool:
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        tally = self.tally
        return {
            "requests": tally.num_requests,
            "ok": tally.num_ok,
            "errors": dict(tally.errors.most_common()),
            "error_share": round(self.error_share, 5),
            "wrong": tally.num_wrong,
            "hung": tally.num_hung,
            "unended_streams": tally.num_unended,
            "longest_s": round(tally.longest_s, 1),
            "by_kind": dict(tally.by_kind),
            "blows": {
                name: {
                    "times": len(times),
                    "median_s": round(median(times), 1),
                    "max_s": round(max(times), 1),
                }
                for name, times in self.blows.items()
            },
            "restarts_by_the_supervisor": self.num_restarts,
            "steady_requests": self.num_steady,
            "memory_mb": {
                name: [round(each.get(name, 0) / 1e6) for each in self.memory]
                for name in (self.memory[-1] if self.memory else {})
            },
            "growth": {name: round(share, 3) for name, share in self.growth().items()},
            "leftovers": self.leftovers,
            "problems": self.problems,
        }

    def __str__(self) -> str:
        tally = self.tally
        lines = [
            f"{tally.num_requests} requests: {tally.num_ok} drawn right, {tally.num_wrong} wrong, "
            f"{tally.num_errors} errors ({self.error_share:.2%}), {tally.num_hung} hung, "
            f"{tally.num_unended} streams without an end; the longest took {tally.longest_s:.0f} s",
        ]
        lines += [f"  {count:>5} {name}" for name, count in tally.errors.most_common()]
        lines += [
            f"  {name}: {len(times)} times, all READY again after {median(times):.0f} s "
            f"(median), {max(times):.0f} s at most"
            for name, times in self.blows.items()
        ]
        lines += [f"  {name}: memory {share:+.1%}" for name, share in self.growth().items()]
        lines.append("not good: " + "; ".join(self.problems) if self.problems else "good")
        return "\n".join(lines)
