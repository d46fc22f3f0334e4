"""What attack.py works with: a client that speaks to a server over stdio, and web servers that note what they get."""

import json
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from posixpath import normpath
from typing import Any, ClassVar, cast
from urllib.parse import unquote

SECRET = "s3cr3tOfTheOwner"  # stands in every file, table and key that no answer may show  # noqa: S105
PATIENCE = 6.0  # seconds for an answer that should take a moment: a busy machine is no fall


class NotHereError(Exception):
    """The attack makes no sense here: the server lacks the tool, or the system lacks the feature."""


class Target:
    """What an attack gets: a server, started by the first call; what it serves; and what it must not show."""

    kind: ClassVar[str]
    served: Path  # what the server is started with

    def __init__(self, command: str, place: Path) -> None:
        self.place = place
        self.private = place / "notes_private"  # its name begins like that of the directory that is served
        self.private.mkdir()
        (self.private / "key.txt").write_text(SECRET)
        self.facts = ""  # what an attack has measured, for the table
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._tools: list[str] = []
        self._calls: dict[int, Future[str]] = {}

    def honest(self) -> bool:
        """An honest call is answered, and rightly."""
        raise NotImplementedError

    def call(self, tool: str, **arguments: Any) -> str:
        """All that comes back from a call, as it came; "" if nothing does."""
        return self.result(self.send(tool, **arguments))

    def result(self, call: Future[str], seconds: float = PATIENCE) -> str:
        """Wait for what comes back from a call that was sent. A server from which nothing does is ended."""
        wait([call], seconds)
        answer = call.result() if call.done() else ""
        if not answer:
            self.kill()
        return answer

    def send(self, tool: str, **arguments: Any) -> Future[str]:
        """Send a call, and do not wait."""
        if self._process is None:
            self._start()
        if tool not in self._tools:
            raise NotHereError(f"no tool {tool}")
        return self._request("tools/call", name=tool, arguments=arguments)

    def memory(self) -> int:
        """The most memory in bytes that the server has held so far."""
        status = Path(f"/proc/{self._process.pid if self._process else 0}/status")
        if not status.exists():
            raise NotHereError("memory is measured on Linux only")
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])

    def kill(self) -> None:
        """End the server and all that it has started; the next call starts a new one."""
        if self._process:
            with self._process:  # its pipes are closed then
                with suppress(OSError):  # it has died by itself
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._reader.join()
            self._process = None

    def _start(self) -> None:
        """Start the server, and say hello in JSON lines, as every client does."""
        errors = self.place / "stderr.txt"
        with errors.open("wb") as stderr:
            self._process = subprocess.Popen(  # noqa: S603
                [word.replace("{}", str(self.served)) for word in shlex.split(self._command)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "SHOP_KEY": SECRET},
                start_new_session=True,
            )
        self._calls = {}
        self._reader = threading.Thread(target=self._read, args=[self._process.stdout, self._calls], daemon=True)
        self._reader.start()
        client = {"name": "attack", "version": "1"}
        hello = self._request("initialize", protocolVersion="2025-06-18", capabilities={}, clientInfo=client)
        if not self.result(hello, 60):
            last_line = errors.read_text().rstrip().rpartition("\n")[2]
            raise NotHereError(f"it does not run as an MCP server: {last_line}")
        self._write(method="notifications/initialized")
        tools = json.loads(self.result(self._request("tools/list"), 60))["result"]["tools"]
        self._tools = [tool["name"] for tool in tools]

    def _request(self, method: str, **params: Any) -> Future[str]:
        number = len(self._calls)
        self._calls[number] = Future[str]()
        self._write(id=number, method=method, params=params)
        return self._calls[number]

    def _write(self, **message: Any) -> None:
        assert self._process
        assert self._process.stdin
        with suppress(BrokenPipeError):  # it has died, and so will say the end of its output
            os.write(self._process.stdin.fileno(), json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")

    @staticmethod
    def _read(lines: Iterable[bytes], calls: dict[int, Future[str]]) -> None:
        """Hand each line to the call that it answers, and "" to all others when the server has died."""
        for line in lines:
            number = json.loads(line).get("id")
            if number in calls:
                calls[number].set_result(line.decode())
        while waiting := [call for call in calls.values() if not call.done()]:
            waiting[0].set_result("")


class Request(BaseHTTPRequestHandler):
    """A request to one of the web servers below."""

    def do_GET(self) -> None:
        """Note it, and answer with the page of that path; paths are cleaned first, as proxies and frameworks do."""
        web, path = cast("Web", self.server), normpath(unquote(self.path.partition("?")[0]))
        web.seen.append((self.command, path, self.headers.get("X-API-Key", "")))
        web.pages.get(path, Request.reply)(self)

    do_DELETE = do_GET  # noqa: N815

    def reply(self, body: bytes = b'{"greeting": "good morning"}', status: int = 200, *header: str) -> None:
        """Answer; the end of the connection ends the body."""
        self.send_response(status)
        if header:
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""


class Web(ThreadingHTTPServer):
    """A web server on a port of its own: what reached it, and the pages that are not a greeting."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.seen: list[tuple[str, str, str]] = []  # method, path, key
        self.pages: dict[str, Callable[[Request], None]] = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Somebody has hung up: so be it."""
