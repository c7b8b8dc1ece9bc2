"""Which TorchServe instances there are, and where each is reached."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from yarl import URL

from gateway.file_stamps import file_stamp
from gateway.model_config import ModelConfig, read_model_config
from gateway.settings import InstanceSettings

__all__ = ["Address", "FixedSource", "RunDirSource", "Source"]


@dataclass(frozen=True, slots=True)
class Address:
    """How one instance is reached, and what it serves."""

    url: str
    model: str
    management: str | None
    token: str | None = None
    management_token: str | None = None
    config: ModelConfig = field(default_factory=ModelConfig)
    metrics: str | None = None
    """Where TorchServe tells its metrics and its worker's."""
    started: str = ""
    """Differs between two servers that had the same address one after the other."""

    @property
    def predictions(self) -> URL:
        """Where requests for the model are posted."""
        return URL(f"{self.url}/predictions/{self.model}")

    @property
    def headers(self) -> dict[str, str]:
        """What every request to it needs."""
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}


class Source(Protocol):
    """Where an instance's address comes from."""

    @property
    def name(self) -> str:
        """What logs call the instance."""
        ...

    def read(self) -> Address | None:
        """Its address now; None while it does not run. Cheap where nothing has changed."""
        ...


class RunDirSource:
    """An instance of this machine, by the state folder that ``make serve`` keeps."""

    def __init__(self, run_dir: Path) -> None:
        self.name = str(run_dir)
        self._saved = run_dir / "server.json"
        self._keys = run_dir / "key_file.json"
        self._seen: tuple[object, ...] | None = None
        self._address: Address | None = None

    def read(self) -> Address | None:
        """Its address now; None while no server has the folder."""
        seen = (file_stamp(self._saved), file_stamp(self._keys))
        if seen != self._seen:
            self._address, self._seen = self._parse(), seen
        return self._address

    def _parse(self) -> Address | None:
        try:
            saved = json.loads(self._saved.read_bytes())
            host = "127.0.0.1" if saved["address"] == "0.0.0.0" else saved["address"]
            keys = json.loads(self._keys.read_bytes()) if saved["auth"] else {}
            return Address(
                url=f"http://{host}:{saved['ports']['inference']}",
                model=str(saved["model_name"]),
                management=str(saved["management"]),
                token=keys.get("inference", {}).get("key"),
                management_token=keys.get("management", {}).get("key"),
                config=read_model_config(Path(saved["archive"])),
                # On loopback, wherever inference listens.
                metrics=f"http://127.0.0.1:{saved['ports']['metrics']}/metrics",
                started=f"{saved['pid']} {saved['created_s']}",
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


class FixedSource:
    """An instance that the configuration names."""

    def __init__(self, settings: InstanceSettings) -> None:
        self.name = settings.url
        self._settings = settings
        path = None if settings.model_config is None else Path(settings.model_config)
        self._config = read_model_config(path)
        self._token_file = None if settings.token_file is None else Path(settings.token_file)
        self._seen: object = None
        self._address = self._parse()

    def read(self) -> Address | None:
        """Its address, with the key that its file holds now."""
        seen = None if self._token_file is None else file_stamp(self._token_file)
        if seen != self._seen:
            self._address, self._seen = self._parse(), seen
        return self._address

    def _parse(self) -> Address:
        token, management_token = _tokens(self._token_file)
        return Address(
            url=self._settings.url,
            model=self._settings.model,
            management=self._settings.management,
            token=token,
            management_token=management_token,
            config=self._config,
            metrics=self._settings.metrics,
        )


def _tokens(path: Path | None) -> tuple[str | None, str | None]:
    try:
        text = "" if path is None else path.read_text("utf-8").strip()
    except (OSError, ValueError):
        return None, None
    try:
        keys = json.loads(text)
        return keys["inference"]["key"], keys["management"]["key"]
    except (ValueError, KeyError, TypeError):
        return text or None, None
