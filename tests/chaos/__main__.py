"""Breaks a whole site while twelve clients draw, and says what they saw.

    python -m tests.chaos                        an hour
    python -m tests.chaos --short                five minutes
    python -m tests.chaos --parts jvm=3 restart  what is named, that often

Two instances, a gateway and HAProxy, with the embedded pipeline at a size that is quick. Needs
haproxy and openssl; as root it fills a disk of its own, else that part is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.chaos.blows import AN_HOUR, BLOWS, FIVE_MINUTES, in_order, parse_parts
from tests.chaos.clients import Clients
from tests.chaos.report import Report
from tests.chaos.site import Site, running_site

_PAUSE_S = 2.0
_DISK_BYTES = 256 << 20


async def _break(site: Site, order: Sequence[str], minutes: float, steady: int) -> Report:
    """Do what is in `order` until it is done or time is up, then let `steady` requests pass."""
    report = Report()
    until_s = time.monotonic() + 60 * minutes
    async with Clients.of(site) as clients:
        await clients.learn()
        async with clients.working():
            report.memory.append(site.memory_bytes())
            for name in order:
                if time.monotonic() > until_s:
                    break
                await asyncio.sleep(_PAUSE_S)
                started_s = time.monotonic()
                await asyncio.to_thread(BLOWS[name], site)
                await asyncio.to_thread(site.wait_until_ready)
                report.note_blow(name, time.monotonic() - started_s)
                _say(report, clients)
            before = clients.tally.num_requests
            next_look = 0
            while clients.tally.num_requests - before < steady and time.monotonic() < until_s:
                await asyncio.sleep(_PAUSE_S)
                if clients.tally.num_requests - before >= next_look:
                    report.memory.append(site.memory_bytes())
                    next_look += max(1, steady // 20)
            report.num_steady = clients.tally.num_requests - before
        report.tally = clients.tally
    return report


def _say(report: Report, clients: Clients) -> None:
    tally = clients.tally
    print(
        f"{report.blows_line()}: {tally.num_requests} requests, {tally.num_errors} errors, "
        f"{tally.num_wrong} wrong, {tally.num_hung} hung",
        file=sys.stderr,
        flush=True,
    )


@contextmanager
def _disk(folder: Path, *, of_its_own: bool) -> Iterator[Path]:
    """A folder for the instances' state, on a small disk where one is to be filled."""
    if not of_its_own:
        yield folder
        return
    disk = folder / "disk"
    disk.mkdir()
    size = f"size={_DISK_BYTES}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 where everything was survived, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--short", action="store_true", help="five minutes, not an hour")
    names = ", ".join(BLOWS)
    which.add_argument("--parts", nargs="+", metavar="PART[=TIMES]", help=f"of {names}")
    parser.add_argument("--minutes", type=float, help="no new blow after that (60; --short: 5)")
    parser.add_argument("--steady", type=int, help="requests in peace afterwards (20000; else 0)")
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    parser.add_argument("--keep", type=Path, help="folder for the site, which stays: its logs")
    arguments = parser.parse_args(argv)
    parts: dict[str, int] = AN_HOUR
    if arguments.parts:
        try:
            parts = parse_parts(arguments.parts)
        except ValueError as error:
            parser.error(str(error))
    elif arguments.short:
        parts = FIVE_MINUTES
    if "disk" in parts and os.geteuid() != 0:
        print("disk: left out, since only root may make a disk of its own", file=sys.stderr)
        parts = {name: count for name, count in parts.items() if name != "disk"}
    is_long = not (arguments.short or arguments.parts)
    minutes = arguments.minutes or (60.0 if is_long else 5.0 if arguments.short else 60.0)
    steady = arguments.steady if arguments.steady is not None else 20_000 * is_long
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        report = _run(arguments.keep or Path(name), parts, minutes, steady)
    print(report)
    if arguments.out:
        arguments.out.write_text(json.dumps(report.as_json(), indent=2) + "\n")
    return 0 if report.is_good else 1


def _run(folder: Path, parts: dict[str, int], minutes: float, steady: int) -> Report:
    folder.mkdir(parents=True, exist_ok=True)
    with _disk(folder, of_its_own="disk" in parts) as disk:
        with running_site(folder, disk / "run") as site:
            report = asyncio.run(_break(site, in_order(parts), minutes, steady))
            report.num_restarts = site.num_restarts()
        report.leftovers = site.leftovers()
    return report


if __name__ == "__main__":
    sys.exit(main())
