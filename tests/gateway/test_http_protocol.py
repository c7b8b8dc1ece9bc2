"""gateway.http_protocol over real connections, on a clock of the test's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

from tests.support.gateway_apps import listening

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Coroutine[Any, Any, Connection]]


# More than the kernel takes for a connection that nobody reads.
LARGE = 64 * 2**20


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
        if scope["path"] == "/large":
            body = bytes(LARGE)
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


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 66_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 12_000 + b"\r\n",
    ],
)
def test_a_head_that_is_too_large(sent: bytes) -> None:
    async def check(app: App, connect: Connect) -> None:
        reader, writer = await connect()
        writer.write(sent)
        status, body = await read_reply(reader)
        assert (status, json.loads(body)["error"]["code"]) == (431, "headers_too_large")
        assert await reader.read() == b""

    run(check)


@pytest.mark.parametrize(
    "begin",
    [
        b"GET / HTTP/1.1\r\nX: ",
        b"GET /",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX: ",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n1;",
    ],
)
@pytest.mark.parametrize("piece", [b"x" * 16_384, b"x\r\nX: y" * 2_000])
def test_a_head_or_a_trailer_without_an_end(begin: bytes, piece: bytes) -> None:
    async def check(app: App, connect: Connect) -> None:
        reader, writer = await connect()
        writer.write(begin)
        num_sent = 0
        with suppress(ConnectionError):
            while num_sent < 200 and not reader.at_eof():
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.001)
                num_sent += 1
        assert num_sent < 200

    run(check)


def test_many_small_requests_and_pieces_are_no_large_head() -> None:
    async def check(app: App, connect: Connect) -> None:
        reader, writer = await connect()
        padding = b"x" * 10_000
        request = b"GET / HTTP/1.1\r\nX: " + padding + b"\r\nContent-Length: 0\r\n\r\n"
        writer.write(request * 20)
        for _ in range(20):
            assert await read_reply(reader) == (200, b"")
        writer.write(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(100):
            writer.write((b"1;" + b"x" * 100 + b"\r\na\r\n") * 100)
            await asyncio.sleep(0)
        writer.write(b"0\r\nX: " + padding + b"\r\n\r\n")
        status, body = await read_reply(reader)
        assert (status, len(body)) == (200, 100 * 100)

    run(check)


@pytest.mark.parametrize(
    ("sent", "reply"), [(b"", b""), (b"\r\n", b""), (b"GET / HTTP/1.1\r\nX: y", b"HTTP/1.1 408 ")]
)
def test_a_head_that_does_not_come(sent: bytes, reply: bytes) -> None:
    async def check(app: App, connect: Connect) -> None:
        reader, writer = await connect()
        writer.write(sent)
        await asyncio.sleep(0.05)
        await jump(31)
        assert (await reader.read())[:13] == reply

    run(check)


def test_a_head_that_comes_slowly_while_another_request_is_drawn() -> None:
    async def check(app: App, connect: Connect) -> None:
        reader, writer = await connect()
        writer.write(head("/wait") + b"GET / HTTP/1.1\r\nX: ")
        await until(lambda: app.num_waiting == 1)
        await jump(40)
        app.may_reply.set()
        assert await read_reply(reader) == (200, b"")
        writer.write(b"y\r\n\r\n")
        assert await read_reply(reader) == (200, b"")
        await jump(60)  # an idle connection is kept for longer than a head is waited for
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert await read_reply(reader) == (200, b"")

    run(check)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"get / HTTP/1.1", "capitals"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "https://"),
        (b"PRI * HTTP/2.0\r\n\r\nSM", "HTTP/2 is not spoken"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -5", "Content-Length"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d" % 10**30, "Content-Length overflow"),
        (
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding can't be present with Content-Length",
        ),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz", "chunk size"),
        (b"GET http://[::1] x HTTP/1.1", "."),
    ],
)
def test_what_is_not_http_is_told(sent: bytes, said: str) -> None:
    async def check(app: App, connect: Connect) -> None:
        reader, writer = await connect()
        writer.write(sent + b"\r\n\r\n")
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        error = json.loads(body)["error"]
        assert error["code"] == "invalid_http"
        assert said in error["message"]
        assert ("capitals" in error["message"]) == (said == "capitals")

    run(check)


EXPECTING = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"


def test_who_is_refused_before_the_body_is_told_that_the_connection_ends() -> None:
    async def check(app: App, connect: Connect) -> None:
        reader, writer = await connect()
        writer.write(EXPECTING % b"/refuse")
        # All of it: the connection ends by itself, for a next request would be taken for the body.
        reply = await reader.read()
        assert reply.startswith(b"HTTP/1.1 413 ")
        assert b"connection: close\r\n" in reply

    run(check)


def test_who_waits_before_the_body_keeps_the_connection() -> None:
    async def check(app: App, connect: Connect) -> None:
        reader, writer = await connect()
        for _ in range(2):
            writer.write(EXPECTING % b"/")
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b"ring")
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            assert b"connection: close" not in head
            assert await reader.readexactly(4) == b"ring"

    run(check)


@pytest.mark.parametrize(("version", "is_answered"), [("1.0", False), ("1.1", True)])
def test_who_shuts_its_side_waits_for_a_reply(version: str, is_answered: bool) -> None:
    """Where it can be told from who has left: not over HTTP/1.0."""

    async def check(app: App, connect: Connect) -> None:
        reader, writer = await connect()
        writer.write(f"POST /wait HTTP/{version}\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode())
        while not app.num_waiting:
            await asyncio.sleep(0.01)
        writer.write_eof()
        await asyncio.sleep(0.05)
        app.may_reply.set()
        assert (b"HTTP/1.1 200 " in await reader.read()) == is_answered

    run(check)


def test_who_reads_nothing_is_let_go() -> None:
    async def check(app: App, connect: Connect) -> None:
        reader, writer = await connect()
        writer.write(head("/large"))
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(0.2)  # the kernel takes what it has room for
        for _ in range(3):
            await jump(60)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(LARGE)

    run(check)


def test_who_reads_slowly_gets_all() -> None:
    async def check(app: App, connect: Connect) -> None:
        reader, writer = await connect()
        writer.write(head("/large"))
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(8):
            assert len(await reader.readexactly(LARGE // 8)) == LARGE // 8
            await asyncio.sleep(0.01)
            await jump(59)

    run(check)
