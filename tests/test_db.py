"""The database server, through an in-memory client and real SQLite files."""

import hashlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio
import anyio.to_thread
import pytest
from common import ConfigError, Options
from conftest import PROJECT, Stdio, ok, refused
from mcp import Client, MCPError
from mcp_types import TextResourceContents

import db_server
from db_server import DatabaseServer, Pool, build_server

pytestmark = pytest.mark.anyio


SETUP = """
CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT NOT NULL, email TEXT, "update" TEXT DEFAULT 'never');
CREATE TABLE orders (
    id INTEGER PRIMARY KEY, customer_id INTEGER NOT NULL REFERENCES customers(id) ON DELETE CASCADE, total REAL
);
CREATE INDEX orders_by_customer ON orders (customer_id, total);
CREATE VIEW big_orders AS SELECT * FROM orders WHERE total > 10;
CREATE TRIGGER no_delete BEFORE DELETE ON customers BEGIN SELECT RAISE(ABORT, 'no'); END;
CREATE TABLE odd (a, b BLOB, c);
CREATE VIRTUAL TABLE docs USING fts5(body);
CREATE VIRTUAL TABLE old_docs USING fts4(body);
CREATE VIRTUAL TABLE places USING rtree(id, x0, x1, y0, y1);
INSERT INTO customers (id, name, email) VALUES (1, 'Ada', 'ada@example.com'), (2, 'Grace', NULL), (3, 'Zoë', NULL);
INSERT INTO orders VALUES (1, 1, 9.5), (2, 1, 20.0), (3, 2, 30.25);
INSERT INTO docs VALUES ('the quick brown fox'), ('a lazy dog');
INSERT INTO old_docs VALUES ('the quick brown fox'), ('a lazy dog');
INSERT INTO places VALUES (1, 0, 1, 0, 1), (2, 5, 6, 5, 6);
"""


def make(path: Path, script: str = SETUP) -> Path:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(script)
    return path


def snapshot(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return make(tmp_path / "shop.db")


@pytest.fixture
async def client(file: Path) -> AsyncGenerator[Client]:
    async with Client(build_server([file])) as client:
        yield client


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Client]:
    """One server for all the tests that only read; starting one takes longer than they do."""
    path = make(tmp_path_factory.mktemp("shared") / "shop.db", SETUP + "CREATE VIEW broken AS SELECT * FROM gone;")
    async with Client(build_server([path])) as client:
        yield client


def parsed(text: str) -> dict[str, Any]:
    """The JSON of a result, without the trailer."""
    body, _, last = text.rpartition("\n")
    return json.loads(body if last.startswith("[") and last.endswith("]") and body.endswith("}") else text)


async def rows(client: Client, query: str, **arguments: Any) -> list[list[Any]]:
    return parsed(await ok(client, "query_database", query=query, **arguments))["rows"]


# ------------------------------------------------------------------------------------------------ hostile statements

TARGETS = ["customers", "big_orders", "docs", "old_docs", "places", "places_node", "docs_data", "sqlite_master"]
WRITES = [
    *(f"INSERT INTO {table} DEFAULT VALUES" for table in TARGETS),
    *(f"DELETE FROM {table}" for table in TARGETS),
    *(f"DROP TABLE {table}" for table in TARGETS),
    *(f"ALTER TABLE {table} RENAME TO gone" for table in TARGETS),
    *(f"ALTER TABLE {table} ADD COLUMN extra" for table in TARGETS),
    *(f"CREATE TABLE {schema}x AS SELECT 1" for schema in ("", "main.", "temp.", "TEMP.")),
    *(f"CREATE {kind} x AS SELECT 1" for kind in ("TEMP TABLE", "TEMPORARY TABLE", "VIEW", "TEMP VIEW")),
    "CREATE TABLE IF NOT EXISTS customers (id)",
    "CREATE TEMP TABLE customers (id, name)",
    "CREATE TEMP VIEW customers AS SELECT 1 AS id, 'forged' AS name",
    "CREATE INDEX x ON customers (name)",
    "CREATE UNIQUE INDEX x ON customers (name)",
    "CREATE TRIGGER x AFTER INSERT ON customers BEGIN SELECT 1; END",
    "CREATE TEMP TRIGGER x AFTER INSERT ON customers BEGIN SELECT 1; END",
    *(f"CREATE VIRTUAL TABLE x USING {module}" for module in ("fts5(a)", "fts4(a)", "rtree(a,b,c)", "dbstat")),
    *(f"CREATE VIRTUAL TABLE temp.x USING {module}" for module in ("fts5(a)", "fts4aux(main, old_docs)", "dbstat")),
    "UPDATE customers SET name = 'x'",
    "UPDATE customers SET name = 'x' WHERE 0",
    "UPDATE OR REPLACE customers SET name = 'x' FROM orders RETURNING *",
    "UPDATE sqlite_master SET sql = 'x'",
    "UPDATE main.sqlite_master SET type = 'x', name = 'x'",
    "UPDATE sqlite_schema SET sql = 'x'",
    "INSERT INTO customers (name) VALUES ('x') RETURNING id",
    "INSERT OR REPLACE INTO customers (id, name) VALUES (1, 'x')",
    "INSERT INTO customers (id, name) VALUES (1, 'x') ON CONFLICT DO UPDATE SET name = 'x'",
    "INSERT INTO customers SELECT * FROM customers",
    "INSERT INTO docs(docs) VALUES ('optimize')",
    "INSERT INTO docs(docs, rank) VALUES ('merge', 16)",
    "INSERT INTO old_docs(old_docs) VALUES ('rebuild')",
    "INSERT INTO places_node VALUES (9, x'00')",
    "DELETE FROM places_rowid WHERE 1",
    "UPDATE places_parent SET parentnode = 1",
    "REPLACE INTO customers (id, name) VALUES (1, 'x')",
    "DELETE FROM customers RETURNING *",
    "WITH doomed AS (SELECT 1 AS id) DELETE FROM customers WHERE id IN doomed",
    "WITH x AS (SELECT 1) INSERT INTO customers SELECT 1, 2, 3, 4",
    "WITH x AS (SELECT 1) UPDATE customers SET name = 'x'",
    "/* SELECT */ DELETE FROM customers",
    "-- SELECT\nDELETE FROM customers",
    "EXPLAIN DELETE FROM customers",
    "EXPLAIN QUERY PLAN DROP TABLE customers",
    "DROP INDEX orders_by_customer",
    "DROP VIEW big_orders",
    "DROP TRIGGER no_delete",
    "ALTER TABLE customers RENAME COLUMN name TO x",
    "ALTER TABLE customers DROP COLUMN email",
    "ANALYZE",
    "ANALYZE customers",
    "REINDEX",
    "REINDEX orders_by_customer",
    "VACUUM",
    "VACUUM main",
    "SELECT optimize(old_docs) FROM old_docs",
]
ATTACHES = [
    *(f"ATTACH '{name}' AS other" for name in ("{dir}/new.db", "{dir}/shop.db", "{dir}/secret.db", ":memory:", "")),
    *(f"ATTACH 'file:{{dir}}/{name}' AS other" for name in ("secret.db?mode=ro", "shop.db?mode=rw", "new?mode=rwc")),
    "ATTACH DATABASE 'file:{dir}/shop.db?mode=rw&cache=shared' AS shop",
    "ATTACH 'file:new?mode=memory&cache=shared' AS other",
    "ATTACH '/etc/passwd' AS other",
    "ATTACH (SELECT '{dir}/secret.db') AS other",
    "DETACH main",
    "DETACH DATABASE temp",
    "VACUUM INTO '{dir}/copy.db'",
    "VACUUM main INTO 'file:{dir}/copy.db?mode=rwc'",
    "SELECT load_extension('{dir}/evil.so')",
    "SELECT load_extension('{dir}/evil', 'entry')",
    "SELECT LOAD_EXTENSION('x') FROM customers",
    "SELECT fts3_tokenizer('simple')",
    "SELECT fts3_tokenizer('simple', x'0000000000000000')",
    "SELECT readfile('{dir}/secret.db')",
    "SELECT writefile('{dir}/new.txt', 'x')",
    "SELECT edit('x')",
    "SELECT * FROM fsdir('/')",
    "SELECT sqlite3_load_extension('x')",
    "SELECT sql FROM sqlite_stmt",
]
TRANSACTIONS = [
    *("BEGIN", "BEGIN IMMEDIATE", "BEGIN EXCLUSIVE", "BEGIN DEFERRED TRANSACTION", "COMMIT", "END", "ROLLBACK"),
    *("SAVEPOINT a", "RELEASE a", "ROLLBACK TO a", "END TRANSACTION", "ROLLBACK TRANSACTION TO SAVEPOINT a"),
]
SETTINGS = [
    f"PRAGMA {setting}"
    for setting in (
        *("query_only = OFF", "query_only(0)", "main.query_only = 0", "journal_mode = WAL", "journal_mode(DELETE)"),
        *("main.journal_mode = MEMORY", "journal_size_limit = 1", "writable_schema = ON", "writable_schema(RESET)"),
        *("trusted_schema = ON", "hard_heap_limit = 1", "hard_heap_limit = 1000000000", "soft_heap_limit = 1"),
        *("temp_store = FILE", "temp_store(1)", "temp_store_directory = '/tmp'", "data_store_directory = '/tmp'"),
        *("user_version = 7", "application_id = 7", "schema_version = 7", "encoding = 'UTF-16'", "page_size = 1024"),
        *("cache_size = 1000000000", "cache_spill = 1", "mmap_size = 1000000000", "max_page_count = 1", "threads = 8"),
        *("auto_vacuum = FULL", "incremental_vacuum", "incremental_vacuum(9)", "wal_checkpoint", "optimize"),
        *("wal_checkpoint(TRUNCATE)", "wal_autocheckpoint = 1", "synchronous = OFF", "locking_mode = EXCLUSIVE"),
        *("locking_mode", "foreign_keys = OFF", "ignore_check_constraints = ON", "recursive_triggers = ON"),
        *("case_sensitive_like = ON", "legacy_alter_table = ON", "reverse_unordered_selects = ON", "shrink_memory"),
        *("secure_delete = OFF", "busy_timeout = 1000000", "automatic_index = OFF", "defer_foreign_keys = ON"),
        *("read_uncommitted = ON", "cell_size_check = ON", "key = 'x'", "rekey = 'x'", "analysis_limit = 5", "stats"),
        *("lock_proxy_file = ':auto:'", "vdbe_trace = ON", "parser_trace = ON", "full_column_names = ON"),
        *("count_changes = ON", "empty_result_callbacks = ON", "short_column_names = OFF", "checkpoint_fullfsync = 1"),
    )
]
SEVERAL = [
    "SELECT 1; DELETE FROM customers",
    "SELECT 1; SELECT 2",
    ";DELETE FROM customers",
    "SELECT 1;\n-- harmless\nDROP TABLE customers;",
    "SELECT 1 /* ; */ ; ATTACH 'x' AS y",
    "BEGIN; DELETE FROM customers; COMMIT",
]
HOSTILE = [*WRITES, *ATTACHES, *TRANSACTIONS, *SETTINGS, *SEVERAL]


