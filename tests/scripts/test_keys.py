"""scripts.keys: the gateway's keys from the installed command."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from gateway.keys import Key, read_keys
from scripts.keys import KEY


def test_a_key_from_any_folder(tmp_path: Path) -> None:
    code = "import sys; from scripts.cli import main; sys.exit(main(sys.argv[1:]))"
    limits = ["--max-steps", "50", "--concurrency", "2", "--models", "a", "b"]
    made = subprocess.run(
        [sys.executable, "-c", code, "key", "--name", "somebody", *limits],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert made.stdout.startswith("dts-")
    (key,) = read_keys(tmp_path / "config" / "keys")
    assert key == Key("somebody", key.hash, concurrency=2, max_steps=50, models=("a", "b"))


def test_every_limit_can_be_given() -> None:
    given = vars(KEY.parse(["--name", "somebody"])).keys() - {"file"}
    assert given == {each.name for each in fields(Key)} - {"hash"}
