"""PostgreSQL for db_server.py, which imports this file only for a postgresql:// URL; copy it along for that.

Trust boundary: SQL from the model is compiled as a part of a SELECT, so PostgreSQL's own parser refuses all that is
none, and runs in a read-only transaction that is always rolled back, as a role that is no superuser.
Not defended against: what that role may do outside of a transaction (SECURITY.md has the SQL for one that may not),
and the memory that PostgreSQL itself takes for a statement.
"""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportAttributeAccessIssue=false
# (asyncpg has no types)
# ruff: noqa: S608 -- SQL is put together here from constants, quoted names and, on purpose, the model's statement

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import accumulate
from typing import Any

from common import ConfigError
from mcp.server.mcpserver.exceptions import ToolError

from db_server import (
    BUSY_TIME,
    GRACE,
    MAX_CELL,
    MAX_NAME,
    MAX_RESOURCES,
    MAX_RESULT,
    RECYCLE,
    RENDER,
    SAFE_INTEGER,
    SAMPLE_CELL,
    SAMPLE_ROWS,
    Answer,
    Backend,
    Cut,
    Dialect,
    QueryError,
    did_you_mean,
    finish,
    fit,
    is_like,
    json_row,
    list_entries,
    quoted,
    read_rows,
    refuse_too_much,
    refuse_unused,
    shrink,
    some,
)

try:
    import asyncpg
except ImportError:
    raise ConfigError("PostgreSQL needs the package asyncpg; install it with: pip install asyncpg") from None

# -------------------------------------------------------------------------------------------------------- limits

MIN_POOL, MAX_POOL = 2, 10  # connections kept open, and at most
CONNECT_TIME = 10.0  # seconds to keep trying while the database starts or restarts
CONNECT_TRY = 5  # seconds for one try
FIRST_PAUSE, MAX_PAUSE = 0.05, 1.6  # seconds between the tries; each pause is twice as long as the one before
CHUNK = 4 * 2**20  # characters fetched at a time, if every cell is as long as it may be
MAX_CHUNK = 1_000  # rows fetched at a time
MAX_DEPTH = 100  # brackets of a JSON value that is shown as it is; a client's parser may refuse many more

SQLSTATE = asyncpg.PostgresError
LOST = (  # the connection, not the statement, has failed: everything here only reads, so it can be run again
    ConnectionError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
    asyncpg.InternalClientError,  # what asyncpg says if the connection ended in the middle of a message
)
NOT_YET = (*LOST, OSError, TimeoutError, asyncpg.TooManyConnectionsError)  # worth another try when connecting

# ------------------------------------------------------------------------------------------------ read-only layers
#
# A read-only transaction alone lets COPY, DO, SET and functions through that work outside of it, and a filter of
# words is got round. So: (1) the statement is compiled inside `SELECT ... FROM ( statement )`, where the grammar
# takes SELECT, WITH, VALUES and TABLE, and no data-modifying WITH; (2) READ ONLY refuses what a function called there
# would write; (3) ROLLBACK undoes settings, notifications and large objects; (4) what is not undone is reset;
# (5) the role is refused if it is, or may become, one that reaches files, programs or other sessions.

BEGIN = """BEGIN READ ONLY; SET LOCAL statement_timeout = {milliseconds}; SET LOCAL lock_timeout = {lock};
SET LOCAL idle_in_transaction_session_timeout = {idle}"""
# Advisory locks and the seed of random() outlive a rollback: without this, a query could hold up, or steer, the next.
END = """ROLLBACK; SELECT pg_advisory_unlock_all(); SELECT setseed(extract(epoch FROM clock_timestamp())::numeric % 1);
RESET ALL"""
MIGHT = """SELECT coalesce(string_agg(rolname, ', ' ORDER BY rolname), '') FROM pg_roles
WHERE pg_has_role(session_user, oid, 'MEMBER') AND (rolsuper OR rolreplication OR rolname IN (
'pg_read_server_files', 'pg_write_server_files', 'pg_execute_server_program', 'pg_signal_backend'))"""
# Everybody may call these, and they act outside of the transaction: on other sessions of the same role, or on other
# servers. A name can be hidden (query_to_xml runs text), so the boundary is the role, from which they can be revoked;
# this says so before the harm is done.
OUTSIDE = re.compile(
    r'\b(pg_terminate_backend|pg_cancel_backend|pg_logical_emit_message|dblink\w*)(?:"|\b)\s*(?:\(|--|/\*)', re.I
)
# A chain of NOT MATERIALIZED doubles the statement with every link, before anything can interrupt it: 22 links took
# all memory of the machine, and the database went down. It is a hint; without it the result is the same. After AS and
# blanks the word stands without NOT; a line break could end a comment that holds the AS.
DOUBLING = re.compile(r"(?<!\bAS )\bMATERIALIZED\b(?=\s*(?:\(|--|/\*))", re.I)
BLANKS = re.compile(r"[ \t\f\v]+")