async def test_every_hostile_statement_is_an_error_and_changes_nothing(client: Client, file: Path) -> None:
    make(file.parent / "secret.db", "CREATE TABLE secret (word); INSERT INTO secret VALUES ('sesame')")
    before = snapshot(file.parent)
    assert len(HOSTILE) > 200
    for statement in HOSTILE:
        sql = statement.replace("{dir}", str(file.parent))
        for tool in ("query_database", "explain_query"):
            error = await refused(client, tool, query=sql)
            assert "inside the server" not in error, sql
            assert "sesame" not in error, sql
        assert await rows(client, "SELECT count(*), min(name) FROM customers") == [[3, "Ada"]], sql
        assert snapshot(file.parent) == before, sql


async def test_a_refusal_says_that_the_server_only_reads(client: Client) -> None:
    error = await refused(client, "query_database", query="DELETE FROM customers")
    assert error.startswith("this server only reads: DELETE customers is refused")


async def test_another_program_can_write_after_every_kind_of_failure(client: Client, file: Path) -> None:
    for sql in (
        "INSERT INTO customers (name) VALUES ('x')",
        "BEGIN IMMEDIATE",
        "SELEC",
        "SELECT abs(-9223372036854775808)",
    ):
        await refused(client, "query_database", query=sql)
        assert len(await rows(client, "SELECT * FROM customers", limit=1)) == 1  # not read to its end
        with closing(sqlite3.connect(file, timeout=0)) as other:
            other.execute("INSERT INTO orders (customer_id, total) VALUES (1, 1)")
            other.commit()
    assert await rows(client, "SELECT count(*) FROM orders") == [[7]]


LEGITIMATE: list[tuple[str, list[list[Any]]]] = [
    ("SELECT 1", [[1]]),
    ("select name from customers where id = 1;", [["Ada"]]),
    ("SELECT 1;;\n ; ", [[1]]),
    ("SELECT 1; -- the end", [[1]]),
    ("SELECT 1; /* the end */", [[1]]),
    ("-- first\n/* DROP */ SELECT 1", [[1]]),
    ("\n\t SELECT (SELECT 1)", [[1]]),
    ("VALUES (1, 'a'), (2, 'b')", [[1, "a"], [2, "b"]]),
    ("WITH x AS (SELECT 1 AS a) SELECT a FROM x", [[1]]),
    ("WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 3) SELECT n FROM c", [[1], [2], [3]]),
    ("SELECT 'DROP TABLE customers; DELETE'", [["DROP TABLE customers; DELETE"]]),
    ('SELECT "update" FROM customers LIMIT 1', [["never"]]),
    ('SELECT 1 AS "delete", 2 AS [insert], 3 AS `drop`', [[1, 2, 3]]),
    ("SELECT replace('a', 'a', 'b')", [["b"]]),
    ("SELECT name, row_number() OVER (ORDER BY name DESC) FROM customers", [["Zoë", 1], ["Grace", 2], ["Ada", 3]]),
    ("SELECT sum(total) OVER (ORDER BY id ROWS 1 PRECEDING) FROM orders", [[9.5], [29.5], [50.25]]),
    ("SELECT count(*) FROM big_orders", [[2]]),
    ("SELECT value FROM json_each('[1, 2]')", [[1], [2]]),
    ("SELECT count(*) FROM json_tree('{\"a\": [1]}')", [[3]]),
    ("SELECT json_extract('{\"a\": 5}', '$.a'), '{\"a\": 6}' ->> 'a'", [[5, 6]]),
    ("SELECT json_group_array(id) FROM customers", [["[1,2,3]"]]),
    ("SELECT json_patch('{}', '{\"a\":1}'), printf('%05.1f', 2.5), instr('abc', 'c')", [['{"a":1}', "002.5", 3]]),
    ("SELECT body FROM docs WHERE docs MATCH 'lazy'", [["a lazy dog"]]),
    ("SELECT highlight(docs, 0, '<', '>') FROM docs('fox') ORDER BY rank", [["the quick brown <fox>"]]),
    ("SELECT snippet(docs, 0, '<', '>', '…', 2) FROM docs WHERE body MATCH 'dog'", [["…lazy <dog>"]]),
    ("SELECT body FROM old_docs WHERE body MATCH 'quick'", [["the quick brown fox"]]),
    ("SELECT id FROM places WHERE x1 > 4", [[2]]),
    ("SELECT name FROM pragma_table_info('orders')", [["id"], ["customer_id"], ["total"]]),
    ("SELECT name FROM pragma_index_list('orders')", [["orders_by_customer"]]),
    ("SELECT \"table\" FROM pragma_foreign_key_list('orders')", [["customers"]]),
    ("PRAGMA user_version", [[0]]),
    ("PRAGMA main.journal_mode", [["delete"]]),
    ("PRAGMA integrity_check", [["ok"]]),
    ("PRAGMA index_info('orders_by_customer')", [[0, 1, "customer_id"], [1, 2, "total"]]),
    ("PRAGMA foreign_key_check", []),
    ("SELECT count(*) > 50 FROM pragma_function_list", [[1]]),
    ("SELECT name FROM sqlite_master WHERE type = 'index' AND sql <> ''", [["orders_by_customer"]]),
    ("SELECT id FROM customers EXCEPT SELECT customer_id FROM orders", [[3]]),
    ("SELECT name FROM customers WHERE name LIKE '%a%' COLLATE NOCASE AND name GLOB '*a'", [["Ada"]]),
    ("SELECT strftime('%Y', '2026-01-02'), date('2026-01-31', '+1 month')", [["2026", "2026-03-03"]]),
    ("SELECT CASE WHEN 1 THEN 'begin' ELSE 'commit' END", [["begin"]]),
    ("SELECT group_concat(name, ', ') FROM (SELECT name FROM customers ORDER BY id)", [["Ada, Grace, Zoë"]]),
    ("SELECT count(*) FROM customers c JOIN orders o ON o.customer_id = c.id LEFT JOIN odd", [[3]]),
    ("SELECT round(sqrt(16)), pow(2, 3), typeof(NULL)", [[4.0, 8.0, "null"]]),
    ("SELECT 'ünïcode ☕', char(9749)", [["ünïcode ☕", "☕"]]),
    ("SELECT 1 WHERE 0", []),
]


