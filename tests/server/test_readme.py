"""What the README shows is run as it stands, on the test's own address."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from scripts.repository import REPOSITORY
from scripts.torchserve.process import TorchServer

README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
CURL_BLOCKS = [block for block in BLOCKS if "curl " in block]
NEEDED_IN = {"events.txt": b"event: image", "kserve.json": b'"predictions"'}
MAKE_LINES = [line for block in BLOCKS for line in block.splitlines() if line.startswith("make ")]


def test_curl_lines(server: TorchServer, tmp_path: Path) -> None:
    script = "\n".join(CURL_BLOCKS).replace("http://127.0.0.1:8080", server.url)
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    outputs = re.findall(r"-o (\S+)", script)
    assert len(outputs) == len(set(outputs)) >= 7
    for output in outputs:
        content = (tmp_path / output).read_bytes()
        if output.endswith(".png"):
            with Image.open(tmp_path / output) as image:
                assert (image.format, image.mode) == ("PNG", "RGB"), output
        else:
            assert NEEDED_IN[output] in content, (output, content[:200])


def test_the_error_shown_is_the_error_sent(server: TorchServer) -> None:
    shown = re.search(r"```json\n(.*?)```", README, re.DOTALL)
    line = next(line for line in README.splitlines() if "stpes" in line and "curl" in line)
    assert shown is not None
    run = subprocess.run(
        ["bash", "-c", f"URL={server.predictions_url}; {line}"],
        capture_output=True,
        text=True,
        check=True,
    )
    pairs = re.findall(r'"(\w+)": "([^"]+)"', shown[1].split('"fields"')[1])
    assert len(pairs) == 2
    for field, problem in pairs:
        assert f'"{field}":"{problem}"' in run.stdout


@pytest.mark.parametrize("line", MAKE_LINES)
def test_make_lines_name_targets_and_variables_that_exist(line: str) -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    words = line.split("#")[0].split()[1:]
    targets = [word for word in words if "=" not in word]
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for variable in (word.split("=")[0] for word in words if "=" in word):
        assert f"$({variable}" in makefile, variable


def test_every_file_linked_exists() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(links) >= 5
    assert not [link for link in links if not (REPOSITORY / link).exists()]
