"""Several instances of one host that are kept as one: their options, and the record of a fleet.

    RUN_DIR/fleet.json     who supervises, and how its instances are
    RUN_DIR/fleet.log      what the supervisor did, and why
    RUN_DIR/0, 1, …        the state directories of the instances

A fleet of one instance that is not said to be of any GPU has its state in RUN_DIR itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from scripts.background import read_saved, running_process, save
from scripts.errors import ServerError, UsageError
from scripts.hints import option
from scripts.torchserve.accelerators import bound_to_cores, bound_to_gpu
from scripts.torchserve.options import Options, Ports
from scripts.torchserve.state import FLEET_RECORD

__all__ = [
    "MAX_INSTANCES",
    "FleetRecord",
    "InstanceState",
    "fingerprint",
    "fleet_over",
    "members",
    "run_dirs",
]

MAX_INSTANCES = 64
# Between the ports of two instances; 8080, 8090 and so on are easy to keep apart.
_PORT_STEP = 10


def members(
    options: Options, *, gpus: Sequence[str] = (), num_instances: int = 1
) -> tuple[Options, ...]:
    """Return the options of every instance of a fleet, those of one being `options`.

    Args:
        options: of a single instance; its state directory becomes the fleet's.
        gpus: one instance for each; if there are any, `num_instances` is not looked at.
        num_instances: on the CPU.

    Raises: UsageError, ServerError.
    """
    count = len(gpus) or num_instances
    if not 1 <= count <= MAX_INSTANCES:
        raise UsageError(f"{option('instances')}{count}: allowed are 1 to {MAX_INSTANCES}")
    if count == 1 and not gpus:
        return (options,)
    found = []
    for index in range(count):
        properties, environment = bound_to_gpu(gpus[index]) if gpus else bound_to_cores(count)
        found.append(
            replace(
                options,
                state_dir=options.state_dir / str(index),
                ports=_ports(options.ports, index),
                properties={**options.properties, **properties},
                environment={**options.environment, **environment},
            )
        )
    _check_ports(found)
    return tuple(found)


def _check_ports(instances: Sequence[Options]) -> None:
    """Raise ServerError where two instances would have one port."""
    owners: dict[int, Path] = {}
    for each in instances:
        for number in each.ports.numbers:
            if (other := owners.setdefault(number, each.state_dir)) != each.state_dir:
                raise ServerError(
                    f"port {number} would be that of instance {other.name} and of instance "
                    f"{each.state_dir.name}: an instance has its ports {_PORT_STEP} above those of "
                    f"the one before, so {option('port')} and {option('grpc_port')} must be "
                    f"{_PORT_STEP * len(instances)} apart"
                )


def _ports(first: Ports, index: int) -> Ports:
    step = _PORT_STEP * index
    grpc = None if first.grpc_inference is None else first.grpc_inference + step
    ports = Ports(first.inference + step, first.metrics + step, grpc)
    if not all(0 < number < 65536 for number in ports.numbers):
        raise ServerError(f"the ports of instance {index} would be {ports.numbers}: above 65535")
    return ports


def fingerprint(instances: Sequence[Options]) -> str:
    """Return a digest of all that a running fleet depends on."""
    parts = [[str(each.state_dir.resolve()), each.fingerprint()] for each in instances]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class InstanceState:
    """How one instance is, as its supervisor sees it."""

    state_dir: str
    state: str = "starting"
    """starting, ready, worker down, no answer, down, draining, stopped."""
    device: str | None = None
    """The GPU that it is bound to."""
    problem: str | None = None
    """Why it is down."""
    num_restarts: int = 0
    """How often it was started again without having been asked for."""
    since_s: float = 0.0
    """When it came into this state, in seconds since 1970."""


@dataclass(frozen=True, slots=True)
class FleetRecord:
    """What a supervisor says of its fleet."""

    pid: int
    created_s: float
    """When it started, by `scripts.background.started_s`."""
    started_as: str
    instances: tuple[InstanceState, ...]
    num_rolls: int = 0
    """Rolling restarts that have ended."""
    roll_problem: str | None = None
    """Why the last one did not come to its end."""

    @classmethod
    def read(cls, run_dir: Path) -> FleetRecord | None:
        """Return the record in `run_dir`, of a supervisor that may be gone; None without one."""
        try:
            saved = read_saved(run_dir / FLEET_RECORD)
            instances = tuple(InstanceState(**each) for each in saved.pop("instances"))
            return cls(instances=instances, **saved)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, run_dir: Path) -> None:
        """Replace the record in `run_dir`. Raises: OSError."""
        save(run_dir / FLEET_RECORD, asdict(self))

    @property
    def supervisor(self) -> psutil.Process | None:
        """The supervisor's process, None when it does not run."""
        try:
            return running_process({"pid": self.pid, "created_s": self.created_s})
        except psutil.Error:
            return None


def fleet_over(state_dir: Path) -> tuple[Path, FleetRecord] | None:
    """Return the folder and the record of the supervised fleet that `state_dir` is one of, if any.

    Not where that is the fleet's own folder.
    """
    own = state_dir.resolve()
    record = FleetRecord.read(own.parent)
    if record is None or record.supervisor is None:
        return None
    is_member = str(own) in [each.state_dir for each in record.instances]
    return (own.parent, record) if is_member else None


def run_dirs(run_dir: Path) -> tuple[Path, ...]:
    """Return the state directories of the instances that `run_dir` stands for, itself at least."""
    record = FleetRecord.read(run_dir)
    return (run_dir,) if record is None else tuple(Path(e.state_dir) for e in record.instances)