@pytest.mark.parametrize(("sql", "expected"), LEGITIMATE, ids=[sql[:60] for sql, _ in LEGITIMATE])
async def test_legitimate_reading_works(shared: Client, sql: str, expected: list[list[Any]]) -> None:
    assert await rows(shared, sql) == expected


async def test_a_view_may_do_what_a_query_may_and_no_more(client: Client, file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE VIEW foxes AS SELECT body FROM docs WHERE docs MATCH 'fox'")
        connection.execute("CREATE VIEW evil AS SELECT load_extension('evil')")
    assert await rows(client, "SELECT * FROM foxes") == [["the quick brown fox"]]
    assert "load_extension" in await refused(client, "query_database", query="SELECT * FROM evil")
    assert "load_extension" in await refused(client, "describe_table", table="evil")


async def test_explain_works_as_a_statement_and_as_a_tool(client: Client) -> None:
    assert len(await rows(client, "EXPLAIN SELECT * FROM customers")) > 3
    assert (await rows(client, "EXPLAIN QUERY PLAN SELECT * FROM customers"))[0][3] == "SCAN customers"
    plan = await ok(client, "explain_query", query="SELECT total FROM orders WHERE customer_id = ?", params=[1])
    assert plan == "- SEARCH orders USING COVERING INDEX orders_by_customer (customer_id=?)"
    nested = await ok(client, "explain_query", query="SELECT 1 UNION SELECT id FROM customers;")
    assert "\n  - " in nested
    assert "without" in await refused(client, "explain_query", query="explain SELECT 1")


# ------------------------------------------------------------------------------------- the layers, one by one

LAYERS = ["files", "query_only", "limits", "authorizer"]
# For each statement, the layers each of which stops it alone (the first layer is opening the files with mode=ro).
STOPPED_BY = [
    ("INSERT INTO t VALUES (2)", {"files", "query_only", "authorizer"}),
    ("UPDATE sqlite_master SET sql = ''", {"files", "query_only", "limits", "authorizer"}),
    ("PRAGMA user_version = 5", {"files", "query_only", "authorizer"}),
    ("CREATE TEMP TABLE t (a)", {"query_only", "authorizer"}),
    ("ATTACH '{dir}/other.db' AS other", {"limits", "authorizer"}),
    ("VACUUM INTO '{dir}/copy.db'", {"limits", "authorizer"}),
    ("PRAGMA query_only = OFF", {"authorizer"}),
    ("PRAGMA trusted_schema = ON", {"authorizer"}),
]


@contextmanager
def connection_with(path: Path, *layers: str) -> Generator[sqlite3.Connection]:
    mode = "ro" if "files" in layers else "rw"
    with closing(db_server.open_files([("main", f"{path.as_uri()}?mode={mode}")])) as connection:
        if "query_only" in layers:
            db_server.forbid_writing(connection)
        if "limits" in layers:
            db_server.limit_sizes(connection, 0)
        if "authorizer" in layers:
            connection.set_authorizer(db_server.Authorizer(connection))
        yield connection


def stops(path: Path, sql: str, *layers: str) -> bool:
    before = snapshot(path.parent)
    with connection_with(path, *layers) as connection:
        try:
            connection.execute(sql.replace("{dir}", str(path.parent))).fetchall()
        except sqlite3.Error:
            return snapshot(path.parent) == before  # query_only refuses VACUUM INTO, and leaves an empty file
        return False


@pytest.mark.parametrize(("sql", "stopped_by"), STOPPED_BY, ids=[sql[:40] for sql, _ in STOPPED_BY])
def test_each_layer_stops_alone_what_it_is_there_for(tmp_path: Path, sql: str, stopped_by: set[str]) -> None:
    found: set[str] = set()
    for layer in LAYERS:
        directory = tmp_path / layer
        directory.mkdir()
        if stops(make(directory / "t.db", "CREATE TABLE t (a)"), sql, layer):
            found.add(layer)
    assert found == stopped_by


def test_a_connection_for_the_model_has_all_layers(tmp_path: Path) -> None:
    path = make(tmp_path / "t.db", "CREATE TABLE t (a)")
    connection, _ = db_server.open_read_only([("main", f"{path.as_uri()}?mode=ro")])
    with closing(connection):
        assert connection.getlimit(sqlite3.SQLITE_LIMIT_ATTACHED) == 0
        assert connection.execute("PRAGMA query_only").fetchone() == (1,)
        with pytest.raises(sqlite3.DatabaseError, match="not authorized"):
            connection.execute("PRAGMA query_only = OFF")
        connection.set_authorizer(None)
        assert connection.execute("PRAGMA hard_heap_limit").fetchone() == (db_server.MAX_HEAP,)
        connection.execute("PRAGMA query_only = OFF")
        with pytest.raises(sqlite3.OperationalError, match="readonly database"):
            connection.execute("INSERT INTO t VALUES (1)")


@pytest.mark.parametrize("missing", LAYERS)
def test_without_one_layer_the_others_still_protect_the_file(tmp_path: Path, missing: str) -> None:
    path = make(tmp_path / "shop.db")
    before = snapshot(tmp_path)
    for statement in HOSTILE:
        if "heap_limit" in statement:  # is for the process, and here that is the one that runs the tests
            continue
        others = [layer for layer in LAYERS if layer != missing]
        with connection_with(path, *others) as connection, suppress(sqlite3.Error, sqlite3.Warning):
            connection.execute(statement.replace("{dir}", str(tmp_path))).fetchall()
        assert snapshot(tmp_path) == before, statement


# ---------------------------------------------------------------------------------------------------- runaways

COUNT = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < {})"
ENDLESS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c)"
ZEROS = "CAST(zeroblob({}) AS TEXT)"
STOPPED = "the statement was stopped at the limit of 0.4 s"
MEMORY = "the statement needs more than the 128 MB of memory"
RUNAWAYS = {
    "endless CTE": (f"{ENDLESS} SELECT count(*) FROM c", STOPPED),
    "endless rows that are never there": (f"{ENDLESS} SELECT n FROM c WHERE n < 0", STOPPED),
    "cartesian join": (f"SELECT count(*) FROM {', '.join(f'pragma_function_list a{i}' for i in range(4))}", STOPPED),
    "64 tables": (f"SELECT count(*) FROM {', '.join(f'customers a{i}' for i in range(64))}", STOPPED),
    "sort": (f"{ENDLESS} SELECT * FROM c ORDER BY hex(randomblob(9000))", "the statement "),
    "group": (f"{ENDLESS} SELECT n, count(*) FROM c GROUP BY hex(randomblob(9000))", "the statement "),
    "distinct": (f"{ENDLESS} SELECT count(DISTINCT hex(randomblob(9000))) FROM c", "the statement "),
    "one long text": (f"{ENDLESS} SELECT group_concat(hex(randomblob(9000))) FROM c", "the statement "),
    "window": (f"{ENDLESS} SELECT sum(n) OVER () FROM c", STOPPED),
    "a blob": ("SELECT zeroblob(999999999)", MEMORY),
    "a random blob": ("SELECT randomblob(999999999)", MEMORY),
    "a row of blobs": (f"WITH b AS MATERIALIZED (SELECT zeroblob(9000000) z) SELECT {'z,' * 999} 1 FROM b", MEMORY),
    "replace that grows": ("SELECT length(replace(hex(zeroblob(9000)), '0', hex(zeroblob(9000))))", MEMORY),
    "instr": (f"SELECT instr({ZEROS.format(50_000_000)}, {ZEROS.format(20_000_000)} || 'b')", STOPPED),
    "LIKE": ("SELECT hex(zeroblob(20000000)) LIKE '%' || substr(hex(zeroblob(20000)), 1, 20000) || '1%'", STOPPED),
    "LIKE with many %": (f"SELECT hex(zeroblob(1000000)) LIKE '{'%0' * 9000}1' AS x", ""),
    "GLOB": (f"SELECT hex(zeroblob(9000000)) GLOB '*{'?' * 20000}*{'0' * 20000}1' AS x", STOPPED),
    "printf": ("SELECT printf('%.*c', 2147483647, 'x')", STOPPED),
    "printf, 20 times": (f"SELECT printf('{'%.*c' * 20}', {', '.join(['2147483647', '1'] * 20)}) AS x", STOPPED),
    "json_patch": (
        "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < 50000),"
        " j AS MATERIALIZED (SELECT json_group_object('k' || n, n) v FROM c) SELECT json_patch(v, v) FROM j",
        STOPPED,
    ),
    "doubling CTEs": (
        "WITH a0(x) AS (SELECT 1), "
        + ", ".join(f"a{i}(x) AS (SELECT x FROM a{i - 1} UNION ALL SELECT x FROM a{i - 1})" for i in range(1, 40))
        + " SELECT count(*) FROM a39",
        "the statement ",
    ),
    "parentheses": ("SELECT " + "(" * 40_000 + "1" + ")" * 40_000, "parser stack overflow"),
    "NOT": ("SELECT " + "NOT " * 20_000 + "1", "parser stack overflow"),
    "subqueries": ("SELECT " + "(SELECT " * 5_000 + "1" + ")" * 5_000, "parser stack overflow"),
    "additions": ("SELECT " + "1+" * 40_000 + "1", "expression tree is too large"),
    "UNIONs": ("SELECT 1" + " UNION SELECT 1" * 5_000, "too many terms in compound SELECT"),
    "columns": ("SELECT " + ",".join(["1"] * 5_000), "too many columns"),
    "JSON": (f"SELECT json('{'[' * 40_000}{']' * 40_000}') AS x", "malformed JSON"),
    "FTS": (f"SELECT * FROM docs WHERE docs MATCH '{'(' * 20_000}a{')' * 20_000}'", "fts5: parser stack overflow"),
    "10 MB of SQL": (f"SELECT '{'x' * 10_000_000}'", "query: string should have at most 100000 characters"),
}


