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
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any
from urllib.parse import parse_qsl

import anyio

import db_server as db
from common import ConfigError
from db_server import Answer, Description, Params, QueryError

# -------------------------------------------------------------------------------------------------------- limits

MAX_POOL = 10  # connections of one server at most; SECURITY.md counts with it
IDLE_TIME = 20.0  # seconds until a connection that nobody uses is given back: others may wait for it
CONNECT_TRIES = 25  # to connect while the database starts or restarts, in about ten seconds
READY_TIME = 2.0  # seconds for BEGIN: a pooler in between makes us wait until it has a connection to the database

# ------------------------------------------------------------------------------------------------ read-only layers
#
# A read-only transaction alone lets COPY, DO, SET and functions through that work outside of it, and a filter of
# words is got round. So: (1) the statement is compiled inside `SELECT ... FROM ( statement )`, where the grammar
# takes SELECT, WITH, VALUES and TABLE, and no data-modifying WITH; (2) READ ONLY refuses what a function called there
# would write; (3) ROLLBACK undoes settings and notifications; (4) what is not undone is reset; (5) the role is refused
# if it is, or may become, one that reaches files, programs or other sessions.

BEGIN = """BEGIN READ ONLY; SET LOCAL statement_timeout = '{limit}s'; SET LOCAL lock_timeout = '{lock}s'; SET LOCAL
idle_in_transaction_session_timeout = '{idle}s'"""
PART = "SELECT * FROM (\n{}\n) AS part"  # the line breaks keep a comment at the end from taking the bracket along
# Advisory locks and the seed of random() outlive a rollback: without this, a query could hold up, or steer, the next.
END = "ROLLBACK; SELECT pg_advisory_unlock_all(), setseed(extract(microseconds FROM now()) / 6e7); RESET ALL"
MIGHT = """SELECT string_agg(rolname, ', ') FROM pg_roles WHERE pg_has_role(session_user, oid, 'MEMBER') AND (rolsuper
OR rolreplication OR rolname ~ '^pg_(read_server_|write_server_|execute_server_|signal_)')"""
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
    """There is no connection, or it has ended: why, and how many tries it is worth. Everything here only reads."""


