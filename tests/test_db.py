"""The database server on SQLite: through an in-memory client with real files, and as a real process."""

import hashlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio
import anyio.to_process
import pytest
from conftest import PROJECT, Stdio, ok, refused
from mcp import Client, MCPError
from mcp_types import INVALID_PARAMS, TextResourceContents

from common import ConfigError
from db_server import MAX_HEAP, MAX_PROCESS, build_server, name_schemas, open_read_only
from serving import Options

pytestmark = pytest.mark.anyio

COUNT = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < {})"
SETUP = """
CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT NOT NULL, email TEXT, "update" TEXT DEFAULT 'never');
CREATE TABLE orders (id INTEGER PRIMARY KEY,
    customer_id INTEGER NOT NULL REFERENCES customers(id) ON DELETE CASCADE, total REAL);
CREATE INDEX orders_by_customer ON orders (customer_id, total);
CREATE VIEW big_orders AS SELECT * FROM orders WHERE total > 10; CREATE TABLE odd (a, b BLOB, c);
CREATE TRIGGER no_delete BEFORE DELETE ON customers BEGIN SELECT RAISE(ABORT, 'no'); END;
CREATE VIRTUAL TABLE docs USING fts5(body); CREATE VIRTUAL TABLE old_docs USING fts4(body);
CREATE VIRTUAL TABLE places USING rtree(id, x0, x1, y0, y1);
INSERT INTO customers (id, name, email) VALUES (1, 'Ada', 'ada@example.com'), (2, 'Grace', NULL), (3, 'Zoë', NULL);
INSERT INTO orders VALUES (1, 1, 9.5), (2, 1, 20.0), (3, 2, 30.25); INSERT INTO docs VALUES ('the quick brown fox'),
    ('a lazy dog'); INSERT INTO old_docs SELECT * FROM docs; INSERT INTO places VALUES (1, 0, 1, 0, 1), (2, 5, 6, 5, 6);
"""


def make(path: Path, script: str = SETUP) -> Path:
    path.parent.mkdir(exist_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
    return path


def snapshot(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def children(pid: int | None = None) -> list[int]:
    pid = pid or os.getpid()
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 8
    for pid in pids:
        with suppress(OSError):
            while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                assert time.monotonic() < deadline, "a worker has outlived its call, or its server"
                time.sleep(0.01)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)  # a running server sets it for its workers
    return make(tmp_path / "shop.db")


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Client]:
    views = {"broken": "SELECT * FROM gone", "broken_2": DOUBLING, "broken_3": f"{ENDLESS} SELECT n FROM c"}
    script = SETUP + "".join(f"CREATE VIEW {name} AS {view};" for name, view in views.items())
    async with served(make(tmp_path_factory.mktemp("shared") / "shop.db", script)) as client:
        yield client


def served(*files: Path, timeout: float = 5, **options: Any) -> Client:
    return Client(build_server(files, timeout=timeout, options=Options(**options)))


def parsed(text: str) -> dict[str, Any]:
    body, _, last = text.rpartition("\n")  # the last line may be a trailer
    return json.loads(body if last.startswith("[") and last.endswith("]") and body.endswith("}") else text)


async def rows(client: Client, query: str, **arguments: Any) -> list[list[Any]]:
    return parsed(await ok(client, "query_database", query=query, **arguments))["rows"]


async def pages(client: Client, tool: str, part: str, most: int, **arguments: Any) -> list[Any]:
    found: list[Any] = []
    while True:
        text = await ok(client, tool, offset=len(found), **arguments)
        assert len(text) <= most
        found += parsed(text)[part]
        if not text.endswith(f"; continue with offset={len(found)}]"):
            return found


async def resource(client: Client, uri: str) -> str:
    (content,) = (await client.read_resource(uri)).contents
    assert isinstance(content, TextResourceContents)
    return content.text


