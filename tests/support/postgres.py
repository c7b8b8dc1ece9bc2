"""A PostgreSQL of the tests' own: on a free port of loopback, in a folder that goes with it."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.gateways import free_port

__all__ = ["missing_postgres", "running_postgres"]

_FOLDERS = [Path("/usr/local/bin"), *sorted(Path("/usr/lib/postgresql").glob("*/bin"))]
_PROGRAMS = ("initdb", "pg_ctl", "postgres")


def _folder() -> Path | None:
    """Where its programs are: Debian has them beside the path."""
    found = shutil.which("initdb")
    for folder in [*([Path(found).parent] if found else []), *reversed(_FOLDERS)]:
        if all((folder / name).exists() for name in _PROGRAMS):
            return folder
    return None


def missing_postgres() -> pytest.MarkDecorator:
    """Skip where it is not installed."""
    return pytest.mark.skipif(
        _folder() is None, reason="PostgreSQL is not installed: apt-get install postgresql"
    )


@contextmanager
def running_postgres() -> Iterator[str]:
    """Run one inside the block; its URL. It refuses to be root, so it is somebody else's then."""
    programs = _folder()
    assert programs is not None
    with tempfile.TemporaryDirectory(prefix="postgres-") as name:
        data = Path(name) / "data"
        as_user: list[str] = []
        if os.geteuid() == 0:
            user = _other_user()
            os.chown(name, user.pw_uid, user.pw_gid)
            ids = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
            as_user = ["setpriv", *ids]
        port = free_port()

        def run(*command: str) -> None:
            done = subprocess.run(
                [*as_user, str(programs / command[0]), *command[1:]],
                cwd=name,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=120,
                text=True,
            )
            assert done.returncode == 0, done.stdout

        run("initdb", "-D", str(data), "-U", "gateway", "--auth=trust", "--no-sync", "-E", "UTF8")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -F"
        # Its log goes to a file: it would keep our pipe open.
        log = str(Path(name) / "log")
        run("pg_ctl", "-D", str(data), "-l", log, "-o", options, "-w", "-t", "100", "start")
        try:
            yield f"postgresql://gateway@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")


def _other_user() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")
