# /// script
# requires-python = ">=3.11"
# dependencies = ["mcp>=2.3,<3", "aiosqlite>=0.22,<0.23", "asyncpg>=0.32,<1"]
# ///
"""An MCP server that lets a language model query a PostgreSQL database, and change nothing in it.

    DATABASE_URL=postgresql://user:password@host/database python pg_server.py

The tools are those of db_server.py; this file has the database. Trust boundary: SQL from the model is compiled as a
part of a SELECT, so PostgreSQL's own parser refuses all that is none, and runs in a read-only transaction that is
always rolled back, as a role that is no superuser.
Not defended against: what that role may do outside of a transaction (SECURITY.md has the SQL for one that may not),
and the memory that PostgreSQL itself takes for a statement.
"""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportAttributeAccessIssue=false
# (asyncpg has no types)
# ruff: noqa: S608 -- SQL is put together here from constants, quoted names and, on purpose, the model's statement

import sys

try:
    import serving  # first of all: it checks Python and mcp, and imports the SDK with the garbage collector off
    import asyncpg  # isort: skip
except ModuleNotFoundError as missing:
    sys.stderr.write(f"pg_server.py needs {missing.name}: pip install asyncpg, or copy the file that is missing\n")
    sys.exit(2)

import asyncio
import json
import os
import re
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial, wraps
from itertools import count
from typing import Any
from urllib.parse import parse_qsl, urlencode

import anyio

import db_server as db
from common import ConfigError
from db_server import Answer, Description, Params, QueryError

# -------------------------------------------------------------------------------------------------------- limits

MAX_POOL = 10  # connections of one server at most; SECURITY.md counts with it
IDLE_TIME = 20.0  # seconds until a connection that nobody uses is given back: others may wait for it
CONNECT_TIME = 10.0  # seconds to keep trying while the database starts or restarts
CONNECT_TRY = 5  # seconds for one try
MAX_PAUSE = 1.6  # seconds between the tries; each pause is twice as long as the one before
READY_TIME = 2.0  # seconds for BEGIN: a pooler in between makes us wait until it has a connection to the database
SHRUNK_TIME = 5.0  # seconds for which no more calls run at once than the database has just had connections for
MAX_CELL = 2**20  # characters without --max-output: rows of wider ones could be fetched one at a time only
CHUNK, MAX_CHUNK = 4 * 2**20, 1_000  # characters (without --max-output db.MAX_RESULT), and rows, fetched at a time

# ------------------------------------------------------------------------------------------------ read-only layers
#
# A read-only transaction alone lets COPY, DO, SET and functions through that work outside of it, and a filter of
# words is got round. So: (1) the statement is compiled inside `SELECT ... FROM ( statement )`, where the grammar
# takes SELECT, WITH, VALUES and TABLE, and no data-modifying WITH; (2) READ ONLY refuses what a function called there
# would write; (3) ROLLBACK undoes settings and notifications; (4) what is not undone is reset; (5) the role is refused
# if it is, or may become, one that reaches files, programs or other sessions.

BEGIN = """BEGIN READ ONLY; SET LOCAL statement_timeout = {limit}; SET LOCAL lock_timeout = {lock};
SET LOCAL idle_in_transaction_session_timeout = {idle}"""
PART = "SELECT * FROM (\n{}\n) AS part"  # the line breaks keep a comment at the end from taking the bracket along
# Advisory locks and the seed of random() outlive a rollback: without this, a query could hold up, or steer, the next.
END = """ROLLBACK; SELECT pg_advisory_unlock_all(); SELECT setseed(extract(epoch FROM clock_timestamp())::numeric % 1);
RESET ALL"""
MIGHT = """SELECT string_agg(rolname, ', ' ORDER BY rolname) FROM pg_roles
WHERE pg_has_role(session_user, oid, 'MEMBER') AND (rolsuper OR rolreplication OR rolname IN (
'pg_read_server_files', 'pg_write_server_files', 'pg_execute_server_program', 'pg_signal_backend'))"""
# Everybody may call these, and they act outside of the transaction: on other sessions of the same role, or on other
# servers. A name can be hidden (query_to_xml runs text), so the boundary is the role, from which they can be revoked;
# this says so before the harm is done.
OUTSIDE = r'\b(pg_terminate_backend|pg_cancel_backend|pg_logical_emit_message|dblink\w*)(?:"|\b)\s*(?:\(|--|/\*)'
# A chain of NOT MATERIALIZED doubles the statement with every link, before anything can interrupt it: 22 links took
# all memory of the machine, and the database went down. It is a hint; without it the result is the same. After AS and
# blanks the word stands without NOT; a line break could end a comment that holds the AS.
DOUBLING = r"(?<!\bAS )\bMATERIALIZED\b(?=\s*(?:\(|--|/\*))"