# What is inside a string, a quoted name or a comment is no code; one that does not end takes the rest of the text.
LITERAL = (
    r"""(?<![\w$])[eE]'(?:[^'\\]|\\.|'')*(?:'|\Z)|'[^']*(?:'|\Z)|"[^"]*(?:"|\Z)|--[^\r\n]*|/\*.*?(?:\*/|\Z)"""
    r"|\$((?:[A-Za-z_]\w*)?)\$.*?(?:\$\1\$|\Z)"
)
LITERAL_OR_END = re.compile(LITERAL + r"|(?P<end>;(?>\s|--[^\r\n]*|/\*.*?\*/)*+\Z)", re.DOTALL)
LITERAL_OR_NUMBER = re.compile(LITERAL + r"|(?<![\w$])\$(?P<number>[0-9]{1,5})", re.DOTALL)
LITERAL_OR_NAME = re.compile(LITERAL + r"|::|:(?P<name>[A-Za-z_]\w*)", re.DOTALL)


def refuse_before_parsing(sql: str) -> None:
    """Raise QueryError for what must not even reach PostgreSQL's parser."""
    if "\0" in sql:
        raise QueryError("the statement contains a NUL character; remove it")
    if found := OUTSIDE.search(sql):
        raise QueryError(f"this server only reads: {found[1]} acts outside of the statement; leave it out")
    if DOUBLING.search(BLANKS.sub(" ", sql)):
        raise QueryError("NOT MATERIALIZED can make PostgreSQL take all memory; leave it out, the result is the same")


def without_end(sql: str) -> str:
    """The statement without the semicolon that ends it, and what stands behind that."""
    end = next((found for found in LITERAL_OR_END.finditer(sql) if found["end"]), None)
    return (sql[: end.start()] if end else sql).rstrip("; \t\r\n")


ONLY_READS = (
    "this server only reads: the statement is refused; write a SELECT, WITH, VALUES or TABLE that returns columns"
    " (explain_query shows plans, current_setting('name') settings)"
)


@contextmanager
def only_reading() -> Generator[None]:
    """Say what is meant when a statement that is right by itself is not where only a SELECT may stand: a syntax error,
    or a "feature not supported" for a WITH that modifies data. The parser's errors have a position, others do not."""
    try:
        yield
    except (asyncpg.PostgresSyntaxError, asyncpg.FeatureNotSupportedError) as exc:
        if exc.position is not None:
            raise QueryError(ONLY_READS) from None
        raise


# --------------------------------------------------------------------------------------------------- rows as JSON
#
# PostgreSQL turns every value into text, cut to a cell's width: so no type, however exotic or long, can stall the
# event loop or fill the memory of this process.


class Verbatim(str):
    """JSON already: a number, true, false, an array, an object."""


class Blob(str):
    """The size of a bytea."""


RENDER[Verbatim] = str
RENDER[Blob] = lambda size: f"\"(blob, {size} bytes; encode(column, 'hex') shows them)\""
LOSSY = re.compile(r"[0-9](?:[0-9]{15}|[eE][+-]?[0-9]{3})")  # a number that other parsers of JSON round, or overflow on
STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')
LINE_BREAK = re.compile(r"[\r\n]\s*")  # between two values: in a string, both are escaped
BRACKETS = {"[": 1, "{": 1, "]": -1, "}": -1}


def _integer(text: str) -> str:
    return Verbatim(text) if -SAFE_INTEGER <= int(text) <= SAFE_INTEGER else text


def _float(text: str) -> str:
    return text if text in ("NaN", "Infinity", "-Infinity") else Verbatim(text)


def has_surrogate(text: str) -> bool:
    """Whether a text holds half of a character, which no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _is_safe(text: str) -> bool:
    """Whether all parsers of JSON read the same from it."""
    bare = STRING.sub("", text)
    depth = max(accumulate(BRACKETS.get(character, 0) for character in bare), default=0)
    if depth > MAX_DEPTH or LOSSY.search(bare):
        return False
    return not has_surrogate(json.dumps(json.loads(text), ensure_ascii=False))


def _json(text: str) -> str:
    """As it is, unless a client's JSON parser could lose digits or give up; a row is one line."""
    suspect = text.count("[") + text.count("{") > MAX_DEPTH or "\\u" in text or LOSSY.search(text)
    if suspect and (len(text) > MAX_CELL or not _is_safe(text)):
        return text
    return Verbatim(LINE_BREAK.sub("", text))


Reader = tuple[str, Callable[[str], str] | None, bool]  # SQL of the text, what reads it, whether it can be long
AS_TEXT: Reader = ("{}::text", None, True)
AS_JSON: Reader = ("to_json({})::text", _json, True)
READERS: dict[int, Reader] = {
    **dict.fromkeys((20, 21, 23, 26), ("{}::text", _integer, False)),  # int8, int2, int4, oid
    **dict.fromkeys((700, 701), ("{}::text", _float, False)),  # float4, float8
    **dict.fromkeys((1082, 1114, 1184), ("to_json({}) #>> '{{}}'", None, False)),  # date, timestamps: ISO 8601
    **dict.fromkeys((114, 3802), ("{}::text", _json, True)),  # json, jsonb
    **dict.fromkeys((2249, 2287), AS_JSON),  # records
    **dict.fromkeys((1083, 1266, 1186, 2950), ("{}::text", None, False)),  # times, interval, uuid
    **dict.fromkeys((22, 30, 2277), AS_TEXT),  # vectors of the catalogs, which are arrays without being JSON
    16: ("{}::text", Verbatim, False),
    17: ("octet_length({})::text", Blob, False),
}