@pytest.fixture(scope="module")
async def hasty(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Client]:
    """A server with a short time limit."""
    path = make(tmp_path_factory.mktemp("hasty") / "shop.db")
    async with Client(build_server([path], timeout=0.4)) as client:
        yield client


@pytest.mark.parametrize(("sql", "message"), RUNAWAYS.values(), ids=RUNAWAYS)
async def test_every_runaway_ends_on_time_with_an_error_that_names_the_limit(
    hasty: Client, sql: str, message: str
) -> None:
    with anyio.fail_after(10):
        if message:
            assert (await refused(hasty, "query_database", query=sql)).startswith(message)
        else:  # quick in one version of SQLite, slow in another
            await hasty.call_tool("query_database", {"query": sql})
    assert await rows(hasty, "SELECT 1") == [[1]]


async def test_rows_without_end_are_stopped_wherever_they_go(hasty: Client) -> None:
    for arguments in ({"offset": 10**12}, {"limit": 10**6, "offset": 10**8}):
        error = await refused(hasty, "query_database", query=f"{ENDLESS} SELECT n FROM c", **arguments)
        assert error.startswith(STOPPED)


async def test_100_000_parameters_are_an_error(client: Client) -> None:
    values = list(range(100_000))
    error = await refused(client, "query_database", query=f"SELECT {', '.join('?' * 30_000)}", params=values)
    assert error == "100000 parameters are more than 32766; pass fewer"
    error = await refused(client, "query_database", query="SELECT ?", params=["x" * 3_000_000])
    assert "more than 2000000" in error


async def test_other_queries_are_answered_while_runaways_run(file: Path) -> None:
    in_c, in_steps = RUNAWAYS["printf"][0], RUNAWAYS["endless CTE"][0]
    async with Client(build_server([file], timeout=20)) as client, anyio.create_task_group() as group:
        for sql in (in_c, in_steps, in_c):
            group.start_soon(client.call_tool, "query_database", {"query": sql})
        await anyio.sleep(0.2)
        with anyio.fail_after(10):
            assert await rows(client, "SELECT 1") == [[1]]
        group.cancel_scope.cancel()


async def test_a_crowd_of_runaways_is_told_that_the_server_is_busy(hasty: Client) -> None:
    errors: list[str] = []

    async def run() -> None:
        errors.append(await refused(hasty, "query_database", query=RUNAWAYS["printf"][0]))

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            for _ in range(16):
                group.start_soon(run)
    assert sum(error.startswith(STOPPED) for error in errors) >= 4
    assert {error.split(" with")[0] for error in errors if not error.startswith(STOPPED)} <= {
        "all 4 connections are busy"
    }
    assert await rows(hasty, "SELECT 1") == [[1]]


@pytest.mark.parametrize("runaway", ["endless CTE", "printf"])
async def test_a_cancelled_call_stops_its_sql(file: Path, runaway: str) -> None:
    server = build_server([file], timeout=20)
    async with Client(server) as client:
        await rows(client, "SELECT 1")
        (worker,) = pool_of(server).workers
        with anyio.move_on_after(0.3):
            await client.call_tool("query_database", {"query": RUNAWAYS[runaway][0]})
        with anyio.fail_after(5):
            await worker.process.wait()
            assert await rows(client, "SELECT 1") == [[1]]


async def test_an_interrupt_never_hits_the_next_query(hasty: Client) -> None:
    for _ in range(3):
        assert (await refused(hasty, "query_database", query=RUNAWAYS["endless CTE"][0])).startswith(STOPPED)
        for number in range(20):
            assert await rows(hasty, f"SELECT {number}, count(*) FROM customers") == [[number, 3]]


def pool_of(server: DatabaseServer) -> Pool:
    assert isinstance(server.pool, Pool)
    return server.pool


def peak_memory(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+)", status)
    return int(found[1]) * 1024 if found else 0  # a process that has just ended has none


async def test_the_workers_memory_is_bounded(file: Path) -> None:
    server = build_server([file], timeout=1, options=Options(max_output=0))
    async with Client(server) as client:
        for runaway in ("sort", "one long text", "a row of blobs", "doubling CTEs"):
            await refused(client, "query_database", query=RUNAWAYS[runaway][0])
        await client.call_tool(
            "query_database", {"query": f"{ENDLESS} SELECT hex(zeroblob(5000)) FROM c", "limit": 10**6}
        )
        for worker in pool_of(server).workers:
            if worker.process.returncode is None:
                assert peak_memory(worker.process.pid) < db_server.MAX_PROCESS


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit the address space")
async def test_a_row_of_blobs_that_sqlite_does_not_count_is_refused(client: Client) -> None:
    sql = "SELECT " + ",".join(["CAST(?1 AS BLOB) b"] * 1_500)  # one value for SQLite, 1,500 copies for Python
    assert (await refused(client, "query_database", query=sql, params=["x" * 1_900_000])).startswith(MEMORY)
    assert await rows(client, "SELECT 1") == [[1]]


async def test_a_worker_that_dies_is_replaced(file: Path) -> None:
    server = build_server([file])
    async with Client(server) as client:
        await rows(client, "SELECT 1")
        (worker,) = pool_of(server).workers
        worker.process.kill()
        await worker.process.wait()
        assert await rows(client, "SELECT 1") == [[1]]


