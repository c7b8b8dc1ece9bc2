"""An archive with a handler of a few lines, to test starting and stopping a server on."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

HANDLER = """
class Toy:
    def initialize(self, context):
        {initialize}

    def handle(self, data, context):
        return [str(row) for row in data]
"""
CONFIG = "minWorkers: 1\nmaxWorkers: 1\nbatchSize: 1\nmaxBatchDelay: 1\n"


def write_toy_archive(
    folder: Path,
    name: str = "toy",
    *,
    initialize: str = "pass",
    handler: str = HANDLER,
    config: str = CONFIG,
) -> Path:
    """Write `folder`/`name`.mar, whose handler runs the statement `initialize` at start-up."""
    model = {
        "modelName": name,
        "modelVersion": "1.0",
        "handler": "toy_entry.py",
        "configFile": "model-config.yaml",
    }
    manifest = {
        "createdOn": "01/01/2025 00:00:00",
        "runtime": "python",
        "model": model,
        "archiverVersion": "0.12.0",
    }
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"{name}.mar"
    with zipfile.ZipFile(archive, "w") as mar:
        mar.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        mar.writestr("toy_entry.py", handler.replace("{initialize}", initialize))
        mar.writestr("model-config.yaml", config)
    return archive
