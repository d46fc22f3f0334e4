"""Measure our servers next to a bare SDK server, the best known peers, and the plain tools, in one run.

    python benchmarks/bench.py            the whole run (about three minutes); writes benchmarks/RESULTS.md
    python benchmarks/bench.py --quick    a look: fewer repetitions, prints only

The client writes JSON lines to a server's stdin and reads its stdout; no SDK is in it. Figures of different machines do
not compare, so what counts are the ratios, each between two figures of the same run. Peers are installed with npm and
pip into a cache directory (--cache); one that cannot be installed is named in the results. Linux only: memory is the
PSS that /proc tells.
"""

import argparse
import json
import math
import os
import platform
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
NPM_PEERS = ["@modelcontextprotocol/server-filesystem@2026.8.31", "@bytebase/dbhub@0.21.2"]
PIP_PEERS = ["mcp-server-sqlite==2025.4.25", "mcp<2"]
FILES, DIRECTORIES = 20_000, 2_200  # of the tree that is searched
BARE_SERVER = """
from mcp.server import MCPServer
server = MCPServer("bare")
TEXT = ("x" * 79 + "\\n") * 125_000

@server.tool(structured_output=False)
async def nothing() -> str:
    return "hello"

server.run()
"""

# -------------------------------------------------------------------------------------------------------- client


