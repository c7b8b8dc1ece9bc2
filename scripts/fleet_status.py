"""Says how the instances of a fleet are, and what is in front of them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from scripts.background import is_suspended
from scripts.console import DONE, FAILED
from scripts.fronts import Front
from scripts.torchserve.fleet import FleetRecord
from scripts.torchserve.process import TorchServer

__all__ = ["fleet_status"]


def fleet_status(record: FleetRecord, in_front: Sequence[Front], *, as_json: bool) -> int:
    """Say how everything is; 1 where an instance does not draw, or something else has ended."""
    folders = [Path(each.state_dir) for each in record.instances]
    process = record.supervisor
    is_supervised = process is not None and not is_suspended(process)
    with ThreadPoolExecutor(len(folders)) as pool:
        seen = list(pool.map(lambda folder: _look(folder, is_supervised), folders))
    instances = [
        {
            **asdict(state),
            "url": None if server is None else server.url,
            "model": None if server is None else server.model_name,
            "pid": None if server is None else server.pid,
            "problem": state.problem or problem,
        }
        for state, (server, problem) in zip(record.instances, seen, strict=True)
    ]
    if as_json:
        supervisor = None if process is None else record.pid
        state = {"supervisor": supervisor, "supervises": is_supervised, "instances": instances}
        rolls = {"num_rolls": record.num_rolls, "roll_problem": record.roll_problem}
        front = {each.name: asdict(each) for each in in_front}
        print(json.dumps({**state, **rolls, "front": front}, indent=2))
    else:
        _print_table(record, instances, is_supervised=is_supervised)
        for each in in_front:
            print(each)
    has_problem = any(each["problem"] for each in instances) or any(e.problem for e in in_front)
    return DONE if is_supervised and not has_problem else FAILED


def _look(state_dir: Path, is_supervised: bool) -> tuple[TorchServer | None, str | None]:
    server = TorchServer.find(state_dir)
    if server is None:
        return None, "it does not run"
    return server, server.problem(is_supervised=is_supervised)


def _print_table(
    record: FleetRecord, instances: Sequence[dict[str, object]], *, is_supervised: bool
) -> None:
    if record.supervisor is None:
        print(f"nobody supervises them: process {record.pid} has ended; start them again")
    else:
        print(f"supervisor   process {record.pid}")
        if not is_supervised:
            print(f"             it is suspended: kill -CONT {record.pid} lets it go on")
    if record.roll_problem is not None:
        print(f"restart      given up: {record.roll_problem}")
    for each in instances:
        device = f"GPU {each['device']}" if each["device"] else "CPU"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(str(each["since_s"]))))
        print(
            f"{each['state']:<12} {each['url'] or '-'}  {device}  process {each['pid'] or '-'}  "
            f"started again {each['num_restarts']} times  since {since}  {each['state_dir']}"
        )
        if each["problem"]:
            print(f"             {each['problem']}")