TARGETS = ["customers", "big_orders", "docs", "old_docs", "places", "places_node", "docs_data", "sqlite_master"]
EACH = ["INSERT INTO {} DEFAULT VALUES", "DELETE FROM {}", "DROP TABLE {}", "ALTER TABLE {} RENAME TO gone"]
WRITES = """
CREATE TABLE x AS SELECT 1 | CREATE TABLE temp.x AS SELECT 1 | CREATE TEMP TABLE x AS SELECT 1 | DROP TRIGGER no_delete
CREATE VIEW x AS SELECT 1 | CREATE TEMP VIEW customers AS SELECT 1 AS id, 'forged' AS name | ATTACH ':memory:' AS other
CREATE INDEX x ON customers (name) | ANALYZE | REINDEX | CREATE TRIGGER x AFTER INSERT ON customers BEGIN SELECT 1; END
CREATE VIRTUAL TABLE temp.x USING fts4aux(main, old_docs) | VACUUM | VACUUM main | VACUUM INTO '{dir}/copy.db' | COMMIT
UPDATE customers SET name = 'x' WHERE 0 | UPDATE OR REPLACE customers SET name = 'x' FROM orders RETURNING * | ROLLBACK
UPDATE sqlite_schema SET sql = 'x' | INSERT INTO customers (name) VALUES ('x') RETURNING id | ;DELETE FROM customers
REPLACE INTO customers (id, name) VALUES (1, 'x') | INSERT INTO docs(docs) VALUES ('optimize') | CREATE TABLE two.x (a)
INSERT INTO places_node VALUES (9, x'00') | DELETE FROM places_rowid WHERE 1 | UPDATE places_parent SET parentnode = 1
WITH doomed AS (SELECT 1 AS id) DELETE FROM customers WHERE id IN doomed | /* SELECT */ DELETE FROM customers | BEGIN
EXPLAIN DELETE FROM customers | EXPLAIN QUERY PLAN DROP TABLE customers | DROP INDEX orders_by_customer | DETACH main
DROP VIEW big_orders | ALTER TABLE customers DROP COLUMN email | SELECT optimize(old_docs) FROM old_docs | SAVEPOINT a
ATTACH '{dir}/new.db' AS other | ATTACH '{dir}/secret.db' AS other | ATTACH 'file:{dir}/secret.db?mode=ro' AS other
VACUUM main INTO 'file:{dir}/copy.db?mode=rwc' | SELECT load_extension('{dir}/evil.so') | INSERT INTO two.t VALUES (2)
SELECT fts3_tokenizer('simple', x'0000000000000000') | SELECT readfile('{dir}/secret.db') | SELECT sql FROM sqlite_stmt
SELECT fts3_tokenizer('simple') | SELECT writefile('{dir}/new.txt', 'x') | SELECT 1; DELETE FROM customers | RELEASE a
BEGIN; DELETE FROM customers; COMMIT | SELECT 1 /* ; */ ; ATTACH 'x' AS y | VACUUM two | PRAGMA two.user_version = 1
""".strip()
SETTINGS = """
query_only = OFF | query_only(0) | main.query_only = 0 | journal_mode = WAL | journal_mode(DELETE) | schema_version = 7
writable_schema = ON | writable_schema(RESET) | trusted_schema = ON | hard_heap_limit = 1 | wal_checkpoint(TRUNCATE)
hard_heap_limit = 1000000000 | soft_heap_limit = 1 | temp_store = FILE | temp_store(1) | temp_store_directory = '/tmp'
user_version = 7 | cache_size = 1000000000 | locking_mode = EXCLUSIVE | busy_timeout = 1000000 | optimize
""".strip()
EACH_TARGET = [statement.format(target) for statement in EACH for target in TARGETS]
HOSTILE = [*EACH_TARGET, *re.split(r" \| |\n", WRITES), *(f"PRAGMA {it}" for it in re.split(r" \| |\n", SETTINGS))]


async def test_every_hostile_statement_is_an_error_changes_nothing_and_holds_no_lock(file: Path) -> None:
    make(file.parent / "secret.db", "CREATE TABLE secret (word); INSERT INTO secret VALUES ('sesame')")
    two = make(file.parent / "two.db", "CREATE TABLE t (a); INSERT INTO t VALUES (1)")
    before = snapshot(file.parent)
    async with served(file, two) as client:
        for statement in HOSTILE:
            sql = statement.replace("{dir}", str(file.parent))
            for tool in ("query_database", "explain_query"):
                error = await refused(client, tool, query=sql)
                assert not re.search("inside the server|sesame", error), sql
            assert await rows(client, "SELECT count(*), min(name) FROM customers") == [[3, "Ada"]], sql
            assert snapshot(file.parent) == before, sql
        for sql, message in {
            "INSERT INTO odd VALUES (1)": "this server only reads (not authorized); write a SELECT",
            "SELECT load_extension('x')": "this server only reads (not authorized to use function: load_extension)",
            "SELECT abs(-9223372036854775808)": "integer overflow",
        }.items():
            assert (await refused(client, "query_database", query=sql)).startswith(message)
            assert len(await rows(client, "SELECT * FROM customers", limit=1)) == 1  # not read to its end
            with closing(sqlite3.connect(file, timeout=0, isolation_level=None)) as other:
                other.execute("INSERT INTO orders (customer_id, total) VALUES (1, 1)")


