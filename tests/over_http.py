"""Helpers of the HTTP tests: a server as a real process, raw requests, and a round-robin proxy."""

import asyncio
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
from conftest import PROJECT

TOKEN = "first-token-0123456789abcdefghijklmnop"
OTHER_TOKEN = "second.token~0123456789+abcdefghijklm=="
HEADERS = {"content-type": "application/json", "accept": "application/json, text/event-stream"}
MODERN = "2026-07-28"

WAITING_SERVER = Path(__file__).with_name("waiting_server.py")


def request(method: str, modern: bool = False, **params: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """The headers and the body of a request in one of the two eras of the protocol."""
    headers = dict(HEADERS)
    if modern:
        headers |= {"mcp-protocol-version": MODERN, "mcp-method": method}
        if "name" in params:
            headers["mcp-name"] = params["name"]
        prefix = "io.modelcontextprotocol/"
        params["_meta"] = {f"{prefix}protocolVersion": MODERN, f"{prefix}clientCapabilities": {}}
    return headers, {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}


class Http:
    """A server as a real process on a port of its own."""

    def __init__(self, *arguments: str, token: str | None = None, address: str = "0", files: int = 1024) -> None:
        env = {name: value for name, value in os.environ.items() if name != "MCP_AUTH_TOKEN"}
        if token is not None:
            env["MCP_AUTH_TOKEN"] = token
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self.process = subprocess.Popen(
            ["sh", "-c", f'ulimit -n {files} && exec "$0" "$@"', sys.executable, *arguments, "--http", address],
            stdin=subprocess.DEVNULL,
            stderr=self.errors,
            cwd=PROJECT,
            env=env,
        )
        try:
            self.port = self._wait_until_it_serves()
        except BaseException:
            self.process.kill()
            self.process.wait()
            self.errors.close()
            raise
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def _wait_until_it_serves(self) -> int:
        deadline = time.monotonic() + 30
        while not (found := re.search(r"Serving (http://\S+:(\d+))/mcp", self.log())):
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)
        self.url = found[1]
        return int(found[2])

    def log(self) -> str:
        """What the server has written to stderr."""
        return os.pread(self.errors.fileno(), 10_000_000, 0).decode()

    def rpc(self, method: str, *, token: str = "", modern: bool = False, **params: Any) -> dict[str, Any]:
        """The result of a request that must be answered."""
        headers, body = request(method, modern, **params)
        if token:
            headers["authorization"] = f"Bearer {token}"
        response = self.client.post("/mcp", headers=headers, json=body)
        assert response.status_code == 200, response.text
        return response.json()["result"]

    def call(self, tool: str, *, token: str = "", modern: bool = False, **arguments: Any) -> dict[str, Any]:
        return self.rpc("tools/call", token=token, modern=modern, name=tool, arguments=arguments)

    def text(self, tool: str, **options: Any) -> str:
        result = self.call(tool, **options)
        assert not result.get("isError"), result
        return "".join(block["text"] for block in result["content"])

    def error(self, tool: str, **options: Any) -> str:
        result = self.call(tool, **options)
        assert result.get("isError"), result
        return "".join(block["text"] for block in result["content"])

    def health(self) -> int:
        return self.client.get("/health").status_code

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def raw(self, data: bytes) -> bytes:
        """All that comes back until the server closes the connection."""
        with self.connect() as connection:
            connection.sendall(data)
            return read_all(connection)

    def memory(self) -> int:
        """Resident memory in bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def terminate(self) -> int:
        """Ask it to end, and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def close(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()
        self.errors.close()


def read_all(connection: socket.socket) -> bytes:
    received = b""
    try:
        while data := connection.recv(65_536):
            received += data
    except ConnectionError:
        pass
    return received


def read_answer(connection: socket.socket) -> int:
    """Read one answer and no further; returns its status."""
    with HTTPResponse(connection) as response:
        response.begin()
        response.read()
        return response.status


def post(body: bytes, *lines: str, length: int | None = None) -> bytes:
    """A POST to /mcp as it goes over the wire; the connection is to be closed after it."""
    head = ["POST /mcp HTTP/1.1", "host: localhost", "connection: close", *(f"{k}: {v}" for k, v in HEADERS.items())]
    head += [*lines, f"content-length: {len(body) if length is None else length}"]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def tool_call(tool: str, **arguments: Any) -> bytes:
    return json.dumps(request("tools/call", name=tool, arguments=arguments)[1]).encode()


@asynccontextmanager
async def round_robin(ports: Sequence[int]) -> AsyncGenerator[int]:
    """A plain proxy: each request goes to the next of the ports, whoever sent it. Yields the proxy's port."""
    turn = itertools.cycle(ports)

    async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
        body = await reader.readexactly(int(length[1]) if length else 0)
        from_replica, to_replica = await asyncio.open_connection("127.0.0.1", next(turn))
        to_replica.write(head + body)
        answer = await from_replica.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)", answer, re.IGNORECASE)
        answer += await from_replica.readexactly(int(length[1]) if length else 0)
        to_replica.close()
        await to_replica.wait_closed()
        writer.write(answer)
        await writer.drain()
        return b"connection: close" not in head.lower()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
