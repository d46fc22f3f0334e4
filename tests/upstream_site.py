"""An HTTP server on loopback for the tests of api_server.py: it records all that reaches it, and can misbehave."""

import asyncio
import gzip
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass
class Seen:
    """One request as it arrived."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes = b""
    hung_up: Callable[[], bool] = bool

    async def gone(self) -> None:
        """Return when the client has hung up."""
        while not self.hung_up():  # noqa: ASYNC110 - the stream has no event for it
            await asyncio.sleep(0.01)

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]


Handler = Callable[[Seen, asyncio.StreamWriter], Awaitable[None]]


def reply(
    body: bytes | str | Mapping[str, Any] | Sequence[Any] = b"",
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    content_type: str = "application/json",
) -> bytes:
    """A whole HTTP response."""
    if not isinstance(body, bytes):
        body = (body if isinstance(body, str) else json.dumps(body)).encode()
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}"]
    lines += [f"Content-Type: {content_type}"] if content_type else []
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass
class Site:
    """`async with Site() as site`: answers /echo with the request, and other paths with what `on` was given."""

    requests: list[Seen] = field(default_factory=list[Seen])
    routes: dict[str, bytes | list[bytes] | Handler] = field(default_factory=dict[str, bytes | list[bytes] | Handler])
    connections: int = 0

    def on(self, path: str, answer: bytes | list[bytes] | Handler) -> None:
        """Answer `path` with bytes, with a list of bytes in turn (the last one again and again), or by a function."""
        self.routes[path] = answer

    def count(self, path: str) -> int:
        return sum(seen.path == path for seen in self.requests)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
                method, target, _ = first.split(" ")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                seen = Seen(method, target, headers, body, reader.at_eof)
                self.requests.append(seen)
                await self._answer(seen, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        route = self.routes.get(seen.path)
        if seen.path.endswith("/echo") and route is None:
            echo = {"method": seen.method, "target": seen.target, "headers": seen.headers, "body": seen.body.decode()}
            route = reply(echo)
        if callable(route):
            await route(seen, writer)
            return
        if isinstance(route, list):
            route = route.pop(0) if len(route) > 1 else route[0]
        route = reply({"error": "not here"}, 404) if route is None else route
        writer.write(route if seen.method != "HEAD" else route.partition(b"\r\n\r\n")[0] + b"\r\n\r\n")


class Gate:
    """A handler that answers when the test says so."""

    def __init__(self, answer: bytes) -> None:
        self.open = asyncio.Event()
        self.arrived = asyncio.Event()
        self.answer = answer

    async def __call__(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        self.arrived.set()
        await self.open.wait()
        writer.write(self.answer)


def once(answer: bytes) -> Handler:
    """A handler that sends these bytes, whatever they are, and hangs up."""

    async def handler(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()
        writer.close()

    return handler


def endless(head: bytes, piece: bytes, pause: float = 0.0) -> Handler:
    """A handler that sends `head`, and then `piece` again and again until the client hangs up."""

    async def handler(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while not seen.hung_up():
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)

    return handler


PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
PACKED = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Type: application/json\r\n\r\n"
HOSTILE: dict[str, Handler] = {
    "gzip bomb": once(PACKED + gzip.compress(b"0" * 50_000_000)),
    "bomb behind": once(PACKED + gzip.compress(b"0" * 4_999_001) + gzip.compress(b"0" * 50_000_000)),
    "flood": endless(PLAIN + b"\r\n", b"x" * 65536),
    "empty members": endless(PACKED, gzip.compress(b"") * 3000),
    "drip": endless(PLAIN + b"Content-Length: 1000000\r\n\r\n", b"x", 0.02),
    "header drip": endless(PLAIN, b"X-A: b\r\n", 0.02),
    "reset": once(b""),
    "reset midway": once(PLAIN + b"Content-Length: 1000\r\n\r\nhalf"),
    "garbage": once(b"SSH-2.0-OpenSSH_9\r\n\r\n"),
    "huge header": once(PLAIN + b"X-A: " + b"b" * 500_000 + b"\r\n\r\n"),
    "not gzip": once(reply("not gzip", headers={"Content-Encoding": "gzip"})),
    "half of gzip": once(reply(gzip.compress(b"x" * 10_000)[:40], headers={"Content-Encoding": "gzip"})),
    "brotli": once(reply("x", headers={"Content-Encoding": "br"})),
    "twice": once(reply("x", headers={"Content-Encoding": "gzip, gzip"})),
}
