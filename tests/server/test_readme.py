"""What the README shows is run as it stands, on the test's own address."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from scripts.repository import REPOSITORY
from scripts.torchserve.process import TorchServer

DOCUMENTS = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text()
    for path in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
}
# Documents whose lines of curl are run in one shell, from the first to the last.
RUN = ("README.md", "docs/requests.md")
NEEDED_IN = {"events.txt": b"event: image", "kserve.json": b'"predictions"'}


def blocks(document: str) -> list[str]:
    """The shell blocks of a document."""
    return re.findall(r"```bash\n(.*?)```", DOCUMENTS[document], re.DOTALL)


MAKE_LINES = [
    line
    for document in DOCUMENTS
    for block in blocks(document)
    for line in block.splitlines()
    if line.startswith("make ")
]


@pytest.mark.parametrize("document", RUN)
def test_curl_lines(document: str, server: TorchServer, tmp_path: Path) -> None:
    (tmp_path / "demo").symlink_to(REPOSITORY / "demo")
    (tmp_path / "in.png").symlink_to(REPOSITORY / "demo" / "circle.png")
    (tmp_path / "mask.png").symlink_to(REPOSITORY / "demo" / "left_half.png")
    script = "\n".join(block for block in blocks(document) if "curl " in block)
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script.replace("http://127.0.0.1:8080", server.url)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    outputs = re.findall(r"-o (\S+)", script)
    assert len(outputs) == len(set(outputs)) >= 4
    for output in outputs:
        content = (tmp_path / output).read_bytes()
        if output.endswith(".png"):
            with Image.open(tmp_path / output) as image:
                assert (image.format, image.mode) == ("PNG", "RGB"), output
        else:
            assert NEEDED_IN[output] in content, (output, content[:200])


@pytest.mark.parametrize("document", RUN)
def test_the_error_shown_is_the_error_sent(document: str, server: TorchServer) -> None:
    text = DOCUMENTS[document]
    shown = re.search(r"```json\n(.*?)```", text, re.DOTALL)
    line = next(line for line in text.splitlines() if "stpes" in line and "curl" in line)
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
    words = shlex.split(line, comments=True)[1:]
    targets = [word for word in words if "=" not in word]
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for variable in (word.split("=")[0] for word in words if "=" in word):
        assert f"$({variable}" in makefile, variable


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_linked_exists(document: str) -> None:
    folder = (REPOSITORY / document).parent
    links = re.findall(r"\]\((?!http)([^)]+)\)", DOCUMENTS[document])
    for path, _, anchor in (link.partition("#") for link in links):
        target = folder / path if path else REPOSITORY / document
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in anchors, (path, anchor)
