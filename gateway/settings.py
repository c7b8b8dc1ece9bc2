"""What an operator may set: config/gateway.yaml, checked whole.

Everything about a key stands in `Settings`: default, allowed values, meaning. Checks that need two
keys are in `_cross_problems`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from gateway.jobs.settings import JobSettings
from gateway.setting_tables import SettingProblems, is_table, read_values
from gateway.setting_tables import setting as _key
from handler import config_checks as allow
from handler.config_checks import Check
from handler.errors import ConfigError
from handler.messages import show

__all__ = [
    "EVERYBODY",
    "NOBODY",
    "QUALITIES",
    "InstanceSettings",
    "Settings",
    "is_loopback",
    "read_settings",
]

QUALITIES = ("low", "medium", "high", "xhigh", "max", "standard", "hd")
"""OpenAI's qualities beside `auto`, which is the model's own number of steps."""
EVERYBODY, NOBODY = "everybody", "nobody"
"""Who may read the metrics, beside the name of a key."""

_URL = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+(:[0-9]+)?/?")
_ORIGIN = re.compile(r"\*|https?://[A-Za-z0-9.\-\[\]:]+")
_NAME = re.compile(r"[^\s/]{1,200}")


@dataclass(frozen=True, slots=True)
class InstanceSettings:
    """A TorchServe that is not found in a RUN_DIR of this machine."""

    url: str
    """Its inference address: ``http://host:port``."""
    model: str
    management: str | None = None
    """``unix:/path`` or ``http://host:port``. None: the worker itself is asked."""
    token_file: str | None = None
    """TorchServe's key_file.json, or a file that holds the inference key alone."""
    model_config: str | None = None
    """The model-config.yaml that it runs with, for limits and defaults. None: the shipped ones."""
    metrics: str | None = None
    """Where TorchServe tells its metrics, ``http://host:port/metrics``. None: not passed on."""


def _list_of(what: str, is_allowed: re.Pattern[str], example: str) -> Check:
    def convert(value: object) -> object:
        entries = value if isinstance(value, (list, tuple)) else (None,)
        if not all(isinstance(each, str) and is_allowed.fullmatch(each) for each in entries):
            raise ValueError
        return tuple(entries)

    return Check(f"a list of {what} such as [{example}]", "", convert)


def _names_to_names() -> Check:
    def convert(value: object) -> object:
        if not isinstance(value, Mapping):
            raise ValueError
        for each in (*value.keys(), *value.values()):
            if not isinstance(each, str) or not _NAME.fullmatch(each):
                raise ValueError
        return dict(value)

    return Check(
        "names and the models that they stand for, such as {dall-e-3: my_model}", "", convert
    )


def _steps_by_quality() -> Check:
    def convert(value: object) -> object:
        if not isinstance(value, Mapping) or not value.keys() <= set(QUALITIES):
            raise ValueError
        steps = allow.integer(1, 1000)
        return {name: steps.convert(each) for name, each in value.items()}

    names = ", ".join(QUALITIES)
    return Check(f"steps from 1 to 1000 for any of {names}, such as {{low: 15}}", "", convert)


