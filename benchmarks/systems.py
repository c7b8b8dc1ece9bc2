"""The servers that benchmarks compare: ours, and the one-at-a-time way, each on a TorchServe."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from scripts import build_archive
from scripts.torchserve.options import Options, Ports
from scripts.torchserve.process import TorchServer

__all__ = ["System", "one_at_a_time", "ours"]

_CONFIG = Path("config/model-config.yaml")
# One 768×768 picture as indented nested lists.
_ARRAY_REPLY_BYTES = 2**26


@dataclass(frozen=True, slots=True)
class System:
    """An archive under a name for the report."""

    name: str
    archive: Path

    @contextmanager
    def serving(
        self, state_dir: Path, environment: Mapping[str, str] | None = None
    ) -> Iterator[TorchServer]:
        """A TorchServe with this archive: READY inside the block, stopped after it."""
        options = Options(
            archive=self.archive,
            state_dir=state_dir / self.name.replace(" ", "-"),
            ports=Ports.free(),
            properties={"max_response_size": str(_ARRAY_REPLY_BYTES), "job_queue_size": "1000"},
            environment=environment or {},
        )
        with TorchServer(options).running() as server:
            yield server


def ours(name: str, pipeline: Path, folder: Path, settings: Mapping[str, object]) -> System:
    """Our handler with its shipped configuration, and `settings` over it."""
    config = yaml.safe_load(_CONFIG.read_text())
    config["handler"].update(settings)
    path = _write_config(folder / name / "model-config.yaml", config)
    arguments = ["--pipeline", str(pipeline), "--name", "bench", "--config", str(path)]
    if build_archive.main([*arguments, "--out", str(folder / name)]):
        raise RuntimeError(f"cannot pack {pipeline}")
    return System(name, folder / name / "bench.mar")


def one_at_a_time(
    name: str, pipeline: Path, folder: Path, *, num_workers: int, settings: Mapping[str, object]
) -> System:
    """The upstream way, packed the upstream way: a deflated zip in a deflated archive."""
    model_config = {
        "minWorkers": num_workers,
        "maxWorkers": num_workers,
        "batchSize": 1,
        "maxBatchDelay": 1,
        "responseTimeout": 600,
        "startupTimeout": 600,  # unzipping gigabytes on a busy machine outlasts the default
        "handler": dict(settings),
    }
    target = folder / name
    path = _write_config(target / "model-config.yaml", model_config)
    model_zip = shutil.make_archive(str(target / "model"), "zip", pipeline)
    handler = Path(__file__).with_name("one_at_a_time.py")
    subprocess.run(
        [
            *(str(Path(sys.executable).with_name("torch-model-archiver")), "--model-name", "bench"),
            *("--version", "1.0", "--handler", str(handler), "--extra-files", model_zip),
            *("--config-file", str(path), "--export-path", str(target), "--force"),
        ],
        check=True,
        capture_output=True,
    )
    return System(name, target / "bench.mar")


def _write_config(path: Path, config: Mapping[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(config)))
    return path
