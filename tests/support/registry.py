"""A real registry on loopback (Debian's docker-registry), and a proxy that cuts connections."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PROGRAM = "docker-registry"
USER, PASSWORD = "ada", "secret word"
_HTPASSWD = f"{USER}:$2y$05$abcdefghijklmnopqrstuu1C7yeI3ZG3Jm.nHdnKkGJg1xTYKP9Oy\n"


@contextmanager
def serve_registry(folder: Path, auth: str = "") -> Iterator[str]:
    """Serve what is in `folder`; give ``host:port``. `auth` is that section of its configuration.

    Where it is not installed the test is skipped, or fails if this is CI.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        message = f"{PROGRAM} is not installed: apt-get install {PROGRAM}"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(message)
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: error}}\n"
        f"storage: {{filesystem: {{rootdirectory: '{folder / 'data'}'}}}}\n"
        f"http: {{addr: '{host}'}}\n{auth}"
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, "serve", str(config)], stdout=log, stderr=log)
    try:
        _wait(f"http://{host}/v2/", process, folder / "log")
        yield host
    finally:
        process.terminate()
        process.wait(timeout=30)


def htpasswd_auth(folder: Path) -> str:
    """The configuration of a registry that asks for `USER` and `PASSWORD`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "htpasswd").write_text(_HTPASSWD)
    return f"auth: {{htpasswd: {{realm: tests, path: '{folder / 'htpasswd'}'}}}}\n"


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(300):
        assert process.poll() is None, log.read_text()
        try:
            opener.open(url, timeout=5).close()
        except urllib.error.HTTPError:
            return  # it wants a password
        except OSError:
            time.sleep(0.1)
        else:
            return
    pytest.fail(f"{PROGRAM} does not answer: {log.read_text()}")


@dataclass
class CuttingProxy:
    """Passes bytes on to `target`, but ends `num_cuts_left` connections `cut_after` that many."""

    target: str
    cut_after: int = 0
    num_cuts_left: int = 0
    sent: int = 0
    received: int = 0
    _server: socket.socket = field(default_factory=socket.socket)

    @property
    def host(self) -> str:
        """Its own ``host:port``."""
        return f"127.0.0.1:{self._server.getsockname()[1]}"

    @contextmanager
    def running(self) -> Iterator[CuttingProxy]:
        """Pass on for the time of the context."""
        self._server.bind(("127.0.0.1", 0))
        self._server.listen()
        thread = threading.Thread(target=self._accept)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown(socket.SHUT_RDWR)
            thread.join()
            self._server.close()

    def _accept(self) -> None:
        threads, clients = [], []
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                break
            clients.append(client)
            threads.append(threading.Thread(target=self._connect, args=(client,)))
            threads[-1].start()
        for client in clients:  # the pool of an error's traceback may keep one open
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()

    def _connect(self, client: socket.socket) -> None:
        name, _, port = self.target.partition(":")
        with client, socket.create_connection((name, int(port))) as registry:
            back = threading.Thread(target=self._pass, args=(registry, client, "received"))
            back.start()
            self._pass(client, registry, "sent")
            back.join()

    def _pass(self, source: socket.socket, sink: socket.socket, what: str) -> None:
        passed = 0
        with suppress(OSError):
            while data := source.recv(64 << 10):
                if self.num_cuts_left and passed + len(data) > self.cut_after:
                    self.num_cuts_left -= 1
                    break
                sink.sendall(data)
                passed += len(data)
                setattr(self, what, getattr(self, what) + len(data))
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
