"""Measure our servers next to a bare SDK server, the best known peers, and the plain tools, in one run.

    python3 benchmarks/bench.py            about four minutes; writes benchmarks/RESULTS.md and benchmarks/results.svg
    python3 benchmarks/bench.py --quick    a look: fewer repetitions and sizes; prints, and writes no results

Needs Linux (memory is what /proc tells), Python 3.11, and npm for the peers on Node; all else is installed into
.cache/bench by the first run. Figures of different machines, or of different hours, do not compare. So the
subjects take turns, and what counts are ratios between medians of the same run.
"""

import argparse
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import stand
from stand import HOME, PROJECT, ROWS, TREES, OverHttp, Process

Call = tuple[str, dict[str, Any]]  # a tool and its arguments
COUNT = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n{}) SELECT count(*) FROM n"
SLOW, ENDLESS = COUNT.format(" WHERE i < 300000"), COUNT.format("")
TABLES: Call = ("list_tables", {})


class Bench:
    """One run. Its figures, by work and subject, are milliseconds unless the work's name says otherwise."""

    def __init__(self, place: Path, servers: Path, url: str, postgres: str, quick: bool) -> None:
        self.quick, self.url, self.database, self.files = quick, url, f"{place}/bench.db", f"{place}/files"
        self.figures: dict[str, dict[str, list[float]]] = {}
        self.servers: dict[str, Process] = {}
        (place / "bare.py").write_text(stand.BARE)
        (place / "serving.py").write_text(stand.BARE_OURS.format(servers=servers))
        (place / "apis.json").write_text(json.dumps({"local": {"base_url": url}}))

        python, node, dbhub = str(stand.PYTHON), f"{stand.BIN}/node", f"{stand.BIN}/dbhub"
        free = ["--max-output", "0"]
        slow = [*free, "--timeout", "20"]
        nothing: Call = ("nothing", {})
        query, theirs = ("query_database", {"query": "SELECT 1"}), ("read_query", {"query": "SELECT 1"})
        small, item = {"path": f"{self.files}/small.txt"}, {"api": "local", "endpoint": "/item"}
        subjects: dict[str, tuple[list[str], Call]] = {  # how each is started, and its small call
            "bare SDK": ([python, f"{place}/bare.py"], nothing),
            "bare serving.py": ([python, f"{place}/serving.py"], nothing),
            "fs_server": ([python, f"{servers}/fs_server.py", self.files, *free], ("read_file", small)),
            "api_server": ([python, f"{servers}/api_server.py", f"{place}/apis.json"], ("call_api", item)),
            "db_server": ([python, f"{servers}/db_server.py", self.database, *slow], query),
            "pg_server": ([python, f"{servers}/pg_server.py", postgres, *slow], query),
            "reference fs": ([node, f"{stand.BIN}/mcp-server-filesystem", self.files], ("read_text_file", small)),
            "DBHub": ([node, dbhub, "--dsn", f"sqlite://{self.database}"], ("execute_sql", {"sql": "SELECT 1"})),
            "mcp-server-sqlite": ([stand.SQLITE_PEER, "--db-path", self.database], theirs),
        }
        for name in [name for name, (command, _) in subjects.items() if not stand.is_there(command)]:
            del subjects[name]
        self.commands = {name: command for name, (command, _) in subjects.items()}
        self.small = {name: call for name, (_, call) in subjects.items()}

    # ------------------------------------------------------------------------------------------------ how to measure

    def note(self, work: str, subject: str, figure: float) -> None:
        """Keep one figure."""
        self.figures.setdefault(work, {}).setdefault(subject, []).append(figure)

    def take_turns(self, work: str, repeat: int, calls: Mapping[str, Call], **others: Callable[[], object]) -> None:
        """Time the servers' calls and the other functions, one after the other; the first turn is for warming up."""
        actions = {
            name: partial(self.servers[name].call, *call) for name, call in calls.items() if name in self.servers
        }
        for turn in range(1 + (min(2, repeat) if self.quick else repeat)):
            for name, action in (actions | others).items():
                started = time.perf_counter()
                answer = action()
                if turn:
                    self.note(work, name, (time.perf_counter() - started) * 1000)
                elif isinstance(answer, bytes):
                    self.note(f"{work}, bytes", name, len(answer))

    def in_a_crowd(self, work: str, name: str, count: int, slow: Call, quick: Call) -> None:
        """How long quick calls take while many slow ones are under way; the first comes right behind these."""
        if name in self.commands:
            with closing(Process(self.commands[name])) as server:
                server.call(*quick)
                for _ in range(count):
                    server.send("tools/call", {"name": slow[0], "arguments": slow[1]})
                for _ in range(20):
                    started = time.perf_counter()
                    server.call(*quick)
                    self.note(work, name, (time.perf_counter() - started) * 1000)

    # ---------------------------------------------------------------------------------------------- what is measured

    def start(self) -> None:
        """Start, and the memory then; one server at a time, because processes share pages."""
        for _ in range(2 if self.quick else 4):
            for name, command in self.commands.items():
                with closing(Process(command)) as server:
                    self.note("start", name, server.ready * 1000)
                    listed = server.answer(server.send("tools/list", {}))
                    time.sleep(0.2)
                    self.note("memory after start, MiB", name, server.memory())
                    self.figures.setdefault("list of tools, bytes", {})[name] = [len(listed)]
        self.servers |= {name: Process(command) for name, command in self.commands.items()}

    def small_calls(self) -> None:
        """Small calls, one after the other and 32 at a time, in bursts; the median of a burst is one figure."""
        for turn in range(3 if self.quick else 16):
            for name, call in self.small.items():
                spans: list[float] = []
                for _ in range(50):
                    started = time.perf_counter()
                    self.servers[name].call(*call)
                    spans.append((time.perf_counter() - started) * 1000)
                if turn:
                    self.note("small call", name, statistics.median(spans))
                    self.note("slowest of 50", name, max(spans))
        for _ in range(2 if self.quick else 5):
            for name, call in self.small.items():
                self.note("call, 32 at a time", name, self.servers[name].turnover(*call, 400))

    def read_files(self) -> None:
        """What the file servers do, next to find, grep and tail, and how it grows."""
        for size, repeat in zip(TREES[: 2 if self.quick else 3], (9, 4, 3), strict=False):
            tree = f"{self.files}/{size}"
            names, text = {"path": tree, "pattern": "**/*.py"}, {"path": tree, "pattern": "needle_xyz"}
            calls = {"fs_server": ("search_files", names), "reference fs": ("search_files", names)}
            if size == TREES[-1]:
                del calls["reference fs"]  # it would take a quarter of a minute
            self.take_turns(f"find, {size:,} files", repeat, calls, find=command("find", tree, "-name", "*.py"))
            grep = {"grep -rn": command("grep", "-rn", "needle_xyz", tree)}
            self.take_turns(f"search, {size:,} files", repeat, {"fs_server": ("search_text", text)}, **grep)
        tree, big = {"path": f"{self.files}/10000"}, {"path": f"{self.files}/big.txt"}
        self.take_turns("tree", 5, dict.fromkeys(("fs_server", "reference fs"), ("directory_tree", tree)))
        self.take_turns("10 MB text", 9, {"fs_server": ("read_file", big), "reference fs": ("read_text_file", big)})
        for size in stand.LONG_FILES:
            path = f"{self.files}/long{size}.txt"
            last = {"path": path, "tail": 10}
            calls = {"fs_server": ("read_file", last), "reference fs": ("read_text_file", last)}
            self.take_turns(f"tail, {size:,} MB", 15, calls, tail=command("tail", "-n10", path))

    def read_rows(self) -> None:
        """Rows out of SQLite and PostgreSQL, and how it grows."""
        with closing(sqlite3.connect(self.database)) as connection:
            for count, repeat in zip((10, *ROWS[: 3 if self.quick else 4]), (30, 15, 9, 3, 1), strict=False):
                sql = f"SELECT * FROM item LIMIT {count}"
                ours: Call = ("query_database", {"query": sql, "limit": count})
                calls = {"db_server": ours, "DBHub": ("execute_sql", {"sql": sql})}
                if count < ROWS[-1]:
                    calls |= {"mcp-server-sqlite": ("read_query", {"query": sql}), "pg_server": ours}
                plain = {"sqlite3 + json.dumps": lambda sql=sql: json.dumps(connection.execute(sql).fetchall())}
                self.take_turns(f"{count:,} rows", repeat, calls, **plain)

    def call_apis(self) -> None:
        """An answer of 10 kB from the cache, from the API, and by httpx alone."""
        import httpx

        items = {"api": "local", "endpoint": "/items"}
        with httpx.Client() as client:
            self.take_turns("answer from the cache", 50, {"api_server": ("call_api", items)})
            anew = {"api_server": ("call_api", {**items, "use_cache": False})}
            self.take_turns("answer from the API", 50, anew, httpx=lambda: client.get(f"{self.url}/items").json())

    def serve_http(self) -> None:
        """Small calls of 1 to 64 clients over HTTP."""
        with ExitStack() as stack:
            servers: dict[str, OverHttp] = {}
            for name in ("bare SDK", "bare serving.py", "fs_server", "db_server"):
                servers[name] = stack.enter_context(closing(OverHttp(self.commands[name], *self.small[name])))
            for turn in range(2 if self.quick else 3):
                for clients in (1, 4, 16, 64):
                    for name, server in servers.items():
                        span = server.turnover(clients, 128)
                        if turn:
                            self.note(f"HTTP, {clients} clients", name, span)

    def crowds(self) -> None:
        """Quick calls among slow ones."""
        query, endless = ("query_database", {"query": SLOW}), ("query_database", {"query": ENDLESS})
        search = ("search_text", {"path": "10000", "pattern": "no"})
        find = ("search_files", {"path": f"{self.files}/1000", "pattern": "**/*.py"})
        wait = ("call_api", {"api": "local", "endpoint": "/slow", "use_cache": False})
        for name, slow, quick in (
            ("fs_server", search, self.small["fs_server"]),
            ("reference fs", find, self.small.get("reference fs")),
            ("api_server", wait, self.small["api_server"]),
            ("db_server", query, TABLES),
            ("pg_server", query, TABLES),
            ("DBHub", ("execute_sql", {"sql": SLOW}), ("search_objects", {"object_type": "table"})),
        ):
            self.in_a_crowd("quick call among 64 slow ones", name, 64, slow, quick or TABLES)
        for name in ("db_server", "pg_server"):
            self.in_a_crowd("list_tables among 8 endless statements", name, 8, endless, TABLES)

    def memory_after_calls(self) -> None:
        """Memory after 10,000 mixed calls as a ratio of what it was after the first 2,000, when all caches are full."""
        query, describe = (
            ("query_database", {"query": "SELECT * FROM item", "limit": 10}),
            ("describe_table", {"table": "item"}),
        )
        place, items = {"path": "1000/d0/e0"}, {"api": "local", "endpoint": "/items"}
        search = ("search_text", {**place, "pattern": "needle"})
        files = [self.small["fs_server"], ("list_directory", place), search, ("directory_tree", place)]
        apis: list[Call] = [("call_api", items), ("call_api", {**items, "use_cache": False}), ("list_apis", {})]
        rows = [query, TABLES, describe]
        mixed: dict[str, list[Call]] = {"fs_server": files, "api_server": apis, "db_server": rows, "pg_server": rows}
        for name, calls in mixed.items():
            after: list[float] = []
            for count in (500, 1_000) if self.quick else (2_000, 8_000):
                for call in calls:
                    self.servers[name].turnover(*call, count // len(calls))
                after.append(self.servers[name].memory())
            self.note("memory after 10,000 calls, of that after 2,000", name, after[1] / after[0])


def command(*words: str) -> Callable[[], object]:
    """What runs a program, without its output."""
    return partial(subprocess.run, words, stdout=subprocess.DEVNULL, check=True)


def run(place: Path, servers: Path, quick: bool, tell: Callable[[str], None]) -> Bench:
    """Make the material in `place`, start everything, and measure."""
    with ExitStack() as stack:
        tell("make files and databases")
        place.chmod(0o755)  # PostgreSQL does not run as root
        stand.make_files(place / "files", TREES[:2] if quick else TREES)
        stand.make_database(place / "bench.db", ROWS[2] if quick else ROWS[3])
        postgres, database_url = stand.start_postgres(place / "pg")
        stack.callback(postgres.cleanup)
        url = stack.enter_context(stand.api())
        bench = Bench(place, servers, url, database_url, quick)
        stack.callback(lambda: [server.close() for server in bench.servers.values()])
        os.sync()  # what is written later would disturb what is measured
        works = (bench.start, bench.small_calls, bench.read_files, bench.read_rows, bench.call_apis, bench.serve_http)
        for work in (*works, bench.memory_after_calls, bench.crowds):
            tell(work.__name__.replace("_", " "))
            work()
    return bench


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure the servers next to their peers.")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and sizes; prints, writes no results")
    parser.add_argument("--servers", type=Path, default=PROJECT, help="a directory with another version of the servers")
    args = parser.parse_args()
    if Path(sys.prefix) != HOME / "venv":
        if not stand.install_ours():
            sys.exit("what the benchmark needs could not be installed")
        os.execv(stand.PYTHON, [str(stand.PYTHON), *sys.argv])
    missing = stand.install_peers()
    started, parts = time.monotonic(), ["begin"]

    def each_minute() -> None:
        while True:
            time.sleep(60)
            print(f"{(time.monotonic() - started) / 60:.0f} min: {parts[-1]} (part {len(parts) - 1} of 9)", flush=True)

    threading.Thread(target=each_minute, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="bench") as name:
        figures = run(Path(name), args.servers.resolve(), args.quick, parts.append).figures

    import report

    report.write(figures, missing, quick=args.quick)
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
