"""Connections to instances: pools of them, and how it shows that the other side is gone."""

from __future__ import annotations

import socket

import aiohttp

__all__ = ["open_session"]

# A machine that lost its power, or a translator of addresses that forgot a connection, sends
# nothing any more, and whoever only waits for a reply would wait for ever: the kernel asks.
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}
_UNIX = "unix:"


def open_session(address: str = "") -> aiohttp.ClientSession:
    """A pool of connections that waits for as long as drawing takes, and keeps no cookies.

    Args:
        address: ``unix:PATH`` for one to that socket; else it is of TCP.
    """
    connector: aiohttp.BaseConnector
    if address.startswith(_UNIX):
        connector = aiohttp.UnixConnector(address.removeprefix(_UNIX))
    else:
        connector = aiohttp.TCPConnector(
            limit=0, keepalive_timeout=30, socket_factory=_asked_whether_it_is_there
        )
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        # Events carry whole pictures in one line.
        read_bufsize=2**18,
    )


def _asked_whether_it_is_there(info: aiohttp.AddrInfoType) -> socket.socket:
    made = socket.socket(*info[:3])
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # not all systems have all of them
            made.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return made
