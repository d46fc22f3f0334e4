"""An HTTP server on loopback for the tests of api_server.py: it records all that reaches it, and can misbehave."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
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
    open_connections: int = 0

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

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
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
        self.open_connections += 1
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
            self.open_connections -= 1
            writer.close()
            with suppress(Exception):
                await writer.wait_closed()

    async def _answer(self, seen: Seen, writer: asyncio.StreamWriter) -> None:
        route = self.routes.get(seen.path)
        if seen.path.endswith("/echo") and route is None:
            echo = {"method": seen.method, "target": seen.target, "headers": seen.headers, "body": seen.body.decode()}
            route = reply(echo)
        if callable(route):
            await route(seen, writer)
            return
        if route is None:
            route = reply({"error": "not here"}, 404)
        if isinstance(route, list):
            route = route.pop(0) if len(route) > 1 else route[0]
        writer.write(route if seen.method != "HEAD" else route.partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