VIEWS = "big_orders broken broken_2 broken_3"
# fmt: off
LEGITIMATE: list[tuple[str, Any, list[list[Any]]]] = [
    ("select name from customers where id = 1;;\n ; ", None, [["Ada"]]), ("-- first\n/* DROP */ SELECT 1", None, [[1]]),
    (f"{COUNT.format(2)} SELECT n FROM c", None, [[1], [2]]), ("SELECT count(*) FROM big_orders", None, [[2]]),
    ("SELECT 'DROP TABLE customers; DELETE' AS \"delete\"", None, [["DROP TABLE customers; DELETE"]]),
    ("SELECT highlight(docs, 0, '<', '>') FROM docs('fox') ORDER BY rank", None, [["the quick brown <fox>"]]),
    ("SELECT body FROM docs WHERE docs MATCH 'lazy'", None, [["a lazy dog"]]), ("PRAGMA user_version", None, [[0]]),
    ("SELECT body FROM old_docs WHERE body MATCH 'quick'", None, [["the quick brown fox"]]),
    ("SELECT id FROM places WHERE x1 > 4", None, [[2]]), ("PRAGMA main.journal_mode", None, [["delete"]]),
    ("PRAGMA integrity_check", None, [["ok"]]), ("SELECT count(*) > 50 FROM pragma_function_list", None, [[1]]),
    ("PRAGMA index_info('orders_by_customer')", None, [[0, 1, "customer_id"], [1, 2, "total"]]),
    ("SELECT :a, @b, $c, :a", {":a": "x", "b": None, "c": 1.5}, [["x", None, 1.5, "x"]]), ("SELECT 1 WHERE 0", {}, []),
    ("SELECT name FROM customers WHERE name = ?", ["x' OR 1 --"], []), ("SELECT ?2, ?1", [True, "a"], [["a", 1]]),
]
VALUES: list[tuple[str, Any]] = [
    ("NULL", None), ("9007199254740992", 9007199254740992), ("9007199254740993", "9007199254740993"),
    ("-9223372036854775807 - 1", "-9223372036854775808"), ("9e999", "Infinity"), ("-9e999", "-Infinity"),
    ("0.1", 0.1), ("x'00ff'", "(blob, 2 bytes; hex(column) shows them)"), ("CAST(x'636166e9' AS TEXT)", "caf\\xe9"),
    ("'a' || char(0) || 'ünïcode ☕'", "a\0ünïcode ☕"), ("'\"quotes\" \\ ' || char(10)", '"quotes" \\ \n'),
    ("'[not a trailer]'", "[not a trailer]"), ("'],['", "],["),
]
ERRORS: list[tuple[str, Any, str]] = [
    ("SELECT :a, :b", {"a": 1}, "You did not supply a value for binding parameter :b; correct the statement or params"),
    ("SELECT :a -- :b", {"a": 1, "b": 2}, "the statement has no placeholder for b;"),
    ("SELECT ?", {"a": 1}, "Binding 1 has no name"), ("SELECT ?", [[1]], "Error binding parameter 1: type 'list'"),
    ("SELECT ?", [2**63], "Python int too large"), ("SELECT ?", ["\ud800"], "'utf-8' codec can't encode"),
    ("SELECT ?", "x", "params"), ("SELECT 1\0", None, "the query contains a null character"),
    ("", None, "the statement is empty"), ("SELECT ?", list(range(100_000)), "Incorrect number of bindings"),
    ("SELECT nmae FROM customers", None, "no such column: nmae; did you mean name?"),
    ("SELECT zzz FROM customers", None, "no such column: zzz; list_tables and describe_table show what there is"),
    ("SELECT * FROM customer", None, "no such table: customer; did you mean customers?"),
    ("SELECT * FROM other.customers", None, "no such table: other.customers; did you mean customers?"),
    ("SELECT * FROM xyzzy", None, "no such table: xyzzy; list_tables and describe_table show what there is"),
    ("SELECT lenght('a')", None, "no such function: lenght; correct the statement"),
    ("SELECT * FORM customers", None, 'near "FORM": syntax error; correct the statement'),
]
# fmt: on


async def test_legitimate_reading_works_and_an_error_says_what_is_wrong_and_what_was_meant(shared: Client) -> None:
    for sql, params, expected in LEGITIMATE:
        assert await rows(shared, sql, params=params) == expected, sql
    for sql, expected in VALUES:
        query = f"{COUNT.format(300)} SELECT n, CASE n WHEN 200 THEN {sql} ELSE 7 END FROM c"
        assert await rows(shared, query, limit=300) == [[n, expected if n == 200 else 7] for n in range(1, 301)], sql
    for sql, params, message in ERRORS:
        error = await refused(shared, "query_database", query=sql, params=params)
        assert error.startswith(message)
        assert "docs_data" not in error