def refuse_before_parsing(sql: str, values: Sequence[Any]) -> None:
    """Raise QueryError for what must not even reach PostgreSQL's parser."""
    if found := re.search(OUTSIDE, sql, re.IGNORECASE):
        raise QueryError(f"this server only reads: {found[1]} acts outside of the statement; leave it out")
    if re.search(DOUBLING, re.sub(r"[ \t\f\v]+", " ", sql), re.IGNORECASE):
        raise QueryError("NOT MATERIALIZED can make PostgreSQL take all memory; leave it out, the result is the same")
    if "\0" in sql or re.search("[\ud800-\udfff]", json.dumps([sql, values], ensure_ascii=False)):
        # asyncpg would fail half way through a message, and the connection with it
        raise QueryError("the statement holds a NUL, or it or a parameter half of a surrogate pair; send valid text")


# ---------------------------------------------------------------------------------------------------- the database


class UnusableError(QueryError, ConfigError):
    """The database cannot be used: at the start it is the configuration's fault, in a call the model is told."""


class LostError(Exception):
    """There is no connection, or it has ended: everything here only reads, so it can be tried again."""


class FullError(LostError):
    """The database is there, but has no connection for us just now."""


class EndedError(LostError):
    """A connection ended in the middle of a statement. The statement may be the cause."""


def in_transaction(work: Callable[..., Awaitable[Any]]) -> Any:
    """Makes `work` a method that is given a `session`: a connection in a read-only transaction of its own."""

    @wraps(work)
    async def method(self: "Postgres", *args: Any) -> Any:
        return await self.run(lambda session: work(self, session, *args))

    return method


