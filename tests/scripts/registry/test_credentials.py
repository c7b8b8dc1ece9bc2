"""scripts.registry.credentials: what docker's config.json says, in all its forms."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from scripts.errors import RegistryError
from scripts.registry.credentials import Credentials, find_credentials

ADA = Credentials("ada", "se:cret")


def encoded(text: str) -> dict[str, str]:
    return {"auth": base64.b64encode(text.encode()).decode()}


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path / "config.json"


@pytest.mark.parametrize(
    ("auths", "wanted"),
    [
        ({"ghcr.io": encoded("ada:se:cret")}, ADA),
        ({"https://ghcr.io": encoded("ada:se:cret")}, ADA),
        ({"https://ghcr.io/v2/": encoded("ada:se:cret")}, ADA),
        ({"ghcr.io": {"username": "ada", "password": "se:cret"}}, ADA),
        ({"ghcr.io": {"identitytoken": "abc"}}, Credentials(identity_token="abc")),
        ({"ghcr.io": {}, "quay.io": encoded("ada:se:cret")}, None),
        ({"ghcr.io.example.org": encoded("ada:se:cret")}, None),
        ([], None),
    ],
)
def test_what_is_written_in_it(docker: Path, auths: object, wanted: Credentials | None) -> None:
    docker.write_text(json.dumps({"auths": auths}))
    assert find_credentials("ghcr.io") == wanted


def test_the_docker_hub_has_an_old_name(docker: Path) -> None:
    docker.write_text(json.dumps({"auths": {"https://index.docker.io/v1/": encoded("ada:x")}}))
    assert find_credentials("docker.io") == Credentials("ada", "x")


def test_without_it_there_are_none(docker: Path) -> None:
    assert find_credentials("ghcr.io") is None


@pytest.mark.parametrize("text", ["{", "[]"])
def test_what_is_not_as_docker_writes_it(docker: Path, text: str) -> None:
    docker.write_text(text)
    if text == "[]":
        assert find_credentials("ghcr.io") is None
    else:
        with pytest.raises(RegistryError, match="is not JSON"):
            find_credentials("ghcr.io")


def test_an_auth_that_cannot_be_read(docker: Path) -> None:
    docker.write_text(json.dumps({"auths": {"ghcr.io": {"auth": "%%%"}}}))
    with pytest.raises(RegistryError, match="log in again"):
        find_credentials("ghcr.io")


def helper(docker: Path, script: str) -> None:
    path = docker.with_name("docker-credential-safe")
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("config", [{"credsStore": "safe"}, {"credHelpers": {"ghcr.io": "safe"}}])
def test_a_credential_helper_is_asked(docker: Path, config: dict[str, object]) -> None:
    docker.write_text(json.dumps(config))
    asked = docker.with_name("asked")
    answer = json.dumps({"Username": "ada", "Secret": "se:cret"})
    helper(docker, f"cat > {asked}; test $1 = get && echo '{answer}'")
    assert find_credentials("ghcr.io") == ADA
    assert asked.read_text() == "ghcr.io"


def test_a_helper_may_have_an_identity_token_or_nothing(docker: Path) -> None:
    docker.write_text(json.dumps({"credsStore": "safe"}))
    helper(docker, """echo '{"Username": "<token>", "Secret": "abc"}'""")
    assert find_credentials("ghcr.io") == Credentials(identity_token="abc")
    helper(docker, "echo credentials not found in native keychain; exit 1")
    assert find_credentials("ghcr.io") is None
    helper(docker, "echo hello")
    with pytest.raises(RegistryError, match="not a credential"):
        find_credentials("ghcr.io")


@pytest.mark.parametrize("name", ["absent", "../evil"])
def test_a_helper_that_is_not_there(docker: Path, name: str) -> None:
    docker.write_text(json.dumps({"credsStore": name}))
    with pytest.raises(RegistryError, match=name):
        find_credentials("ghcr.io")


def test_no_message_shows_a_secret() -> None:
    assert "se:cret" not in repr(ADA)
