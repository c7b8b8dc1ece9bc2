"""gateway.http_protocol over real connections, on a clock of the test's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from tests.support.gateway_apps import listening

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Coroutine[Any, Any, Connection]]


class JumpingLoop(asyncio.SelectorEventLoop):
    """Timers are due as soon as a test says that their time has come."""

    jumped_s = 0.0

    def time(self) -> float:
        return super().time() + self.jumped_s


class App:
    """Replies with the body that it has read; /refuse without reading, /wait when it may."""

    def __init__(self) -> None:
        self.may_reply = asyncio.Event()
        self.num_waiting = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, status = b"", 200
        if scope["path"] == "/refuse":
            status = 413
        else:
            message = {"more_body": True}
            while message.get("more_body"):
                message = await receive()
                body += message.get("body", b"")
        if scope["path"] == "/wait":
            self.num_waiting += 1
            await self.may_reply.wait()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def run(check: Callable[[App, Connect], Coroutine[Any, Any, None]]) -> None:
    async def run_check() -> None:
        app, opened = App(), list[asyncio.StreamWriter]()
        async with listening(app) as port:

            async def connect() -> Connection:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                opened.append(writer)
                return reader, writer

            try:
                await asyncio.wait_for(check(app, connect), 600)
            finally:
                for writer in opened:
                    writer.close()
                    await asyncio.gather(writer.wait_closed(), return_exceptions=True)

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(run_check())


async def jump(seconds: float) -> None:
    """Let time pass, and what is due then happen."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, JumpingLoop)
    loop.jumped_s += seconds
    for _ in range(20):
        await asyncio.sleep(0)


async def until(is_enough: Callable[[], bool]) -> None:
    while not is_enough():
        await asyncio.sleep(0)


async def read_reply(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return int(head.split()[1]), await reader.readexactly(length)


def head(path: str, length: int = 0) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()


def test_a_refused_body_that_has_come_closes_no_later_request() -> None:
    async def check(app: App, connect: Connect) -> None:
        reader, writer = await connect()
        writer.write(head("/refuse", 4))
        assert await read_reply(reader) == (413, b"")
        writer.write(b"body" + head("/wait"))
        await until(lambda: app.num_waiting == 1)
        await jump(10)
        app.may_reply.set()
        assert await read_reply(reader) == (200, b"")

    run(check)


def test_a_refused_body_without_an_end_is_not_read_for_long() -> None:
    async def check(app: App, connect: Connect) -> None:
        reader, writer = await connect()
        writer.write(head("/refuse", 4000))
        assert await read_reply(reader) == (413, b"")
        writer.write(b"body")
        await jump(10)
        assert await reader.read() == b""

    run(check)


def test_a_body_that_comes_after_the_reply_before_it_is_waited_for() -> None:
    async def check(app: App, connect: Connect) -> None:
        reader, writer = await connect()
        writer.write(head("/wait") + head("/", 8) + b"half")
        await until(lambda: app.num_waiting == 1)
        app.may_reply.set()
        assert await read_reply(reader) == (200, b"")
        await jump(10)
        writer.write(b"half")
        assert await read_reply(reader) == (200, b"halfhalf")

    run(check)