async def test_explain_works_as_a_statement_and_as_a_tool(shared: Client) -> None:
    assert (await rows(shared, "EXPLAIN QUERY PLAN SELECT * FROM customers"))[0][3] == "SCAN customers"
    for start in ("", "explain ", "EXPLAIN QUERY PLAN "):
        sql = f"{start}SELECT total FROM orders WHERE customer_id = ?"
        plan = await ok(shared, "explain_query", query=sql, params=[1])
        assert plan == "- SEARCH orders USING COVERING INDEX orders_by_customer (customer_id=?)"
    assert "\n  - " in await ok(shared, "explain_query", query="SELECT 1 UNION SELECT id FROM customers;")
    dqs = 'SELECT "nmae" FROM customers LIMIT 1'  # by an old rule of SQLite's a text; SECURITY.md says so
    answer = refused if sys.version_info >= (3, 12) else ok  # a text is "nmae" too, and no hint at name
    assert "nmae" in await answer(shared, "query_database", query=dqs)


def test_a_connection_for_the_model_has_all_layers(tmp_path: Path) -> None:
    path = make(tmp_path / "t.db", "CREATE TABLE t (a)")
    connection = open_read_only(name_schemas([path]))
    with closing(connection):
        with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
            connection.execute("PRAGMA query_only = OFF")
        assert connection.getlimit(sqlite3.SQLITE_LIMIT_ATTACHED) == 0
        connection.set_authorizer(None)
        assert connection.execute("PRAGMA hard_heap_limit").fetchone() == (MAX_HEAP,)
        for sql in ("CREATE TEMP TABLE t (a)", "PRAGMA query_only = OFF; INSERT INTO t VALUES (1)"):
            with pytest.raises(sqlite3.OperationalError, match="readonly database"):  # mode=ro lets the first through
                connection.executescript(sql)


ENDLESS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c)"
DOUBLED = (f"a{i}(x) AS (SELECT x FROM a{i - 1} UNION ALL SELECT x FROM a{i - 1})" for i in range(1, 40))
DOUBLING = f"WITH a0(x) AS (SELECT 1), {', '.join(DOUBLED)} SELECT count(*) FROM a39"
ZEROS = "CAST(zeroblob({}) AS TEXT)"
STOPPED = "the statement was stopped at the limit of 0.3 s"
MEMORY = "the statement needs more than the 128 MB of memory"
RUNAWAYS = {
    "endless CTE": (f"{ENDLESS} SELECT count(*) FROM c", STOPPED),
    "sort": (f"{ENDLESS} SELECT * FROM c ORDER BY hex(randomblob(9000))", "the statement "),
    "one long text": (f"{ENDLESS} SELECT group_concat(hex(randomblob(9000))) FROM c", "the statement "),
    "a blob": ("SELECT zeroblob(999999999)", MEMORY),
    "a row of blobs": (f"WITH b AS MATERIALIZED (SELECT zeroblob(9000000) z) SELECT {'z,' * 999} 1 FROM b", MEMORY),
    "instr": (f"SELECT instr({ZEROS.format(50_000_000)}, {ZEROS.format(20_000_000)} || 'b')", STOPPED),
    "printf": ("SELECT printf('%.*c', 2147483647, 'x')", STOPPED),
    "doubling CTEs": (DOUBLING, "the statement "),
    "additions": ("SELECT " + "1+" * 40_000 + "1", "Expression tree is too large"),
    "JSON": (f"SELECT json('{'[' * 40_000}{']' * 40_000}') AS x", "malformed JSON"),
    "FTS": (f"SELECT * FROM docs WHERE docs MATCH '{'(' * 20_000}a{')' * 20_000}'", "fts5: parser stack overflow"),
    "10 MB of SQL": (f"SELECT '{'x' * 10_000_000}'", "query: string should have at most 100000 characters"),
}


async def stopped(client: Client, sql: str, message: str) -> None:
    assert (await refused(client, "query_database", query=sql)).startswith(message)


async def test_every_runaway_ends_on_time_and_names_the_limit_and_others_get_their_turn(file: Path) -> None:
    async with served(file, timeout=0.3) as client:
        for sql, message in RUNAWAYS.values():
            with anyio.fail_after(10):
                await stopped(client, sql, message)
            assert await rows(client, "SELECT 1") == [[1]]
        with anyio.fail_after(25):
            async with anyio.create_task_group() as group:
                for number in range(40):
                    group.start_soon(rows, client, f"SELECT {number}")
                    if number % 4 == 0:
                        group.start_soon(stopped, client, *RUNAWAYS["endless CTE"])


@pytest.mark.slow
async def test_while_slow_statements_queue_for_their_turn_the_schema_is_told_at_once(file: Path) -> None:
    errors: list[str] = []

    async def run(runaway: str) -> None:
        errors.append(await refused(client, "query_database", query=RUNAWAYS[runaway][0]))

    async with served(file, timeout=25) as client, anyio.create_task_group() as group:
        for runaway in ("instr", "endless CTE", "instr") * 3:  # (a fast machine is done with printf in 25 s)
            group.start_soon(run, runaway)
        await anyio.sleep(0.2)
        assert "orders" in await ok(client, "list_tables")
        assert "customer_id" in await ok(client, "describe_table", table="orders")
        assert "CREATE TABLE orders" in await resource(client, "schema://main/orders")
        assert (await client.list_resources()).resources
        assert not errors
    queued = [error for error in errors if "limit of 25 s" not in error]
    assert 5 <= len(queued) <= 8
    assert all("queued" in error for error in queued), queued
    assert any("not begun" in error for error in queued)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit the address space")
