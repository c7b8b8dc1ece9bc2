"""A stand-in for the hub on loopback; changes with what the hub's client asks for.

It answers model info, tree listings and file downloads (ETag, ranges) for models given as plain
files, and refuses as the hub refuses: gated, private, missing, unknown revision.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Model:
    """A model's files; `token` is what a reader must send, `is_gated` says how it is refused."""

    files: dict[str, bytes]
    token: str | None = None
    is_gated: bool = False
    revisions: tuple[str, ...] = ("main", REVISION)


@dataclass
class Hub:
    """The running stand-in: its address, and every file request as (method, path, range)."""

    url: str
    models: dict[str, Model]
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    cut_at_byte: int | None = None

    def fetched(self) -> set[str]:
        """The files whose bytes were asked for."""
        return {path for method, path, _ in self.requests if method == "GET"}


@contextmanager
def serve_hub(models: dict[str, Model]) -> Iterator[Hub]:
    """Serve `models` by their ids for the time of the context."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}", models)
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep quiet."""

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined,no-any-return]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        for pattern, answer in (
            (r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", self._info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
        ):
            if match := re.fullmatch(pattern, path):
                model = self._model(match[1], match[2] or "main")
                if model is not None:
                    answer(match, model)
                return
        self._refuse(404, "", "not a path of the hub")

    def _model(self, model_id: str, revision: str) -> Model | None:
        """The model, unless this reader is refused."""
        model = self.hub.models.get(model_id)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if model is None or (model.token and token != model.token and not model.is_gated):
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
            return None
        if model.is_gated and token != model.token:
            self._refuse(403 if token else 401, "GatedRepo", "Access to this model is restricted")
            return None
        if revision not in model.revisions:
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
            return None
        return model

    def _info(self, match: re.Match[str], model: Model) -> None:
        siblings = [{"rfilename": name, "size": len(data)} for name, data in model.files.items()]
        self._send_json(
            {"id": match[1], "modelId": match[1], "sha": REVISION, "siblings": siblings}
        )

    def _tree(self, match: re.Match[str], model: Model) -> None:
        self._send_json(
            [
                {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
                for name, data in model.files.items()
            ]
        )

    def _file(self, match: re.Match[str], model: Model) -> None:
        name = match[3]
        wanted = self.headers.get("Range")
        self.hub.requests.append((self.command, name, wanted))
        data = model.files.get(name)
        if data is None:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{_etag(data)}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data[start : self.hub.cut_at_byte])
        self.close_connection = self.hub.cut_at_byte is not None

    def _send_json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
