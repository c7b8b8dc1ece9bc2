"""Which TorchServe instances there are, where each is reached, and whether its worker is READY.

READY is what the management API says of the worker; /ping is healthy long before. An instance
whose management address cannot be reached from here is asked through its inference port to cancel
a request that does not exist: that passes its worker and draws nothing.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from gateway.file_stamps import file_stamp
from gateway.model_config import ModelConfig, read_model_config
from gateway.settings import InstanceSettings

__all__ = ["Address", "FixedSource", "RunDirSource", "Source", "WorkerCheck"]

_CHECK_TIMEOUT_S = 5.0


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


class WorkerCheck:
    """Asks instances whether their worker is READY; keeps a connection to each."""

    def __init__(self, open_session: Callable[..., aiohttp.ClientSession]) -> None:
        self._open_session = open_session
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    async def is_ready(self, address: Address) -> bool | None:
        """Whether the worker can take requests; None when nothing was said in time.

        A frontend that is busy may be late, so that no answer does not mean that it is gone.
        """
        try:
            async with asyncio.timeout(_CHECK_TIMEOUT_S):
                if address.management is None:
                    return await self._asks_worker(address)
                return await self._asks_management(address, address.management)
        except TimeoutError:
            return None
        except (aiohttp.ClientError, OSError, ValueError, KeyError, TypeError):
            return False

    async def hears(self, address: Address) -> bool:
        """Wait until the worker answers; False where it cannot be asked, or has died over it."""
        try:
            return await self._asks_worker(address)
        except (aiohttp.ClientError, OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    async def close(self) -> None:
        """Close all connections."""
        for session in self._sessions.values():
            await session.close()

    async def _asks_management(self, address: Address, management: str) -> bool:
        token = address.management_token
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        base = "http://localhost" if management.startswith("unix:") else management.rstrip("/")
        url = URL(f"{base}/models/{address.model}")
        async with self._session(management).get(url, headers=headers) as reply:
            workers = json.loads(await reply.read())[0]["workers"]
        return any(worker.get("status") == "READY" for worker in workers)

    async def _asks_worker(self, address: Address) -> bool:
        body = json.dumps({"cancel": f"gateway-{secrets.token_hex(8)}"}).encode()
        headers = {**address.headers, "Content-Type": "application/json"}
        session = self._session(address.url)
        async with session.post(address.predictions, data=body, headers=headers) as reply:
            content = json.loads(await reply.read())
        return bool(content.get("error", {}).get("code") == "not_found")

    def _session(self, where: str) -> aiohttp.ClientSession:
        if where not in self._sessions:
            if where.startswith("unix:"):
                connector: aiohttp.BaseConnector = aiohttp.UnixConnector(
                    where.removeprefix("unix:")
                )
            else:
                assert urlsplit(where).netloc, where
                connector = aiohttp.TCPConnector(limit=0)
            self._sessions[where] = self._open_session(connector=connector)
        return self._sessions[where]
