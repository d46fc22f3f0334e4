"""The database server, through an in-memory client and real SQLite files."""

import asyncio
import hashlib
import json
import sqlite3
from collections.abc import AsyncGenerator, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from conftest import ok, refused
from mcp import Client, MCPError

import db_server
from common import ConfigError, Options
from db_server import build_server

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


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return make(tmp_path / "shop.db")


@pytest.fixture
async def client(file: Path) -> AsyncGenerator[Client]:
    async with Client(build_server([file])) as client:
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
    for sql in ("INSERT INTO customers (name) VALUES ('x')", "BEGIN IMMEDIATE", "SELEC", "SELECT abs(-9223372036854775808)"):
        await refused(client, "query_database", query=sql)
        with closing(sqlite3.connect(file, timeout=0)) as other:
            other.execute("INSERT INTO orders (customer_id, total) VALUES (1, 1)")
            other.commit()
    assert await rows(client, "SELECT count(*) FROM orders") == [[7]]


LEGITIMATE = [
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
    ("SELECT \"update\" FROM customers LIMIT 1", [["never"]]),
    ("SELECT 1 AS \"delete\", 2 AS [insert], 3 AS `drop`", [[1, 2, 3]]),
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
    ("SELECT name FROM sqlite_master WHERE type = 'view'", [["big_orders"]]),
    ("SELECT count(*) > 0 FROM dbstat", [[1]]),
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
async def test_legitimate_reading_works(client: Client, sql: str, expected: list[list[Any]]) -> None:
    assert await rows(client, sql) == expected


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
def connection_with(path: Path, *layers: str) -> Iterator[sqlite3.Connection]:
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


@pytest.mark.parametrize("missing", LAYERS)
def test_without_one_layer_the_others_still_protect_the_file(tmp_path: Path, missing: str) -> None:
    path = make(tmp_path / "shop.db")
    before = snapshot(tmp_path)
    for statement in HOSTILE:
        if "heap_limit" in statement:  # is for the process, and here that is the one that runs the tests
            continue
        with connection_with(path, *(layer for layer in LAYERS if layer != missing)) as connection:
            with suppress(sqlite3.Error, sqlite3.Warning):
                connection.execute(statement.replace("{dir}", str(tmp_path))).fetchall()
        assert snapshot(tmp_path) == before, statement
