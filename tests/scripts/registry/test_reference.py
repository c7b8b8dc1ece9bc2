"""scripts.registry.reference: what names an image, and what does not."""

from __future__ import annotations

import pytest

from scripts.errors import UsageError
from scripts.registry.reference import Reference

DIGEST = f"sha256:{'0123456789abcdef' * 4}"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("ghcr.io/me/sd:1.0", Reference("ghcr.io", "me/sd", "1.0")),
        ("ghcr.io/me/sd", Reference("ghcr.io", "me/sd")),
        (f"localhost:5000/sd@{DIGEST}", Reference("localhost:5000", "sd", None, DIGEST)),
        (f"[::1]:5000/a/b/c__d:x@{DIGEST}", Reference("[::1]:5000", "a/b/c__d", "x", DIGEST)),
    ],
)
def test_references(text: str, wanted: Reference) -> None:
    assert Reference.parse(text) == wanted
    assert str(wanted) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "sd", "me/sd:1.0", "ghcr.io/", "ghcr.io/Me/sd", "ghcr.io/me/../sd", "ghcr.io/me/sd:"),
        *(
            "ghcr.io/me/sd:a b",
            "ghcr.io/me/sd@",
            "ghcr.io/me/sd@sha256:12",
            "https://ghcr.io/me/sd",
        ),
        *("ghcr.io/me//sd", "ghcr.io:x/sd", "user@ghcr.io/me/sd", f"ghcr.io/{'a' * 256}"),
    ],
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(UsageError):
        Reference.parse(text)


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        *(("localhost", True), ("localhost:5000", True), ("127.0.0.1:5000", True)),
        *(("127.9.9.9", True), ("[::1]:5000", True), ("10.0.0.1:5000", False)),
        *(("localhost.example.org", False), ("127.0.0.1.example.org", False)),
    ],
)
def test_which_are_on_this_machine(host: str, is_loopback: bool) -> None:
    assert Reference(host, "sd").is_loopback == is_loopback


def test_the_docker_hub_is_asked_elsewhere() -> None:
    assert Reference.parse("docker.io/me/sd").api_host == "registry-1.docker.io"
