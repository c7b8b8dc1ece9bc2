"""HAProxy's admin socket: tells it which instance gets no new gRPC calls for a while."""

from __future__ import annotations

import os
import socket
from pathlib import Path

__all__ = ["admin_socket", "haproxy_dir_of", "num_calls", "server_name", "set_state"]

_BACKEND = "grpc"
_TIMEOUT_S = 2.0
# A Unix socket's path may have 107 bytes, and HAProxy binds it under a longer name first.
_MAX_BYTES = 80


def haproxy_dir_of(run_dir: Path) -> Path:
    """Return the state folder of the HAProxy that belongs to an instance or a fleet."""
    return run_dir.with_name(f"{run_dir.name}-haproxy")


def admin_socket(haproxy_dir: Path) -> Path:
    """Return where HAProxy listens for commands: in its folder, or below /tmp for a long path."""
    path = haproxy_dir.resolve() / "admin.sock"
    if len(os.fsencode(path)) <= _MAX_BYTES:
        return path
    # The folder's own name would be no secret: it has mode 0700, and the inode is nobody else's.
    status = haproxy_dir.stat()
    return Path(f"/tmp/haproxy-{status.st_dev:x}-{status.st_ino:x}.sock")


def server_name(index: int) -> str:
    """Return what HAProxy calls an instance of a fleet."""
    return f"instance{index}"


def set_state(run_dir: Path, index: int, state: str) -> bool:
    """Set the state of an instance's gRPC to ``drain`` or ``ready``; False without an HAProxy."""
    # It says nothing where it has done it.
    return _ask(run_dir, f"set server {_BACKEND}/{server_name(index)} state {state}") == ""


def num_calls(run_dir: Path, index: int) -> int:
    """Return how many gRPC calls an instance has of HAProxy; 0 without one."""
    for line in (_ask(run_dir, "show stat") or "").splitlines():
        fields = line.split(",")
        # Source: HAProxy 2.6, management.txt, 9.1: pxname, svname, qcur, qmax, scur.
        if fields[:2] == [_BACKEND, server_name(index)] and fields[4].isdigit():
            return int(fields[4])
    return 0


def _ask(run_dir: Path, command: str) -> str | None:
    """Return what HAProxy says to a command; None where there is none."""
    said = b""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_TIMEOUT_S)
            connection.connect(str(admin_socket(haproxy_dir_of(run_dir))))
            connection.sendall(f"{command}\n".encode())
            while piece := connection.recv(65536):
                said += piece
    except OSError:
        return None
    return said.decode("utf-8", "replace").strip()
