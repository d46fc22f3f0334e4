"""Helpers of the HTTP tests: a server as a real process, and raw requests."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPResponse
from pathlib import Path
from socket import create_connection, socket
from typing import Any

import httpx
from conftest import PROJECT

TOKEN = "first-token-0123456789abcdefghijklmnop"
OTHER_TOKEN = "second.token~0123456789+abcdefghijklm=="
HEADERS = {"content-type": "application/json", "accept": "application/json, text/event-stream"}
MODERN = "2026-07-28"

WAITING_SERVER = str(Path(__file__).with_name("waiting_server.py"))


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
    """A server as a real process on a port of its own; `words` are its file and what that is given."""

    def __init__(self, *words: str, token: str | None = None, address: str = "0", files: int = 1024) -> None:
        env = {name: value for name, value in os.environ.items() if name != "MCP_AUTH_TOKEN"}
        if token is not None:
            env["MCP_AUTH_TOKEN"] = token
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        command = [sys.executable, *words, "--http", address]
        limited = ["sh", "-c", f'ulimit -n {files} && exec "$0" "$@"', *command]
        self.process = subprocess.Popen(limited, cwd=PROJECT, stdin=subprocess.DEVNULL, stderr=self.errors, env=env)
        until(lambda: "/mcp" in self.log() or self.process.poll() is not None)
        found = re.search(r"Serving (http://\S+:(\d+))/mcp", self.log())
        assert found, self.log()
        self.url, self.port = found[1], int(found[2])
        self.client = self.new_client()

    def new_client(self) -> httpx.Client:
        """A client with a connection of its own; it loads no certificates, which takes longer than a request."""
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, verify=False)

    def log(self) -> str:
        """What the server has written to stderr."""
        return os.pread(self.errors.fileno(), 10_000_000, 0).decode()

    def post(
        self, method: str, *more: tuple[str, str], modern: bool = False, token: str = "", **params: Any
    ) -> httpx.Response:
        """The response to a request, with `more` headers."""
        headers, body = request(method, modern, **params)
        headers |= {"authorization": f"Bearer {token}"} if token else {}
        return self.client.post("/mcp", headers=headers | dict(more), json=body)

    def call(self, tool: str, *, token: str = "", modern: bool = False, **arguments: Any) -> tuple[bool, str]:
        """Whether a tool call succeeded, and its text."""
        response = self.post("tools/call", modern=modern, token=token, name=tool, arguments=arguments)
        assert response.status_code == 200, response.text
        result = response.json()["result"]
        return not result.get("isError"), "".join(block["text"] for block in result["content"])

    def text(self, tool: str, **options: Any) -> str:
        succeeded, text = self.call(tool, **options)
        assert succeeded, text
        return text

    def health(self) -> int:
        return self.client.get("/health").status_code

    def connect(self) -> socket:
        return create_connection(("127.0.0.1", self.port), timeout=30)

    def memory(self) -> int:
        """Resident memory in bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def terminate(self) -> int:
        """Ask it to end, and return the exit code."""
        self.process.terminate()
        return self.process.wait(30)

    def close(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()
        self.errors.close()


class Waiting(Http):
    """The server that waits; what its tools do can be seen in `directory`."""

    def __init__(self, directory: Path, *options: str, **more: Any) -> None:
        self.directory = directory
        super().__init__(WAITING_SERVER, str(directory), *options, **more)


@contextmanager
def served(*words: str, token: str = "", address: str = "0") -> Generator[httpx.Client]:
    """A client of a server that is up for as long as the block lasts; it sends the token, if there is one."""
    with closing(Http(*words, token=token or None, address=address)) as server:
        server.client.headers.update({"authorization": f"Bearer {token}"} if token else {})
        yield server.client


def rpc(client: httpx.Client, method: str, **params: Any) -> dict[str, Any]:
    """The result of a request that must be answered."""
    headers, body = request(method, **params)
    response = client.post("/mcp", headers=headers, json=body)
    assert response.status_code == 200, response.text
    return response.json()["result"]


def until(condition: Callable[[], Any], seconds: float = 30) -> None:
    """Wait for what must come to pass."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def read_all(connection: socket) -> bytes:
    received = bytearray()
    with suppress(ConnectionError):
        while data := connection.recv(1 << 20):
            received += data
    return bytes(received)


def read_answer(connection: socket) -> int:
    """Read one answer and no further; returns its status."""
    with HTTPResponse(connection) as response:
        response.begin()
        response.read()
        return response.status


def raw_post(body: bytes, *lines: str, length: int | None = None) -> bytes:
    """A POST to /mcp as it goes over the wire; the connection is to be closed after it."""
    head = ["POST /mcp HTTP/1.1", "host: localhost", "connection: close", *(f"{k}: {v}" for k, v in HEADERS.items())]
    head += [*lines, f"content-length: {len(body) if length is None else length}"]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def tool_call(tool: str, **arguments: Any) -> bytes:
    return json.dumps(request("tools/call", name=tool, arguments=arguments)[1]).encode()