def _instances() -> Check:
    known = {each.name for each in fields(InstanceSettings)}

    def convert(value: object) -> object:
        entries = value if isinstance(value, (list, tuple)) else (None,)
        return tuple(_instance(each) for each in entries)

    def _instance(entry: object) -> InstanceSettings:
        if isinstance(entry, InstanceSettings):
            return entry
        if not isinstance(entry, Mapping) or not {"url", "model"} <= entry.keys() <= known:
            raise ValueError
        if not all(isinstance(each, str) for each in entry.values()):
            raise ValueError
        if not _URL.fullmatch(entry["url"]) or not _NAME.fullmatch(entry["model"]):
            raise ValueError
        if "metrics" in entry and not re.fullmatch(r"https?://.+", entry["metrics"]):
            raise ValueError
        management = entry.get("management")
        if management is not None and not re.fullmatch(r"unix:/.+|https?://.+", management):
            raise ValueError
        return InstanceSettings(**{**entry, "url": entry["url"].rstrip("/")})

    return Check(
        "a list of objects with url and model, and perhaps management, token_file, model_config and"
        " metrics",
        "",
        convert,
    )


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of the gateway; times and sizes in the unit that the name ends with."""

    address: str = _key("127.0.0.1", allow.text(), "where it listens; any but loopback needs keys")
    port: int = _key(8000, allow.integer(1, 65535), "TCP port")
    public_url: str | None = _key(
        None,
        allow.optional(allow.text()),
        "what clients reach it by, for links to pictures; left out: what the request says",
    )
    run_dirs: tuple[str, ...] = _key(
        (".run",),
        _list_of("folders", re.compile(r"[^\x00]+"), ".run"),
        "state folders of TorchServe instances on this machine, running or not yet",
    )
    instances: tuple[InstanceSettings, ...] = _key(
        (), _instances(), "TorchServe instances elsewhere"
    )
    default_model: str | None = _key(
        None,
        allow.optional(allow.text()),
        "what a request without `model` gets; left out: the first instance's",
    )
    aliases: Mapping[str, str] = _key(
        {},
        _names_to_names(),
        "other names for models, for clients with built-in ones",
    )
    quality_steps: Mapping[str, int] = _key(
        {},
        _steps_by_quality(),
        "steps for a quality; left out: a share of the model's own number of steps",
    )

    keys_file: str = _key("config/keys", allow.text(), "the keys, which `make key NAME=…` makes")
    require_keys: bool | None = _key(
        None,
        allow.optional(allow.boolean()),
        "ask every request for a key; left out: where the address is not loopback",
    )
    metrics_for: str | None = _key(
        None,
        allow.optional(allow.text()),
        "who may read /metrics: everybody, nobody or the name of a key; left out: everybody where"
        " no key is needed, else nobody",
    )
    cors_origins: tuple[str, ...] = _key(
        (), _list_of("origins", _ORIGIN, "https://app.example"), "web pages that may call it"
    )

    max_body_bytes: int = _key(
        17 * 1024 * 1024,
        allow.integer(256, 2**31 - 1),
        "bytes of a body; as an instance's max_request_size",
    )
    max_bodies_bytes: int = _key(
        512 * 1024 * 1024,
        allow.integer(256, 2**40),
        "bytes of all bodies that are held at a time; beyond that 503",
    )
    body_timeout_s: float = _key(
        30.0, allow.number(0.1, 3600.0), "seconds that a body may take to arrive"
    )
    max_waiting: int = _key(
        512, allow.integer(0, 100_000), "pictures that may wait for an instance; beyond that 503"
    )
    max_waiting_per_key: int = _key(
        128, allow.integer(0, 100_000), "the same for one key; beyond that 429"
    )
    max_wait_s: float = _key(
        180.0,
        allow.number(0.1, 86400.0),
        "seconds that a request waits for an instance to be READY and free; then 503",
    )
    max_in_flight: int | None = _key(
        None,
        allow.optional(allow.integer(1, 10_000)),
        "requests that one instance gets at a time; left out: its batchSize less 16",
    )
    poll_s: float = _key(
        1.0, allow.number(0.05, 60.0), "seconds between two looks at an instance's worker"
    )
    silence_s: float = _key(
        180.0,
        allow.number(0.1, 86400.0),
        "seconds without a word from a worker that draws, after which it counts as dead: more than"
        " its longest forward takes",
    )
    drain_s: float = _key(
        30.0, allow.number(0.0, 86400.0), "seconds that requests may take to end when it stops"
    )
    trace_endpoint: str | None = _key(
        None,
        allow.optional(allow.text()),
        "where spans of requests go, OTLP over HTTP; left out: OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
        " of the environment, else none",
    )
    log_format: str = _key(
        "text", allow.one_of("text", "json"), "of the log: lines of text, or one object a line"
    )

    url_expires_s: float = _key(
        3600.0, allow.number(1.0, 30 * 86400.0), "seconds that a picture's URL is good for"
    )
    url_store_bytes: int = _key(
        1024**3, allow.integer(1024, 2**50), "bytes of all such pictures; the oldest go first"
    )

    jobs: JobSettings = _key(  # noqa: RUF009  (it is frozen)
        JobSettings(), is_table(JobSettings), "requests that nobody waits for"
    )

    def __post_init__(self) -> None:
        problems = [*_cross_problems(self)]
        if problems:
            raise SettingProblems(problems)

    @property
    def keys_required(self) -> bool:
        """Whether a request needs a key."""
        if self.require_keys is None:
            return not is_loopback(self.address)
        return self.require_keys

    @classmethod
    def from_mapping(cls, section: Mapping[str, object] | None) -> Settings:
        """The settings of a gateway.yaml.

        Raises:
            ConfigError: names every unknown key, every bad value and what is allowed.
        """
        return cls(**read_values(cls, section))


def read_settings(path: Path, **overrides: object) -> Settings:
    """Read a gateway.yaml; `overrides` beat what it says, where they are not None.

    Raises:
        ConfigError: it cannot be read, or is wrong.
    """
    try:
        section = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    given = {name: value for name, value in overrides.items() if value is not None}
    if section is None or isinstance(section, Mapping):
        section = {**(section or {}), **given}
    return Settings.from_mapping(section)


def is_loopback(address: str) -> bool:
    """Tell whether only this machine reaches `address`."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _cross_problems(settings: Settings) -> Iterator[str]:
    address = settings.address
    if address != "localhost":
        try:
            ipaddress.ip_address(address)
        except ValueError:
            yield f"address: {show(address)} is not an address such as 127.0.0.1, 0.0.0.0 or ::"
            return
    if settings.require_keys is False and not is_loopback(address):
        yield (
            f"require_keys: false is for loopback only, and {address} can be reached from other"
            " machines"
        )
    if not settings.run_dirs and not settings.instances:
        yield "run_dirs, instances: there is no instance to send anything to"
    if settings.max_bodies_bytes < settings.max_body_bytes:
        yield f"max_bodies_bytes: {settings.max_bodies_bytes} is below max_body_bytes"
