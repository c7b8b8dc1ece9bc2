"""HAProxy's admin socket: tells it which instance gets no new gRPC calls for a while."""

from __future__ import annotations

import os
import socket
from pathlib import Path

__all__ = ["admin_socket", "haproxy_dir_of", "server_name", "set_state"]

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
    folder = haproxy_dir_of(run_dir)
    command = f"set server {_BACKEND}/{server_name(index)} state {state}\n"
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_TIMEOUT_S)
            connection.connect(str(admin_socket(folder)))
            connection.sendall(command.encode())
            # It says nothing where it has done it.
            return connection.recv(4096).strip() == b""
    except OSError:
        return False