async def test_a_worker_that_does_not_start_is_not_blamed_on_the_statement(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Client(build_server([file])) as client:
        monkeypatch.setattr(db_server, "RECYCLE", 0.0)
        for attribute, value in (("PROGRAM", str(tmp_path / "gone.py")), ("sys.executable", str(tmp_path / "gone"))):
            with monkeypatch.context() as patch:
                patch.setattr(f"db_server.{attribute}", value)
                assert "did not start" in await refused(client, "query_database", query="SELECT 1")
        assert await rows(client, "SELECT 1") == [[1]]


async def test_a_worker_that_ran_out_of_memory_is_replaced(file: Path) -> None:
    server = build_server([file])
    async with Client(server) as client:
        await rows(client, "SELECT 1")
        (first,) = pool_of(server).workers
        assert (await refused(client, "query_database", query=RUNAWAYS["a blob"][0])).startswith(MEMORY)
        assert await rows(client, "SELECT 1") == [[1]]
        assert first not in pool_of(server).idle


async def test_an_old_worker_is_replaced(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = build_server([file])
    async with Client(server) as client:
        await rows(client, "SELECT 1")
        (first,) = pool_of(server).workers
        await rows(client, "SELECT 1")
        assert pool_of(server).workers == {first}
        monkeypatch.setattr(db_server, "RECYCLE", 0.0)
        await rows(client, "SELECT 1")
        assert first not in pool_of(server).idle


async def test_a_server_may_be_used_by_several_clients_and_again(file: Path) -> None:
    server = build_server([file])
    for _ in range(2):
        async with Client(server) as first:
            async with Client(server) as second:
                assert await rows(second, "SELECT 1") == [[1]]
            assert await rows(first, "SELECT 2") == [[2]]


# ------------------------------------------------------------------------------------------------------ results


async def test_the_row_cap_is_exact(client: Client) -> None:
    for limit, truncated in ((2, True), (3, False), (4, False)):
        text = await ok(client, "query_database", query="SELECT id FROM customers ORDER BY id DESC", limit=limit)
        result = parsed(text)
        assert (result["row_count"], result["truncated"]) == (min(limit, 3), truncated)
        assert text.endswith("[rows 1-2 shown; continue with offset=2]") is truncated
    assert await rows(client, "SELECT id FROM customers ORDER BY id DESC", limit=2, offset=2) == [[1]]
    assert await rows(client, "SELECT id FROM customers LIMIT 1 OFFSET 1", limit=5) == [[2]]
    error = await refused(client, "query_database", query="SELECT id FROM customers", offset=4)
    assert error == "offset=4 is past the end: the query has 3 rows; use a smaller offset"


async def test_a_result_is_one_row_a_line_and_valid_json(client: Client) -> None:
    text = await ok(client, "query_database", query="SELECT id, name FROM customers WHERE id < 3")
    assert text == (
        '{"columns": ["id", "name"], "rows": [\n[1,"Ada"],\n[2,"Grace"]\n], "row_count": 2, "truncated": false}'
    )
    empty = await ok(client, "query_database", query="SELECT 1 AS a WHERE 0")
    assert empty == '{"columns": ["a"], "rows": [], "row_count": 0, "truncated": false}'
    result = await client.call_tool("query_database", {"query": "SELECT 1"})
    assert result.structured_content is None


VALUES: list[tuple[str, Any]] = [
    ("NULL", None),
    ("9007199254740992", 9007199254740992),
    ("9007199254740993", "9007199254740993"),
    ("-9223372036854775807 - 1", "-9223372036854775808"),
    ("9e999", "Infinity"),
    ("-9e999", "-Infinity"),
    ("9e999 - 9e999", None),
    ("0.1", 0.1),
    ("1e300", 1e300),
    ("-0.0", 0.0),
    ("x'00ff'", "(blob, 2 bytes; hex(column) shows them)"),
    ("''", ""),
    ("CAST(x'636166e9' AS TEXT)", "caf\\xe9"),
    ("CAST(x'eda080' AS TEXT)", "\\xed\\xa0\\x80"),
    ("'a' || char(0) || 'b'", "a\0b"),
    ("'\"quotes\" \\ and ' || char(10) || char(8232)", '"quotes" \\ and \n\u2028'),
    ("'[not a trailer]'", "[not a trailer]"),
]


@pytest.mark.parametrize(("sql", "expected"), VALUES, ids=[sql for sql, _ in VALUES])
async def test_every_value_survives_json(shared: Client, sql: str, expected: Any) -> None:
    assert await rows(shared, f"SELECT {sql}") == [[expected]]


@pytest.mark.parametrize(("sql", "expected"), VALUES, ids=[sql for sql, _ in VALUES])
async def test_a_value_survives_among_many_rows(shared: Client, sql: str, expected: Any) -> None:
    found = await rows(shared, f"{COUNT.format(300)} SELECT n, CASE n WHEN 200 THEN {sql} ELSE 7 END FROM c", limit=300)
    assert found == [[n, expected if n == 200 else 7] for n in range(1, 301)]


FOREVER = f"({ENDLESS} SELECT count(*) FROM c)"


async def test_rows_beyond_the_limit_are_not_computed(shared: Client) -> None:
    sql = f"{COUNT.format(100)} SELECT n, CASE WHEN n > 52 THEN {FOREVER} END FROM c"  # sqlite3 looks one row ahead
    assert len(await rows(shared, sql, limit=50)) == 50
    assert (await refused(shared, "query_database", query=sql, limit=60)).startswith("the statement was stopped")


async def test_hardly_more_rows_are_computed_than_fit(file: Path) -> None:
    sql = f"{COUNT.format(1000)} SELECT hex(zeroblob(50)), CASE WHEN n > 25 THEN {FOREVER} END FROM c"
    async with Client(build_server([file], options=Options(max_output=2_000))) as client:
        text = await ok(client, "query_database", query=sql, limit=1000)
        assert parsed(text)["row_count"] > 10


async def test_duplicate_column_names_survive(client: Client) -> None:
    result = parsed(
        await ok(client, "query_database", query="SELECT 1 AS a, 2 AS a, c.id, o.id FROM customers c, orders o")
    )
    assert result["columns"] == ["a", "a", "id", "id"]


async def test_a_long_cell_is_cut_and_says_its_length(client: Client) -> None:
    text = await ok(client, "query_database", query="SELECT replace(hex(zeroblob(6000)), '0', 'é') AS long, 1")
    cell = parsed(text)["rows"][0][0]
    assert cell == "é" * 10_000 + "… (cut: 10000 of 12000 characters)"
    assert text.endswith("\n[1 cells cut, substr(column, start, length) reads on in one]")
    whole = "SELECT substr(replace(hex(zeroblob(5000)), '0', 'é'), 1, 10000)"
    assert await rows(client, whole) == [["é" * 10_000]]


async def test_a_result_stays_within_its_budget_and_pages_can_be_put_together(file: Path) -> None:
    sql = f"{COUNT.format(500)} SELECT n, hex(zeroblob(n % 50)) FROM c"
    async with Client(build_server([file], options=Options(max_output=2_000))) as client:
        numbers: list[int] = []
        more = True
        while more:
            text = await ok(client, "query_database", query=sql, limit=1000, offset=len(numbers))
            assert len(text) <= 2_000
            result = parsed(text)
            more = result["truncated"]
            numbers += [row[0] for row in result["rows"]]
            assert text.endswith(f"continue with offset={len(numbers)}]") is more
        assert numbers == list(range(1, 501))


@pytest.mark.parametrize("expression", ["hex(zeroblob(9000))", "replace(hex(zeroblob(9000)), '0', char(1))"])
async def test_a_row_larger_than_the_budget_is_shown_with_shorter_cells(file: Path, expression: str) -> None:
    async with Client(build_server([file], options=Options(max_output=4_000))) as client:
        text = await ok(
            client, "query_database", query=f"SELECT {expression} a, {expression} b, 7 UNION ALL SELECT 1, 2, 3"
        )
        assert len(text) <= 4_000
        result = parsed(text)
        assert "of 18000 characters" in result["rows"][0][0]
        assert result["rows"][0][2] == 7
        assert await refused(
            client, "query_database", query="SELECT " + ",".join(f"'{'x' * 40}'" for _ in range(2_000))
        )


async def test_without_a_limit_on_output_nothing_is_cut(file: Path) -> None:
    async with Client(build_server([file], options=Options(max_output=0))) as client:
        sql = f"{COUNT.format(100_000)} SELECT n, 'name' || n FROM c"
        result = parsed(await ok(client, "query_database", query=sql, limit=100_000))
        assert (result["row_count"], result["truncated"]) == (100_000, False)
        assert await rows(client, "SELECT hex(zeroblob(20000))") == [["0" * 40_000]]


PARAMETERS: list[tuple[str, Any, Any]] = [
    ("SELECT ?, ?", [1, "a"], [[1, "a"]]),
    ("SELECT ?2, ?1", [1, 2], [[2, 1]]),
    ("SELECT :a, @b, $c", {"a": 1, "b": None, "c": 1.5}, [[1, None, 1.5]]),
    ("SELECT :a, :a", {":a": "x"}, [["x", "x"]]),
    ("SELECT ?", [True], [[1]]),
    ("SELECT name FROM customers WHERE name = ?", ["x' OR 1 --"], []),
    ("SELECT typeof(?)", ["[1]"], [["text"]]),
    ("SELECT 1", [], [[1]]),
    ("SELECT 1", {}, [[1]]),
    ("SELECT 1", None, [[1]]),
]
BAD_PARAMETERS: list[tuple[str, Any, str]] = [
    ("SELECT ?, ?", [1], "placeholders in the statement: 2, values in params: 1; pass one for each"),
    ("SELECT ?", [1, 2], "placeholders in the statement: 1, values in params: 2; pass one for each"),
    ("SELECT ?", None, "placeholders in the statement: 1, values in params: 0; pass one for each"),
    ("SELECT :a, :b", {"a": 1}, "params has no value for :b; pass one for each placeholder"),
    ("SELECT :a", {"a": 1, "b": 2}, "the statement has no placeholder for b;"),
    ("SELECT ?", {"a": 1}, "params does not fit the placeholders; pass a list for ?, an object for :name"),
    ("SELECT ?", [[1]], "parameter 1 is a list or an object;"),
    ("SELECT :a", {"a": {}}, "parameter a is a list or an object;"),
    ("SELECT ?", [2**63], "parameter 1 is 9223372036854775808, beyond SQLite's 64-bit integers; pass it as text"),
    ("SELECT ?", ["\ud800"], "the statement or a parameter holds half of a surrogate pair"),
    ("SELECT ?", "x", "params"),
    ("SELECT 1\0", None, "the statement contains a NUL character"),
    ("", None, "the statement returns no rows"),
    ("-- nothing", None, "the statement returns no rows"),
]


@pytest.mark.parametrize(("sql", "params", "expected"), PARAMETERS)
async def test_parameters_by_position_and_by_name(shared: Client, sql: str, params: Any, expected: Any) -> None:
    assert await rows(shared, sql, params=params) == expected


@pytest.mark.parametrize(("sql", "params", "message"), BAD_PARAMETERS)
async def test_a_wrong_parameter_is_a_clear_error(shared: Client, sql: str, params: Any, message: str) -> None:
    assert (await refused(shared, "query_database", query=sql, params=params)).startswith(message)
    assert await rows(shared, "SELECT 1") == [[1]]


ERRORS = [
    ("SELECT nmae FROM customers", "no such column: nmae; did you mean name?"),
    ("SELECT c.emial FROM customers c", "no such column: c.emial; did you mean email?"),
    ("SELECT zzz FROM customers", "no such column: zzz; describe_table shows the columns"),
    ("SELECT * FROM customer", "no such table: customer; did you mean customers?"),
    ("SELECT * FROM other.customers", "no such table: other.customers; the schemas are main"),
    ("SELECT lenght('a')", "no such function: lenght; did you mean length?"),
    ("SELECT * FORM customers", 'near "FORM": syntax error; correct the statement'),
    ("SELECT id FROM customers, orders", "ambiguous column name: id; correct the statement"),
]


@pytest.mark.parametrize(("sql", "message"), ERRORS)
async def test_an_error_names_what_was_probably_meant(shared: Client, sql: str, message: str) -> None:
    assert (await refused(shared, "query_database", query=sql)).startswith(message)
    assert (await refused(shared, "explain_query", query=sql)).startswith(message)


async def test_an_unknown_table_is_answered_with_the_tables_there_are(client: Client) -> None:
    error = await refused(client, "query_database", query="SELECT * FROM xyzzy")
    assert error.startswith("no such table: xyzzy; the tables are ")
    assert "customers" in error
    assert "docs_data" not in error


async def test_an_error_says_how_many_tables_it_does_not_name(tmp_path: Path) -> None:
    path = make(tmp_path / "t.db", "".join(f"CREATE TABLE t{i:02} (a);" for i in range(25)))
    async with Client(build_server([path])) as client:
        error = await refused(client, "query_database", query="SELECT * FROM xyzzy")
        assert error.endswith("t18, t19 and 5 more (list_tables shows them)")


async def test_wrong_arguments_are_errors(client: Client) -> None:
    for arguments in ({"limit": "5"}, {"limit": 0}, {"limit": 10**9}, {"offset": -1}, {"offset": True}, {"Limit": 5}):
        assert await refused(client, "query_database", query="SELECT 1", **arguments)


# ------------------------------------------------------------------------------------------------------- schema


async def test_list_tables_shows_tables_and_views_and_no_internals(client: Client) -> None:
    result = json.loads(await ok(client, "list_tables"))
    assert result["schemas"] == ["main"]
    assert result["table_count"] == len(result["tables"]) == 7
    kinds = {table["name"]: table["type"] for table in result["tables"]}
    assert kinds == {
        **dict.fromkeys(["customers", "orders", "odd"], "table"),
        **dict.fromkeys(["docs", "old_docs", "places"], "virtual"),
        "big_orders": "view",
    }
    assert {"name": "customers", "type": "table", "columns": 4, "row_estimate": 3} in result["tables"]
    for pattern, names in (("ord*", ["orders"]), ("%DOCS", ["docs", "old_docs"]), ("?dd", ["odd"]), ("x", [])):
        found = json.loads(await ok(client, "list_tables", pattern=pattern))
        assert [table["name"] for table in found["tables"]] == names
    error = await refused(client, "list_tables", schema="public")
    assert error == "no such schema: public; the schemas are main"


async def test_a_large_database_gets_its_row_estimates_from_analyze(tmp_path: Path) -> None:
    many = f"{COUNT.format(5_000)} INSERT INTO t SELECT n, hex(zeroblob(500)) FROM c"
    path = make(tmp_path / "t.db", f"CREATE TABLE t (a, b); CREATE INDEX i ON t (a); {many};")
    async with Client(build_server([path])) as client:
        assert "row_estimate" not in await ok(client, "list_tables")
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("ANALYZE")
        assert '"row_estimate": 5000' in await ok(client, "list_tables")


async def test_many_tables_are_listed_in_pages(tmp_path: Path) -> None:
    path = make(tmp_path / "t.db", "".join(f"CREATE TABLE table_{i:04} (a);" for i in range(300)))
    async with Client(build_server([path], options=Options(max_output=3_000))) as client:
        names: list[str] = []
        while True:
            text = await ok(client, "list_tables", offset=len(names))
            assert len(text) <= 3_000
            names += [table["name"] for table in parsed(text)["tables"]]
            if not text.endswith(f"of 300 shown; continue with offset={len(names)}]"):
                break
        assert names == [f"table_{i:04}" for i in range(300)]


async def test_describe_table_shows_columns_keys_and_samples(client: Client) -> None:
    result = (await client.call_tool("describe_table", {"table": "ORDERS"})).structured_content
    assert result is not None
    assert result["table"] == "orders"
    assert [(column["name"], column["type"], column["nullable"]) for column in result["columns"]] == [
        ("id", "INTEGER", False),
        ("customer_id", "INTEGER", False),
        ("total", "REAL", True),
    ]
    assert result["primary_key"] == ["id"]
    index = {"name": "orders_by_customer", "columns": ["customer_id", "total"], "unique": False, "partial": False}
    assert result["indexes"] == [index]
    key = {"columns": ["customer_id"], "table": "customers", "references": ["id"]}
    assert result["foreign_keys"] == [{**key, "on_update": "NO ACTION", "on_delete": "CASCADE"}]
    assert result["sample_rows"] == [[1, 1, 9.5], [2, 1, 20.0], [3, 2, 30.25]]
    error = await refused(client, "describe_table", table="custmers")
    assert error == "no such table: custmers; did you mean customers?"


HARD_TABLES = {
    "a blob too large to read": (
        "CREATE TABLE t (id INTEGER, body); INSERT INTO t VALUES (1, zeroblob(150000000))",
        ["id", "body"],
    ),
    "a view that never ends": (f"CREATE VIEW t AS {ENDLESS} SELECT count(*) AS n FROM c", ["n"]),
    "generated columns": ("CREATE TABLE t (a, b AS (a + 1), c AS (a + 2) STORED)", ["a", "b", "c"]),
    "an index on an expression": ("CREATE TABLE t (a); CREATE INDEX i ON t (a + 1) WHERE a > 0", ["a"]),
    "a key of two columns": (
        "CREATE TABLE p (x, y, PRIMARY KEY (x, y)); CREATE TABLE t (a, b, FOREIGN KEY (a, b) REFERENCES p)",
        ["a", "b"],
    ),
    "without rowid": ("CREATE TABLE t (a TEXT PRIMARY KEY) WITHOUT ROWID", ["a"]),
    "values of all kinds": ("CREATE TABLE t (a); INSERT INTO t VALUES (9e999), (9007199254740993), (x'ff')", ["a"]),
}


@pytest.mark.parametrize(("script", "columns"), HARD_TABLES.values(), ids=HARD_TABLES)
async def test_describe_table_does_not_fail_on_a_hard_table(tmp_path: Path, script: str, columns: list[str]) -> None:
    async with Client(build_server([make(tmp_path / "t.db", script)], timeout=1)) as client:
        result = json.loads(await ok(client, "describe_table", table="t"))
        assert [column["name"] for column in result["columns"]] == columns
        if "zeroblob" in script:
            assert "no sample rows" in result["note"]
            assert await rows(client, "SELECT id, length(body) FROM t") == [[1, 150_000_000]]
            assert (await refused(client, "query_database", query="SELECT * FROM t")).startswith(MEMORY)


async def test_the_description_of_a_very_wide_table_fits(tmp_path: Path) -> None:
    wide = f"CREATE TABLE t ({', '.join(f'column_number_{i} INTEGER' for i in range(1_900))})"
    async with Client(build_server([make(tmp_path / "t.db", wide)])) as client:
        text = await ok(client, "describe_table", table="t")
        assert len(text) <= 40_000
        assert "of 1900 shown" in json.loads(text)["note"]


async def test_a_description_that_is_cut_says_what_of(tmp_path: Path) -> None:
    script = "CREATE TABLE t (a, b);" + "".join(f"CREATE INDEX index_{i} ON t (a, b);" for i in range(100))
    async with Client(build_server([make(tmp_path / "t.db", script)], options=Options(max_output=2_000))) as client:
        text = await ok(client, "describe_table", table="t")
        result = json.loads(text)
        assert len(text) <= 2_000
        assert len(result["columns"]) == 2
        shown = len(result["indexes"])
        assert 1 < shown < 100
        assert f"no sample rows, indexes 1-{shown} of 100 shown;" in result["note"]


async def test_a_text_that_is_cut_says_where_the_rest_is(file: Path) -> None:
    many = " UNION ALL ".join(["SELECT id FROM customers"] * 50)
    async with Client(build_server([file], options=Options(max_output=300))) as client:
        plan = await ok(client, "explain_query", query=many)
        assert re.search(r"\n\[characters 1-\d+ of \d+ shown, for the rest explain a part of the statement\]$", plan)
        with closing(sqlite3.connect(file)) as connection:
            connection.execute(f"CREATE VIEW v AS {many}")
        assert (await resource(client, "schema://main/v")).endswith(
            "query substr(sql, start, length) of sqlite_master]"
        )


async def resource(client: Client, uri: str) -> str:
    (content,) = (await client.read_resource(uri)).contents
    assert isinstance(content, TextResourceContents)
    return content.text


async def test_resources_count_as_calls_do_and_are_written_down(file: Path, tmp_path: Path) -> None:
    options = Options(rate_limit=(3, 1000), audit_log=tmp_path / "audit.jsonl")
    async with Client(build_server([file], options=options)) as client:
        await client.list_resources()
        await resource(client, "schema://main/orders")
        with pytest.raises(MCPError, match="no such table"):
            await resource(client, "schema://main/nothing")
        for ask in (client.list_resources, lambda: resource(client, "schema://main/orders")):
            with pytest.raises(MCPError, match="rate limit reached"):
                await ask()
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(line["tool"], line["arguments"].get("uri"), line["outcome"]) for line in lines] == [
        ("resources/list", None, "ok"),
        ("resources/read", "schema://main/orders", "ok"),
        ("resources/read", "schema://main/nothing", "error"),
        ("resources/list", None, "error"),
        ("resources/read", "schema://main/orders", "error"),
    ]


async def test_create_statements_are_resources(client: Client, file: Path) -> None:
    name = "odd/na%me ?#.."
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(f'CREATE TABLE "{name}" (a)')
    uris = [str(resource.uri) for resource in (await client.list_resources()).resources]
    assert "schema://main/customers" in uris
    assert f"schema://main/{quote(name, safe='')}" in uris
    templates = (await client.list_resource_templates()).resource_templates
    assert [template.uri_template for template in templates] == ["schema://{schema}/{table}"]
    for uri in uris:
        assert (await resource(client, uri)).startswith("CREATE ")
    assert "CREATE INDEX orders_by_customer" in await resource(client, "schema://main/orders")
    for uri, message in (
        ("schema://main/custmers", "did you mean customers"),
        ("schema://x/orders", "the schemas are"),
    ):
        with pytest.raises(MCPError, match=message):
            await client.read_resource(uri)


async def test_the_tool_list_is_small_and_says_that_nothing_is_written(client: Client) -> None:
    tools = (await client.list_tools()).tools
    assert [tool.name for tool in tools] == ["query_database", "list_tables", "describe_table", "explain_query"]
    assert all(tool.annotations and tool.annotations.read_only_hint for tool in tools)
    dumped = [tool.model_dump(mode="json", by_alias=True, exclude_none=True) for tool in tools]
    assert len(json.dumps(dumped, separators=(",", ":"))) < 4_500
    assert "is stopped after 5 s" in (tools[0].description or "")
    for tool in tools:
        assert all(schema.get("description") for schema in tool.input_schema["properties"].values())


# -------------------------------------------------------------------------------------------------------- files


async def test_several_files_are_schemas_named_after_the_files(tmp_path: Path) -> None:
    for directory in ("one", "two"):
        (tmp_path / directory).mkdir()
    names = ["one/shop.db", "one/hr.sqlite", "two/shop.db", "two/my-data 2.db"]
    files = [make(tmp_path / name, f"CREATE TABLE t (a); INSERT INTO t VALUES ('{name}')") for name in names]
    async with Client(build_server(files)) as client:
        expected = dict(zip(["shop", "hr", "shop_2", "my_data_2"], names, strict=True))
        assert json.loads(await ok(client, "list_tables", schema="hr"))["schemas"] == ["main", *expected]
        for schema, name in {"main": names[0], **expected}.items():
            assert await rows(client, f"SELECT a FROM {schema}.t") == [[name]]
            assert (await ok(client, "describe_table", table="t", schema=schema)).count(name) == 1
        assert await refused(client, "query_database", query="ATTACH ':memory:' AS x")
        assert await refused(client, "query_database", query="DETACH hr")


async def test_an_attached_file_can_be_read_in_all_ways_and_written_in_none(tmp_path: Path) -> None:
    files = [make(tmp_path / "one.db", "CREATE TABLE t (a)"), make(tmp_path / "two.db")]
    async with Client(build_server(files)) as client:
        before = snapshot(tmp_path)
        assert await rows(client, "SELECT body FROM two.docs WHERE docs MATCH 'fox'") == [["the quick brown fox"]]
        assert await rows(client, "SELECT id FROM two.places WHERE x1 > 4") == [[2]]
        assert await rows(client, "SELECT body FROM two.old_docs WHERE body MATCH 'lazy'") == [["a lazy dog"]]
        assert await rows(client, "SELECT name FROM pragma_table_info('orders', 'two') LIMIT 1") == [["id"]]
        assert await rows(client, "SELECT count(*) FROM t JOIN two.customers JOIN json_each('[1]')") == [[0]]
        for sql in (
            "INSERT INTO two.customers (name) VALUES ('x')",
            "CREATE TABLE two.x (a)",
            "DROP TABLE two.docs",
            "PRAGMA two.user_version = 1",
            "UPDATE two.sqlite_master SET sql = ''",
            "DELETE FROM two.places_node",
            "VACUUM two",
        ):
            assert await refused(client, "query_database", query=sql), sql
        assert snapshot(tmp_path) == before


async def test_a_table_of_another_file_is_found_by_the_name_that_an_error_suggests(tmp_path: Path) -> None:
    files = [
        make(tmp_path / "shop.db"),
        make(tmp_path / "hr.db", 'CREATE TABLE staff (a); CREATE VIEW "x.y" AS SELECT 1'),
    ]
    async with Client(build_server(files)) as client:
        for arguments in ({"table": "staff"}, {"table": "shop.staf"}, {"table": "staff", "schema": "shop"}):
            error = await refused(client, "describe_table", **arguments)
            assert error == f"no such table: {arguments['table']}; did you mean hr.staff?"
        assert "hr.staff?" in await refused(client, "query_database", query="SELECT * FROM stafff")
        assert "mean customers?" in await refused(client, "query_database", query="SELECT * FROM customer")
        for arguments in ({"table": "HR.Staff"}, {"table": "staff", "schema": "hr"}):
            found = json.loads(await ok(client, "describe_table", **arguments))
            assert (found["schema"], found["table"]) == ("hr", "staff")
        assert json.loads(await ok(client, "describe_table", table="x.y", schema="hr"))["table"] == "x.y"
        assert "CREATE TABLE staff" in await resource(client, "schema://main/hr.staff")


async def test_a_schema_is_named_after_the_file_as_it_was_given(tmp_path: Path) -> None:
    make(tmp_path / "release-7.db", "CREATE TABLE t (a)")
    (tmp_path / "current.db").symlink_to("release-7.db")
    async with Client(build_server([tmp_path / "current.db", make(tmp_path / "other.db")])) as client:
        assert await rows(client, "SELECT count(*) FROM current.t") == [[0]]


@pytest.mark.parametrize(
    "name", ["a?b.db", "a#b.db", "a%20b.db", "a b.db", "ünï.db", "a'b\"c.db", "file:x.db", "-x.db"]
)
async def test_a_file_name_is_never_read_as_a_uri(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / "plain.db", "CREATE TABLE t (a); INSERT INTO t VALUES (7)").rename(tmp_path / name)
    async with Client(build_server([path, path])) as client:
        assert await rows(client, "SELECT a FROM t") == [[7]]
    assert os.listdir(tmp_path) == [name]


async def test_a_file_that_cannot_be_served_is_an_error_at_start(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database, but it is long enough to look at it" * 99)
    (tmp_path / "cut.db").write_bytes(b"SQLite format 3\0" + b"\xff" * 200)
    os.mkfifo(tmp_path / "fifo.db")
    before = set(os.listdir(tmp_path))
    for name, message in {
        "missing.db": "No such file",
        "": "is a directory",
        "text.db": "not an SQLite database",
        "cut.db": "not an SQLite database",
        "fifo.db": "is a device",
    }.items():
        with pytest.raises(ConfigError, match=message):
            build_server([tmp_path / name])
    with pytest.raises(ConfigError, match="at most 10"):
        build_server([make(tmp_path / "t.db")] * 11)
    assert set(os.listdir(tmp_path)) == before | {"t.db"}


async def test_an_empty_file_is_an_empty_database(tmp_path: Path) -> None:
    (tmp_path / "empty.db").touch()
    async with Client(build_server([tmp_path / "empty.db"])) as client:
        assert '"tables": []' in await ok(client, "list_tables")
        assert await rows(client, "SELECT 1") == [[1]]
        error = await refused(client, "query_database", query="SELECT * FROM t")
        assert error == "no such table: t; the database has no tables"
        assert (tmp_path / "empty.db").stat().st_size == 0


async def test_a_virtual_table_whose_name_is_not_utf_8_hides_no_other(tmp_path: Path) -> None:
    path = make(tmp_path / "t.db", "CREATE VIRTUAL TABLE xxxx USING rtree(a, b, c); CREATE TABLE t (a)")
    path.write_bytes(path.read_bytes().replace(b"xxxx", b"x\xff\xfex"))
    async with Client(build_server([path])) as client:
        assert await rows(client, "SELECT count(*) FROM t") == [[0]]
        assert r"x\\xff\\xfex" in await ok(client, "list_tables")


async def test_a_damaged_file_is_an_error_at_the_call(tmp_path: Path) -> None:
    path = make(tmp_path / "t.db", "CREATE TABLE good (a); CREATE TABLE bad (a); INSERT INTO bad VALUES (1)")
    with path.open("r+b") as stream:
        stream.seek(2 * 4096)
        stream.write(b"\xff" * 4096)
    async with Client(build_server([path])) as client:
        assert "is damaged" in await refused(client, "query_database", query="SELECT * FROM bad")
        assert await rows(client, "SELECT * FROM good") == []
        assert len(json.loads(await ok(client, "list_tables"))["tables"]) == 2


async def test_a_locked_file_is_an_error_and_can_be_read_again_later(file: Path) -> None:
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        server = build_server([file])  # it starts all the same
        async with Client(server) as client:
            assert "locked" in await refused(client, "query_database", query="SELECT * FROM customers")
            other.execute("COMMIT")
            assert await rows(client, "SELECT count(*) FROM customers") == [[3]]


async def test_a_file_that_goes_away_is_an_error_and_a_new_one_is_read(file: Path) -> None:
    async with Client(build_server([file])) as client:
        await rows(client, "SELECT 1")
        os.replace(file, file.with_name("hidden"))
        assert "cannot be opened" in await refused(client, "query_database", query="SELECT * FROM customers")
        os.replace(file.with_name("hidden"), file)
        assert await rows(client, "SELECT count(*) FROM customers") == [[3]]
        os.replace(make(file.with_name("new"), "CREATE TABLE t (a); INSERT INTO t VALUES (7)"), file)
        assert await rows(client, "SELECT a FROM t") == [[7]]


async def test_a_database_in_wal_mode_is_read_live_and_never_blocks_its_writer(tmp_path: Path) -> None:
    path = make(tmp_path / "wal.db", "PRAGMA journal_mode = WAL; CREATE TABLE t (a)")
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as writer:
        async with Client(build_server([path], timeout=2)) as client, anyio.create_task_group() as group:
            for number in range(1, 4):
                writer.execute("INSERT INTO t VALUES (?)", (number,))
                assert await rows(client, "SELECT count(*) FROM t") == [[number]]
            group.start_soon(client.call_tool, "query_database", {"query": f"{ENDLESS} SELECT count(*) FROM t, c"})
            await anyio.sleep(0.2)
            writer.execute("INSERT INTO t VALUES (9)")
            assert await rows(client, "SELECT max(a) FROM t") == [[9]]
            assert writer.execute("PRAGMA wal_checkpoint").fetchone()[0] == 0
            group.cancel_scope.cancel()


async def test_a_change_of_the_schema_by_another_program_is_noticed(client: Client, file: Path) -> None:
    for number in range(3):
        assert await rows(client, "SELECT count(*) FROM places") == [[2]]
        assert await rows(client, "SELECT count(*) FROM docs, json_each('[1]')") == [[2]]
        with closing(sqlite3.connect(file)) as connection:
            connection.execute(f"CREATE TABLE added_{number} (a)")
        assert await rows(client, f"SELECT count(*) FROM added_{number}") == [[0]]


async def test_without_wal_a_writer_waits_for_one_query_at_most(file: Path) -> None:
    async with Client(build_server([file], timeout=0.4)) as hasty, anyio.create_task_group() as group:
        group.start_soon(hasty.call_tool, "query_database", {"query": f"{ENDLESS} SELECT count(*) FROM customers, c"})
        await anyio.sleep(0.1)

        def write() -> None:
            with closing(sqlite3.connect(file, timeout=10)) as writer:
                writer.execute("INSERT INTO customers (name) VALUES ('x')")
                writer.commit()

        with anyio.fail_after(5):
            await anyio.to_thread.run_sync(write)
        assert await rows(hasty, "SELECT count(*) FROM customers") == [[4]]


# ------------------------------------------------------------------------------------------------ real processes


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 5
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker has outlived its server"
        time.sleep(0.01)


@pytest.mark.parametrize("runaway", ["endless CTE", "printf"])
@pytest.mark.parametrize("ending", ["hang up", "kill"])
def test_no_worker_outlives_its_server(stdio: Callable[..., Stdio], file: Path, runaway: str, ending: str) -> None:
    server = stdio("db_server.py", str(file))
    assert "Ada" in server.text("query_database", query="SELECT name FROM customers")
    workers = children(server.process.pid)
    assert workers
    server.start("query_database", query=RUNAWAYS[runaway][0])
    time.sleep(0.2)
    if ending == "kill":
        server.process.kill()
    server.close()
    wait_until_gone(workers)


@pytest.mark.skipif(sys.platform != "linux", reason="names are text elsewhere")
def test_a_file_whose_name_is_not_utf_8_is_served(stdio: Callable[..., Stdio], file: Path) -> None:
    name = os.fsdecode(os.fsencode(file.parent) + b"/caf\xe9.db")
    file.rename(name)
    server = stdio("db_server.py", name)
    assert "Ada" in server.text("query_database", query="SELECT name FROM customers")
    assert r"caf\\xe9.db" in server.text("query_database", query="PRAGMA database_list")


@pytest.mark.parametrize("runaway", ["endless CTE", "printf"])
def test_a_cancel_message_ends_the_worker_at_once(stdio: Callable[..., Stdio], file: Path, runaway: str) -> None:
    server = stdio("db_server.py", str(file), "--timeout", "25")
    server.text("query_database", query="SELECT 1")
    workers = children(server.process.pid)
    number = server.start("query_database", query=RUNAWAYS[runaway][0])
    time.sleep(0.2)
    server.send("notifications/cancelled", {"requestId": number}, notification=True)
    wait_until_gone(workers)
    assert server.text("query_database", query="SELECT 1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.db"], "missing.db cannot be opened"),
        (["{file}", "--timeout", "0"], "is not a number of seconds"),
        (["{file}", "--timeout", "nan"], "is not a number of seconds"),
        (["{file}", "--writable"], "unrecognized arguments"),
        ([], "DATABASE_URL"),
    ],
)
def test_a_wrong_start_is_one_line_and_exit_code_2(file: Path, arguments: list[str], message: str) -> None:
    command = [sys.executable, str(PROJECT / "db_server.py"), *(argument.format(file=file) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=file.parent, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(file.parent) == ["shop.db"]


def test_the_sample_database_answers_from_the_command_line() -> None:
    command = [sys.executable, "db_server.py", "examples/shop.db", "--call", "query_database"]
    done = subprocess.run([*command, "query=SELECT count(*) FROM orders"], capture_output=True, text=True, cwd=PROJECT)
    assert (done.returncode, done.stderr) == (0, "")
    assert parsed(done.stdout.rstrip())["rows"] == [[600]]


def test_the_sample_database_is_what_its_script_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "examples/make_sample_db.py", str(tmp_path / "shop.db")], check=True, cwd=PROJECT)
    with (
        closing(sqlite3.connect(tmp_path / "shop.db")) as made,
        closing(sqlite3.connect(PROJECT / "examples/shop.db")) as kept,
    ):
        assert list(made.iterdump()) == list(kept.iterdump())


def test_without_the_file_for_postgresql_it_says_which_to_copy(tmp_path: Path) -> None:
    for name in ("db_server.py", "common.py"):
        (tmp_path / name).write_bytes((PROJECT / name).read_bytes())
    command = [sys.executable, str(tmp_path / "db_server.py"), "postgresql://reader@localhost/shop"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("db-server: PostgreSQL is served by db_postgres.py; copy it")