async def test_the_workers_memory_is_bounded(file: Path) -> None:
    many_copies = "SELECT " + ",".join(["CAST(?1 AS BLOB) b"] * 1_500)  # one value for SQLite, 1,500 for Python
    async with served(file, timeout=15, max_output=0) as client:
        error = await refused(client, "query_database", query=many_copies, params=["x" * 1_900_000])
        assert error.startswith(MEMORY)
        for runaway in ("sort", "one long text", "a row of blobs", "doubling CTEs"):
            await refused(client, "query_database", query=RUNAWAYS[runaway][0])
            for worker in children():
                peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{worker}/status").read_text())
                assert not peak or int(peak[1]) * 1024 < MAX_PROCESS


async def test_a_worker_that_is_cancelled_dies_or_runs_out_of_memory_is_replaced(file: Path) -> None:
    server = build_server([file], timeout=20)
    async with Client(server) as client, Client(server) as other:  # a server may have several clients
        for seconds in (0.01, 0.05, 0.1, 0.3):
            async with anyio.create_task_group() as group:
                for runaway in ("endless CTE", "printf") * 2:
                    group.start_soon(client.call_tool, "query_database", {"query": RUNAWAYS[runaway][0]})
                await anyio.sleep(seconds)
                group.cancel_scope.cancel()
        assert await rows(client, "SELECT 1") == await rows(other, "SELECT 1") == [[1]]
        assert not await anyio.to_process.run_sync(eval, "'serving' in __import__('sys').modules")  # it starts fast
        workers = children()
        assert len(workers) <= 6  # idle ones
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        assert await rows(client, "SELECT 1") == [[1]]
        await stopped(client, *RUNAWAYS["a blob"])
        assert not set(workers) & set(children())
    async with Client(server) as again:
        assert await rows(again, "SELECT 1") == [[1]]


async def test_rows_come_one_a_line_and_the_cap_is_exact(shared: Client) -> None:
    sql = "SELECT id FROM customers ORDER BY id DESC"
    for limit, truncated in ((2, True), (3, False), (4, False)):
        text = await ok(shared, "query_database", query=sql, limit=limit)
        assert (parsed(text)["row_count"], parsed(text)["truncated"]) == (min(limit, 3), truncated)
        assert text.endswith("[rows 1-2 shown; continue with offset=2]") is truncated
    text = await ok(shared, "query_database", query=sql, limit=2, offset=2)
    assert text == '{"columns": ["id"], "rows": [\n[1]\n], "row_count": 1, "truncated": false}'
    assert not await rows(shared, sql, offset=4)
    text = await ok(shared, "query_database", query="SELECT replace(hex(zeroblob(6000)), '0', 'é') AS long, 1")
    assert parsed(text)["rows"][0][0] == "é" * 10_000 + "… (cut: 10000 of 12000 characters)"
    assert text.endswith("\n[1 cells cut, substr(column, start, length) reads on in one]")
    for arguments in ({"limit": "5"}, {"limit": 0}, {"limit": 10**9}, {"offset": -1}, {"offset": True}, {"Limit": 5}):
        assert await refused(shared, "query_database", query="SELECT 1", **arguments)


async def test_tables_and_views_are_listed_and_described_without_internals_or_harm_by_broken_ones(
    shared: Client,
) -> None:
    result = json.loads(await ok(shared, "list_tables"))
    assert (result["schemas"], result["table_count"]) == (["main"], 10)
    kinds = {"table": "customers odd orders", "view": VIEWS, "virtual": "docs old_docs places"}
    for kind, names in kinds.items():
        assert [table["name"] for table in result["tables"] if table["type"] == kind] == names.split()
    assert {"name": "customers", "type": "table", "row_estimate": 3} in result["tables"]
    for pattern, names in (("ord*", ["orders"]), ("%DOCS", ["docs", "old_docs"]), ("x", []), ("broken", ["broken"])):
        found = json.loads(await ok(shared, "list_tables", pattern=pattern))
        assert [table["name"] for table in found["tables"]] == names
    assert len((await shared.list_resources()).resources) == 10
    for name in VIEWS.split():
        assert f"CREATE VIEW {name}" in await resource(shared, f"schema://main/{name}")
    assert "public; the schemas are main" in await refused(shared, "list_tables", schema="public")
    key = {"columns": ["customer_id"], "table": "customers", "references": ["id"]}
    needed = [column(name, "INTEGER", nullable=False) for name in ("id", "customer_id")]
    index = {"name": "orders_by_customer", "columns": ["customer_id", "total"], "unique": False, "partial": False}
    assert (await shared.call_tool("describe_table", {"table": "ORDERS"})).structured_content == {
        **{"table": "orders", "schema": "main", "type": "table", "note": "", "primary_key": ["id"]},
        **{"columns": [*needed, column("total", "REAL")], "indexes": [index]},
        "foreign_keys": [{**key, "on_update": "NO ACTION", "on_delete": "CASCADE"}],
        "sample_rows": [[1, 1, 9.5], [2, 1, 20.0], [3, 2, 30.25]],
    }
    customers = json.loads(await ok(shared, "describe_table", table="customers"))
    assert customers["columns"][3] == column("update", "TEXT", default="'never'")


