"""gateway.settings."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from gateway.settings import InstanceSettings, Settings, read_settings
from handler.errors import ConfigError
from scripts.repository import REPOSITORY

SHIPPED = REPOSITORY / "config" / "gateway.yaml"


def test_the_shipped_file_has_the_defaults() -> None:
    assert read_settings(SHIPPED) == Settings()


def test_the_shipped_file_names_every_key() -> None:
    text = SHIPPED.read_text()
    for field in fields(Settings):
        assert f"\n{field.name}: " in text or f"\n# {field.name}: " in text, field.name


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_text("# nothing\n")
    assert read_settings(tmp_path / "gateway.yaml", port=9000) == Settings(port=9000)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"adress": "::1"}, "adress: unknown key; did you mean address?"),
        ({"port": 0}, "port: 0 is not allowed; must be an integer from 1 to 65535"),
        ({"port": "8000"}, "port: '8000' is not allowed"),
        ({"address": "example.org"}, "is not an address such as 127.0.0.1"),
        ({"address": "0.0.0.0", "require_keys": False}, "require_keys: false is for loopback only"),
        ({"run_dirs": []}, "no instance to send anything to"),
        ({"run_dirs": ".run"}, "run_dirs: '.run' is not allowed; must be a list of folders"),
        ({"instances": [{"url": "http://10.0.0.5:8080"}]}, "a list of objects with url and model"),
        ({"instances": [{"url": "10.0.0.5", "model": "a"}]}, "a list of objects"),
        ({"instances": [{"url": "http://a", "model": "a", "key": "x"}]}, "a list of objects"),
        ({"instances": [{"url": "http://a", "model": "a", "management": "b"}]}, "a list of"),
        ({"quality_steps": {"best": 5}}, "steps from 1 to 1000 for any of low, medium"),
        ({"quality_steps": {"low": 0}}, "steps from 1 to 1000"),
        ({"aliases": ["a"]}, "names and the models that they stand for"),
        ({"cors_origins": ["app.example"]}, "a list of origins"),
        ({"max_body_bytes": 1000, "max_bodies_bytes": 999}, "below max_body_bytes"),
        ([], "must be keys and values"),
    ],
)
def test_what_is_wrong_is_named(section: object, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.from_mapping(section)  # type: ignore[arg-type]
    assert said in str(caught.value)


def test_everything_that_is_wrong_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.from_mapping({"port": 0, "poll_s": -1, "prot": 1})
    assert len(str(caught.value).splitlines()) == 4


def test_instances() -> None:
    entry = {"url": "http://10.0.0.5:8080/", "model": "toy", "management": "unix:/run/m.sock"}
    (read,) = Settings.from_mapping({"instances": [entry]}).instances
    assert read == InstanceSettings("http://10.0.0.5:8080", "toy", "unix:/run/m.sock")


@pytest.mark.parametrize(
    ("address", "required"),
    [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("::", True)],
)
def test_keys_are_required_where_others_reach_it(address: str, required: bool) -> None:
    assert Settings(address=address).keys_required is required
    assert Settings(address=address, require_keys=True).keys_required


@pytest.mark.parametrize("text", ["a: [", "\x00"])
def test_a_file_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "gateway.yaml").write_text(text)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_settings(tmp_path / "gateway.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_settings(tmp_path / "missing.yaml")


def test_defaults_pass_their_own_checks() -> None:
    defaults = {field.name: getattr(Settings(), field.name) for field in fields(Settings)}
    assert Settings.from_mapping(defaults) == Settings()
    assert yaml.safe_load(SHIPPED.read_text()).keys() <= defaults.keys()