class Postgres:
    """A PostgreSQL database, as the tools of db_server.py need it: see `build` there."""

    dialect = db.Dialect(
        name="PostgreSQL",
        schema="public",
        schemas="Schema; list_tables names them all",
        params="List for $1, $2 ..., object for :name placeholders; dates and the like as text",
        reads="SELECT, WITH, VALUES, TABLE",
        values="Numeric values, integers beyond 2^53, NaN and infinities come as strings, a JSON null like a NULL",
        plan="Seq Scan reads every row, Index Scan uses an index, Sort sorts",
    )

    def __init__(self, url: str, seconds: float = db.TIMEOUT, allow_superuser: bool = False) -> None:
        self.arguments, self.given = connect_arguments(url)  # holds the password: it goes to asyncpg, and nowhere else
        self.seconds, self.allow_superuser, self.users = seconds, allow_superuser, 0
        limit, lock = round(seconds * 1000), round(min(db.BUSY_TIME, seconds / 2) * 1000)
        self.begin = BEGIN.format(limit=limit, lock=lock, idle=2 * limit)

    @in_transaction
    async def query(self, session: Any, sql: str, params: Params, limit: int, offset: int, max_output: int) -> Answer:
        """What `query_database` answers."""
        sql, values, columns = await compiled(session, sql, params)
        width = min(db.MAX_CELL, max_output // 4) if max_output else MAX_CELL
        lines = await fetch(session, sql, values, columns, width, limit + 1, offset, max_output or db.MAX_RESULT)
        if offset and not lines:
            total = await session.fetchval(f"SELECT count(*)::text FROM ({PART.format(sql)}) AS s", *values)
            raise QueryError(f"offset={offset} is past the end: the query has {total} rows; use a smaller offset")
        return db.rows_answer([column.name for column in columns], lines, limit, offset, max_output, "column::text")

    @in_transaction
    async def explain(self, session: Any, sql: str, params: Params, max_output: int) -> Answer:
        """What `explain_query` answers: PostgreSQL's own text, which is indented."""
        sql, values, _ = await compiled(session, sql, params)
        # As a part of a SELECT: EXPLAIN of `ANALYZE DELETE ...` would run it.
        plan = await session.fetch(f"EXPLAIN {PART.format(sql)}", *values)
        return db.fit("\n".join(line[0] for line in plan), max_output, "explain a part of the statement")

    @in_transaction
    async def tables(self, session: Any, schema: str, pattern: str, offset: int, max_output: int) -> Answer:
        """What `list_tables` answers."""
        catalog = await ask(session, CATALOG)
        schema = find_schema(catalog, schema)
        found = [table for table in catalog[schema] if db.is_like(table["name"], pattern)]
        return db.tables_answer(schema, [name for name in catalog if name not in SYSTEM], found, offset, max_output)

    @in_transaction
    async def describe(self, session: Any, schema: str, table: str, max_output: int) -> Description:
        """What `describe_table` answers."""
        name = await find_table(session, schema, table)
        found = await ask(session, DESCRIBE, name) | {"sample_rows": [], "note": ""}
        for column in found["columns"]:
            column.setdefault("default", None)
        seconds = min(db.SAMPLE_TIME, self.seconds / 4)  # a slow view must not hide the columns
        await session.execute(f"SET LOCAL statement_timeout = {round(seconds * 1000)}")
        try:
            sql = f"SELECT {', '.join(db.quoted(column['name']) for column in found['columns'])} FROM {name}"
            columns = (await session.prepare(sql)).get_attributes()
            lines = await fetch(session, sql, (), columns, db.SAMPLE_CELL, db.SAMPLE_ROWS, 0, db.MAX_RESULT)
            found["sample_rows"] = [json.loads(line) for line in lines]
        except FAILED as exc:
            found["note"] = f"no sample rows: {await explained(session, exc, seconds)}"
        return db.shrink(found, max_output, "information_schema.columns")

    @in_transaction
    async def create_statement(self, session: Any, schema: str, table: str, max_output: int) -> Answer:
        """The CREATE statement of a table or view, as the catalogs tell it, with its indexes and triggers."""
        text = await session.fetchval(CREATE, await find_table(session, schema, table))
        return db.fit(text, max_output, "query pg_get_viewdef, pg_indexes or information_schema.columns")

    @in_transaction
    async def all_tables(self, session: Any) -> Sequence[tuple[str, str, str]]:
        """Schema, name and type of what the role may read."""
        return names_in(await ask(session, CATALOG))[: db.MAX_RESOURCES]

    # -- connections

    async def check(self) -> None:
        """Raise UnusableError if the database does not answer, or the role may do too much."""
        async with self.running():
            if self.places.available_tokens > 0:  # else it is busy, and thus there
                await self.run(lambda session: session.fetchval("SELECT 1"))

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """The life of a server, which several clients may use at once: from the first to the last of them."""
        self.users += 1
        try:
            if self.users == 1:
                self.places = anyio.CapacityLimiter(MAX_POOL)
                limits = {"min_size": 0, "max_size": MAX_POOL, "max_inactive_connection_lifetime": IDLE_TIME}
                reset = partial(asyncio.sleep, 0)  # nothing: `attempt` has done it
                self.pool = await asyncpg.create_pool(init=self.require_reader, reset=reset, **limits, **self.arguments)
            yield
        finally:
            self.users -= 1
            if not self.users:
                with anyio.CancelScope(shield=True), suppress(TimeoutError):  # what was cancelled gets time to end
                    await asyncio.wait_for(self.pool.close(), 2 * db.GRACE)

    async def require_reader(self, session: Any) -> None:
        """What the pool does with a new connection. Raises UnusableError, FullError."""
        try:
            might = await session.fetchval(MIGHT, timeout=READY_TIME)
        except TimeoutError:
            session.terminate()  # else the pool says good-bye first, which waits as well
            raise FullError from None
        if might and not self.allow_superuser:
            raise UnusableError(MIGHTY.format(might[:200]))

    async def run(self, work: Callable[[Any], Awaitable[Any]]) -> Any:
        """What `work` returns, in a read-only transaction. Calls wait for a connection in order. Raises QueryError."""
        loop, ended = asyncio.get_running_loop(), 0
        patience = loop.time() + CONNECT_TIME
        with suppress(TimeoutError):
            async with asyncio.timeout(db.CALL_TIME):
                for tries in count():
                    try:
                        async with self.places:
                            return await self.attempt(work)
                    except FullError:  # no more calls at once than there are connections: the others wait for these
                        self.places.total_tokens = max(1, self.pool.get_size())
                        loop.call_later(SHRUNK_TIME, partial(setattr, self.places, "total_tokens", MAX_POOL))
                    except LostError as exc:
                        ended += isinstance(exc, EndedError)
                        if loop.time() > patience or ended > 2:
                            raise UnusableError(str(exc)) from None
                    await asyncio.sleep(min(2**tries / 20, MAX_PAUSE))
        raise UnusableError("the call was queued until its time was up: PostgreSQL had no connection free; try again")

    async def attempt(self, work: Callable[[Any], Awaitable[Any]]) -> Any:
        """Run an operation once. Raises QueryError, LostError. asyncpg cancels in PostgreSQL what is cancelled
        here; a connection that then is not reset in time is closed."""
        try:
            session = await self.pool.acquire()
        except Exception as exc:
            raise refusal(exc, self.given) from None
        begun = False
        try:
            await session.execute(self.begin, timeout=READY_TIME)
            begun = True
            async with asyncio.timeout(self.seconds + db.GRACE):  # set_config can lift PostgreSQL's own limit
                try:
                    return await work(session)
                except FAILED as exc:
                    raise await explained(session, exc, self.seconds) from None
        except TimeoutError:
            raise QueryError(SLOW.format(seconds=self.seconds)) if begun else FullError() from None
        except (*FAILED, asyncpg.InterfaceError, OSError):  # of BEGIN, or after it: the connection has ended
            raise EndedError(ENDED) if begun else LostError(ENDED) from None
        finally:
            with anyio.CancelScope(shield=True), suppress(Exception):
                try:
                    await asyncio.wait_for(session.execute(END), db.GRACE)
                except Exception:  # what is not reset must not be there for the next call
                    session.terminate()
                await self.pool.release(session)


# ----------------------------------------------------------------------------------------------------- statements

# What is inside a string, a quoted name or a comment is no code; one that does not end takes the rest of the text.
TOKEN = re.compile(
    r"""(?<![\w$])[eE]'(?:[^'\\]|\\.|'')*(?:'|\Z)|'[^']*(?:'|\Z)|"[^"]*(?:"|\Z)|--[^\r\n]*|/\*.*?(?:\*/|\Z)"""
    r"|\$((?:[A-Za-z_]\w*)?)\$.*?(?:\$\1\$|\Z)"
    r"|(?P<end>;(?>\s|--[^\r\n]*|/\*.*?\*/)*+\Z)|(?<![\w$])\$(?P<number>[0-9]{1,5})|::|:(?P<name>[A-Za-z_]\w*)",
    re.DOTALL,
)


async def compiled(session: Any, sql: str, params: Params) -> tuple[str, list[str | None], Sequence[Any]]:
    """What PostgreSQL makes of the model's statement by itself, without running it: the statement with its parameters
    as texts, these, and the columns. Raises QueryError."""
    db.refuse_too_much(sql, params)
    sql, values = positional(sql, params)
    refuse_before_parsing(sql, values)
    statement = await session.prepare(sql)
    if not (columns := statement.get_attributes()):
        raise QueryError(ONLY_READS)
    return *typed(sql, values, statement.get_parameters()), columns


def positional(sql: str, params: Params) -> tuple[str, list[Any]]:
    """The statement without the semicolon that ends it, with $1, $2 ... in place of :name, and the values in that
    order. Raises QueryError."""
    named = {name.lstrip(":@$"): value for name, value in params.items()} if isinstance(params, dict) else {}
    order: dict[str, int] = {}

    def replace(found: re.Match[str]) -> str:
        if found["name"] in named:
            return f"${order.setdefault(found['name'], len(order) + 1)}"
        return "" if found["end"] else found[0]

    sql = TOKEN.sub(replace, sql).rstrip("; \t\r\n")
    db.refuse_unused(named.keys() - order.keys())
    return sql, [named[name] for name in order] if isinstance(params, dict) else list(params or ())


def typed(sql: str, values: Sequence[Any], kinds: Sequence[Any]) -> tuple[str, list[str | None]]:
    """The statement with every parameter cast from text to the type that PostgreSQL found for it, and the texts:
    asyncpg would want a Python object of just the right class, a date for a date. Raises QueryError."""
    if len(values) != len(kinds):
        counts = f"placeholders in the statement: {len(kinds)}, values in params: {len(values)}"
        raise QueryError(f"{counts}; pass one for each ($1, $2 ... with a list, :name with an object)")
    casts: list[str] = []
    texts: list[str | None] = []
    for number, (value, kind) in enumerate(zip(values, kinds, strict=True), 1):
        name, cast = f"{db.quoted(kind.schema)}.{db.quoted(kind.name.removesuffix('[]'))}", "CAST({}::text AS {})"
        if kind.kind == "array":  # from JSON, as it may be an array of arrays
            name, cast = f"{name}[]", "CAST((SELECT v FROM json_to_record({0}::json) AS r(v {1})) AS {1})"
            value = {"v": value}
        casts.append(cast.format(f"${number}", name))
        texts.append(value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return TOKEN.sub(lambda found: casts[int(found["number"]) - 1] if found["number"] else found[0], sql), texts


# --------------------------------------------------------------------------------------------------- rows as JSON
#
# PostgreSQL writes every value as JSON, cut to a cell's width before: so no type, however exotic or long, can stall
# the event loop or fill the memory of this process.

JSON, SAFE = "to_json({0})::text", db.SAFE_INTEGER
SHORT = {  # by type: SQL for its JSON, if that can never be too long
    **dict.fromkeys((16, 21, 23, 26, 700, 701, 1082, 1114, 1184), JSON),  # bool, int2, int4, oid, floats, dates
    20: f"CASE WHEN {{0}} BETWEEN -{SAFE} AND {SAFE} THEN {{0}}::text ELSE to_json({{0}}::text)::text END",  # int8
    17: "to_json('(blob, ' || octet_length({0}) || ' bytes; encode(column, ''hex'') shows them)')::text",
}
INET = 869  # a host is written without the /32 that a cast to text adds
# Other parsers of JSON round such a number or overflow on it, give up on so many brackets, find half of a character.
LOSSY = "'[0-9]([0-9]{{15}}|[eE][+-]?[0-9]{{3}})|([[{{][^][{{}}]*){{101}}'"
HALF = r"'\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB]..)\\u[dD][c-fC-F]'"
STRING = r"""'"([^"\\]|\\.)*"', '', 'g'"""
NESTED = f"""CASE WHEN {{0}} ~ {LOSSY} AND regexp_replace({{0}}, {STRING}) ~ {LOSSY} OR {{0}} ~ {HALF}
THEN to_json({{0}})::text ELSE regexp_replace({{0}}, '[\r\n]\\s*', '', 'g') END"""


def cell(name: str, kind: Any, width: int) -> tuple[str, str]:
    """SQL for the text of a column, and for its JSON on one line, cut at `width` characters, from this text."""
    if kind.oid in SHORT:
        return f"{SHORT[kind.oid].format(name)} AS {name}", name
    text, whole = "to_json({0}) #>> '{{}}'" if kind.oid == INET else "{0}::text", JSON
    # json, jsonb, records, arrays and composite types; the catalogs have arrays (22, 30 and 2277) that are no JSON.
    if kind.oid in (114, 3802, 2249, 2287) or (kind.kind in ("array", "composite") and kind.oid not in (22, 30, 2277)):
        text, whole = JSON, NESTED
    cut = f"to_json(left({{0}}, {width}) || '… (cut: {width} of ' || length({{0}}) || ' characters)')::text"
    shown = f"CASE WHEN length({{0}}) > {width} THEN {cut} ELSE {whole} END"
    return f"{text.format(name)} AS {name}", shown.format(name)


async def fetch(
    session: Any, sql: str, values: Any, columns: Sequence[Any], width: int, limit: int, offset: int, room: int
) -> list[str]:
    """Rows as JSON lists: at most `limit` from `offset` on, and no more than are needed to fill `room` characters."""
    kinds = {f"c{place}": column.type for place, column in enumerate(columns)}
    cells = [cell(name, kind, width) for name, kind in kinds.items()]
    # LIMIT tells the planner that few rows are wanted: a sort keeps these only. OFFSET 0 has each text made once.
    rows = f"({PART.format(sql)} LIMIT {limit} OFFSET {offset}) AS r({', '.join(kinds)}) OFFSET 0"
    line = f"'[' || array_to_string(ARRAY[{', '.join(json for _, json in cells)}], ',', 'null') || ']'"
    query = f"SELECT {line} FROM (SELECT {', '.join(text for text, _ in cells)} FROM {rows}) AS s"
    cursor = await (await session.prepare(query)).cursor(*values)
    weight = sum(40 if kind.oid in SHORT else width for kind in kinds.values())
    chunk = max(1, min(MAX_CHUNK, max(CHUNK, room) // weight))
    lines: list[str] = []
    while len(lines) < limit and room > 0 and (found := await cursor.fetch(min(chunk, limit - len(lines)))):
        lines += [row[0] for row in found]
        room -= sum(map(len, lines[-len(found) :]))
    return lines


# ------------------------------------------------------------------------------------------------------- catalogs

KIND = """CASE c.relkind WHEN 'v' THEN 'view' WHEN 'm' THEN 'materialized view' WHEN 'f' THEN 'foreign table'
WHEN 'p' THEN 'partitioned table' ELSE CASE WHEN c.relispartition THEN 'partition' ELSE 'table' END END"""
# By schema (pg_t... are those of temporary tables), all tables and views that the role may read at least a column of.
CATALOG = f"""SELECT json_object_agg(n.nspname, ARRAY(SELECT json_strip_nulls(json_build_object('name', c.relname,
'type', {KIND}, 'row_estimate', CASE WHEN c.relkind <> 'v' AND c.reltuples >= 0 THEN c.reltuples::bigint END))
FROM pg_class c WHERE c.relnamespace = n.oid AND c.relkind IN ('r', 'v', 'm', 'p', 'f')
AND (has_table_privilege(c.oid, 'SELECT') OR has_any_column_privilege(c.oid, 'SELECT')) ORDER BY c.relname)
ORDER BY n.nspname)::text FROM pg_namespace n WHERE has_schema_privilege(n.oid, 'USAGE') AND n.nspname !~ '^pg_t'"""
SYSTEM = ("information_schema", "pg_catalog")
FROM_TABLE = "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = $1::text::regclass"
COLUMNS = """FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum WHERE a.attrelid = c.oid AND a.attnum > 0
AND NOT a.attisdropped AND has_column_privilege(a.attrelid, a.attnum, 'SELECT')"""
DEFAULT = """CASE a.attidentity WHEN 'a' THEN 'GENERATED ALWAYS AS IDENTITY'
WHEN 'd' THEN 'GENERATED BY DEFAULT AS IDENTITY' ELSE {}pg_get_expr(d.adbin, d.adrelid) END"""
KEY = """ARRAY(SELECT a.attname FROM unnest(o.{0}key) WITH ORDINALITY AS k(attnum, place)
JOIN pg_attribute a ON a.attnum = k.attnum AND a.attrelid = o.{0}relid ORDER BY k.place)"""
ACTION = """'{{"a":"NO ACTION","r":"RESTRICT","c":"CASCADE","n":"SET NULL","d":"SET DEFAULT"}}'::json ->> o.{}"""
DESCRIBE = f"""SELECT json_strip_nulls(json_build_object('table', c.relname, 'schema', n.nspname, 'type', {KIND},
'comment', obj_description(c.oid, 'pg_class'), 'columns', ARRAY(SELECT json_build_object('name', a.attname,
'type', format_type(a.atttypid, a.atttypmod), 'nullable', NOT a.attnotnull, 'default', {DEFAULT.format("")},
'generated', a.attgenerated <> '', 'comment', col_description(c.oid, a.attnum),
'values', (SELECT json_agg(e.enumlabel ORDER BY e.enumsortorder) FROM pg_enum e
WHERE e.enumtypid IN (t.oid, t.typelem, t.typbasetype))) {COLUMNS} ORDER BY a.attnum), 'primary_key', coalesce(
(SELECT {KEY.format("con")} FROM pg_constraint o WHERE o.conrelid = c.oid AND o.contype = 'p'), '{{}}'),
'indexes', ARRAY(SELECT json_build_object('name', x.relname, 'columns', ARRAY(
SELECT pg_get_indexdef(i.indexrelid, k, true) FROM generate_series(1, i.indnkeyatts) AS k ORDER BY k),
'unique', i.indisunique, 'partial', i.indpred IS NOT NULL) FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid
WHERE i.indrelid = c.oid ORDER BY x.relname), 'foreign_keys', ARRAY(SELECT json_build_object(
'columns', {KEY.format("con")}, 'table', o.confrelid::regclass, 'references', {KEY.format("conf")},
'on_update', {ACTION.format("confupdtype")}, 'on_delete', {ACTION.format("confdeltype")})
FROM pg_constraint o WHERE o.conrelid = c.oid AND o.contype = 'f' AND o.conparentid = 0 ORDER BY o.conname)))::text
{FROM_TABLE}"""
# Where a foreign table's rows come from, and what a table is a partition of, is left out; options may hold a password.
CREATE = rf"""SELECT concat(concat_ws(E';\n', CASE WHEN c.relkind IN ('v', 'm') THEN format(E'CREATE %s %I.%I AS\n%s',
upper({KIND}), n.nspname, c.relname, rtrim(pg_get_viewdef(c.oid), ';'))
ELSE format(E'CREATE %sTABLE %I.%I (\n    %s\n)%s', CASE c.relkind WHEN 'f' THEN 'FOREIGN ' END, n.nspname, c.relname,
(SELECT string_agg(part, E',\n    ' ORDER BY place, part) FROM (
SELECT a.attnum AS place, concat_ws(' ', quote_ident(a.attname), format_type(a.atttypid, a.atttypmod),
CASE WHEN a.attgenerated <> '' THEN format('GENERATED ALWAYS AS (%s) STORED', pg_get_expr(d.adbin, d.adrelid))
ELSE {DEFAULT.format("'DEFAULT ' || ")} END, CASE WHEN a.attnotnull THEN 'NOT NULL' END) AS part {COLUMNS}
UNION ALL SELECT 9999, format('CONSTRAINT %I %s', conname, pg_get_constraintdef(oid))
FROM pg_constraint WHERE conrelid = c.oid AND contype IN ('p', 'u', 'c', 'f', 'x')) AS parts),
' PARTITION BY ' || pg_get_partkeydef(c.oid)) END, (SELECT string_agg(line, E';\n' ORDER BY line) FROM (
SELECT pg_get_indexdef(i.indexrelid) AS line FROM pg_index i WHERE i.indrelid = c.oid
AND NOT EXISTS (SELECT FROM pg_constraint o WHERE o.conindid = i.indexrelid AND o.conrelid = c.oid)
UNION ALL SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgrelid = c.oid AND NOT tgisinternal) AS lines)), ';')
{FROM_TABLE}"""


async def ask(session: Any, sql: str, *values: str) -> Any:
    """The answer of a query to the catalogs, which is one text in JSON."""
    return json.loads(await session.fetchval(sql, *values))


def names_in(catalog: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Schema, name and type of all tables and views but PostgreSQL's own."""
    ours = (schema for schema in catalog if schema not in SYSTEM)
    return [(schema, table["name"], table["type"]) for schema in ours for table in catalog[schema]]


def find_schema(catalog: dict[str, Any], schema: str) -> str:
    """A schema's name as it is written. Raises QueryError."""
    for name in (schema, *catalog):
        if name in catalog and name.lower() == schema.lower():
            return name
    raise QueryError(f"no such schema: {schema}; the schemas are {db.some([*catalog])}")


async def find_table(session: Any, schema: str, table: str) -> str:
    """A table or view that the role may read, as SQL names it. Raises QueryError that suggests the nearest name."""
    catalog = await ask(session, CATALOG)
    schema = find_schema(catalog, schema)
    there = [(schema, found["name"]) for schema, tables in catalog.items() for found in tables]
    for place, name in sorted(there, key=lambda pair: pair != (schema, table)):
        if (place == schema and name.lower() == table.lower()) or f"{place}.{name}" == table:
            return f"{db.quoted(place)}.{db.quoted(name)}"
    raise no_such_table(catalog, table)


def no_such_table(catalog: dict[str, Any], name: str) -> QueryError:
    """The error that suggests the nearest names there are, or says what there is."""
    tables = [(table, table if schema == "public" else f"{schema}.{table}") for schema, table, _ in names_in(catalog)]
    there_are = f"; the tables are {db.some([full for _, full in tables]) or 'none: the role may read nothing'}"
    return QueryError(f"no such table: {name}{db.did_you_mean(name.rpartition('.')[2], tables) or there_are}")


# -------------------------------------------------------------------------------------------------------- errors

FAILED = (asyncpg.PostgresError, asyncpg.InternalClientError, UnicodeDecodeError)  # the statement, not the connection
MIGHTY = "the role can do more than read ({}); SECURITY.md has the SQL for one that cannot; or use --allow-superuser"
ENDED = "PostgreSQL ends the connection again and again; try later, or in another way"
ONLY_READS = "this server only reads: write SELECT, WITH, VALUES or TABLE (or explain_query, current_setting())"
SLOW = "the statement was stopped at the limit of {seconds:g} s; read fewer rows (explain_query shows the plan)"
MESSAGES = {  # by a pattern in SQLSTATE and text
    "^57014": SLOW,
    "^55P03": "another program has locked what the statement reads; try again in a moment",
    "^25006": "this server only reads: {text}; write a SELECT that does not",
    "^42501": "{text}: the server's role has no right to it; list_tables shows what can be read",
    "^42703": "{text}; {hint}describe_table shows the columns",
    "^53": "not enough memory or other resources for PostgreSQL ({text}); ask for less, or try again later",
    "^08|^HV": "the foreign server behind a table failed ({text}); query other tables, or try again later",
    "multiple commands": "a call runs one statement; send the others in calls of their own",
    "^42601": "{text}; {hint}correct the statement; placeholders are $1, $2 ... with a list, :name with an object",
    "": "{text}; {hint}correct the statement",
}
CAPITAL = re.compile(r"(?:^|(?<=; ))[A-Z](?=[a-z])")  # at the beginning of a sentence


async def explained(session: Any, exc: Any, seconds: float) -> QueryError:
    """What the model is told about an error of a statement, which ends with it: what is wrong, and what to do."""
    await session.execute("ROLLBACK")
    if not isinstance(exc, asyncpg.PostgresError):  # pg_stats has such a column
        return QueryError("a column is not UTF-8, or has the type anyarray; cast it to bytea or text, or name others")
    # Right by itself, but not as a part of a SELECT; the parser's errors have a position.
    if re.match("42601|0A000", exc.sqlstate) and exc.position and PART.partition("{}")[2] in exc.query:
        return QueryError(ONLY_READS)
    # postgres_fdw hands on the code that the other server gave.
    state = "HV" if "remote SQL command" in (exc.context or "") else exc.sqlstate
    if state == "42P01" and (name := re.search('"(.*)"', exc.message)):
        return no_such_table(await ask(session, CATALOG), name[1])
    template = next(text for pattern, text in MESSAGES.items() if re.search(pattern, f"{state} {exc.message}"))
    hint = f"{exc.hint or ''} ".replace(". ", "; ")
    said = template.format(text=exc.message.rstrip("."), hint=hint, seconds=seconds)
    return QueryError(CAPITAL.sub(lambda found: found[0].lower(), said))


# ------------------------------------------------------------------------------------------- the URL, and connecting

# Hosted providers put these into their URLs; they are meant for libpq, and the server would refuse them. asyncpg
# cannot bind a channel; against somebody in between, sslmode=verify-full helps as well.
FOR_LIBPQ = re.compile(
    "channel_binding|client_encoding|connect_timeout|fallback_application_name|gss(delegation|encmode)|keepalives.*"
    "|load_balance_hosts|pgbouncer|ssl(certmode|compression|sni)|tcp_user_timeout"
)
INVALID = "the PostgreSQL URL is not valid; write postgresql://user:password@host:5432/database, percent-encoded"
REFUSED = "the PostgreSQL URL's parameter {} is refused; correct it, or leave it out"
REFUSALS = {  # what is said when connecting fails for good, by a pattern in the error's class and text
    "SSLCertVerif": "TLS: its certificate is refused ({exc.verify_message}); sslrootcert=FILE or system has its root",
    "SSLError": "TLS with the server fails ({exc.reason}); check sslmode and the certificate files of the URL",
    "rejected SSL upgrade": "the server offers no TLS, which the URL's sslmode asks for; switch it on there",
    "root certificate": "TLS: no root certificate to verify the server with; add sslrootcert=FILE or system to the URL",
    "pg_hba": "PostgreSQL (pg_hba.conf) does not let this role in from here; it may want TLS, with sslmode=require",
    "InvalidAuth|InvalidPass|authentication failed": "PostgreSQL refuses the role or its password; correct the URL",
    "InvalidCatalogName|no such database": "PostgreSQL has no database of that name; correct the URL",
}


def connect_arguments(url: str) -> tuple[dict[str, Any], dict[str, str]]:
    """What asyncpg is told to connect to a URL, and the URL's parameters in it. Raises UnusableError, which has no word
    of the URL but a parameter's name."""
    url, _, query = url.partition("?")
    if "#" in url + query or "@" in query:  # of a password that is not encoded
        raise UnusableError(INVALID)
    given = {name: value for name, value in parse_qsl(query) if not FOR_LIBPQ.fullmatch(name)}
    settings = {"application_name": given.pop("application_name", "pg-server")}
    arguments: dict[str, Any] = {"statement_cache_size": 0, "server_settings": settings, "timeout": CONNECT_TRY}
    if given.get("sslrootcert") == "system":  # the roots that the operating system trusts
        del given["sslrootcert"]
        arguments["ssl"] = ssl.create_default_context()
    for name in ("sslrootcert", "sslcert", "sslkey", "sslcrl"):
        if not os.path.isfile(given.get(name, __file__)):
            raise UnusableError(f"the PostgreSQL URL's {name} names no file that can be read; correct it")
    return arguments | {"dsn": f"{url}?{urlencode(given)}"}, given


def refusal(exc: Exception, given: Mapping[str, str]) -> Exception:
    """What an error while connecting amounts to: LostError if another try may help, else UnusableError. `given` are the
    parameters of the URL."""
    if isinstance(exc, (QueryError, LostError)):
        return exc
    if isinstance(exc, asyncpg.TooManyConnectionsError):
        return FullError()
    text = f"{type(exc).__name__}: {exc}"
    told = [why.format(exc=exc) for pattern, why in REFUSALS.items() if re.search(pattern, text)]
    if not isinstance(exc, (OSError, asyncpg.CannotConnectNowError, asyncpg.ConnectionDoesNotExistError)):
        told += [REFUSED.format(name) for name, value in given.items() if name in text or value in text]
        told += [INVALID] if isinstance(exc, (ValueError, asyncpg.InterfaceError)) else []
    if told:
        return UnusableError(told[0])
    said = f" ({exc})" if isinstance(exc, asyncpg.PostgresError) else ""
    return LostError(f"PostgreSQL does not answer{said} for {CONNECT_TIME:g} s; check that it runs, and the URL")


# -------------------------------------------------------------------------------------------------- command line


def build_server(url: str, options: serving.Options, **settings: Any) -> serving.Server:
    """A server for the database of a postgresql:// URL, with `settings` of `Postgres`. Raises ConfigError."""
    return db.build(Postgres(url, **settings), "one database", options, "pg-server")


def start(args: Any, options: serving.Options) -> serving.Server:
    """The server that the command line asks for."""
    url = args.url or os.environ.get("DATABASE_URL", "")
    if not url.startswith(("postgresql://", "postgres://")):
        raise ConfigError("set DATABASE_URL to a URL that begins with postgresql://, or give it as the argument")
    if not 0.1 <= args.timeout <= 25:  # a tool call may take 30 s in all
        raise ConfigError(f"--timeout {args.timeout:g} is not a number of seconds from 0.1 to 25")
    # What is printed for a client's configuration must hold no password.
    sys.argv = ["postgresql://USER:PASSWORD@HOST/DATABASE" if word == args.url else word for word in sys.argv]
    asyncio.run(Postgres(url, allow_superuser=args.allow_superuser).check())
    server = build_server(url, options, seconds=args.timeout, allow_superuser=args.allow_superuser)
    server.variables = () if args.url else ("DATABASE_URL",)
    return server


def main() -> None:
    """The command line: `DATABASE_URL=postgresql://... pg_server.py`."""
    parser = serving.argument_parser("pg-server", "Serve a PostgreSQL database to MCP clients, read-only.")
    parser.add_argument("url", nargs="?", metavar="URL", help="better in DATABASE_URL: others can see the command line")
    parser.add_argument("--allow-superuser", action="store_true", help="serve a role that can do more than read")
    parser.add_argument("--timeout", type=float, default=db.TIMEOUT, metavar="SECONDS", help="for one statement (5)")
    serving.serve(parser, start)


if __name__ == "__main__":
    main()