def column(name: str, kind: str = "", **facts: Any) -> dict[str, Any]:
    return {"name": name, "type": kind, "nullable": True, "default": None, "generated": False, **facts}


NO_ACTION = {"table": "p", "on_update": "NO ACTION", "on_delete": "NO ACTION"}
KEYS = "CREATE TABLE t (a, b, c, FOREIGN KEY (b, a) REFERENCES p, FOREIGN KEY (a, c) REFERENCES p (y, x))"
# fmt: off
HARD_TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    "a blob too large": ("CREATE TABLE t (a, b); INSERT INTO t VALUES (1, zeroblob(150000000))", {"sample_rows": []}),
    "a view that never ends": (f"CREATE VIEW t AS {ENDLESS} SELECT count(*) AS n FROM c", {"sample_rows": []}),
    "generated columns": ("CREATE TABLE t (a, b AS (a + 1), c AS (a + 2) STORED)", {
        "columns": [column("a"), column("b", generated=True), column("c", generated=True)]}),
    "an index on an expression": ("CREATE TABLE t (a); CREATE UNIQUE INDEX i ON t (a + 1) WHERE a > 0", {
        "indexes": [{"name": "i", "columns": ["(expression)"], "unique": True, "partial": True}]}),
    "keys of two columns": ("CREATE TABLE p (x, y, PRIMARY KEY (y, x));" + KEYS, {"foreign_keys": [
        {"columns": ["a", "c"], "references": ["y", "x"], **NO_ACTION},
        {"columns": ["b", "a"], "references": [], **NO_ACTION}]}),
    "the order of a key": ("CREATE TABLE t (x, y, PRIMARY KEY (y, x))", {"primary_key": ["y", "x"]}),
    "values of all kinds": ("CREATE TABLE t (a); INSERT INTO t VALUES (9e999), (9007199254740993), (x'ff')", {
        "sample_rows": [["Infinity"], ["9007199254740993"], ["(blob, 1 bytes; hex(column) shows them)"]]}),
}
# fmt: on


@pytest.mark.parametrize(("script", "expected"), HARD_TABLES.values(), ids=HARD_TABLES)
async def test_describe_table_copes_with_a_hard_table(tmp_path: Path, script: str, expected: dict[str, Any]) -> None:
    async with served(make(tmp_path / "t.db", script), timeout=1) as client:
        result = json.loads(await ok(client, "describe_table", table="t"))
        assert {part: result[part] for part in expected} == expected
        assert ("no sample rows" in result["note"]) is (expected == {"sample_rows": []})


async def test_results_stay_within_their_budget_and_pages_can_be_put_together(tmp_path: Path) -> None:
    made = [f"CREATE TABLE table_{i:04} (a);" for i in range(300)]
    made += [f"CREATE TABLE wide ({', '.join(f'column_number_{i} INTEGER' for i in range(1_900))});"]
    made += [f"CREATE INDEX index_{i} ON table_0000 (a, a);" for i in range(100)]
    plan = " UNION ALL ".join(["SELECT a FROM table_0000"] * 400)
    path = make(tmp_path / "t.db", f"BEGIN;{''.join(made)}CREATE VIEW v AS {plan};COMMIT")
    async with served(path, max_output=2_000) as client:
        found = await pages(client, "list_tables", "tables", 2_000)
        assert [table["name"] for table in found] == [*(f"table_{i:04}" for i in range(300)), "v", "wide"]
        more = "the result has more than 2000 characters; "
        error = await refused(client, "describe_table", table="wide")
        assert error == f"{more}query pragma_table_xinfo('wide', 'main') for the columns"
        assert await refused(client, "explain_query", query=plan) == f"{more}explain a part of the statement"
        with pytest.raises(MCPError, match=r"query substr\(sql, start, length\) of sqlite_master"):
            await resource(client, "schema://main/v")
        sql = f"{COUNT.format(500)} SELECT n, hex(zeroblob(n % 50)) FROM c"
        found = await pages(client, "query_database", "rows", 2_000, query=sql, limit=1000)
        assert [row[0] for row in found] == list(range(1, 501))
        cut = "0" * 500 + "… (cut: 500 of 1800 characters)"
        assert await rows(client, "SELECT hex(zeroblob(900)), 7") == [[cut, 7]]
        for columns in (["hex(zeroblob(9000))"] * 9, [repr("x" * 40)] * 2_000):
            error = await refused(client, "query_database", query=f"SELECT {','.join(columns)}")
            assert error == "one row alone is too long; name fewer columns, or read parts with substr(column, 1, 1000)"
    async with served(path, max_output=0) as client:
        sql = f"{COUNT.format(100_000)} SELECT n, 'name' || n FROM c"
        assert await rows(client, sql, limit=100_000) == [[n, f"name{n}"] for n in range(1, 100_001)]
        assert await rows(client, "SELECT hex(zeroblob(20000))") == [["0" * 40_000]]


