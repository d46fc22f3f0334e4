"""Helpers that the tests of all servers share."""

import asyncio
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from mcp import Client
from mcp_types import CallToolResult, TextContent

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def text_of(result: CallToolResult) -> str:
    """The text of a result that must be a success."""
    text = "".join(block.text for block in result.content if isinstance(block, TextContent))
    assert not result.is_error, text
    return text


async def ok(client: Client, tool: str, **arguments: Any) -> str:
    return text_of(await client.call_tool(tool, arguments))


async def refused(client: Client, tool: str, **arguments: Any) -> str:
    """The text of a result that must be an error: one line, and so no traceback."""
    result = await client.call_tool(tool, arguments)
    text = "".join(block.text for block in result.content if isinstance(block, TextContent))
    assert result.is_error, text
    assert "\n" not in text
    return text


class Clock:
    """A timer that moves only when it is told to; sleeping moves it."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def tick(self, seconds: float) -> None:
        self.now += seconds

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


class Stdio:
    """A server as a real process, spoken to in raw JSON lines."""

    def __init__(self, *arguments: str, **options: Any) -> None:
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": PROJECT, **options}
        self.process = subprocess.Popen([sys.executable, *arguments], **options)
        self._id = 0

    def send(self, method: str, params: dict[str, Any] | None = None, *, notification: bool = False) -> int:
        message: dict[str, Any] = {"jsonrpc": "2.0", "method": method, "params": params or {}}
        if not notification:
            self._id += 1
            message["id"] = self._id
        assert self.process.stdin
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()
        return self._id

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "the server has closed its output"
        return json.loads(line)

    def answer(self, number: int) -> dict[str, Any]:
        """The answer to one request; what comes before it is dropped."""
        while True:
            message = self.receive()
            if message.get("id") == number:
                return message

    def initialize(self) -> dict[str, Any]:
        client = {"name": "test", "version": "1"}
        number = self.send("initialize", {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": client})
        answer = self.answer(number)
        self.send("notifications/initialized", notification=True)
        return answer["result"]

    def start(self, tool: str, **arguments: Any) -> int:
        return self.send("tools/call", {"name": tool, "arguments": arguments})

    def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        return self.answer(self.start(tool, **arguments))["result"]

    def text(self, tool: str, **arguments: Any) -> str:
        result = self.call(tool, **arguments)
        assert not result.get("isError"), result
        return "".join(block.get("text", "") for block in result["content"])

    def memory(self) -> int:
        """Resident memory in bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> int:
        """Hang up and return the exit code."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        try:
            return self.process.wait(10)
        finally:
            self.process.kill()
            self.process.stdout.close()


@pytest.fixture
def stdio() -> Iterator[Callable[..., Stdio]]:
    """Starts servers as processes; they are closed at the end of the test."""
    started: list[Stdio] = []

    def start(*arguments: str, **options: Any) -> Stdio:
        started.append(Stdio(*arguments, **options))
        started[-1].initialize()
        return started[-1]

    yield start
    for server in started:
        server.close()


def calls_during_a_race(
    server: Stdio, program: str, arguments: Sequence[str], calls: Sequence[tuple[str, dict[str, Any]]]
) -> Iterator[bytes]:
    """The answers to 20,000 random ones of the calls, while another process runs the Python program in a tight loop."""
    choose = random.Random(1)

    def send() -> None:
        for tool, values in choose.choices(calls, k=20_000):
            server.start(tool, **values)

    assert server.process.stdout
    refusals = 0
    with subprocess.Popen([sys.executable, "-c", program, *arguments]) as racer:
        try:
            threading.Thread(target=send, daemon=True).start()
            for _ in range(20_000):
                line = server.process.stdout.readline()
                assert line, "the server has closed its output"
                refusals += b'"isError":true' in line
                yield line
        finally:
            racer.kill()
    assert 100 < refusals < 19_900  # both sides of the race were met