def reader_of(kind: Any) -> Reader:
    """How a column of this type is read."""
    return READERS.get(kind.oid) or (AS_JSON if kind.kind in ("array", "composite") else AS_TEXT)


def wrap(sql: str, readers: Sequence[Reader], width: int, limit: int, offset: int) -> str:
    """The statement that runs: `limit` rows from `offset` on of what the model's returns, each cell as text of at most
    `width` characters, or, if it is longer, that many and its length."""
    names = [f"c{number}" for number in range(len(readers))]
    cells = ", ".join(
        f"CASE WHEN length({name}) > {width} THEN left({name}, {width}) || length({name}) ELSE {name} END"
        if long
        else name
        for name, (_, _, long) in zip(names, readers, strict=True)
    )
    texts = ", ".join(f"{text.format(name)} AS {name}" for name, (text, _, _) in zip(names, readers, strict=True))
    # The line breaks keep a comment at the end of the statement from taking the bracket along; OFFSET 0 has each
    # text made once. LIMIT tells the planner that few rows are wanted: a sort keeps these only.
    inner = f"SELECT * FROM (\n{sql}\n) AS q LIMIT {limit} OFFSET {offset}"
    return f"SELECT {cells} FROM (SELECT {texts} FROM ({inner}) AS r({', '.join(names)}) OFFSET 0) AS s"


def cells(record: Any, readers: Sequence[Reader], width: int) -> tuple[Any, ...]:
    """A row as `json_row` takes it."""
    row: list[Any] = []
    for text, (_, read, long) in zip(record, readers, strict=True):
        if text is not None and long and len(text) > width:
            row.append(Cut(text[:width], int(text[width:])))
        else:
            row.append(text if text is None or read is None else read(text))
    return tuple(row)


async def prepare(connection: Any, sql: str) -> Any:
    """A statement as PostgreSQL has compiled it. Without a name, because asyncpg keeps those with one, and
    pg_prepared_statements would show them to other callers. Raises QueryError."""
    try:
        return await connection.prepare(sql, name="")
    except asyncpg.InternalClientError as exc:  # anyarray in pg_stats, or a record that holds it
        if not re.search("types|codec", str(exc)):
            raise
        raise QueryError(
            "a column has the type anyarray, which has no values; cast it to text, name the others"
        ) from None