async def test_create_statements_are_resources_that_count_as_calls(file: Path, tmp_path: Path) -> None:
    name = "odd/na%me ?#.."
    make(file, f'CREATE TABLE "{name}" (a)')
    async with served(file, rate_limit=(11, 1000), audit_log=tmp_path / "audit.jsonl") as client:
        uris = [str(resource.uri) for resource in (await client.list_resources()).resources]
        texts = {uri: await resource(client, uri) for uri in uris}
        assert [text[:7] for text in texts.values()] == ["CREATE "] * 8
        assert f"schema://main/{quote(name, safe='')}" in texts
        assert "CREATE INDEX orders_by_customer" in texts["schema://main/orders"]
        for uri, message in (("main/custmers", "did you mean customers"), ("x/orders", "did you mean orders")):
            with pytest.raises(MCPError, match=message) as caught:
                await resource(client, f"schema://{uri}")
            assert caught.value.error.code == INVALID_PARAMS
        with pytest.raises(MCPError, match="rate limit reached"):
            await client.list_resources()
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [line["tool"] for line in lines] == ["resources/list", *["resources/read"] * 10, "resources/list"]


async def test_several_files_are_schemas_named_after_the_files(tmp_path: Path) -> None:
    (tmp_path / "current.db").symlink_to("one/shop.db")  # it goes by the name it was given
    names = ["current.db", "one/shop.db", "one/hr.sqlite", "two/shop.db", "two/my-data 2.db", "order.db"]
    files = [make(tmp_path / n, f"CREATE TABLE t (a); INSERT INTO t VALUES ('{n}')") for n in names[1:]]
    make(files[1], 'CREATE TABLE staff (a); CREATE VIEW "x.y" AS SELECT 1')
    async with served(tmp_path / names[0], *files) as client:
        expected = dict(zip(["shop", "hr", "shop_2", "my_data_2", "order"], names[1:], strict=True))
        assert json.loads(await ok(client, "list_tables", schema="hr"))["schemas"] == ["main", "current", *expected]
        for schema, name in {"main": names[1], "current": names[1], **expected}.items():
            assert await rows(client, f'SELECT a FROM "{schema}".t') == [[name]]
            assert (await ok(client, "describe_table", table="t", schema=schema)).count(name) == 1
        for table in ("staff", "shop.staf"):  # a table of another file is found by the name that an error suggests
            error = await refused(client, "describe_table", table=table)
            assert error == f"no such table: main.{table}; did you mean hr.staff?"
        for arguments in ({"table": "HR.Staff"}, {"table": "staff", "schema": "hr"}, {"table": "x.y", "schema": "hr"}):
            assert json.loads(await ok(client, "describe_table", **arguments))["schema"] == "hr"
        assert "CREATE TABLE staff" in await resource(client, "schema://main/hr.staff")
        resources = {resource.name for resource in (await client.list_resources()).resources}
        assert resources == {"hr.staff", "hr.x.y", *(f"{schema}.t" for schema in ("current", *expected))}


