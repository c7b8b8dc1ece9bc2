"""gateway.connections: whoever waits for an instance sees that it has vanished."""

from __future__ import annotations

import asyncio
import socket

from gateway.connections import open_session


def test_the_kernel_asks_whether_the_other_side_is_there() -> None:
    """A machine without power says nothing, and a reply may take any time."""

    async def begin_to_reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
        await reader.read()
        writer.close()

    async def check() -> None:
        server = await asyncio.start_server(begin_to_reply, "127.0.0.1", 0)
        url = "http://{}:{}".format(*server.sockets[0].getsockname())
        async with server, open_session(url) as session, session.get(url) as response:
            assert response.connection is not None
            assert response.connection.transport is not None
            connected: socket.socket = response.connection.transport.get_extra_info("socket")
            assert connected.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if hasattr(socket, "TCP_KEEPIDLE"):
                assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60

    asyncio.run(asyncio.wait_for(check(), 60))
