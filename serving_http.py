"""Serving over Streamable HTTP, for a team. Imported for `--http` only; copy it together with serving.py.

The SDK's application speaks the protocol, checks Host and Origin, and takes requests of up to 4 MB; uvicorn serves it.
Here is what these leave open: who may call, how long a client may keep us waiting, and how it ends. There are no
sessions: each request stands alone, so any replica behind a load balancer can answer it.

The boundary: who reaches the port is hostile until they show a token, and then trusted like the person at stdin. Not
here: TLS, and limits for each address. They belong to the proxy that a server on a network needs anyway.
"""

import asyncio
import errno
import hashlib
import hmac
import ipaddress
import os
import re
import socket
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import anyio
import uvicorn
from mcp.server.transport_security import TransportSecurityMiddleware, TransportSecuritySettings
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from common import ConfigError, TTLCache

if TYPE_CHECKING:
    from serving import Server

MIN_TOKEN = 32  # characters: such a token cannot be guessed, and its short hash in the audit log tells nothing
ARRIVAL_TIME = 15.0  # seconds for a request to arrive whole
ANSWER_TIME = 45.0  # seconds after that to answer it: a tool's 30, and time to send the result
IDLE_TIME = 75.0  # seconds a connection stays between requests: clients and proxies would send into one closed earlier
DRAIN_TIME = 10.0  # seconds that calls in flight may still take after SIGTERM
HEALTH_TIME = 5.0  # seconds until a resource that does not answer counts as gone
MAX_FILES = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else -1  # that the process may open; -1: no limit known
MAX_CONNECTIONS = min(1_000, MAX_FILES // 2) if MAX_FILES > 0 else 1_000  # the other files are for calls
READ_SIZE = 8_192  # bytes of a connection that are parsed before others have their turn: 0.03 s at worst

# ----------------------------------------------------------------------------------------------------- the start


def read_tokens(text: str | None) -> list[str]:
    """The bearer tokens in MCP_AUTH_TOKEN: several, with commas between, while one replaces another."""
    tokens = [] if text is None else [token.strip() for token in text.split(",")]
    for number, token in enumerate(tokens, 1):
        # A secret that is mounted empty or was cut must not leave the server open, or open to guessing.
        if len(token) < MIN_TOKEN or not re.fullmatch(r"[\w.~+/-]+=*", token, re.ASCII):
            rule = f"give {MIN_TOKEN} or more letters, digits and -._~+/= (such as from: openssl rand -hex 32)"
            raise ConfigError(f"MCP_AUTH_TOKEN: token {number} has {len(token)} characters or odd ones; {rule}")
    return tokens


def listen(host: str, port: int, *, public: bool) -> list[socket.socket]:
    """Sockets on all addresses of a host. Raises ConfigError, also for an address that is not loopback, if the server
    is not to be `public`."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # What is asked is where the name leads, not how it is spelt: 0, 127.1 and localhost are names as well.
        if not public and not all(ipaddress.ip_address(str(info[4][0])).is_loopback for info in found):
            raise ConfigError(f"others can reach {host}: set MCP_AUTH_TOKEN, or give no host, only a port")
        for family, _, _, _, address in sorted(found, key=lambda info: info[0]):  # IPv4 first
            sockets.append(socket.create_server((str(address[0]), port), family=family))
            port = port or sockets[-1].getsockname()[1]
    except (OSError, UnicodeError) as exc:
        # A machine without IPv6 still has the name ::1 for localhost.
        if not sockets or getattr(exc, "errno", None) != errno.EADDRNOTAVAIL:
            raise ConfigError(f"cannot listen on {host}, port {port}: {getattr(exc, 'strerror', exc)}") from None
    return sockets


# --------------------------------------------------------------------------------------------------- who may call


class Gate:
    """The outermost ASGI application: /health for everybody, and /mcp for who has a token and uses a known name."""

    def __init__(self, server: "Server", names: Iterable[str], tokens: Iterable[str]) -> None:
        self.server = server
        # A web page in somebody's browser can send requests here, and make its own name lead here (DNS rebinding).
        # Its Host or Origin header gives it away: only names that are known to be this server's are answered.
        hosts = [host for name in names for host in (name, f"{name}:*")]
        origins = [f"{scheme}://{host}" for host in hosts for scheme in ("http", "https")]
        security = TransportSecuritySettings(allowed_hosts=hosts, allowed_origins=origins)
        self.security = TransportSecurityMiddleware(security)
        self.app = server.streamable_http_app(json_response=True, stateless_http=True, transport_security=security)
        # Digests, so that comparing takes the same time for a token of any length.
        self.tokens = [hashlib.sha256(token.encode()).digest() for token in tokens]
        self.checked = TTLCache[str, JSONResponse](1, ttl=0.1)
        self.checking = anyio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; or, once, the start and the end of the application."""
        with anyio.CancelScope() as call:
            scope["hang_up"] = call.cancel  # for `Connection`
            answer = self.app if scope["type"] == "lifespan" else await self.answer(scope)
            await answer(scope, receive, send)

    async def answer(self, scope: Scope) -> ASGIApp:
        """Who answers a request: the SDK's application, or a refusal that says what to do."""
        # Names mean the same in upper and lower case, but the SDK compares them as they are.
        scope["headers"] = [(n, v.lower() if n in (b"host", b"origin") else v) for n, v in scope["headers"]]
        caller = self.authenticate(scope["headers"])
        if scope["path"] == "/health":
            return await self.health()
        if caller is None:
            return PlainTextResponse("set Authorization: Bearer TOKEN", 401, {"WWW-Authenticate": 'Bearer realm="mcp"'})
        if scope["path"] != "/mcp" or scope["method"] != "POST":
            # The SDK's router would lead /mcp/ to the Host header's name: to another machine, or from https to http.
            # And it would answer GET with a stream, which without sessions has no events and only holds up the end.
            status = 405 if scope["path"] == "/mcp" else 404
            return PlainTextResponse("send POST requests to /mcp; there are no sessions", status, {"Allow": "POST"})
        if refused := await self.security.validate_request(Request(scope)):
            # The application asks again, but would read the body first, and not say what to do.
            advice = "this server does not know that name; to add one, start it with --allowed-host NAME"
            return PlainTextResponse(f"{bytes(refused.body).decode()}: {advice}", refused.status_code)
        self.server.caller.set(caller)
        return self.app

    def authenticate(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """The short hash of the caller's token, "" if none is needed, None if it is not valid."""
        if not self.tokens:
            return ""
        # Joined, two headers are no token: a proxy in front may have judged the one, and we would take the other.
        scheme, _, token = b",".join(v for name, v in headers if name == b"authorization").partition(b" ")
        digest = hashlib.sha256(token.strip()).digest()
        # Comparing with == takes longer the more is right, and stopping at a match tells which one it is.
        found = [hmac.compare_digest(digest, known) for known in self.tokens]
        return f"sha256:{digest.hex()[:8]}" if scheme.lower() == b"bearer" and any(found) else None

    async def health(self) -> ASGIApp:
        """Whether the resource answers. It is asked ten times a second at most: anybody may ask for /health."""
        async with self.checking:
            if (answer := self.checked.get("")) is None:
                try:
                    await asyncio.wait_for((self.server.health or anyio.lowlevel.checkpoint)(), HEALTH_TIME)
                    answer = JSONResponse({"status": "ok"})
                except Exception as exc:
                    print(f"/health: {str(exc) or type(exc).__name__}", file=sys.stderr)
                    answer = JSONResponse({"status": "unavailable"}, 503)
                self.checked.put("", answer)
            return answer


# --------------------------------------------------------------------------------------------- how long all may take


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1, with one timer a connection for a client that keeps us waiting.

    uvicorn has none for a request that never arrives whole, nor for an answer that is never taken. And beyond its
    limit_concurrency everybody gets a 503: who holds that many connections open would lock out all others.
    """

    in_order: ClassVar[dict["Connection", asyncio.Transport]] = {}  # all that are open, the oldest first

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected, and its first request must arrive."""
        super().connection_made(transport)
        # The body is written after the headers, and without this it waits for an acknowledgement: 40 ms a call.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        transport.max_size = READ_SIZE  # type: ignore[attr-defined]
        self.timer = self.loop.call_later(ARRIVAL_TIME, transport.abort)
        self.in_order[self] = transport
        if len(self.in_order) > MAX_CONNECTIONS:  # a client needs its connection for milliseconds, an attacker keeps it
            oldest = next(connection for connection in self.in_order if not connection.in_call())
            self.in_order.pop(oldest).abort()

    def in_call(self) -> bool:
        """Whether a request has arrived whole and is not answered yet."""
        return bool(self.cycle) and not self.cycle.more_body and not self.cycle.response_complete

    def wait(self, seconds: float) -> None:
        """Give the client so many seconds from now; then the connection ends, with what is still to be sent."""
        self.timer.cancel()
        self.timer = self.loop.call_later(seconds, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        """A piece of a request has arrived. The first piece and the last one begin a new time, those between do not."""
        was_idle = self.timeout_keep_alive_task is not None
        super().data_received(data)
        if self.in_call():
            self.wait(ANSWER_TIME)
        elif was_idle:
            self.wait(ARRIVAL_TIME)

    def send_400_response(self, msg: str) -> None:
        """What has arrived is no HTTP. Only a first request is told so: a later one, or one that went on badly, may
        have an answer under way, and uvicorn's second one would be a traceback in the log for each."""
        if not self.cycle:
            super().send_400_response(msg)
        self.transport.close()

    def on_response_complete(self) -> None:
        """An answer was written; what is still to be sent of it has the same time as the next request."""
        self.wait(IDLE_TIME)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the work for a client that has hung up: nobody else could."""
        self.timer.cancel()
        self.in_order.pop(self, None)
        if self.cycle and not self.cycle.response_complete:
            cast("Any", self.scope).get("hang_up", int)()  # the work may not even have begun
        super().connection_lost(exc)


class HttpServer(uvicorn.Server):
    """uvicorn's server, which also ends when a worker thread is stuck in a system call."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, and wait for those that there are."""
        for connection in Connection.in_order:
            # A request that is still arriving is a new one. A call that is not done in time is stopped, as if its
            # client had hung up: cancelled as a task, uvicorn would log a traceback.
            connection.wait(DRAIN_TIME if connection.in_call() else 1)
        asyncio.get_running_loop().call_later(DRAIN_TIME + 1, os._exit, 0)
        await super().shutdown(sockets)
        os._exit(0)  # uvicorn would raise the signal again


# ------------------------------------------------------------------------------------------------------- serving


def serve(server: "Server", address: str, hosts: Sequence[str]) -> None:
    """Serve at [HOST:]PORT, until the process ends. Raises ConfigError.

    Clients may call the server by that host, by `hosts`, and by this machine's own names.
    """
    given = re.fullmatch(r"(?:(\[[\da-f:.]+\]|[^][:]+):)?(\d{1,5})", address, re.ASCII | re.IGNORECASE)
    if given is None or int(given[2]) > 65_535:
        raise ConfigError(f"--http {address!r} is not [HOST:]PORT, such as 8000, 0.0.0.0:8000 or [::1]:8000")
    for name in hosts:
        if not re.fullmatch(r"([\w.-]+|\[[\da-f:.]+\])(:\d+)?", name, re.ASCII | re.IGNORECASE):
            raise ConfigError(f"--allowed-host {name!r} is not a host name, such as mcp.example.com")
    host = (given[1] or "127.0.0.1").lower()
    tokens = read_tokens(os.environ.get("MCP_AUTH_TOKEN"))
    sockets = listen(host.strip("[]"), int(given[2]), public=bool(tokens))
    if tokens:  # a caller's token must not come back in what another one is told, nor stand in the audit log
        secret, redact = re.compile("|".join(map(re.escape, tokens))), server.redact
        server.redact = lambda text: secret.sub("***", redact(text))
    name = "localhost" if host in ("0.0.0.0", "[::]") else host  # noqa: S104 - these are no names to call it by
    known = list(dict.fromkeys([name, *map(str.lower, hosts), "127.0.0.1", "localhost", "[::1]"]))
    url, how = f"http://{name}:{sockets[0].getsockname()[1]}", "with" if tokens else "without"
    print(f"{server.name} {server.version}: {server.instructions}", file=sys.stderr)
    print(f"Serving {url}/mcp, {how} a token, and {url}/health; known as {', '.join(known)}", file=sys.stderr)
    # The backlog is how many are accepted in one go; three times more come before the oldest ones make room for them.
    limits: dict[str, Any] = {"backlog": MAX_CONNECTIONS // 8, "timeout_keep_alive": int(IDLE_TIME)}
    # An access log would write down whatever a caller puts into a path; the audit log tells who did what.
    quiet: dict[str, Any] = {"log_level": "error", "access_log": False}
    config = uvicorn.Config(Gate(server, known, tokens), http=Connection, ws="none", **limits, **quiet)
    anyio.run(HttpServer(config).serve, sockets)