async def test_a_file_that_cannot_be_served_is_an_error_at_start_and_any_name_will_do(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database, but it is long enough to look at it" * 99)
    (tmp_path / "half.db").write_bytes(make(tmp_path / "t.db").read_bytes()[:8192])
    os.mkfifo(tmp_path / "fifo.db")
    before = set(os.listdir(tmp_path))
    partial = "half.db cannot be served: .*not the whole of it is there; copy it again"
    messages = {"missing.db": "is not there", "": "no regular", "text.db": "not an SQLite", "half.db": partial}
    for name, message in {**messages, "fifo.db": "is no regular file"}.items():
        with pytest.raises(ConfigError, match=message):
            build_server([tmp_path / name])
    for files in ([], [tmp_path / "t.db"] * 11):
        with pytest.raises(ConfigError, match="10 at most"):
            build_server(files)
    assert set(os.listdir(tmp_path)) == before
    for name in ("a?b.db", "a#b.db", "a%20b.db", "ünï.db", "a'b\"c.db", "file:x.db"):  # never read as a URI
        path = make(tmp_path / "plain.db", "CREATE TABLE t (a); INSERT INTO t VALUES (7)").rename(tmp_path / name)
        async with served(path, path) as client:  # the first by its own name too: opened, and attached
            assert await rows(client, "SELECT a FROM t") == [[7]]
        before.add(name)
        assert set(os.listdir(tmp_path)) == before


async def test_a_file_is_read_live_and_one_that_is_locked_or_goes_away_is_an_error_meanwhile(file: Path) -> None:
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        server = build_server([file])  # it starts all the same
        async with Client(server) as client:
            assert "locked" in await refused(client, "query_database", query="SELECT * FROM customers")
            assert "locked" in await refused(client, "list_tables")
            other.execute("COMMIT")
            for number in range(2):  # another program changes the schema
                assert await rows(client, "SELECT count(*) FROM places, docs, json_each('[1]')") == [[4]]
                other.execute(f"CREATE TABLE added_{number} (a)")
                assert await rows(client, f"SELECT count(*) FROM added_{number}") == [[0]]
            os.replace(file, file.with_name("hidden"))
            assert "cannot be opened" in await refused(client, "query_database", query="SELECT * FROM customers")
            assert "cannot be opened" in await refused(client, "list_tables")
            assert server.health
            with pytest.raises(ConfigError):
                await server.health()
            os.replace(make(file.with_name("new"), "PRAGMA journal_mode = WAL; CREATE TABLE t (a)"), file)
            assert await rows(client, "SELECT a FROM t") == []
            await server.health()
            with closing(sqlite3.connect(file, timeout=0, isolation_level=None)) as writer:  # it is never blocked
                async with anyio.create_task_group() as group:
                    sql = f"{ENDLESS} SELECT count(*) FROM t, c"
                    for number in range(3):
                        writer.execute("INSERT INTO t VALUES (?)", (number,))
                        assert await rows(client, "SELECT max(a) FROM t") == [[number]]
                        group.start_soon(client.call_tool, "query_database", {"query": sql})
                        await anyio.sleep(0.1)
                    assert writer.execute("PRAGMA wal_checkpoint").fetchone()[0] == 0
                    group.cancel_scope.cancel()


@pytest.mark.parametrize("ending", ["kill", pytest.param("hang up", marks=pytest.mark.slow)])
def test_no_worker_outlives_its_call_or_its_server(stdio: Callable[..., Stdio], file: Path, ending: str) -> None:
    server = stdio("db_server.py", str(file), "--timeout", "25")
    for runaway, end in (("endless CTE", "cancel"), ("printf", "cancel"), ("printf", ending)):
        assert "Ada" in server.text("query_database", query="SELECT name FROM customers")
        number = server.start("query_database", query=RUNAWAYS[runaway][0])
        time.sleep(0.3)
        workers = children(server.process.pid)
        assert workers
        if end == "cancel":
            server.send("notifications/cancelled", {"requestId": number}, notification=True)
        else:
            server.process.kill() if end == "kill" else server.close()
        wait_until_gone(workers)


def run(command: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, *command]
    return subprocess.run(call, capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}, check=False)


@pytest.mark.parametrize("start", [[str(PROJECT / "db_server.py")], ["-Pc", "import db_server; db_server.main()"]])
def test_nothing_in_the_working_directory_is_imported(file: Path, tmp_path: Path, start: list[str]) -> None:
    for module in "anyio json sqlite3 signal select resource difflib pydantic_core db_server serving aiosqlite".split():
        (tmp_path / f"{module}.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w').write('x')\n")
    call = [*start, str(file), "--call", "query_database", "query=SELECT nmae FROM customers"]
    done = run(call, tmp_path, PYTHONPATH=str(PROJECT))  # as if it were installed
    assert done.stderr == "no such column: nmae; did you mean name?\n"
    assert not (tmp_path / "imported").exists()


WRONG_STARTS = [
    ("", "postgres://me:sesame@host/shop", "use pg_server.py: DATABASE_URL=... python pg_server.py"),
    ("shop.db mysql://me:sesame@host/shop", "", "serves SQLite files, not mysql:// URLs"),
    pytest.param("shop.db --timeout nan", "", "--timeout nan is not a number", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("arguments", "url", "message"), WRONG_STARTS)
def test_a_wrong_start_is_one_line_and_exit_code_2(file: Path, arguments: str, url: str, message: str) -> None:
    done = run([str(PROJECT / "db_server.py"), *arguments.split()], file.parent, DATABASE_URL=url)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr
    assert "sesame" not in done.stderr
    assert os.listdir(file.parent) == ["shop.db"]