async def fetch(
    connection: Any, sql: str, values: Sequence[Any], readers: Sequence[Reader], width: int, limit: int, room: int
) -> list[tuple[Any, ...]]:
    """Rows of a wrapped statement: at most `limit`, and no more than are needed to fill `room` characters."""
    weight = sum(width if long else 40 for _, _, long in readers)
    chunk = max(1, min(limit, MAX_CHUNK, CHUNK // weight))
    statement = await prepare(connection, sql)
    if limit <= chunk:
        return [cells(record, readers, width) for record in await statement.fetch(*values)]
    rows: list[tuple[Any, ...]] = []
    cursor = await statement.cursor(*values)
    while len(rows) < limit and room > 0:
        found = await cursor.fetch(min(chunk, limit - len(rows)))
        if not found:
            break
        size = sum(len(text) for record in found for text in record if text is not None)
        room -= size
        rows += [cells(record, readers, width) for record in found]
        if size < CHUNK // 16:  # short rows: fetch more of them at a time, as far as 64 MB could hold
            chunk = min(2 * chunk, MAX_CHUNK, max(chunk, 16 * CHUNK // weight))
    return rows


# ---------------------------------------------------------------------------------------------------- parameters


def positional(sql: str, params: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """The statement with $1, $2 ... in place of :name, and the values in that order. Raises QueryError."""
    named = {name.lstrip(":@$"): value for name, value in params.items()}
    order: dict[str, int] = {}

    def number(found: re.Match[str]) -> str:
        name = found["name"]
        return f"${order.setdefault(name, len(order) + 1)}" if name in named else found[0]

    sql = LITERAL_OR_NAME.sub(number, sql)
    refuse_unused(named.keys() - order.keys())
    return sql, [named[name] for name in order]


def bindable(sql: str, params: Sequence[Any] | Mapping[str, Any] | None) -> tuple[str, list[Any]]:
    """A statement with $1, $2 ... and its values."""
    refuse_too_much(sql, params)
    return positional(sql, params) if isinstance(params, Mapping) else (sql, list(params or ()))


def as_text(value: Any, kind: Any) -> str | None:
    """A parameter as PostgreSQL writes a value of this type: "5" as well as 5 for a number, "2024-01-31" for a date."""
    if value is None or isinstance(value, str):
        return value
    if kind.kind == "array" and isinstance(value, list):
        return as_array(value)
    return json.dumps(value, ensure_ascii=False)  # true, false, numbers; lists and objects for json


def as_array(values: Sequence[Any]) -> str:
    """A list as an array: {"1","two",NULL,{"3"}}."""
    items: list[str] = []
    for value in values:
        if isinstance(value, list):
            items.append(as_array(value))
        elif value is None:
            items.append("NULL")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            items.append('"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"')
    return "{" + ",".join(items) + "}"


def typed(sql: str, values: Sequence[Any], kinds: Sequence[Any]) -> tuple[str, list[str | None]]:
    """The statement with every parameter cast from text to the type that PostgreSQL found for it, and the texts:
    asyncpg would want a Python object of just the right class, a date for a date. Raises QueryError."""
    if len(values) != len(kinds):
        raise QueryError(
            f"placeholders in the statement: {len(kinds)}, values in params: {len(values)}; pass one for each"
            " ($1, $2 ... with a list, :name with an object)"
        )

    def cast(found: re.Match[str]) -> str:
        if not found["number"]:
            return found[0]
        kind = kinds[int(found["number"]) - 1]
        name = kind.name.removesuffix("[]")
        return f"CAST({found[0]}::text AS {quoted(kind.schema)}.{quoted(name)}{'[]' if name != kind.name else ''})"

    texts = [as_text(value, kind) for value, kind in zip(values, kinds, strict=True)]
    return LITERAL_OR_NUMBER.sub(cast, sql) if values else sql, texts


# ------------------------------------------------------------------------------------------------------- queries


async def compile_reading(connection: Any, sql: str, params: Any) -> tuple[str, list[str | None], Sequence[Any]]:
    """What PostgreSQL makes of the model's statement, without running it: the statement with its parameters as texts,
    these, and the columns. Raises QueryError."""
    sql, values = bindable(sql, params)
    sql = without_end(sql)
    refuse_before_parsing(sql)
    # asyncpg would fail half way through a message, and the connection with it.
    if has_surrogate(sql) or has_surrogate(json.dumps(values, ensure_ascii=False)):
        raise QueryError("the statement or a parameter holds half of a surrogate pair; send valid text")
    try:
        statement = await prepare(connection, sql)
    except asyncpg.PostgresSyntaxError as exc:
        if values and "$1" not in sql:
            raise QueryError(f"{exc.message}; placeholders are $1, $2 ... with a list, :name with an object") from None
        raise
    if not statement.get_attributes():
        raise QueryError(ONLY_READS)
    return *typed(sql, values, statement.get_parameters()), statement.get_attributes()


async def run_query(connection: Any, *, sql: str, params: Any, limit: int, offset: int, max_output: int) -> Answer:
    """What `query_database` answers."""
    sql, values, columns = await compile_reading(connection, sql, params)
    readers = [reader_of(column.type) for column in columns]
    width, room = (MAX_CELL, max_output) if max_output else (MAX_RESULT // 8, MAX_RESULT)
    with only_reading():
        rows = await fetch(
            connection, wrap(sql, readers, width, limit + 1, offset), values, readers, width, limit + 1, room
        )
    if offset and not rows:
        counted = f"SELECT count(*)::text FROM (SELECT FROM (\n{sql}\n) AS q LIMIT {offset}) AS q"
        total = await (await prepare(connection, counted)).fetchval(*values)
        raise QueryError(f"offset={offset} is past the end: the query has {total} rows; use a smaller offset")
    names = [column.name for column in columns]
    return read_rows(names, rows, limit, offset, max_output, text="column::text")


async def explain(connection: Any, *, sql: str, params: Any, max_output: int) -> Answer:
    """What `explain_query` answers: PostgreSQL's own text, which is indented."""
    if re.match(r"\s*EXPLAIN\b", sql, re.IGNORECASE):
        raise QueryError("the statement begins with EXPLAIN; pass it without")
    sql, values, _ = await compile_reading(connection, sql, params)
    with only_reading():  # in brackets: EXPLAIN of `ANALYZE DELETE ...` would run it
        plan = await (await prepare(connection, f"EXPLAIN SELECT * FROM (\n{sql}\n) AS q")).fetch(*values)
    return fit("\n".join(line[0] for line in plan), max_output, "explain a part of the statement")


# -------------------------------------------------------------------------------------------------------- schema

# Tables, views and the like that the role may read, at least a column of them.
OBJECTS = """FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'v', 'm', 'p', 'f') AND has_schema_privilege(n.oid, 'USAGE')
AND (has_table_privilege(c.oid, 'SELECT') OR has_any_column_privilege(c.oid, 'SELECT'))"""
KIND = """CASE c.relkind WHEN 'v' THEN 'view' WHEN 'm' THEN 'materialized view' WHEN 'f' THEN 'foreign table'
WHEN 'p' THEN 'partitioned table' ELSE CASE WHEN c.relispartition THEN 'partition' ELSE 'table' END END"""
OURS = "n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname NOT LIKE 'pg\\_%'"
READABLE = "a.attnum > 0 AND NOT a.attisdropped AND has_column_privilege(a.attrelid, a.attnum, 'SELECT')"

SCHEMAS = f"""SELECT coalesce(json_agg(nspname ORDER BY nspname), '[]')::text FROM pg_namespace n
WHERE has_schema_privilege(oid, 'USAGE') AND {OURS}"""
TABLES = f"""SELECT coalesce(json_agg(json_build_array(c.relname, {KIND},
(SELECT count(*) FROM pg_attribute a WHERE a.attrelid = c.oid AND {READABLE}),
CASE WHEN c.relkind IN ('r', 'm', 'p', 'f') AND c.reltuples >= 0 THEN c.reltuples::bigint END)
ORDER BY c.relname), '[]')::text {OBJECTS} AND n.nspname = $1"""
ALL_TABLES = f"""SELECT coalesce(json_agg(t), '[]')::text FROM (
SELECT json_build_array(n.nspname, c.relname, {KIND}) AS t {OBJECTS} AND {OURS} ORDER BY n.nspname, c.relname
LIMIT {MAX_RESOURCES}) AS s"""
FIND = f"""SELECT c.oid, c.relname::text, {KIND} {OBJECTS} AND n.nspname = $1 AND lower(c.relname) = lower($2)
ORDER BY c.relname <> $2 LIMIT 1"""

COLUMNS = f"""SELECT json_agg(json_build_object('name', a.attname, 'type', format_type(a.atttypid, a.atttypmod),
'nullable', NOT a.attnotnull, 'default', CASE WHEN a.attidentity <> '' THEN 'generated ' ||
CASE a.attidentity WHEN 'a' THEN 'always' ELSE 'by default' END || ' as identity' ELSE pg_get_expr(d.adbin, d.adrelid)
END, 'generated', a.attgenerated <> '') ORDER BY a.attnum)::text
FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE a.attrelid = $1 AND {READABLE}"""
INDEXES = """SELECT coalesce(json_agg(json_build_object('name', c.relname, 'columns', ARRAY(
SELECT pg_get_indexdef(i.indexrelid, k, true) FROM generate_series(1, i.indnkeyatts) AS k ORDER BY k),
'unique', i.indisunique, 'partial', i.indpred IS NOT NULL) ORDER BY c.relname), '[]')::text
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indrelid = $1"""
NAMES_OF = """ARRAY(SELECT a.attname FROM unnest({}) WITH ORDINALITY AS k(attnum, place)
JOIN pg_attribute a ON a.attnum = k.attnum AND a.attrelid = {} ORDER BY k.place)"""
PRIMARY_KEY = f"""SELECT to_json({NAMES_OF.format("o.conkey", "o.conrelid")})::text
FROM pg_constraint o WHERE o.conrelid = $1 AND o.contype = 'p'"""
ACTION = """CASE o.{} WHEN 'r' THEN 'RESTRICT' WHEN 'c' THEN 'CASCADE' WHEN 'n' THEN 'SET NULL'
WHEN 'd' THEN 'SET DEFAULT' ELSE 'NO ACTION' END"""
FOREIGN_KEYS = f"""SELECT coalesce(json_agg(json_build_object(
'columns', {NAMES_OF.format("o.conkey", "o.conrelid")}, 'table', o.confrelid::regclass::text,
'references', {NAMES_OF.format("o.confkey", "o.confrelid")}, 'on_update', {ACTION.format("confupdtype")},
'on_delete', {ACTION.format("confdeltype")}) ORDER BY o.conname), '[]')::text
FROM pg_constraint o WHERE o.conrelid = $1 AND o.contype = 'f' AND o.conparentid = 0"""


async def ask(connection: Any, sql: str, *values: Any) -> Any:
    """The answer of a query to the catalogs, which is one text in JSON."""
    return json.loads(await connection.fetchval(sql, *values) or "[]")


async def find_schema(connection: Any, schema: str) -> str:
    """A schema's name as it is written. Raises QueryError."""
    names: list[str] = await ask(connection, SCHEMAS)
    for name in (*names, "pg_catalog", "information_schema"):
        if name == schema or (name.lower() == schema.lower() and schema not in names):
            return name
    raise QueryError(f"no such schema: {schema}; the schemas are {', '.join(names[:50])}")


async def find_table(connection: Any, schema: str, table: str) -> tuple[str, int, str, str]:
    """Schema, identifier, name and type of a table or view. Raises QueryError that suggests the nearest name."""
    qualifier, _, name = table.partition(".")
    for place in ((await find_schema(connection, schema), table), (qualifier, name)):
        if found := await connection.fetchrow(FIND, *place):
            return place[0], *found
    raise QueryError(f"no such table: {table}{nearest(table, await ask(connection, ALL_TABLES))}")


def nearest(name: str, known: Sequence[tuple[str, str, str]]) -> str:
    """The end of a "no such table" message: the nearest names there are, or what there is."""
    tables = [(table, table if schema == "public" else f"{schema}.{table}") for schema, table, _ in known]
    if close := did_you_mean(name.rpartition(".")[2], tables):
        return close
    return f"; the tables are {some([full for _, full in tables])}" if known else "; the role may read no table"


async def tables(connection: Any, *, schema: str, pattern: str, offset: int, max_output: int) -> Answer:
    """What `list_tables` answers."""
    schema = await find_schema(connection, schema)
    entries = [
        {"name": name, "type": kind, "columns": columns} | ({} if rows is None else {"row_estimate": rows})
        for name, kind, columns, rows in await ask(connection, TABLES, schema)
        if is_like(name, pattern)
    ]
    return list_entries(schema, await ask(connection, SCHEMAS), entries, offset, max_output)


async def describe(connection: Any, *, schema: str, table: str, seconds: float, max_output: int) -> Answer:
    """What `describe_table` answers, as JSON."""
    schema, oid, table, kind = await find_table(connection, schema, table)
    result: dict[str, Any] = {
        "table": table,
        "schema": schema,
        "type": kind,
        "columns": await ask(connection, COLUMNS, oid),
        "primary_key": await ask(connection, PRIMARY_KEY, oid),
        "indexes": await ask(connection, INDEXES, oid),
        "foreign_keys": await ask(connection, FOREIGN_KEYS, oid),
    }
    names = [column["name"] for column in result["columns"]]
    result["sample_rows"], result["note"] = await sample(connection, schema, table, names, seconds)
    return Answer(shrink(result, max_output, "information_schema.columns"))


async def sample(
    connection: Any, schema: str, table: str, names: Sequence[str], seconds: float
) -> tuple[list[Any], str]:
    """The first rows and "", or none and why: a slow view must not hide the columns."""
    if not names:
        return [], "the table has no columns"
    columns = ", ".join(quoted(name) for name in names)
    sql = f"SELECT {columns} FROM {quoted(schema)}.{quoted(table)}"
    await connection.execute(f"SAVEPOINT sample; SET LOCAL statement_timeout = {max(1, round(seconds * 1000))}")
    try:
        statement = await prepare(connection, sql)
        readers = [reader_of(column.type) for column in statement.get_attributes()]
        wrapped = wrap(sql, readers, SAMPLE_CELL, SAMPLE_ROWS, 0)
        rows = await fetch(connection, wrapped, (), readers, SAMPLE_CELL, SAMPLE_ROWS, MAX_RESULT)
    except QueryError as exc:
        return [], f"no sample rows: {exc}"
    except LOST:
        raise
    except SQLSTATE as exc:
        await connection.execute("ROLLBACK TO sample")
        slow = exc.sqlstate == "57014"
        reason = f"took longer than {seconds:g} s" if slow else f"cannot be read ({' '.join(exc.message.split())})"
        return [], f"no sample rows: they {reason}; query single columns"
    return [json.loads(json_row(row)) for row in rows], ""


HEAD = f"""SELECT format('%I.%I', n.nspname, c.relname), c.relkind::text,
CASE WHEN c.relkind IN ('v', 'm') THEN pg_get_viewdef(c.oid) END, pg_get_partkeydef(c.oid),
CASE WHEN c.relispartition THEN (SELECT h.inhparent::regclass::text FROM pg_inherits h WHERE h.inhrelid = c.oid) END,
pg_get_expr(c.relpartbound, c.oid),
(SELECT quote_ident(s.srvname) FROM pg_foreign_table f JOIN pg_foreign_server s ON s.oid = f.ftserver
WHERE f.ftrelid = c.oid) {OBJECTS} AND c.oid = $1"""
PARTS = f"""SELECT coalesce(json_agg(part ORDER BY rank, place), '[]')::text FROM (
SELECT 1 AS rank, a.attnum::text AS place, quote_ident(a.attname) || ' ' || format_type(a.atttypid, a.atttypmod)
|| CASE WHEN a.attgenerated <> '' THEN ' GENERATED ALWAYS AS (' || pg_get_expr(d.adbin, d.adrelid) || ')'
|| CASE a.attgenerated WHEN 's' THEN ' STORED' ELSE '' END
WHEN a.attidentity <> '' THEN ' GENERATED ' || CASE a.attidentity WHEN 'a' THEN 'ALWAYS' ELSE 'BY DEFAULT' END
|| ' AS IDENTITY' WHEN d.adbin IS NOT NULL THEN ' DEFAULT ' || pg_get_expr(d.adbin, d.adrelid) ELSE '' END
|| CASE WHEN a.attnotnull THEN ' NOT NULL' ELSE '' END AS part
FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE a.attrelid = $1 AND {READABLE}
UNION ALL SELECT 2, contype::text || conname, format('CONSTRAINT %I %s', conname, pg_get_constraintdef(oid))
FROM pg_constraint WHERE conrelid = $1 AND contype IN ('p', 'u', 'c', 'f', 'x')) AS parts"""
MORE = """SELECT coalesce(json_agg(line ORDER BY line), '[]')::text FROM (
SELECT pg_get_indexdef(i.indexrelid) AS line FROM pg_index i WHERE i.indrelid = $1
AND NOT EXISTS (SELECT FROM pg_constraint o WHERE o.conindid = i.indexrelid AND o.conrelid = $1)
UNION ALL SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgrelid = $1 AND NOT tgisinternal) AS lines"""


SEE_ALSO = "query pg_get_viewdef, pg_indexes or information_schema.columns"


async def create_statement(connection: Any, *, schema: str, table: str, max_output: int) -> Answer:
    """The CREATE statement of a table or view, as the catalogs tell it, with its indexes and triggers."""
    _, oid, _, _ = await find_table(connection, schema, table)
    name, kind, view, key, parent, bound, server = await connection.fetchrow(HEAD, oid)
    if view is not None:
        first = f"CREATE {'MATERIALIZED ' if kind == 'm' else ''}VIEW {name} AS\n{view.rstrip(';')}"
    else:
        parts = ",\n    ".join(await ask(connection, PARTS, oid))
        first = f"CREATE {'FOREIGN ' if kind == 'f' else ''}TABLE {name} (\n    {parts}\n)"
        first += f" PARTITION BY {key}" if key else ""
        first += f" SERVER {server}" if server else ""  # its options may hold a password
        first += f";\nALTER TABLE {parent} ATTACH PARTITION {name} {bound}" if parent else ""
    return fit("\n".join(f"{line};" for line in [first, *await ask(connection, MORE, oid)]), max_output, SEE_ALSO)


async def all_tables(connection: Any) -> Answer:
    """Schema, name and type of what the role may read, as JSON; for the list of resources."""
    return Answer(json.dumps(await ask(connection, ALL_TABLES)))


# -------------------------------------------------------------------------------------------------------- errors

MESSAGES = {  # by the beginning of the SQLSTATE
    "57014": "the statement was stopped at the limit of {seconds:g} s; read fewer rows with WHERE or an index"
    " (explain_query shows the plan), or aggregate less",
    "55P03": "another program has locked what the statement reads; try again in a moment",
    "25006": "this server only reads: {text}; write a SELECT that does not",
    "42501": "{text}: the server's role has no right to it; list_tables shows what can be read",
    "53200": "the statement needs more memory than PostgreSQL may use; sort or group fewer rows, name fewer columns",
    "53": "PostgreSQL is out of resources ({text}); try again later, or ask for less",
    "42703": "{text}; {hint}describe_table shows the columns",
    "22P05": "{text}; a parameter holds a character that the database cannot store",
    "": "{text}; {hint}correct the statement (PostgreSQL {version})",
}


def sentence(exc: Any, seconds: float, version: int) -> str:
    """What the model is told about PostgreSQL's error: what is wrong, and what to do."""
    if "multiple commands" in exc.message:
        return "a call runs one statement; send the others in calls of their own"
    template = next(text for state, text in MESSAGES.items() if (exc.sqlstate or "").startswith(state))
    hint = "".join(f"{part[:1].lower()}{part[1:]}; " for part in (exc.hint or "").rstrip(".").split(". ") if part)
    text = exc.message.rstrip(".")
    text = text[0].lower() + text[1:] if text[1:2].islower() else text
    return " ".join(template.format(text=text, hint=hint, seconds=seconds, version=version).split())[:MAX_NAME]


# --------------------------------------------------------------------------------------------------------- pool

Operation = Callable[..., Coroutine[Any, Any, Answer]]
OPERATIONS: dict[str, Operation] = {
    function.__name__: function for function in (run_query, explain, tables, describe, create_statement, all_tables)
}


class PostgresPool(Backend):
    """Up to MAX_POOL connections; each serves one call at a time and goes on only if that ended as it should."""

    size = MAX_POOL
    dialect = Dialect(
        name="PostgreSQL",
        schema="public",
        schemas="Schema; list_tables names them all",
        params="List for $1, $2 ..., object for :name placeholders; dates and the like as text",
        reads="SELECT, WITH, VALUES, TABLE",
        values="Numeric values, integers beyond 2^53, NaN and infinities come as strings, arrays and records as JSON",
        plan="Seq Scan reads every row, Index Scan uses an index, Sort sorts",
    )

    def __init__(self, url: str, seconds: float, allow_superuser: bool) -> None:
        self._url = url  # holds the password: it goes to asyncpg, and nowhere else
        self.seconds, self.allow_superuser = seconds, allow_superuser
        self.idle: list[Any] = []
        self.opened: dict[Any, float] = {}  # when each connection was opened
        self.closing: set[asyncio.Task[None]] = set()
        milliseconds = round(seconds * 1000)
        lock = round(min(BUSY_TIME, seconds / 2) * 1000)
        self.begin = BEGIN.format(milliseconds=milliseconds, lock=lock, idle=2 * milliseconds)

    async def check(self) -> None:
        """Connect once; called when the server starts, to say what is wrong before a client waits for it."""
        connection = await self.connect()
        self.opened.pop(connection)  # it is no part of the pool; a probe may come every second
        await connection.close(timeout=GRACE)

    # -- life of a connection

    async def connect_once(self) -> Any:
        """A new connection. Raises ConfigError for what another try will not mend."""
        try:
            connection = await asyncpg.connect(
                self._url, timeout=CONNECT_TRY, server_settings={"application_name": "db-server"}
            )
        except (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidPasswordError):
            raise ConfigError("PostgreSQL refuses the role or its password; correct the URL") from None
        except asyncpg.InvalidCatalogNameError:
            raise ConfigError("PostgreSQL has no database of that name; correct the URL") from None
        except (ValueError, asyncpg.InterfaceError):  # its text would show a part of the URL
            raise ConfigError(
                "the PostgreSQL URL is not valid; write postgresql://user:password@host:5432/database, and special"
                " characters of the password percent-encoded"
            ) from None
        try:
            might = "" if self.allow_superuser else await connection.fetchval(MIGHT)
        except BaseException:
            connection.terminate()
            raise
        if might:
            connection.terminate()
            raise ConfigError(
                f"the role is, or may become, one that can do more than read ({might[:200]}); serve as one that only"
                " reads (SECURITY.md has the SQL that makes it), or start with --allow-superuser"
            )
        self.opened[connection] = time.monotonic()
        return connection

    async def connect(self) -> Any:
        """A new connection, tried for as long as a database takes to start. Raises ConfigError."""
        deadline = time.monotonic() + CONNECT_TIME
        pause = FIRST_PAUSE
        while True:
            try:
                return await self.connect_once()
            except NOT_YET as exc:
                if time.monotonic() + pause > deadline:
                    full = isinstance(exc, asyncpg.TooManyConnectionsError)
                    why = "has no connection left" if full else "does not answer"
                    raise ConfigError(
                        f"PostgreSQL {why} (tried for {CONNECT_TIME:g} s); check that it runs, and the URL"
                    ) from None
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE)

    def take(self) -> Any:
        """An idle connection that is open and young, or None."""
        while self.idle:
            connection = self.idle.pop()
            if not connection.is_closed() and time.monotonic() - self.opened[connection] < RECYCLE:
                return connection
            self.discard(connection)
        return None

    def discard(self, connection: Any) -> None:
        """Close a connection, without waiting for it."""
        self.opened.pop(connection, None)
        task = asyncio.ensure_future(self._close(connection))
        self.closing.add(task)
        task.add_done_callback(self.closing.discard)

    async def _close(self, connection: Any) -> None:
        # When a call is cancelled, asyncpg asks the server to stop the statement; closing waits until it has.
        with suppress(Exception):
            await connection.close(timeout=2 * GRACE)

    async def _warm(self) -> None:
        with suppress(ConfigError, *NOT_YET):
            for _ in range(MIN_POOL):
                async with self.slots:  # without a place of its own, it could be one connection too many
                    if len(self.opened) < MIN_POOL:  # calls may have opened them while this waited for a place
                        self.idle.append(await self.connect())

    async def open(self) -> None:
        """Begin to open the first connections before they are needed."""
        self.warming = asyncio.ensure_future(self._warm())

    async def close(self) -> None:
        """Close what is open; statements that were cancelled get the time to end."""
        self.warming.cancel()
        with suppress(asyncio.CancelledError):
            await self.warming
        while self.idle:
            self.discard(self.idle.pop())
        await asyncio.gather(*self.closing)

    # -- calls

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[Any]:
        """A connection inside a read-only transaction. Raises TimeoutError, or ConnectionError when it is lost."""
        connection = self.take() or await self.connect()
        ended = False
        try:
            async with asyncio.timeout(self.seconds + GRACE):  # set_config can lengthen PostgreSQL's own limit
                try:
                    async with asyncio.timeout(BUSY_TIME):  # half of a connection that the network has forgotten
                        await connection.execute(self.begin)
                except TimeoutError:
                    raise ConnectionError from None
                try:
                    yield connection
                except (QueryError, SQLSTATE) as exc:
                    if not isinstance(exc, LOST):
                        with suppress(Exception):
                            await connection.execute(END)
                            ended = True
                    raise
                await connection.execute(END)
                ended = True
        except asyncpg.InterfaceError:
            if connection.is_closed():
                raise ConnectionError from None
            raise
        finally:
            if ended:
                self.idle.append(connection)
            else:
                self.discard(connection)

    async def call(self, function: Callable[..., Answer], **arguments: object) -> str:
        """What an operation answers, with its trailer. Raises ToolError."""
        try:
            async with self.slot():
                return finish(await self.attempt(OPERATIONS[function.__name__], arguments))
        except (QueryError, ConfigError) as exc:
            raise ToolError(" ".join(str(exc).split())[:MAX_NAME]) from None
        except TimeoutError:
            raise ToolError(MESSAGES["57014"].format(seconds=self.seconds)) from None
        except UnicodeDecodeError:
            raise ToolError("the database holds text that is not UTF-8; read that column as convert_to()") from None

    async def attempt(self, operation: Operation, arguments: Mapping[str, object]) -> Answer:
        """Run an operation; again, on a new connection, if the one it had is lost. Raises QueryError."""
        version = 0
        for last in (False, False, True):  # the first may find a connection that was lost before, the next lose one
            try:
                async with self.transaction() as connection:
                    version = connection.get_server_version().major
                    return await operation(connection, **arguments)
            except LOST:
                while self.idle:  # the database has restarted: the others are lost as well
                    self.discard(self.idle.pop())
                if last:
                    raise QueryError(
                        "PostgreSQL closed the connection again and again; try later, or in another way"
                    ) from None
            except asyncpg.UndefinedTableError as exc:
                name = re.search(r'"(.*)"', exc.message)
                if name is None:
                    raise QueryError(sentence(exc, self.seconds, version)) from None
                known = json.loads((await self.attempt(all_tables, {})).text)
                raise QueryError(f"no such table: {name[1]}{nearest(name[1], known)}") from None
            except SQLSTATE as exc:
                raise QueryError(sentence(exc, self.seconds, version)) from None
        raise AssertionError