class Server:
    """A server as a process, spoken to in raw JSON lines."""

    def __init__(self, command: list[str], cwd: Path) -> None:
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=cwd
        )
        assert self.process.stdin
        assert self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.number = 0

    def send(self, method: str, params: dict[str, Any], *, answered: bool = True) -> int:
        """Send one message; returns the number that its answer will bear."""
        message: dict[str, Any] = {"jsonrpc": "2.0", "method": method, "params": params}
        if answered:
            self.number += 1
            message["id"] = self.number
        self.stdin.write(json.dumps(message).encode() + b"\n")
        self.stdin.flush()
        return self.number

    def receive(self) -> tuple[int | None, bytes]:
        """The next message's number and bytes."""
        line = self.stdout.readline()
        if not line:
            raise EOFError("the server has ended")
        # Parsing 10 MB of JSON would measure this client, so the number is looked for at both ends.
        ends = line[:60] + line[-60:]
        found = ends.rpartition(b'"id":')[2].lstrip()
        digits = found[: next((at for at, byte in enumerate(found) if not 48 <= byte <= 57), len(found))]
        return int(digits) if digits else None, line

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

    def initialize(self) -> float:
        """Shake hands; returns the seconds since the process was started."""
        client = {"name": "bench", "version": "1"}
        self.answer(
            self.send("initialize", {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": client})
        )
        ready = time.perf_counter() - self.started
        self.send("notifications/initialized", {}, answered=False)
        return ready

    def memory(self) -> float:
        """The process's proportional set size with that of its children, in MiB."""
        total = 0
        for pid in [self.process.pid, *children(self.process.pid)]:
            with suppress(OSError):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total / 1024

    def close(self) -> None:
        """End the process."""
        self.stdin.close()
        try:
            self.process.wait(3)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.stdout.close()


def children(pid: int) -> list[int]:
    """All descendants of a process."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *children(child)]
    return found


def timed(action: Callable[[], object], repeat: int) -> float:
    """The median of several runs, in milliseconds; the first run is for warming up."""
    action()
    spans: list[float] = []
    for _ in range(repeat):
        started = time.perf_counter()
        action()
        spans.append((time.perf_counter() - started) * 1000)
    return statistics.median(spans)


# ------------------------------------------------------------------------------------------------------ material


def make_tree(root: Path, files: int, directories: int) -> None:
    """A tree of text files, the same every time; one file in 500 holds the needle."""
    choose = random.Random(1)
    words = ["".join(choose.choices("abcdefghijklmnop", k=choose.randint(3, 9))) for _ in range(3000)]
    for number in range(files):
        place = number % directories
        directory = root / f"d{place % 20}" / f"e{place % 400}" / f"f{place}"
        directory.mkdir(parents=True, exist_ok=True)
        lines = [" ".join(choose.choices(words, k=8)) for _ in range(choose.randint(20, 80))]
        if number % 500 == 0:
            lines.append("the needle_xyz is here")
        suffix = choose.choice(["py", "py", "txt", "md", "js", "json"])
        (directory / f"n{number}.{suffix}").write_text("\n".join(lines) + "\n")


def make_database(path: Path) -> None:
    """A table of 100,000 rows."""
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price REAL, note TEXT)")
    rows = ((n, f"name {n}", n / 7, None if n % 3 else "a note") for n in range(100_000))
    connection.executemany("INSERT INTO item VALUES (?, ?, ?, ?)", rows)
    connection.commit()
    connection.close()


class Upstream(BaseHTTPRequestHandler):
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


def install_peers(cache: Path) -> list[str]:
    """Install the peers that are not there yet; returns a line for each that cannot be had."""
    cache.mkdir(parents=True, exist_ok=True)
    missing: list[str] = []
    if not (cache / "node_modules" / ".bin" / "dbhub").exists():
        command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(cache), *NPM_PEERS]
        if not shutil.which("npm") or subprocess.run(command, capture_output=True, check=False).returncode:
            missing.append("the npm peers (reference file-system server, DBHub): npm could not install them")
    if not (cache / "venv" / "bin" / "mcp-server-sqlite").exists():
        subprocess.run([sys.executable, "-m", "venv", str(cache / "venv")], check=True)
        pip = [str(cache / "venv" / "bin" / "pip"), "install", "-q", *PIP_PEERS]
        if subprocess.run(pip, capture_output=True, check=False).returncode:
            missing.append("mcp-server-sqlite: pip could not install it")
    return missing


# ------------------------------------------------------------------------------------------------------ the bench


class Bench:
    """One run: figures by work and subject, in milliseconds unless the work's name says otherwise."""

    def __init__(self, place: Path, cache: Path, quick: bool) -> None:
        self.place, self.cache, self.quick = place, cache, quick
        self.repeat = 3 if quick else 9
        self.figures: dict[str, dict[str, float]] = {}
        self.servers: dict[str, Server] = {}
        self.missing = install_peers(cache)
        self.tree, self.database = place / "tree", place / "bench.db"
        self.commands = self.all_commands()

    def all_commands(self) -> dict[str, list[str]]:
        """How each subject is started; peers that are not there are left out."""
        bins, config = self.cache / "node_modules" / ".bin", self.place / "apis.json"
        python = sys.executable
        (self.place / "bare.py").write_text(BARE_SERVER)
        (self.place / "bare_big.py").write_text(BARE_SERVER.replace('return "hello"', "return TEXT"))
        commands = {
            "bare SDK": [python, str(self.place / "bare.py")],
            "bare SDK, 10 MB": [python, str(self.place / "bare_big.py")],
            "fs_server": [python, str(PROJECT / "fs_server.py"), str(self.tree), "--max-output", "0"],
            "db_server": [python, str(PROJECT / "db_server.py"), str(self.database), "--max-output", "0"],
            "api_server": [python, str(PROJECT / "api_server.py"), str(config)],
            "reference fs": ["node", str(bins / "mcp-server-filesystem"), str(self.tree)],
            "DBHub": ["node", str(bins / "dbhub"), "--transport", "stdio", "--dsn", f"sqlite://{self.database}"],
            "mcp-server-sqlite": [
                str(self.cache / "venv" / "bin" / "mcp-server-sqlite"),
                "--db-path",
                str(self.database),
            ],
        }
        return {
            name: command
            for name, command in commands.items()
            if Path(command[0]).exists() or (command[0] == "node" and Path(command[1]).exists())
        }

    def note(self, work: str, subject: str, figure: float) -> None:
        """Keep one figure."""
        self.figures.setdefault(work, {})[subject] = figure
        print(f"{work:45} {subject:20} {figure:12.3f}", file=sys.stderr)

    def start_all(self) -> None:
        """Start-up: every subject in turn, several times, so that they share the machine's moods."""
        times: dict[str, list[float]] = {name: [] for name in self.commands}
        lists: dict[str, list[float]] = {name: [] for name in self.commands}
        for _ in range(self.repeat):
            for name, command in self.commands.items():
                server = Server(command, self.place)
                times[name].append(server.initialize() * 1000)
                listed = server.answer(server.send("tools/list", {}))
                lists[name].append((time.perf_counter() - server.started) * 1000)
                self.figures.setdefault("tools/list, bytes", {})[name] = len(listed)
                server.close()
        for name, command in self.commands.items():
            self.note("start to initialize", name, statistics.median(times[name]))
            self.note("start to tools/list", name, statistics.median(lists[name]))
            self.servers[name] = Server(command, self.place)
            self.servers[name].initialize()
            time.sleep(0.3)
            self.note("memory after start, MiB", name, self.servers[name].memory())

    def compare(self, work: str, calls: dict[str, tuple[str, dict[str, Any]]], repeat: int = 0) -> None:
        """One work on several servers."""
        for name, (tool, arguments) in calls.items():
            if name in self.servers:
                server = self.servers[name]
                span = timed(lambda s=server, t=tool, a=arguments: s.call(t, a), repeat or self.repeat)
                self.note(work, name, span)
                self.figures.setdefault(f"{work}, bytes", {})[name] = len(server.call(tool, arguments))

    def small_calls(self) -> None:
        """Latency of one small call after the other, in bursts of each subject in turn, and a pipeline of them."""
        calls: dict[str, tuple[str, dict[str, Any]]] = {
            "bare SDK": ("nothing", {}),
            "fs_server": ("read_file", {"path": "small.txt"}),
            "db_server": ("query_database", {"query": "SELECT 1"}),
            "api_server": ("call_api", {"api": "local", "endpoint": "/item"}),
            "reference fs": ("read_text_file", {"path": str(self.tree / "small.txt")}),
            "DBHub": ("execute_sql", {"sql": "SELECT 1"}),
            "mcp-server-sqlite": ("read_query", {"query": "SELECT 1"}),
        }
        calls = {name: call for name, call in calls.items() if name in self.servers}
        spans: dict[str, list[float]] = {name: [] for name in calls}
        for number in range((4 if self.quick else 20) * 50 * len(calls)):
            name = list(calls)[number // 50 % len(calls)]
            tool, arguments = calls[name]
            started = time.perf_counter()
            self.servers[name].call(tool, arguments)
            spans[name].append((time.perf_counter() - started) * 1000)
        for name, (tool, arguments) in calls.items():
            self.note("small call, p50", name, statistics.median(spans[name]))
            self.note("small call, p99", name, sorted(spans[name])[int(len(spans[name]) * 0.99)])
            self.note("calls a second, pipelined", name, self.pipelined(self.servers[name], tool, arguments))

    def pipelined(self, server: Server, tool: str, arguments: dict[str, Any]) -> float:
        """Calls a second when the next call does not wait for the last answer (32 are under way)."""
        count, started = (500 if self.quick else 2000), time.perf_counter()
        for _ in range(32):
            server.send("tools/call", {"name": tool, "arguments": arguments})
        for answered in range(count):
            server.receive()
            if answered < count - 32:
                server.send("tools/call", {"name": tool, "arguments": arguments})
        return count / (time.perf_counter() - started)

    def files(self) -> None:
        """What the file servers do, next to find and grep."""
        tree = str(self.tree)
        self.compare(
            "10 MB text",
            {
                "fs_server": ("read_file", {"path": "big.txt"}),
                "reference fs": ("read_text_file", {"path": f"{tree}/big.txt"}),
                "bare SDK, 10 MB": ("nothing", {}),
            },
        )
        find = {
            "fs_server": ("search_files", {"path": ".", "pattern": "**/*.py"}),
            "reference fs": ("search_files", {"path": tree, "pattern": "**/*.py"}),
        }
        self.compare("find **/*.py", {"fs_server": find["fs_server"]})
        self.compare("find **/*.py", {"reference fs": find["reference fs"]}, 2)
        self.floor("find **/*.py", "find", ["find", tree, "-name", "*.py"])
        self.compare("search a literal", {"fs_server": ("search_text", {"path": ".", "pattern": "needle_xyz"})})
        self.floor("search a literal", "grep -rn", ["grep", "-rn", "needle_xyz", tree])
        trees = {
            "fs_server": ("directory_tree", {"path": "."}),
            "reference fs": ("directory_tree", {"path": tree}),
        }
        self.compare("directory tree", trees)

    def floor(self, work: str, name: str, command: list[str]) -> None:
        """A plain tool, as a whole process."""
        self.note(
            work, name, timed(lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True), self.repeat)
        )

    def rows(self) -> None:
        """Rows out of SQLite."""
        connection = sqlite3.connect(self.database)
        for count in (10, 1000, 100_000):
            sql, work = f"SELECT * FROM item LIMIT {count}", f"{count} rows"
            self.compare(
                work,
                {
                    "db_server": ("query_database", {"query": "SELECT * FROM item", "limit": count}),
                    "DBHub": ("execute_sql", {"sql": sql}),
                    "mcp-server-sqlite": ("read_query", {"query": sql}),
                },
                3 if count > 1000 else 0,
            )
            plain = timed(lambda q=sql: json.dumps(connection.execute(q).fetchall()), self.repeat)
            self.note(work, "sqlite3 + json.dumps", plain)
        connection.close()

    def http(self, port: int) -> None:
        """A cached answer, one from the upstream, and plain httpx."""
        import httpx

        self.compare("cached answer", {"api_server": ("call_api", {"api": "local", "endpoint": "/items"})}, 200)
        anew = {"api": "local", "endpoint": "/items", "use_cache": False}
        self.compare("answer from the upstream", {"api_server": ("call_api", anew)}, 50)
        with httpx.Client() as client:
            url = f"http://127.0.0.1:{port}/items"
            self.note("answer from the upstream", "httpx", timed(lambda: client.get(url).json(), 50))

    def crowd(self) -> None:
        """How long one quick call takes among 64 slow ones."""
        slow_sql = (
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < 300000) SELECT count(*) FROM n"
        )
        crowds: dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = {
            "fs_server": (("search_text", {"path": ".", "pattern": "nothing"}), ("read_file", {"path": "small.txt"})),
            "api_server": (
                ("call_api", {"api": "local", "endpoint": "/slow", "use_cache": False}),
                ("call_api", {"api": "local", "endpoint": "/items"}),
            ),
            "db_server": (("query_database", {"query": slow_sql}), ("query_database", {"query": "SELECT 1"})),
            "DBHub": (("execute_sql", {"sql": slow_sql}), ("execute_sql", {"sql": "SELECT 1"})),
            "reference fs": (
                ("search_files", {"path": str(self.tree / "d0"), "pattern": "**/*.py"}),
                ("read_text_file", {"path": str(self.tree / "small.txt")}),
            ),
        }
        for name, (slow, quick) in crowds.items():
            if name not in self.servers:
                continue
            server = self.servers[name]
            for _ in range(64):
                server.send("tools/call", {"name": slow[0], "arguments": slow[1]})
            started = time.perf_counter()
            number = server.send("tools/call", {"name": quick[0], "arguments": quick[1]})
            waiting, overtaken = {*range(number - 64, number + 1)}, 0
            while waiting:
                got, _ = server.receive()
                waiting.discard(got or 0)
                if got == number:
                    overtaken = len(waiting)
                    self.note("quick call among 64 slow ones", name, (time.perf_counter() - started) * 1000)
            self.note("64 slow calls, all together", name, (time.perf_counter() - started) * 1000)
            self.note("slow calls that the quick one overtook", name, overtaken)

    def growth(self) -> None:
        """How the time grows with the size: the slope in the logarithms of both (1 = in proportion)."""
        fs = self.servers["fs_server"]
        for size in (1, 10, 100):
            path = self.tree / f"grow{size}.txt"
            path.write_bytes(b"x" * 79 + b"\n")
            with path.open("ab") as file:
                for _ in range(size):
                    file.write((b"x" * 79 + b"\n") * 12_500)
            arguments = {"path": path.name, "tail": 10}
            self.note("tail of 1, 10, 100 MB", f"{size} MB", timed(lambda a=arguments: fs.call("read_file", a), 20))
            arguments = {"path": path.name, "offset": size * 12_000, "head": 10}
            self.note("10 lines at the end", f"{size} MB", timed(lambda a=arguments: fs.call("read_file", a), 10))
            path.unlink()
        for part, files in (("d0/e0", 49), ("d0", 1000), (".", FILES)):
            arguments = {"path": part, "pattern": "*.py"}
            self.note("find in more files", f"{files} files", timed(lambda a=arguments: fs.call("search_files", a), 5))
        works = ["10 rows", "1000 rows", "100000 rows"]
        db = [(float(work.split()[0]), self.figures[work]["db_server"]) for work in works if work in self.figures]
        for name, points in {
            "10 lines at the end": [(float(k.split()[0]), v) for k, v in self.figures["10 lines at the end"].items()],
            "find in more files": [(float(k.split()[0]), v) for k, v in self.figures["find in more files"].items()],
            "rows": db[1:],
        }.items():
            (x0, y0), (x1, y1) = points[-2], points[-1]
            self.note("slope between the larger two", name, math.log(y1 / y0) / math.log(x1 / x0))

    def steady_memory(self) -> None:
        """Memory after many mixed calls, next to what it was after a first round of the same."""
        mixed: dict[str, list[tuple[str, dict[str, Any]]]] = {
            "fs_server": [
                ("read_file", {"path": "small.txt"}),
                ("list_directory", {"path": "d0/e0"}),
                ("search_text", {"path": "d0/e0", "pattern": "needle"}),
                ("directory_tree", {"path": "d0/e0"}),
            ],
            "db_server": [
                ("query_database", {"query": "SELECT * FROM item", "limit": 10}),
                ("describe_table", {"table": "item"}),
                ("list_tables", {}),
            ],
            "api_server": [
                ("call_api", {"api": "local", "endpoint": "/items"}),
                ("call_api", {"api": "local", "endpoint": "/items", "use_cache": False}),
                ("list_apis", {}),
            ],
            "bare SDK": [("nothing", {})],
        }
        count = 1000 if self.quick else 10_000
        for name, calls in mixed.items():
            server = self.servers[name]
            for number in range(500):
                server.call(*calls[number % len(calls)])
            before = server.memory()
            for number in range(count):
                server.call(*calls[number % len(calls)])
            self.note(f"memory growth over {count} calls, %", name, 100 * (server.memory() / before - 1))


# --------------------------------------------------------------------------------------------------------- results

GOALS = [  # (what, work, ours, other, at most this ratio)
    ("small call, fs", "small call, p50", "fs_server", "bare SDK", 0.6),
    ("small call, db", "small call, p50", "db_server", "bare SDK", 0.6),
    ("small call, api (cached)", "small call, p50", "api_server", "bare SDK", 0.6),
    ("calls a second, fs (turned over)", "calls a second, pipelined", "bare SDK", "fs_server", 0.6),
    ("calls a second, db (turned over)", "calls a second, pipelined", "bare SDK", "db_server", 0.6),
    ("calls a second, api (turned over)", "calls a second, pipelined", "bare SDK", "api_server", 0.6),
    ("start, fs", "start to initialize", "fs_server", "bare SDK", 1.0),
    ("start, db", "start to initialize", "db_server", "bare SDK", 1.0),
    ("start, api", "start to initialize", "api_server", "bare SDK", 1.0),
    ("find next to find", "find **/*.py", "fs_server", "find", 3.0),
    ("find next to the reference server", "find **/*.py", "fs_server", "reference fs", 1 / 30),
    ("text search next to grep", "search a literal", "fs_server", "grep -rn", 5.0),
    ("10 MB text", "10 MB text", "fs_server", "reference fs", 0.4),
    ("tree", "directory tree", "fs_server", "reference fs", 0.5),
    ("tree, bytes", "directory tree, bytes", "fs_server", "reference fs", 0.1),
    ("10 rows", "10 rows", "db_server", "DBHub", 0.5),
    ("1,000 rows", "1000 rows", "db_server", "DBHub", 0.5),
    ("100,000 rows", "100000 rows", "db_server", "DBHub", 0.5),
    ("100,000 rows next to sqlite3", "100000 rows", "db_server", "sqlite3 + json.dumps", 3.0),
    ("memory after start, fs", "memory after start, MiB", "fs_server", "bare SDK", 1.1),
    ("memory after start, db", "memory after start, MiB", "db_server", "bare SDK", 1.1),
    ("memory after start, api", "memory after start, MiB", "api_server", "bare SDK", 1.1),
]


RESULTS = PROJECT / "benchmarks" / "RESULTS.md"
TRIED = "## What was tried"  # written by hand; a new run keeps it


def report(bench: Bench) -> str:
    """The results as Markdown."""
    node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=False).stdout.strip()
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), ""
    )
    out = [
        "# Results",
        "",
        "Written by `python benchmarks/bench.py`; what it does is in its first lines. Medians of one run.",
        "",
        f"- {platform.system()} {platform.machine()}, {os.cpu_count()} processors ({cpu}), {time.strftime('%Y-%m-%d')}",
        f"- Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, Node {node}, mcp {version('mcp')},"
        f" httpx {version('httpx')}, aiosqlite {version('aiosqlite')}",
        f"- peers: {', '.join(NPM_PEERS + PIP_PEERS)}",
        *(f"- not measured: {line}" for line in bench.missing),
        "",
        "## Next to the goals",
        "",
        "| | ratio | at most | |",
        "|---|---:|---:|---|",
    ]
    for what, work, ours, other, goal in GOALS:
        figures = bench.figures.get(work, {})
        if ours in figures and other in figures:
            ratio = figures[ours] / figures[other]
            out.append(f"| {what} | {ratio:.3g} | {goal:.3g} | {'' if ratio <= goal else 'missed'} |")
    subjects = list(dict.fromkeys(name for figures in bench.figures.values() for name in figures))
    out += ["", "## All figures", "", "Milliseconds, where nothing else is said.", ""]
    for work, figures in bench.figures.items():
        cells = ", ".join(f"{name} **{figures[name]:.4g}**" for name in subjects if name in figures)
        out.append(f"- {work}: {cells}")
    return "\n".join([*out, "", TRIED, "", RESULTS.read_text().partition(TRIED)[2].strip("\n")]) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure the servers next to their peers.")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions; prints, and writes no file")
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "small-mcp-servers-bench"
    parser.add_argument("--cache", type=Path, default=default, help="where peers are installed (%(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        make_tree(place / "tree", FILES, DIRECTORIES)
        (place / "tree" / "big.txt").write_text(("x" * 79 + "\n") * 125_000)
        (place / "tree" / "small.txt").write_text("hello\n")
        make_database(place / "bench.db")
        upstream = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
        upstream.daemon_threads = True
        threading.Thread(target=upstream.serve_forever, daemon=True).start()
        port = upstream.server_address[1]
        (place / "apis.json").write_text(json.dumps({"local": {"base_url": f"http://127.0.0.1:{port}"}}))
        bench = Bench(place, args.cache, args.quick)
        bench.start_all()
        try:
            bench.small_calls()
            bench.files()
            bench.rows()
            bench.http(port)
            bench.crowd()
            bench.growth()
            bench.steady_memory()
        finally:
            for server in bench.servers.values():
                server.close()
            upstream.shutdown()
            upstream.server_close()
        text = report(bench)
    if args.quick:
        print(text)
    else:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