class Postgres:
    """A PostgreSQL database, as the tools of db_server.py need it: see `build` there."""

    kind, schema = "PostgreSQL", "public"

    def __init__(self, url: str, seconds: float = db.TIMEOUT, allow_superuser: bool = False) -> None:
        # They hold the password, which goes to asyncpg, and nowhere else.
        self.arguments: dict[str, Any] = {**connect_arguments(url), "init": self.require_reader}
        self.seconds, self.allow_superuser, self.users = seconds, allow_superuser, 0
        self.begin = BEGIN.format(limit=seconds, lock=min(db.BUSY_TIME, seconds / 2), idle=2 * seconds)
        self.query = partial(self.run, query)
        self.explain = partial(self.run, explain)
        self.tables = partial(self.run, list_tables)
        self.describe = partial(self.run, describe, min(db.SAMPLE_TIME, seconds / 4))
        self.create_statement = partial(self.run, create_statement)
        self.all_tables = partial(self.run, all_tables)

    async def check(self) -> None:
        """Raise UnusableError if the database does not answer, or the role may do too much."""
        async with self.running():
            if self.pool.get_size() == self.pool.get_idle_size():  # else it is answering somebody just now
                await self.run(compiled, "SELECT 1", None)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """The life of a server, which several clients may use at once: from the first to the last of them."""
        self.users += 1
        try:
            if self.users == 1:
                # What resets a connection is a part of `attempt`, so that here nothing is left to do.
                self.pool = await asyncpg.create_pool(reset=partial(asyncio.sleep, 0), **self.arguments)
            yield
        finally:
            self.users -= 1
            if not self.users:
                with anyio.move_on_after(2 * db.GRACE, shield=True):  # what was cancelled gets time to end
                    await self.pool.close()

    async def require_reader(self, session: Any) -> None:
        """What the pool does with a new connection. Raises UnusableError, TimeoutError."""
        try:
            might = await session.fetchval(MIGHT, timeout=READY_TIME)
        except TimeoutError:
            session.terminate()  # else the pool says good-bye first, which waits as well
            raise
        if might and not self.allow_superuser:
            raise UnusableError(f"the role can do more than read ({might[:200]}); see SECURITY.md or --allow-superuser")

    async def run(self, work: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        """What `work` returns, given a connection in a read-only transaction of its own, and the arguments. Calls wait
        for a connection in order, and try again after a pause that doubles. Raises QueryError."""
        with anyio.move_on_after(db.CALL_TIME):
            for tries in range(1, 99):
                try:
                    return await self.attempt(work, *arguments)
                except LostError as exc:
                    if tries >= exc.args[1]:
                        raise UnusableError(exc.args[0]) from None
                await asyncio.sleep(min(2**tries / 40, 0.4))  # seconds
        raise UnusableError(ABSENT)

    async def attempt(self, work: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        """Run an operation once. Raises QueryError, LostError. asyncpg cancels in PostgreSQL what is cancelled
        here; a connection that then is not reset in time is closed."""
        try:
            session = await self.pool.acquire()
        except Exception as exc:
            raise exc if isinstance(exc, UnusableError) else refusal(exc) from None
        begun = False
        try:
            await session.execute(self.begin, timeout=READY_TIME)
            begun = True
            async with asyncio.timeout(self.seconds + db.GRACE):  # set_config can lift PostgreSQL's own limit
                try:
                    return await work(session, *arguments)
                except FAILED as exc:
                    raise await explained(session, exc, self.seconds) from None
        except TimeoutError:
            raise QueryError(SLOW.format(self.seconds)) if begun else LostError(ABSENT, 99) from None
        except (*FAILED, asyncpg.InterfaceError, OSError):  # the connection has ended; the statement may be the cause
            raise LostError("PostgreSQL ends the connection again and again; try later", 3) from None
        finally:
            with anyio.CancelScope(shield=True), suppress(Exception):
                try:
                    await session.execute(END, timeout=db.GRACE)
                    await self.pool.release(session)
                except Exception:  # what is not reset must not be there for the next call
                    session.terminate()


# ------------------------------------------------------------------------------------- what the tools and resources do


async def query(session: Any, sql: str, params: Params, limit: int, offset: int, max_output: int) -> Answer:
    """What `query_database` answers."""
    statement = await compiled(session, sql, params)
    # Rows of wider cells than these 2**20 characters could be fetched one at a time only.
    width = min(db.MAX_CELL, max_output // 4) if max_output else 2**20
    lines = await fetch(session, statement, width, limit + 1, offset, max_output or db.MAX_RESULT)
    names = [column.name[: db.MAX_NAME] for column in statement[2]]
    return db.listing({"columns": names}, "rows", lines, limit, offset, max_output)


async def explain(session: Any, sql: str, params: Params, max_output: int) -> str:
    """What `explain_query` answers: PostgreSQL's own text, which is indented."""
    sql, values, _ = await compiled(session, sql, params)
    # As a part of a SELECT: EXPLAIN of `ANALYZE DELETE ...` would run it.
    plan = await session.fetch(f"EXPLAIN {PART.format(sql)}", *values)
    return db.whole("\n".join(line[0] for line in plan), max_output, "explain a part of the statement")


async def list_tables(session: Any, schema: str, pattern: str, offset: int, max_output: int) -> Answer:
    """What `list_tables` answers."""
    rows = await session.fetch(CATALOG, schema)
    schemas = list(dict.fromkeys(row["schema"] for row in rows))
    if schema not in schemas:
        raise QueryError(f"no such schema: {schema}; the schemas are {', '.join(schemas[:20])}")
    there = [row for row in rows if row["schema"] == schema and row["name"] and db.is_like(row["name"], pattern)]
    shown = [{key: row[key] for key in ("name", "type", "row_estimate") if row[key] is not None} for row in there]
    lines = [db.dumps(table) for table in shown[offset:]]
    return db.listing({"schema": schema, "schemas": schemas}, "tables", lines, len(lines), offset, max_output)


async def describe(session: Any, seconds: float, schema: str, table: str, max_output: int) -> Description:
    """What `describe_table` answers; `seconds` are for the sample rows: a slow view must not hide its columns."""
    there = await find_table(session, schema, table)
    found = {"table": there["name"], "schema": there["schema"], "type": there["type"]}
    found |= json.loads(await session.fetchval(DESCRIBE, there["sql"])) | {"sample_rows": [], "note": ""}
    found["columns"] = [column | {"default": column.get("default")} for column in found["columns"]]
    await session.execute(f"SET LOCAL statement_timeout = '{seconds}s'")
    try:
        sql = f"SELECT {', '.join(db.quoted(column['name']) for column in found['columns'])} FROM {there['sql']}"
        columns = (await session.prepare(sql)).get_attributes()
        lines = await fetch(session, (sql, (), columns), db.SAMPLE_CELL, 3, 0, db.MAX_RESULT)
        found["sample_rows"] = [json.loads(line) for line in lines]
    except FAILED as exc:
        found["note"] = f"no sample rows: {await explained(session, exc, seconds)}"
    return db.whole(found, max_output, "query information_schema.columns for the columns")


async def create_statement(session: Any, schema: str, table: str, max_output: int) -> str:
    """The CREATE statement of a table or view, as the catalogs tell it, with its indexes and triggers."""
    found = await find_table(session, schema, table)
    view, parts, by, others = await session.fetchrow(CREATE, found["sql"])
    body = f"AS\n{view.rstrip(';')}" if view else "(\n    " + ",\n    ".join(parts) + "\n)"
    kind = re.sub("partition(ed table)?", "table", found["type"]).upper()
    text = ";\n".join([f"CREATE {kind} {found['sql']} {body}{by}", *others]) + ";"
    return db.whole(text, max_output, "query pg_get_viewdef, pg_indexes or information_schema.columns")


async def all_tables(session: Any) -> Sequence[tuple[str, str, str]]:
    """Schema, name and type of what the role may read."""
    return tables_in(await session.fetch(CATALOG, ""))[: db.MAX_RESOURCES]


# ----------------------------------------------------------------------------------------------------- statements

# What is inside a string, a quoted name or a comment is no code; one that does not end takes the rest of the text.
TOKEN = re.compile(
    r"""(?<![\w$])[eE]'(?:[^'\\]|\\.|'')*(?:'|\Z)|'[^']*(?:'|\Z)|"[^"]*(?:"|\Z)|--[^\r\n]*|/\*.*?(?:\*/|\Z)"""
    r"|\$((?:[A-Za-z_]\w*)?)\$.*?(?:\$\1\$|\Z)"
    r"|(?P<end>;(?>\s|--[^\r\n]*|/\*.*?\*/)*+\Z)|(?<![\w$])\$(?P<number>[0-9]{1,5})|::|:(?P<name>[A-Za-z_]\w*)",
    re.DOTALL,
)


async def compiled(session: Any, sql: str, params: Params) -> Sequence[Any]:
    """The model's statement as PostgreSQL compiles it by itself, without running it: its SQL with the parameters cast
    from text, these texts, and the columns. Raises QueryError."""
    sql, values = positional(sql, params)
    refuse_before_parsing(sql, values)
    prepared = await session.prepare(sql)
    kinds, columns = prepared.get_parameters(), prepared.get_attributes()
    if len(values) != len(kinds):
        raise QueryError(f"placeholders in the statement: {len(kinds)}, values in params: {len(values)}; pass one each")
    if not columns:
        raise QueryError("this server only reads: write SELECT, WITH, VALUES or TABLE")
    bounds = [bound(f"${number}", *pair) for number, pair in enumerate(zip(values, kinds, strict=True), 1)]
    sql = TOKEN.sub(lambda found: bounds[int(found["number"]) - 1][0] if found["number"] else found[0], sql)
    return sql, [text for _, text in bounds], columns


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


def bound(placeholder: str, value: Any, kind: Any) -> tuple[str, str | None]:
    """A parameter, cast from text to the type that PostgreSQL found for it, and the text: asyncpg would want a Python
    object of just the right class, a date for a date."""
    name = f"{db.quoted(kind.schema)}.{db.quoted(kind.name.removesuffix('[]'))}"
    sql = f"CAST({placeholder}::text AS {name})"
    if kind.kind == "array":  # from JSON, as it may be an array of arrays
        sql = f"CAST((SELECT v FROM json_to_record({placeholder}::json) AS r(v {name}[])) AS {name}[])"
        value = {"v": value}
    return sql, value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --------------------------------------------------------------------------------------------------- rows as JSON
#
# PostgreSQL writes every value as JSON, cut to a cell's width before: so no type, however exotic or long, can stall
# the event loop or fill the memory of this process.

JSON, SAFE = "to_json({0})::text", db.SAFE_INTEGER
SHORT = {  # by type: SQL for its JSON, if that can never be too long
    **dict.fromkeys((16, 21, 23, 26, 700, 701, 869, 1082, 1114, 1184), JSON),  # bool, ints, oid, floats, inet, dates
    20: f"CASE WHEN {{0}} BETWEEN -{SAFE} AND {SAFE} THEN {{0}}::text ELSE to_json({{0}}::text)::text END",  # int8
    17: "to_json('(blob, ' || octet_length({0}) || ' bytes; encode(column, ''hex'') shows them)')::text",
}
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
    text, whole = "{0}::text", JSON
    if kind.kind in ("array", "composite") or kind.name in ("json", "jsonb", "record"):
        text, whole = JSON, NESTED
    cut = f"to_json(left({{0}}, {width}) || '… (cut: {width} of ' || length({{0}}) || ' characters)')::text"
    shown = f"CASE WHEN length({{0}}) > {width} THEN {cut} ELSE {whole} END"
    return f"{text.format(name)} AS {name}", shown.format(name)


async def fetch(session: Any, statement: Sequence[Any], width: int, limit: int, offset: int, room: int) -> list[str]:
    """Rows as JSON lists: at most `limit` from `offset` on, and no more than are needed to fill `room` characters."""
    sql, values, columns = statement
    kinds = {f"c{place}": column.type for place, column in enumerate(columns)}
    cells = [cell(name, kind, width) for name, kind in kinds.items()]
    # LIMIT tells the planner that few rows are wanted: a sort keeps these only. OFFSET 0 has each text made once.
    rows = f"({PART.format(sql)} LIMIT {limit} OFFSET {offset}) AS r({', '.join(kinds)}) OFFSET 0"
    line = f"'[' || array_to_string(ARRAY[{', '.join(json for _, json in cells)}], ',', 'null') || ']'"
    texts = ", ".join(text for text, _ in cells)
    prepared = await session.prepare(f"SELECT {line} FROM (SELECT {texts} FROM {rows}) AS s")
    weight = sum(40 if kind.oid in SHORT else width for kind in kinds.values())
    chunk = max(1, min(1_000, max(4 * 2**20, room) // weight))  # rows at a time: some megabytes
    if limit <= chunk:  # one message to PostgreSQL instead of three
        return [row[0] for row in await prepared.fetch(*values)]
    cursor = await prepared.cursor(*values)
    lines: list[str] = []
    while room > 0 and (found := await cursor.fetch(chunk)):
        lines += [row[0] for row in found]
        room -= sum(map(len, lines[-len(found) :]))
    return lines


# ------------------------------------------------------------------------------------------------------- catalogs

# All tables and views that the role may read at least a column of; PostgreSQL's own schemas only if asked for.
CATALOG = """SELECT n.nspname AS schema, c.relname AS name, CASE c.relkind WHEN 'v' THEN 'view'
WHEN 'm' THEN 'materialized view' WHEN 'f' THEN 'foreign table' WHEN 'p' THEN 'partitioned table'
ELSE CASE WHEN c.relispartition THEN 'partition' ELSE 'table' END END AS type,
CASE WHEN c.relkind <> 'v' AND c.reltuples >= 0 THEN c.reltuples::bigint END AS row_estimate,
concat(quote_ident(n.nspname), '.', quote_ident(c.relname)) AS sql FROM pg_namespace n
LEFT JOIN pg_class c ON c.relnamespace = n.oid AND c.relkind IN ('r', 'v', 'm', 'p', 'f')
AND has_any_column_privilege(c.oid, 'SELECT') WHERE has_schema_privilege(n.oid, 'USAGE')
AND (n.nspname = $1 OR n.nspname !~ '^pg_|^information_schema$') ORDER BY n.nspname = 'public', n.nspname, c.relname"""
COLUMNS = """FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum WHERE a.attrelid = c.oid AND a.attnum > 0
AND NOT a.attisdropped AND has_column_privilege(a.attrelid, a.attnum, 'SELECT') ORDER BY a.attnum"""
DEFAULT = """CASE a.attidentity WHEN 'a' THEN 'GENERATED ALWAYS AS IDENTITY'
WHEN 'd' THEN 'GENERATED BY DEFAULT AS IDENTITY' ELSE {}pg_get_expr(d.adbin, d.adrelid) END"""
KEY = """ARRAY(SELECT attname FROM pg_attribute WHERE attrelid = {0}relid AND attnum = ANY ({0}key)
ORDER BY array_position({0}key, attnum))"""
ACTION = """'{{"a":"NO ACTION","r":"RESTRICT","c":"CASCADE","n":"SET NULL","d":"SET DEFAULT"}}'::json ->> {}"""
DESCRIBE = f"""SELECT json_strip_nulls(json_build_object('comment', obj_description(c.oid, 'pg_class'),
'columns', ARRAY(SELECT json_build_object('name', a.attname, 'type', format_type(a.atttypid, a.atttypmod),
'nullable', NOT a.attnotnull, 'default', {DEFAULT.format("")}, 'generated', a.attgenerated <> '',
'comment', col_description(c.oid, a.attnum), 'values', (SELECT json_agg(enumlabel ORDER BY enumsortorder)
FROM pg_enum WHERE enumtypid IN (t.oid, t.typelem, t.typbasetype))) {COLUMNS}),
'primary_key', coalesce((SELECT {KEY.format("con")} FROM pg_constraint WHERE conrelid = c.oid AND contype = 'p'),
'{{}}'), 'indexes', ARRAY(SELECT json_build_object('name', x.relname, 'columns', ARRAY(
SELECT pg_get_indexdef(x.oid, k, true) FROM generate_series(1, indnkeyatts) AS k ORDER BY k),
'unique', indisunique, 'partial', indpred IS NOT NULL) FROM pg_index JOIN pg_class x ON x.oid = indexrelid
WHERE indrelid = c.oid ORDER BY x.relname), 'foreign_keys', ARRAY(SELECT json_build_object(
'columns', {KEY.format("con")}, 'table', confrelid::regclass, 'references', {KEY.format("conf")},
'on_update', {ACTION.format("confupdtype")}, 'on_delete', {ACTION.format("confdeltype")}) FROM pg_constraint
WHERE conrelid = c.oid AND contype = 'f' AND conparentid = 0 ORDER BY conname)))::text
FROM pg_class c WHERE c.oid = $1::text::regclass"""
# Where a foreign table's rows come from, and what a table is a partition of, is left out; options may hold a password.
CREATE = f"""SELECT CASE WHEN c.relkind IN ('v', 'm') THEN pg_get_viewdef(c.oid) END,
ARRAY(SELECT concat_ws(' ', quote_ident(a.attname), format_type(a.atttypid, a.atttypmod),
CASE WHEN a.attgenerated <> '' THEN format('GENERATED ALWAYS AS (%s) STORED', pg_get_expr(d.adbin, d.adrelid))
ELSE {DEFAULT.format("'DEFAULT ' || ")} END, CASE WHEN a.attnotnull THEN 'NOT NULL' END) {COLUMNS}) || ARRAY(
SELECT format('CONSTRAINT %I %s', conname, pg_get_constraintdef(oid)) FROM pg_constraint WHERE conrelid = c.oid
AND contype IN ('p', 'u', 'c', 'f', 'x') ORDER BY conname), concat(' PARTITION BY ' || pg_get_partkeydef(c.oid)),
ARRAY(SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = c.oid AND NOT EXISTS (SELECT FROM pg_constraint
WHERE conindid = indexrelid AND conrelid = c.oid) UNION ALL SELECT pg_get_triggerdef(oid) FROM pg_trigger
WHERE tgrelid = c.oid AND NOT tgisinternal) FROM pg_class c WHERE c.oid = $1::text::regclass"""


async def find_table(session: Any, schema: str, table: str) -> Any:
    """The catalog's row of a table or view that the role may read. Raises QueryError that suggests the nearest name."""
    rows = await session.fetch(CATALOG, table.rpartition(".")[0] or schema)
    known = {f"{row['schema']}.{row['name']}".lower(): row for row in rows}
    found = known.get(f"{schema}.{table}".lower()) or known.get(table.lower())
    if not found:
        raise db.no_such("table", table, tables_in(rows), "public")
    return found


def tables_in(rows: Sequence[Any]) -> list[tuple[str, str, str]]:
    """Schema, name and type of each table and view in the catalog."""
    return [row[:3] for row in rows if row["name"]]


# -------------------------------------------------------------------------------------------------------- errors

FAILED = (asyncpg.PostgresError, asyncpg.InternalClientError, UnicodeDecodeError)  # the statement, not the connection
ABSENT = "PostgreSQL does not answer, or the call was queued for a free connection in vain; check it and its URL"
SLOW = "the statement was stopped at the limit of {:g} s; read fewer rows (explain_query shows the plan)"
ADVICE = {  # what to do, by what SQLSTATE begins with
    "08": "a foreign server behind a table failed; query other tables, or try again later",
    "25": "this server only reads; leave out what writes",
    "42601": "this server only reads: write one SELECT (or use explain_query, current_setting), with $1 or :name",
    "55P03": "another program has locked what the statement reads; try again in a moment",
    "": "correct the statement",
}


async def explained(session: Any, exc: Any, seconds: float) -> QueryError:
    """What the model is told about an error of a statement, which ends with it: what is wrong, and what to do."""
    await session.execute("ROLLBACK")
    if not isinstance(exc, asyncpg.PostgresError):  # pg_stats has such a column
        return QueryError("a column is not UTF-8, or has the type anyarray; cast it to bytea or text, or name others")
    # postgres_fdw hands on the code that the other server gave.
    state = "08" if "remote SQL command" in (exc.context or "") else exc.sqlstate.replace("HV", "08")
    if state == "57014":
        return QueryError(SLOW.format(seconds))
    if state == "42P01" and (name := re.search('"(.*)"', exc.message)):
        return db.no_such("table", name[1], tables_in(await session.fetch(CATALOG, "")), "public")
    advice = next(advice for start, advice in ADVICE.items() if state.startswith(start))
    return QueryError("; ".join(said.rstrip(".") for said in (exc.message, exc.hint, advice) if said))


# ------------------------------------------------------------------------------------------- the URL, and connecting

# Hosted providers put these into their URLs; they are meant for libpq, and the server would refuse them. asyncpg
# cannot bind a channel; against somebody in between, sslmode=verify-full helps as well.
FOR_LIBPQ = "(channel_binding|connect_timeout|gssencmode|keepalives.*|pgbouncer|sslsni)=.*|sslrootcert=system|"
INVALID = "set DATABASE_URL to a valid URL: postgresql://user:password@host:5432/database, percent-encoded"


def connect_arguments(url: str) -> dict[str, Any]:
    """What asyncpg is told to connect to a URL. Raises UnusableError, which has no word of the URL."""
    address, _, query = url.partition("?")
    if not re.match("postgres(ql)?://", url) or "#" in url or "@" in query:  # of a password that is not encoded
        raise UnusableError(INVALID)
    pairs = [pair for pair in query.split("&") if not re.fullmatch(FOR_LIBPQ, pair)]
    for name, file in parse_qsl("&".join(pairs)):
        if name in ("sslrootcert", "sslcert", "sslkey", "sslcrl") and not os.path.isfile(file):
            raise UnusableError(f"the PostgreSQL URL's {name} names no file that can be read; correct it")
    dsn = "&".join([f"{address}?application_name=pg-server", *pairs])  # of two of a name the last one counts
    # asyncpg takes only a file; these are the roots that the operating system trusts.
    roots = ssl.create_default_context() if "sslrootcert=system" in query.split("&") else None
    pool = {"min_size": 0, "max_size": MAX_POOL, "max_inactive_connection_lifetime": IDLE_TIME}
    return {"dsn": dsn, "ssl": roots, "timeout": 5, "statement_cache_size": 0, **pool}


def refusal(exc: Exception) -> Exception:
    """What an error while connecting amounts to: LostError if another try may help, else UnusableError."""
    text = str(exc)
    if isinstance(exc, ssl.SSLError) or re.search("SSL upgrade|root certificate", text):
        text = getattr(exc, "verify_message", text)
        return UnusableError(f"TLS with the server fails ({text}); correct the URL's sslmode or sslrootcert")
    if isinstance(exc, asyncpg.PostgresError) and exc.sqlstate[:2] in ("22", "28", "3D", "42"):
        return UnusableError(f"PostgreSQL refuses the connection: {text}; correct the URL")
    if isinstance(exc, (ValueError, asyncpg.InterfaceError, asyncpg.InternalClientError)):  # the text may hold a secret
        named = re.search("sslmode|sslnegotiation|target_session_attrs|target|TLS version", text)
        return UnusableError(f"the PostgreSQL URL's {named[0]} is refused; correct it" if named else INVALID)
    # Somebody will give a connection back; the time of the call is the limit.
    full = isinstance(exc, (asyncpg.TooManyConnectionsError, TimeoutError))
    return LostError(ABSENT, 99 if full else CONNECT_TRIES)


# -------------------------------------------------------------------------------------------------- command line


def build_server(url: str, options: serving.Options, **settings: Any) -> serving.Server:
    """A server for the database of a postgresql:// URL, with `settings` of `Postgres`. Raises ConfigError."""
    return db.build(Postgres(url, **settings), "one database", options, "pg-server")


def start(args: Any, options: serving.Options) -> serving.Server:
    """The server that the command line asks for."""
    url = args.url or os.environ.get("DATABASE_URL", "")
    # What is printed for a client's configuration must hold no password.
    sys.argv = ["postgresql://USER:PASSWORD@HOST/DATABASE" if word == args.url else word for word in sys.argv]
    server = build_server(url, options, seconds=args.timeout, allow_superuser=args.allow_superuser)
    asyncio.run(Postgres(url, allow_superuser=args.allow_superuser).check())
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
