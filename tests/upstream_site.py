"""An HTTP server on loopback for the tests of api_server.py: it records all that reaches it, and can misbehave."""

import asyncio
import gzip
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing, suppress
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
Route = bytes | list[bytes] | Handler


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
    lines += [f"{name}: {value}" for name, value in {"Content-Type": content_type, **(headers or {})}.items() if value]
    return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass
class Site:
    """`async with Site() as site`: answers /echo with the request, and other paths with what `on` was given."""

    requests: list[Seen] = field(default_factory=list[Seen])
    routes: dict[str, Route] = field(default_factory=dict[str, Route])
    connections: int = 0

    def on(self, path: str, answer: Route) -> None:
        """Answer `path` with bytes, with a list of bytes in turn (the last one again and again), or by a function."""
        self.routes[path] = answer

    def count(self, path: str) -> int:
        return sum(seen.path == path for seen in self.requests)

    async def __aenter__(self) -> Self:
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if task := asyncio.current_task():
            self._tasks.add(task)
        self.connections += 1
        with closing(writer), suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
                method, target, _ = first.split(" ")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                self.requests.append(seen := Seen(method, target, headers, body, reader.at_eof))
                await self._answer(seen, writer)
                await writer.drain()

    async def _answer(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        route = self.routes.get(seen.path, reply({"error": "not here"}, 404))
        if seen.path.endswith("/echo") and seen.path not in self.routes:
            route = reply({"target": seen.target, "headers": seen.headers, "body": seen.body.decode()})
        if callable(route):
            await route(seen, writer)
            return
        if isinstance(route, list):
            route = route.pop(0) if len(route) > 1 else route[0]
        writer.write(route if seen.method != "HEAD" else route.partition(b"\r\n\r\n")[0] + b"\r\n\r\n")


class Gate:
    """A handler that answers when the test says so."""

    def __init__(self, answer: bytes) -> None:
        self.open, self.arrived, self.answer = asyncio.Event(), asyncio.Event(), answer

    async def __call__(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        self.arrived.set()
        await self.open.wait()
        writer.write(self.answer)


def sends(head: bytes, piece: bytes = b"", pause: float = 0.0) -> Handler:
    """A handler that sends `head`, and `piece` again and again until the client hangs up; without, it does so."""

    async def handler(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while piece and not seen.hung_up():
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)
        await writer.drain()
        writer.close()

    return handler


PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
PACKED = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Type: application/json\r\n\r\n"
BOMB = gzip.compress(b"0" * 50_000_000)
# Answers by an enemy, and what the error says of each.
HOSTILE: dict[str, tuple[Handler, str]] = {
    "gzip bomb": (sends(PACKED + BOMB), "5,000,000 bytes"),
    "bomb behind": (sends(PACKED + gzip.compress(b"0" * 4_999_001) + BOMB), "the answer is not the gzip"),
    "flood": (sends(PLAIN + b"\r\n", b"x" * 65536), "5,000,000 bytes"),
    "empty members": (sends(PACKED, gzip.compress(b"") * 3000), "the answer is not the gzip"),
    "drip": (sends(PLAIN + b"Content-Length: 1000000\r\n\r\n", b"x", 0.02), "within 1 s"),
    "header drip": (sends(PLAIN, b"X-A: b\r\n", 0.02), "within 1 s"),
    "reset": (sends(b""), "broke off"), "garbage": (sends(b"SSH-2.0-OpenSSH_9\r\n\r\n"), "broke off"),
    "reset midway": (sends(PLAIN + b"Content-Length: 1000\r\n\r\nhalf"), "broke off"),
    "huge header": (sends(PLAIN + b"X-A: " + b"b" * 500_000 + b"\r\n\r\n"), "broke off"),
    "not gzip": (sends(PACKED + b"not gzip"), "the answer is not the gzip"),
    "half of gzip": (sends(PACKED + gzip.compress(b"x" * 10_000)[:40]), "not all of it"),
    "brotli": (sends(reply("x", headers={"Content-Encoding": "br"})), "compressed"),
    "twice": (sends(reply("x", headers={"Content-Encoding": "gzip, gzip"})), "compressed"),
}  # fmt: skip
