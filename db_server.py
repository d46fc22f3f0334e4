# /// script
# requires-python = ">=3.11"
# dependencies = ["mcp>=2.3,<3", "aiosqlite>=0.22,<0.23"]
# ///
"""An MCP server that lets a language model query the SQLite files you name, and never change a byte of them.

    python db_server.py FILE.db [FILE.db ...]

(A postgresql:// URL is served by db_postgres.py, with the same tools.)
Trust boundary: SQL from the model runs in a worker process, on connections that SQLite itself holds read-only;
whatever it does there, the worker is killed at the time limit and cannot take more memory than its limit.
Not defended against: what the rows themselves say to the model, and reading: all of the named files is readable.
"""
# ruff: noqa: E402 -- the file has two halves. A worker runs the first and exits before the imports of the second:
# the SDK takes ten times as long to import as everything that a worker needs.

import asyncio
import json
import os
import re
import select
import signal
import sqlite3
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from itertools import groupby, islice
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import aiosqlite
from pydantic_core import to_json

# -------------------------------------------------------------------------------------------------------- limits

TIMEOUT = 5.0  # seconds for one statement, unless --timeout says otherwise
GRACE = 0.5  # seconds more until the worker is killed: the SQL was inside one C function and did not see the limit
SAMPLE_TIME = 1.0  # seconds for the sample rows of describe_table: a view may be slow, its description is not
BUSY_TIME = 2.0  # seconds to wait for a file that another program has locked
MAX_SQL = 100_000  # characters of one statement: SQLite's parser takes seconds for megabytes
MAX_REQUEST = 2_000_000  # bytes of statement and parameters together
MAX_PARAMETERS = 32_766  # SQLite's own default
MAX_ROWS = 1_000_000  # for `limit`; what fits into a result is usually far less
MAX_CELL = 10_000  # characters of one cell: a quarter of a result
MAX_NAME = 1_000  # characters of a name or an error: a column without AS is named by its whole expression
MAX_RESULT = 64 * 2**20  # characters of a result when --max-output sets no limit: the server's memory has one
CACHED = 16  # compiled statements kept for the next time; they count as SQLite's memory
MAX_HEAP = 128 * 2**20  # bytes that SQLite may allocate in one worker: sorts, groups, temporary tables, page cache
MAX_PROCESS = 768 * 2**20  # bytes of address space of one worker, where the system can limit it (Linux)
SAFE_INTEGER = 2**53  # above it, JavaScript clients lose digits
SAMPLE_ROWS = 3
SAMPLE_CELL = 200  # characters of one cell in the sample rows
MAX_COUNTED = 4 * 2**20  # bytes of a database whose rows are counted for list_tables: that takes milliseconds
MAX_FILES = 10  # SQLite attaches ten databases to a connection at most
MAX_NAMES = 5_000  # names looked through for a suggestion
MAX_SHOWN = 20  # names in an error
MAX_RESOURCES = 1_000  # tables listed as resources; others can be read all the same


class QueryError(Exception):
    """Something that the model can act on: one sentence."""


class Answer(NamedTuple):
    """A result, and what its trailer has to say."""

    text: str
    facts: Sequence[str] = ()
    resume: Mapping[str, object] = {}


# -------------------------------------------------------------------------------------------- four read-only layers
#
# No layer holds alone: mode=ro lets a query ATTACH and write other files, query_only can be switched off by the
# query itself, size limits only stop what is large, and an authorizer is a list that somebody might extend wrongly.

DENIED = {
    getattr(sqlite3, f"SQLITE_{action}"): action.replace("_", " ")
    for action in (
        "ALTER_TABLE ANALYZE ATTACH CREATE_INDEX CREATE_TABLE CREATE_TEMP_INDEX CREATE_TEMP_TABLE CREATE_TEMP_TRIGGER"
        " CREATE_TEMP_VIEW CREATE_TRIGGER CREATE_VIEW CREATE_VTABLE DELETE DETACH DROP_INDEX DROP_TABLE"
        " DROP_TEMP_INDEX DROP_TEMP_TABLE DROP_TEMP_TRIGGER DROP_TEMP_VIEW DROP_TRIGGER DROP_VIEW DROP_VTABLE"
        " FUNCTION INSERT PRAGMA REINDEX SAVEPOINT TRANSACTION UPDATE"
    ).split()
}
DENIED_FUNCTIONS = {"load_extension", "fts3_tokenizer", "optimize"}  # foreign code, and a write to an FTS index
PRAGMAS = frozenset(  # read without an argument; with one, most of them would set something
    "application_id auto_vacuum busy_timeout cache_size collation_list compile_options data_version database_list"
    " encoding foreign_keys freelist_count function_list journal_mode module_list page_count page_size pragma_list"
    " query_only recursive_triggers schema_version secure_delete synchronous temp_store user_version".split()
)
PRAGMAS_ABOUT = frozenset(  # the argument only says what to report on
    "foreign_key_check foreign_key_list index_info index_list index_xinfo integrity_check quick_check table_info"
    " table_list table_xinfo".split()
)


def quoted(name: str) -> str:
    """A name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def open_files(files: Sequence[Sequence[str]], busy_time: float = BUSY_TIME) -> sqlite3.Connection:
    """Layer 1: a connection to pairs of schema name and `file:` URI; the URIs say mode=ro. The first is `main`."""
    connection = sqlite3.connect(
        files[0][1],
        uri=True,
        isolation_level=None,
        timeout=busy_time,
        cached_statements=CACHED,
        check_same_thread=False,
    )
    try:
        for schema, uri in files[1:]:
            connection.execute("ATTACH ? AS ?", (uri, schema))
        for schema, _ in files:  # opening reads nothing; this does
            connection.execute(f"SELECT 1 FROM {quoted(schema)}.sqlite_master").fetchone()  # noqa: S608
    except BaseException:
        connection.close()
        raise
    return connection


def forbid_writing(connection: sqlite3.Connection) -> None:
    """Layer 2: the engine refuses to write, to any attached file."""
    connection.execute("PRAGMA query_only = ON")


def limit_sizes(connection: sqlite3.Connection, attached: int) -> None:
    """Layer 3: nothing more can be attached (VACUUM INTO attaches too), and no statement or heap grows too large."""
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, attached)
    connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, 4 * MAX_SQL)
    connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, MAX_PARAMETERS)
    connection.execute("PRAGMA temp_store = MEMORY")  # a sort wrote 2.5 GB of temporary files in three seconds
    connection.execute(f"PRAGMA hard_heap_limit = {MAX_HEAP}")


class Authorizer:
    """Layer 4: what a statement may do is a list, and everything that is not on it is denied at compile time."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.refused = ""
        virtual = "SELECT name FROM {}.sqlite_master WHERE type = 'table' AND rootpage = 0"
        schemas = [row[1] for row in connection.execute("PRAGMA database_list")]
        names = [row[0] for schema in schemas for row in connection.execute(virtual.format(quoted(schema)))]
        # An R-tree prepares the statements that would write its shadow tables before it can be read. Run from a
        # query, they are stopped by the other layers.
        self.prepared = {f"{name}_{part}" for name in names for part in ("node", "rowid", "parent")}

    def __call__(self, action: int, name: str | None, detail: str | None, schema: str | None, _: str | None) -> int:
        """SQLite asks this while it compiles a statement; the meaning of the names depends on the action."""
        match action:
            case sqlite3.SQLITE_SELECT | sqlite3.SQLITE_READ | sqlite3.SQLITE_RECURSIVE if name != "sqlite_stmt":
                return sqlite3.SQLITE_OK  # that table shows the statements of other callers
            case sqlite3.SQLITE_FUNCTION:
                name, allowed = detail, (detail or "").lower() not in DENIED_FUNCTIONS
            case sqlite3.SQLITE_PRAGMA:
                allowed = (name or "").lower() in (PRAGMAS_ABOUT if detail else PRAGMAS | PRAGMAS_ABOUT)
            case sqlite3.SQLITE_UPDATE if name == "sqlite_master":
                allowed = schema == "main"  # every virtual table, such as json_each, needs it to declare its columns
            case sqlite3.SQLITE_INSERT | sqlite3.SQLITE_UPDATE | sqlite3.SQLITE_DELETE:
                allowed = name in self.prepared
            case _:
                allowed = False
        if not allowed and not self.refused:
            self.refused = f"{DENIED.get(action, 'this statement')} {name or ''}".strip()
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


def open_read_only(files: Sequence[Sequence[str]]) -> tuple[sqlite3.Connection, Authorizer]:
    """A connection with all four layers; the authorizer last, because it would deny the others their PRAGMAs."""
    connection = open_files(files)
    forbid_writing(connection)
    limit_sizes(connection, len(files) - 1)
    connection.text_factory = text_reader(
        MAX_NAME
    )  # a name that is not UTF-8, the file's own too, is no reason to fail
    authorizer = Authorizer(connection)
    connection.set_authorizer(authorizer)
    return connection, authorizer


# ------------------------------------------------------------------------------------------------- rows as JSON

Row = tuple[Any, ...]
_encode_text = json.encoder.encode_basestring  # a text in quotes; JSONEncoder.encode takes a detour to it
_INFINITE = {float("inf"): '"Infinity"', float("-inf"): '"-Infinity"'}  # not JSON; SQLite stores NaN as NULL
_CONTINUATION = bytes(range(0x80, 0xC0))  # what follows the first byte of a UTF-8 character


class Cut(NamedTuple):
    """The beginning of a text that is too long for a cell."""

    head: str
    length: int  # of the whole, in characters


def text_reader(width: int) -> Callable[[bytes], str | Cut]:
    r"""What reads a TEXT cell of at most `width` characters. Bytes that are no UTF-8 become `\xNN`: an error would
    hide the row. SQLite hands over one cell at a time, so cutting here keeps a row of many long texts out of memory.
    """

    def read(data: bytes) -> str | Cut:
        if len(data) <= width:
            return data.decode("utf-8", "backslashreplace")
        head = data[: 4 * width].decode("utf-8", "backslashreplace")[:width]
        length = len(data.translate(None, _CONTINUATION))
        return Cut(head, length) if length > width else head

    return read


def shorten(value: Any, width: int) -> Any:
    """A cell with its text cut at `width` characters."""
    if isinstance(value, Cut):
        return Cut(value.head[:width], value.length)
    return Cut(value[:width], len(value)) if isinstance(value, str) and len(value) > width else value


RENDER: dict[type, Callable[[Any], str]] = {
    str: _encode_text,
    int: lambda value: str(value) if -SAFE_INTEGER <= value <= SAFE_INTEGER else f'"{value}"',
    float: lambda value: _INFINITE.get(value) or repr(value),
    bytes: lambda value: f'"(blob, {len(value)} bytes; hex(column) shows them)"',
    Cut: lambda cut: _encode_text(f"{cut.head}… (cut: {len(cut.head)} of {cut.length} characters)"),
    type(None): lambda _: "null",
}


def json_row(row: Row) -> str:
    """One row as a JSON list."""
    return "[" + ",".join([RENDER[type(value)](value) for value in row]) + "]"


PLAIN = frozenset({str, int, float, type(None)})
BATCH = 64  # rows fetched at once: as many large blobs still fit into a worker's memory


def is_plain(column: Sequence[Any]) -> bool:
    """Whether the cells are all JSON as they are; infinities are not, but the encoder knows them."""
    kinds = set(map(type, column))
    if int in kinds and not all(-SAFE_INTEGER <= cell <= SAFE_INTEGER for cell in column if type(cell) is int):
        return False
    return kinds <= PLAIN


def json_rows(rows: Iterable[Row], room: int) -> Iterator[tuple[Row, str]]:
    """Each row, and the same as a JSON list. Rows are looked at by the column, and plain ones are encoded by pydantic's
    Rust: both are several times as fast as Python is with one cell after the other."""
    rows, size = iter(rows), 1
    while batch := list(islice(rows, size)):
        plain, line = all(map(is_plain, zip(*batch, strict=True))), ""
        for row in batch:
            line = to_json(row, inf_nan_mode="strings").decode() if plain else json_row(row)
            room -= len(line)
            yield row, line
        # Not many more than there is room for: a row may take its time, and be for nothing.
        size = max(1, min(2 * size, BATCH, room // len(line)))


def squeeze(row: Row, room: int) -> Row:
    """A row that does not fit, with its texts cut until it does: each cell gets its share."""
    for divisor in (2, 8, 32):  # the share is in characters; escaped, one can take six
        shorter = tuple(shorten(value, room // (divisor * len(row))) for value in row)
        if len(json_row(shorter)) <= room:
            return shorter
    raise QueryError(
        f"one row of {len(row)} columns does not fit into a result of {room} characters; name fewer columns"
    )


def read_rows(
    names: Iterable[str], rows: Iterable[Row], limit: int, offset: int, max_output: int, text: str = "column"
) -> Answer:
    """The rows, of which the first is number `offset`, as far as `limit` and `max_output` allow; one more is fetched to
    know if there is."""
    names = [name if len(name) <= MAX_NAME else name[:MAX_NAME] + "…" for name in names]
    header = '{"columns": ' + json.dumps(names, ensure_ascii=False) + ', "rows": ['
    max_output = max_output or MAX_RESULT
    room = max_output - len(header) - min(300, max_output // 4)  # for the last line and the trailer
    if room < max_output // 4:
        raise QueryError(f"the column names alone take {len(header)} characters; name fewer columns, or shorter ones")
    lines: list[str] = []
    used = cut = 0
    more = False
    for row, line in json_rows(islice(rows, limit + 1), room):
        if len(lines) == limit:
            more = True
            break
        used += len(line) + 2
        if used > room:
            if lines:
                more = True
                break
            row = squeeze(row, room)
            line = json_row(row)
        cut += sum(type(value) is Cut for value in row) if "… (cut: " in line else 0
        lines.append(line)
    facts = [f"rows {offset + 1}-{offset + len(lines)} shown"] if more else []
    if cut:
        facts.append(f"{cut} cells cut, substr({text}, start, length) reads on in one")
    body = "\n" + ",\n".join(lines) + "\n" if lines else ""
    result = f'{header}{body}], "row_count": {len(lines)}, "truncated": {"true" if more else "false"}}}'
    return Answer(result, facts, {"offset": offset + len(lines)} if more else {})


# ------------------------------------------------------------------------------------------------------- queries


def refuse_too_much(sql: str, params: Sequence[Any] | Mapping[str, Any] | None) -> None:
    """Raise QueryError for a statement that takes too long to parse, or that has too many parameters."""
    if len(sql) > MAX_SQL:
        raise QueryError(f"the statement has {len(sql)} characters, more than {MAX_SQL}; pass long values as params")
    if len(params or ()) > MAX_PARAMETERS:
        raise QueryError(f"{len(params or ())} parameters are more than {MAX_PARAMETERS}; pass fewer")


def refuse_unused(names: Collection[str]) -> None:
    """Raise QueryError if there are parameters that the statement does not ask for: their names may be misspelt."""
    if names:
        raise QueryError(
            f"the statement has no placeholder for {', '.join(sorted(names))}; write :name for each, or leave it out"
        )


class Named(dict[str, Any]):
    """Parameters by name that remember which of them the statement asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__({name.lstrip(":@$"): value for name, value in values.items()})
        self.unused = set(self)

    def __getitem__(self, name: str) -> Any:
        self.unused.discard(name)
        return super().__getitem__(name)


def bindable(params: Sequence[Any] | Mapping[str, Any] | None) -> Sequence[Any] | Named:
    """Parameters as sqlite3 takes them. Raises QueryError for what has no SQL type."""
    values = params.items() if isinstance(params, Mapping) else enumerate(params or (), 1)
    for key, value in values:
        if isinstance(value, list | dict):
            raise QueryError(f"parameter {key} is a list or an object; pass text, numbers, true, false or null")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise QueryError(f"parameter {key} is {value}, beyond SQLite's 64-bit integers; pass it as text")
    return Named(params) if isinstance(params, Mapping) else list(params or ())


def execute(connection: sqlite3.Connection, sql: str, params: Any) -> sqlite3.Cursor:
    """Run the model's statement, one that returns rows. Raises QueryError, or what sqlite3 raises."""
    refuse_too_much(sql, params)
    values = bindable(params)
    cursor = connection.execute(sql.rstrip("; \t\r\n"), values)
    if cursor.description is None:
        raise QueryError("the statement returns no rows; write one that does, such as SELECT, WITH or VALUES")
    if isinstance(values, Named):
        refuse_unused(values.unused)
    return cursor


def run_query(
    connection: sqlite3.Connection, *, sql: str, params: Any, limit: int, offset: int, max_output: int
) -> Answer:
    """What `query_database` answers."""
    connection.text_factory = text_reader(MAX_CELL if max_output else MAX_RESULT // 8)
    cursor = execute(connection, sql, params)
    try:
        for skipped in range(offset):
            if cursor.fetchone() is None:
                raise QueryError(f"offset={offset} is past the end: the query has {skipped} rows; use a smaller offset")
        return read_rows((name for name, *_ in cursor.description), cursor, limit, offset, max_output)
    finally:
        cursor.close()  # an open cursor keeps its read lock, and another program's write waits for it


def explain(connection: sqlite3.Connection, *, sql: str, params: Any, max_output: int) -> Answer:
    """What `explain_query` answers: one line a step, indented below the step that it belongs to."""
    if re.match(r"\s*EXPLAIN\b", sql, re.IGNORECASE):
        raise QueryError("the statement begins with EXPLAIN; pass it without")
    # The authorizer is not asked about VACUUM before it runs, so look at what the statement was compiled to.
    for _, operation, _, writes, *_ in execute(connection, f"EXPLAIN {sql}", params):
        if operation == "Vacuum" or (operation == "Transaction" and writes):
            raise QueryError(MESSAGES["SQLITE_READONLY"])
    cursor = execute(connection, f"EXPLAIN QUERY PLAN {sql}", params)
    depth = {0: -1}
    lines: list[str] = []
    for step, parent, _, detail in cursor:
        depth[step] = depth.get(parent, -1) + 1
        lines.append("  " * depth[step] + f"- {detail}")
    return fit("\n".join(lines) or "- no table is read", max_output, "explain a part of the statement")


def fit(text: str, max_output: int, rest: str) -> Answer:
    """As many lines as a result may hold, or as many characters of a single long one; `rest` says how to see more."""
    if not max_output or len(text) <= max_output:
        return Answer(text)
    shown = text[: max(0, max_output - 100)]
    shown = shown[: shown.rfind("\n")] if "\n" in shown else shown
    return Answer(shown, [f"characters 1-{len(shown)} of {len(text)} shown, for the rest {rest}"])


# -------------------------------------------------------------------------------------------------------- schema

OBJECTS = """SELECT name, type, ncol FROM pragma_table_list
 WHERE schema = ? AND type <> 'shadow' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY name"""
INDEX_COLUMNS = "SELECT name FROM pragma_index_info(?, ?)"
FOREIGN_KEYS = """SELECT id, "from", "to", "table", on_update, on_delete FROM pragma_foreign_key_list(?, ?)
 ORDER BY id, seq"""


def schemas_of(connection: sqlite3.Connection) -> list[str]:
    """The names of the attached databases."""
    return [row[1] for row in connection.execute("PRAGMA database_list") if row[1] != "temp"]


def find_schema(connection: sqlite3.Connection, schema: str) -> str:
    """A schema's name as it is written. Raises QueryError."""
    names = schemas_of(connection)
    for name in names:
        if name.lower() == schema.lower():
            return name
    raise QueryError(f"no such schema: {schema}; the schemas are {', '.join(names)}")


def find_table(connection: sqlite3.Connection, schema: str, table: str) -> tuple[str, str, str]:
    """Schema, name and type of a table or view. Raises QueryError that suggests the nearest name."""
    known = (
        "SELECT schema, name, type FROM pragma_table_list WHERE schema = ? COLLATE NOCASE AND name = ? COLLATE NOCASE"
    )
    qualifier, _, name = table.partition(".")
    for place in ((find_schema(connection, schema), table), (qualifier, name)):
        if found := connection.execute(known, place).fetchone():
            return found
    raise QueryError(f"no such table: {table}{nearest(connection, 'table', table, '')}")


def row_estimates(connection: sqlite3.Connection, schema: str, tables: Iterable[str]) -> dict[str, int]:
    """How many rows the tables have, as far as that costs nothing: from ANALYZE, or counted in a small database."""
    prefix = quoted(schema)
    pages = connection.execute(f"PRAGMA {prefix}.page_count").fetchone()[0]
    size = connection.execute(f"PRAGMA {prefix}.page_size").fetchone()[0]
    counts: dict[str, int] = {}
    if pages * size <= MAX_COUNTED:
        for table in tables:
            with suppress(sqlite3.Error):  # a damaged table is still listed
                counts[table] = connection.execute(f"SELECT count(*) FROM {prefix}.{quoted(table)}").fetchone()[0]  # noqa: S608
        return counts
    with suppress(sqlite3.Error, ValueError):  # no ANALYZE, no such table
        for table, stat in connection.execute(f"SELECT tbl, stat FROM {prefix}.sqlite_stat1"):  # noqa: S608
            counts[table] = max(counts.get(table, 0), int(stat.split()[0]))
    return counts


def is_like(name: str, pattern: str) -> bool:
    """Whether a name matches a glob, in any case; also one as SQLite writes it, or with the % of LIKE."""
    return fnmatchcase(name.lower(), (pattern or "*").lower().replace("%", "*").replace("[^", "[!"))


def tables(connection: sqlite3.Connection, *, schema: str, pattern: str, offset: int, max_output: int) -> Answer:
    """What `list_tables` answers: one table a line, in the form of a query's result."""
    schema = find_schema(connection, schema)
    found = [row for row in connection.execute(OBJECTS, (schema,)) if is_like(row[0], pattern)]
    estimates = row_estimates(connection, schema, [name for name, kind, _ in found if kind == "table"])
    entries = [
        {"name": name[:MAX_NAME], "type": kind}
        | ({} if kind == "virtual" else {"columns": columns})  # what SQLite counts there includes hidden columns
        | ({"row_estimate": estimates[name]} if name in estimates else {})
        for name, kind, columns in found
    ]
    return list_entries(schema, schemas_of(connection), entries, offset, max_output)


def list_entries(
    schema: str, schemas: Sequence[str], entries: Sequence[Mapping[str, Any]], offset: int, max_output: int
) -> Answer:
    """The tables of a schema from `offset` on, one a line, in the form of a query's result."""
    if offset and offset >= len(entries):
        raise QueryError(f"offset={offset} is past the end: there are {len(entries)} tables; use a smaller offset")
    lines: list[str] = []
    used = 0
    for entry in entries[offset:]:
        line = json.dumps(entry, ensure_ascii=False)
        used += len(line) + 2
        if lines and max_output and used > max_output - 500:
            break
        lines.append(line)
    end = offset + len(lines)
    head = {"schema": schema, "schemas": schemas}
    body = "\n" + ",\n".join(lines) + "\n" if lines else ""
    text = f'{json.dumps(head, ensure_ascii=False)[:-1]}, "tables": [{body}], "table_count": {len(entries)}}}'
    more = end < len(entries)
    facts = [f"tables {offset + 1}-{end} of {len(entries)} shown"] if more else []
    return Answer(text, facts, {"offset": end} if more else {})


def describe(connection: sqlite3.Connection, *, schema: str, table: str, seconds: float, max_output: int) -> Answer:
    """What `describe_table` answers, as JSON."""
    schema, table, kind = find_table(connection, schema, table)
    info = connection.execute(
        'SELECT name, type, "notnull", dflt_value, pk, hidden FROM pragma_table_xinfo(?, ?) WHERE hidden <> 1',
        (table, schema),
    ).fetchall()
    keys = [row[0] for row in sorted(info, key=lambda row: row[4]) if row[4]]
    columns = [
        {
            "name": name,
            "type": declared,
            # A lone INTEGER PRIMARY KEY is the row's number: SQLite reports it as nullable, but it never is NULL.
            "nullable": not (notnull or (keys == [name] and declared.upper() == "INTEGER")),
            "default": default,
            "generated": hidden > 1,
        }
        for name, declared, notnull, default, _, hidden in info
    ]
    found = connection.execute(
        'SELECT name, "unique", partial FROM pragma_index_list(?, ?)', (table, schema)
    ).fetchall()
    indexes = [
        {
            "name": name,
            "columns": [row[0] or "(expression)" for row in connection.execute(INDEX_COLUMNS, (name, schema))],
            "unique": bool(unique),
            "partial": bool(partial),
        }
        for name, unique, partial in found
    ]
    result: dict[str, Any] = {"table": table, "schema": schema, "type": kind, "columns": columns, "primary_key": keys}
    result |= {"indexes": indexes, "foreign_keys": foreign_keys(connection, schema, table)}
    result["sample_rows"], result["note"] = sample(connection, schema, table, seconds)
    return Answer(shrink(result, max_output))


def foreign_keys(connection: sqlite3.Connection, schema: str, table: str) -> list[dict[str, Any]]:
    """The foreign keys of a table, one entry a key however many columns it has."""
    rows = connection.execute(FOREIGN_KEYS, (table, schema)).fetchall()
    keys = [list(key) for _, key in groupby(rows, itemgetter(0))]
    return [
        {
            "columns": [column for _, column, *_ in key],
            "table": key[0][3],
            "references": [to for _, _, to, *_ in key if to is not None],  # NULL: the parent's primary key
            "on_update": key[0][4],
            "on_delete": key[0][5],
        }
        for key in keys
    ]


def sample(connection: sqlite3.Connection, schema: str, table: str, seconds: float) -> tuple[list[Any], str]:
    """The first rows of a table and "", or no rows and why: a slow view or a huge value must not hide the columns."""
    limit_time(connection, seconds)
    connection.text_factory = text_reader(SAMPLE_CELL)
    statement = f"SELECT * FROM {quoted(schema)}.{quoted(table)} LIMIT {SAMPLE_ROWS}"  # noqa: S608
    try:
        rows = connection.execute(statement).fetchall()
    except (sqlite3.Error, MemoryError) as exc:
        slow = getattr(exc, "sqlite_errorname", "") == "SQLITE_INTERRUPT"
        reason = f"took longer than {seconds:g} s" if slow else "cannot be read, a value may be too large"
        return [], f"no sample rows: they {reason}; query single columns"
    return [json.loads(json_row(row)) for row in rows], ""


def shrink(result: dict[str, Any], max_output: int, elsewhere: str = "pragma_table_xinfo(table, schema)") -> str:
    """A table description as JSON that fits: a table can have 2,000 columns, and any number of indexes."""
    text = json.dumps(result, ensure_ascii=False)
    totals = {part: len(result[part]) for part in ("columns", "primary_key", "indexes", "foreign_keys")}
    while max_output and len(text) > max_output:
        longest = result[max(totals, key=lambda part: len(str(result[part])))]
        if not result["sample_rows"]:
            if len(longest) < 2:
                raise QueryError(
                    f"the description does not fit into {max_output} characters; query {elsewhere} instead"
                )
            del longest[len(longest) * 3 // 4 :]
        result["sample_rows"] = []
        lists = {part: len(result[part]) for part in totals}
        cut = [f", {part} 1-{shown} of {totals[part]} shown" for part, shown in lists.items() if shown < totals[part]]
        result["note"] = (
            f"too large for one result, no sample rows{''.join(cut)}; query_database with {elsewhere} lists all columns"
        )
        text = json.dumps(result, ensure_ascii=False)
    return text


def create_statement(connection: sqlite3.Connection, *, schema: str, table: str, max_output: int) -> Answer:
    """The CREATE statement of a table or view, followed by those of its indexes and triggers."""
    schema, table, _ = find_table(connection, schema, table)
    rows = connection.execute(
        f"SELECT sql FROM {quoted(schema)}.sqlite_master WHERE tbl_name = ? AND sql IS NOT NULL"  # noqa: S608
        " ORDER BY name <> tbl_name, rowid",
        (table,),
    )
    return fit("\n".join(f"{row[0]};" for row in rows), max_output, "query substr(sql, start, length) of sqlite_master")


def all_tables(connection: sqlite3.Connection) -> Answer:
    """Schema, name and type of every table and view, as JSON; for the list of resources."""
    schemas = schemas_of(connection)
    found = [[s, *row[:2]] for s in (schemas[1:] or schemas) for row in connection.execute(OBJECTS, (s,))]
    return Answer(json.dumps(found[:MAX_RESOURCES]))


# -------------------------------------------------------------------------------------------------------- errors


def did_you_mean(name: str, known: Iterable[tuple[str, str]]) -> str:
    """The end of a "no such" message: the nearest of the known names, each with what it must be called; or nothing."""
    import difflib  # only here: a worker starts faster without it

    names: dict[str, list[str]] = {}
    for candidate, full in known:
        names.setdefault(candidate.lower(), []).append(full)
    close = difflib.get_close_matches(name.strip("\"'`[]").lower()[:100], names, 3, 0.6)
    found = [full for match in close for full in names[match]]
    return f"; did you mean {' or '.join(found[:5])}?" if found else ""


def nearest(connection: sqlite3.Connection, kind: str, name: str, sql: str) -> str:
    """The end of a "no such" message: the nearest names there are, or what there is."""
    schema, _, name = name.partition(" - should")[0].rpartition(".")  # newer versions of SQLite add a hint of theirs
    schemas = schemas_of(connection)
    if kind == "table" and schema and schema.lower() not in (known.lower() for known in schemas):
        return f"; the schemas are {', '.join(schemas)}"
    names = NAMES[kind](connection, sql)
    if close := did_you_mean(name, names.items()):
        return close
    if kind == "table":
        return f"; the tables are {some(list(names.values()))}" if names else "; the database has no tables"
    return "; describe_table shows the columns" if kind == "column" else f"; SQLite {sqlite3.sqlite_version} has none"


def some(names: Sequence[str]) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - MAX_SHOWN} more (list_tables shows them)" if len(names) > MAX_SHOWN else ""
    return ", ".join(names[:MAX_SHOWN]) + more


def _table_names(connection: sqlite3.Connection, _: str = "") -> dict[str, str]:
    names: dict[str, str] = {}
    found = connection.execute(
        "SELECT schema, name FROM pragma_table_list WHERE type <> 'shadow' AND name NOT LIKE 'sqlite^_%' ESCAPE '^'"
        " ORDER BY schema <> 'main', schema, name"
    )
    for schema, name in found.fetchmany(MAX_NAMES):  # describe_table finds those outside of `main` by their full names
        names.setdefault(name, name if schema == "main" else f"{schema}.{name}")
    return names


def _column_names(connection: sqlite3.Connection, sql: str) -> dict[str, str]:
    """Columns of the tables that the statement names come first."""
    names: dict[str, str] = {}
    for table in sorted(_table_names(connection), key=lambda table: table.lower() not in sql.lower()):
        if len(names) < MAX_NAMES:
            with suppress(sqlite3.Error):  # a view of a table that is gone
                names |= {row[1]: row[1] for row in connection.execute(f"PRAGMA table_xinfo({quoted(table)})")}
    return names


NAMES: dict[str, Callable[[sqlite3.Connection, str], dict[str, str]]] = {
    "table": _table_names,
    "column": _column_names,
    "function": lambda connection, _: dict(connection.execute("SELECT DISTINCT name, name FROM pragma_function_list")),
}
BINDINGS = re.compile(r"current statement uses (\d+), and there are (\d+) supplied")
NO_SUCH = re.compile(r"no such (table|column|function): (.+)", re.DOTALL)


def message_for(exc: BaseException) -> str | None:
    """What MESSAGES has for an error."""
    code, text = getattr(exc, "sqlite_errorname", "SQLITE_NOMEM" if isinstance(exc, MemoryError) else ""), str(exc)
    return next(
        (message for start, message in MESSAGES.items() if code.startswith(start) or text.startswith(start)), None
    )


def sentence(connection: sqlite3.Connection, exc: BaseException, sql: str, refused: str, seconds: float) -> str:
    """What the model is told about an error: what is wrong, and what to do."""
    text = str(exc)
    if isinstance(exc, UnicodeDecodeError):
        return "a column's name is not UTF-8; name the columns and give them aliases with AS"
    if isinstance(exc, UnicodeEncodeError):
        return "the statement or a parameter holds half of a surrogate pair, which is no character; send valid text"
    if "\0" in sql:
        return "the statement contains a NUL character; remove it, or pass the text in params"
    if counts := BINDINGS.search(text):
        return f"placeholders in the statement: {counts[1]}, values in params: {counts[2]}; pass one for each"
    if missing := re.search(r"binding parameter (\S+?)\.?$", text):
        return f"params has no value for {missing[1]}; pass one for each placeholder"
    if found := NO_SUCH.search(text):
        with suppress(sqlite3.Error):
            return f"no such {found[1]}: {found[2]}{nearest(connection, found[1], found[2], sql)}"
    if message := message_for(exc):
        return message.format(refused=refused or "it", seconds=seconds)
    if not isinstance(exc, sqlite3.Error | sqlite3.Warning):
        traceback.print_exception(exc)  # to the log; to the model it says nothing
        return "the statement failed inside the server, and the reason is in its log; write it in another way"
    if text[1:2].islower():
        text = text[0].lower() + text[1:]
    return f"{text.rstrip('.')}; correct the statement (SQLite {sqlite3.sqlite_version})"


WAL_DIRECTORY = (  # readers of a WAL database announce themselves in a file beside it
    "the database is in WAL mode and its directory cannot be written to; make it writable, or serve a copy on which"
    " PRAGMA journal_mode = DELETE was run"
)
MESSAGES = {  # the beginning of SQLite's name for the error, or of its text
    "SQLITE_AUTH": "this server only reads: {refused} is refused; write a SELECT, or a WITH, VALUES, EXPLAIN or"
    " PRAGMA that reads",
    "not authorized": "this server only reads: {refused} is refused; use another function",
    "SQLITE_INTERRUPT": "the statement was stopped at the limit of {seconds:g} s; read fewer rows with WHERE or an"
    " index (explain_query shows the plan), or aggregate less",
    "SQLITE_TOOBIG": "a value or the statement is larger than SQLite's limit; leave the column out, or pass less",
    "SQLITE_NOMEM": f"the statement needs more than the {MAX_HEAP // 2**20} MB of memory it may use; sort or group"
    " fewer rows, name fewer columns, and of huge values read only length()",
    "SQLITE_BUSY": "another program has locked the database; try again in a moment",
    "SQLITE_LOCKED": "another program has locked the database; try again in a moment",
    "SQLITE_NOTADB": "the file is not an SQLite database, or is encrypted; start the server with another file",
    "SQLITE_CORRUPT": "the database file is damaged where the statement reads; query other tables, or restore it",
    "SQLITE_READONLY_CANTINIT": WAL_DIRECTORY,
    "SQLITE_READONLY_DIRECTORY": WAL_DIRECTORY,
    "SQLITE_READONLY_": "the database must be recovered after a crash, which needs writing; open it once elsewhere",
    "SQLITE_READONLY": "this server only reads: the statement would write; write a SELECT",
    "SQLITE_CANTOPEN": "the database file cannot be opened; check that it is there and readable",
    "SQLITE_IOERR": "the database file cannot be read (input/output error); try again",
    "You can only execute one": "a call runs one statement; send the others in calls of their own",
    "Binding ": "params does not fit the placeholders; pass a list for ?, an object for :name",
}


# -------------------------------------------------------------------------------------------------- worker process
#
# Nothing interrupts SQLite inside one C function or while it compiles a statement; killing the process does. So SQL
# runs in worker processes. A frame is eight bytes of length and a body: JSON requests in; out, one line of JSON and
# the text of the result.

REQUESTS: dict[str, Callable[..., Answer]] = {
    function.__name__: function for function in (run_query, explain, tables, describe, create_statement, all_tables)
}


def limit_time(connection: sqlite3.Connection, seconds: float) -> None:
    """Interrupt what runs on the connection after `seconds`; asking every 10,000 steps costs next to nothing."""
    deadline = time.monotonic() + seconds
    connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)


def limit_memory() -> None:
    """Have the system refuse this process more memory: rows of many huge blobs are no part of SQLite's heap."""
    if sys.platform != "win32":
        import resource

        with suppress(OSError, ValueError):  # not every system can, and a stricter limit may be set already
            resource.setrlimit(resource.RLIMIT_AS, (MAX_PROCESS, MAX_PROCESS))


def failure(error: str, *, retire: bool = False) -> bytes:
    """The body that reports an error, as one line; it may quote a statement or a name of any length. A worker that
    ran out of memory asks to be retired: what is left in its memory must not cost the next caller."""
    return json.dumps({"error": " ".join(error.split())[:MAX_NAME], "retire": retire}).encode()


def frame(body: bytes) -> bytes:
    """A body as it travels between server and worker."""
    return len(body).to_bytes(8, "big") + body


class Reader(aiosqlite.Connection):
    """A read-only connection on a thread of its own, which answers requests on standard output."""

    def __init__(self, files: Sequence[Sequence[str]], seconds: float) -> None:
        self._files, self._seconds = files, seconds
        super().__init__(self._open, iter_chunk_size=64)

    def _open(self) -> sqlite3.Connection:
        connection, self._authorizer = open_read_only(self._files)
        return connection

    async def serve(self) -> None:
        """Answer requests until there are no more, in one visit to the thread: a visit takes longer than a query."""
        await self._execute(self._serve)  # pyright: ignore[reportUnknownMemberType] -- aiosqlite has no type

    def _serve(self) -> None:
        while request := receive():
            self._answer(request)

    def _answer(self, request: bytes) -> None:
        connection, sql = self._conn, ""
        self._authorizer.refused = ""
        try:
            operation, arguments = json.loads(request)
            sql = arguments.get("sql", "")
            limit_time(connection, self._seconds)
            connection.text_factory = text_reader(MAX_RESULT)
            text, facts, resume = REQUESTS[operation](connection, **arguments)
            body = json.dumps({"facts": facts, "resume": resume}).encode() + b"\n" + text.encode()
        except QueryError as exc:
            body = failure(str(exc))
        except Exception as exc:
            limit_time(connection, SAMPLE_TIME)
            error = sentence(connection, exc, sql, self._authorizer.refused, self._seconds)
            body = failure(error, retire=isinstance(exc, MemoryError))
        send(body)


def send(body: bytes) -> None:
    """Answer the server."""
    sys.stdout.buffer.write(frame(body))
    sys.stdout.buffer.flush()


def receive() -> bytes:
    """The next request; nothing when the server has gone."""
    return sys.stdin.buffer.read(int.from_bytes(sys.stdin.buffer.read(8), "big"))


def end_with_server() -> None:
    """Wait until the server closes its end of standard input, and end this process, whatever SQLite is doing."""
    server = select.poll()
    server.register(sys.stdin, 0)  # hanging up is always reported
    server.poll()
    os._exit(0)


async def work() -> None:
    """A worker's life: open the files it is told of, say so, and answer one request after the other."""
    if sys.platform != "win32":
        threading.Thread(target=end_with_server, daemon=True).start()
    reader = Reader(**json.loads(receive()))
    try:
        await reader
    except (sqlite3.Error, MemoryError) as exc:
        send(failure(message_for(exc) or MESSAGES["SQLITE_CANTOPEN"]))
        os._exit(1)
    send(b"{}")
    await reader.serve()
    os._exit(0)


WORKER = "--worker"  # how the server starts this file when it needs a worker
if __name__ == "__main__" and sys.argv[1:] == [WORKER]:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process on the terminal; the server ends us
    limit_memory()
    asyncio.run(work())


# ------------------------------------------------------------------------------------------- pool of worker processes

import argparse
import stat
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import anyio
from common import READ_ONLY, ConfigError, Options, Server, argument_parser, in_thread_of_its_own, serve, trailer
from mcp.server.mcpserver.exceptions import ResourceError, ResourceNotFoundError, ToolError
from mcp.server.mcpserver.resources.templates import ResourceSecurity
from mcp.shared.exceptions import MCPError
from mcp_types import INTERNAL_ERROR, Resource
from pydantic import BaseModel, Field

POSTGRES = ("postgresql://", "postgres://")
POOL_SIZE = 4  # statements that run at once: a slow one does not hold up a fast one
PROGRAM = os.path.abspath(__file__)
RECYCLE = 3600.0  # seconds until a worker is replaced: nothing that a query leaves behind outlives it
NOT_STARTED = "the process that runs SQL did not start, the server's log may say why; try again in a moment"
START_TIME = 10.0  # seconds for a worker to start, on a busy machine; 0.06 are usual


class Dialect(NamedTuple):
    """What the model is told about one kind of database."""

    name: str = "SQLite"
    schema: str = "main"
    schemas: str = "Attached file; main is the first"
    params: str = "List for ? placeholders, object for :name placeholders"
    reads: str = "SELECT, WITH, VALUES, EXPLAIN, PRAGMA table_info ..."
    values: str = "Integers beyond 2^53 and infinities come as strings"
    plan: str = "SCAN reads every row, SEARCH uses an index, TEMP B-TREE sorts"


class Backend(Protocol):
    """A database, as the tools need it: `Pool` here for SQLite, `PostgresPool` in db_postgres.py."""

    dialect: Dialect
    size: int  # calls that run at once
    seconds: float  # for one statement
    users: int = 0
    slots: asyncio.Semaphore

    async def check(self) -> None:
        """Raise ConfigError if it cannot be served; called when the server starts. Files are looked at before that."""

    async def open(self) -> None:
        """Prepare for the first call."""

    async def close(self) -> None:
        """End what runs, and wait until it has ended."""

    async def call(self, function: Callable[..., Answer], **arguments: object) -> str:
        """What an operation, named by its function for SQLite, answers. Raises ToolError."""
        ...

    @asynccontextmanager
    async def running(self, _: object = None) -> AsyncGenerator[None]:
        """The life of a server, which several clients may use at once: open from the first to the last of them."""
        self.users += 1
        try:
            if self.users == 1:
                self.slots = asyncio.Semaphore(self.size)
                await self.open()
            yield
        finally:
            self.users -= 1
            if not self.users:
                with anyio.CancelScope(shield=True):
                    await self.close()

    @asynccontextmanager
    async def slot(self) -> AsyncGenerator[None]:
        """A place for one call. Raises ToolError if there is none for as long as a runaway takes to end."""
        try:
            async with asyncio.timeout(self.seconds + 2 * GRACE):
                await self.slots.acquire()
        except TimeoutError:
            raise ToolError(f"all {self.size} connections are busy with slow statements; try again later") from None
        try:
            yield
        finally:
            self.slots.release()


def finish(answer: Answer) -> str:
    """A result with its trailer."""
    text, facts, resume = answer
    return f"{text}\n{trailer(*facts, **resume)}" if facts else text


class Worker:
    """A worker process, seen from the server."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process, self.stdin, self.stdout = process, process.stdin, process.stdout
        self.started = time.monotonic()
        self.greeted = False
        self.reads: object = None  # which files, by device and inode

    @classmethod
    async def start(cls, config: Mapping[str, object]) -> "Worker":
        """Start a process; it opens its files while we do other things."""
        program = [sys.executable, "-W", "ignore", PROGRAM, WORKER]
        pipe = asyncio.subprocess.PIPE
        try:
            worker = cls(await asyncio.create_subprocess_exec(*program, stdin=pipe, stdout=pipe))
        except OSError:  # no process or descriptor is left
            raise ToolError(NOT_STARTED) from None
        worker.stdin.write(frame(json.dumps(config).encode()))
        return worker

    async def read(self, seconds: float) -> bytes:
        """The next frame, within `seconds`. Raises TimeoutError, or EOFError when the process has ended."""
        async with asyncio.timeout(seconds):
            return await self.stdout.readexactly(int.from_bytes(await self.stdout.readexactly(8), "big"))

    async def ask(self, request: bytes, seconds: float) -> bytes:
        """Send a request and return the answer; the first one waits for the worker's greeting."""
        if not self.greeted:
            try:
                error = json.loads(await self.read(START_TIME)).get("error")
            except (TimeoutError, EOFError):
                raise ToolError(NOT_STARTED) from None
            if error:
                raise ToolError(error)
            self.greeted = True
        self.stdin.write(frame(request))
        return await self.read(seconds)

    def kill(self) -> None:
        """End the process, wherever it is. It holds nothing that could be damaged."""
        with suppress(ProcessLookupError):
            self.process.kill()


class Pool(Backend):
    """Up to POOL_SIZE workers; each serves one call at a time, and dies with a call that it cannot end."""

    dialect = Dialect()
    size = POOL_SIZE

    def __init__(self, paths: Sequence[Path], files: Sequence[tuple[str, str]], seconds: float) -> None:
        self.paths, self.seconds = paths, seconds
        self.files = files  # schema name and URI
        self.idle: list[Worker] = []
        self.workers: set[Worker] = set()

    async def open(self) -> None:
        """Start the first worker before it is needed."""
        self.idle.append(await self.start())

    async def close(self) -> None:
        """Kill all workers and wait until they are gone."""
        workers, self.idle, self.workers = self.workers, [], set()
        for worker in workers:
            worker.kill()
        for worker in workers:
            await worker.process.communicate()

    async def start(self) -> Worker:
        """A new worker."""
        there = self.there()
        worker = await Worker.start({"files": self.files, "seconds": self.seconds})
        worker.reads = there
        self.workers = {other for other in self.workers if other.process.returncode is None} | {worker}
        return worker

    def there(self) -> object:
        """Which files the paths lead to just now: one that was replaced must not be read from its old inode."""
        with suppress(OSError):
            return [(status.st_dev, status.st_ino) for status in map(os.stat, self.paths)]
        return None

    @asynccontextmanager
    async def worker(self) -> AsyncGenerator[Worker]:
        """A worker for one call. If the call does not end as it should, the worker does."""
        async with self.slot():
            worker = self.take() or await self.start()
            try:
                yield worker
            except BaseException:  # also a cancelled call: nothing else stops its SQL for certain
                worker.kill()
                raise
            self.idle.append(worker)

    def take(self) -> Worker | None:
        """An idle worker that is alive, young, and has the right files open."""
        there = self.there()
        while self.idle:
            worker = self.idle.pop()
            young = time.monotonic() - worker.started < RECYCLE
            if young and worker.reads == there and worker.process.returncode is None:
                return worker
            worker.kill()
        return None

    async def call(self, function: Callable[..., Answer], **arguments: object) -> str:
        """What a worker answers, with its trailer. Raises ToolError."""
        request = json.dumps([function.__name__, arguments]).encode()
        if len(request) > MAX_REQUEST:
            raise ToolError(f"statement and params take {len(request)} bytes, more than {MAX_REQUEST}; pass less")
        try:
            async with self.worker() as worker:
                head, _, text = (await worker.ask(request, self.seconds + GRACE)).partition(b"\n")
                outcome = json.loads(head)
                if outcome.get("retire"):
                    raise ToolError(outcome["error"])
        except TimeoutError:
            raise ToolError(MESSAGES["SQLITE_INTERRUPT"].format(seconds=self.seconds)) from None
        except (EOFError, OSError):
            raise ToolError("SQLite crashed on this statement and was restarted; write it in another way") from None
        if "error" in outcome:
            raise ToolError(outcome["error"])
        return finish(Answer(text.decode(), outcome["facts"], outcome["resume"]))


# --------------------------------------------------------------------------------------------------------- tools


class Column(BaseModel):
    """A column."""

    name: str
    type: str
    nullable: bool
    default: str | None
    generated: bool


class Index(BaseModel):
    """An index."""

    name: str
    columns: list[str]
    unique: bool
    partial: bool


class ForeignKey(BaseModel):
    """A foreign key; no references: to the primary key."""

    columns: list[str]
    table: str
    references: list[str]
    on_update: str
    on_delete: str


class TableDescription(BaseModel):
    """A table or view."""

    table: str
    schema_: str = Field(alias="schema")
    type: str
    columns: list[Column]
    primary_key: list[str]
    indexes: list[Index]
    foreign_keys: list[ForeignKey]
    sample_rows: list[list[Any]]
    note: str


Params = list[Any] | dict[str, Any] | None
TABLE = Annotated[str, Field(description="Name of a table or view, or schema.name", max_length=1000)]
OFFSET = Annotated[int, Field(description="Skip so many: what a cut result said", ge=0, le=SAFE_INTEGER, strict=True)]
NAME = ResourceSecurity(exempt_params={"schema", "table"})  # names of tables, whatever they look like, are no paths


class DatabaseServer(Server):
    """Lists the tables there are just now as resources."""

    def __init__(self, pool: Backend, instructions: str, options: Options) -> None:
        super().__init__("db-server", instructions, options, lifespan=pool.running)
        self.pool = pool

    async def list_resources(self) -> list[Resource]:
        """One resource for each table or view. Raises MCPError."""
        try:
            found = json.loads(await self.recorded("resources/list", {}, partial(self.pool.call, all_tables)))
        except ResourceError as exc:
            raise MCPError(INTERNAL_ERROR, str(exc)) from None
        return [
            Resource(
                uri=f"schema://{quote(schema, safe='')}/{quote(table, safe='')}",
                name=f"{schema}.{table}",
                description=f"CREATE statement of the {kind} {table}",
                mime_type="application/sql",
            )
            for schema, table, kind in found
        ]


def open_backend(files: Sequence[str | Path], timeout: float, allow_superuser: bool) -> tuple[Backend, str]:
    """The database that the command line names, and what to call it. Raises ConfigError when it cannot be served."""
    if any(str(file).startswith(POSTGRES) for file in files):
        if len(files) > 1:
            raise ConfigError("a PostgreSQL database is served alone; start another server for the others")
        # Run as a script, this module is __main__; imported under its name again, it would be loaded a second time.
        sys.modules.setdefault("db_server", sys.modules[__name__])
        try:
            from db_postgres import PostgresPool
        except ModuleNotFoundError as exc:
            if exc.name != "db_postgres":
                raise
            raise ConfigError("PostgreSQL is served by db_postgres.py; copy it into the same directory") from None

        return PostgresPool(str(files[0]), timeout, allow_superuser), "one database"
    if not 1 <= len(files) <= MAX_FILES:
        raise ConfigError(f"{len(files)} files are named; SQLite serves at least 1 and at most {MAX_FILES} together")
    paths = [check_file(file) for file in files]
    names = [Path(file).name for file in files]
    schemas = name_schemas(names, paths)
    served = ", ".join(f"{name} as {schema}" for name, (schema, _) in zip(names, schemas[-len(names) :], strict=True))
    return Pool(paths, schemas, timeout), served.encode("utf-8", "backslashreplace").decode()  # a name can be any bytes


def build_server(
    files: Sequence[str | Path],
    *,
    timeout: float = TIMEOUT,
    allow_superuser: bool = False,
    options: Options = Options(),  # noqa: B008 -- frozen
) -> DatabaseServer:
    """A server for the named SQLite files, or one postgresql:// URL. Raises ConfigError when one cannot be served."""
    pool, names = open_backend(files, timeout, allow_superuser)
    dialect = pool.dialect
    instructions = f"Read-only SQL ({dialect.name}) on {names}. Begin with list_tables and describe_table."
    server = DatabaseServer(pool, instructions, options)
    server.health = pool.check
    if isinstance(pool, Pool):
        paths = pool.paths
        server.health = in_thread_of_its_own(lambda: [check_file(path) for path in paths])
    cut = options.max_output

    sql = Field(description=f"One {dialect.name} statement that reads", max_length=MAX_SQL)
    values = Field(description=dialect.params)
    where = Field(description=dialect.schemas, max_length=200)

    @server.tool(
        annotations=READ_ONLY,
        structured_output=False,
        description=f"Run one SQL statement that reads ({dialect.reads}) and return JSON: columns, rows, row_count,"
        f" truncated. A cut result ends with a line that says how to continue. {dialect.values}, blobs as their size,"
        f" cells over 10,000 characters cut, with their length. A statement is stopped after {timeout:g} s: filter and"
        " aggregate in SQL.",
    )
    async def query_database(
        query: Annotated[str, sql],
        params: Annotated[Params, values] = None,
        limit: Annotated[int, Field(description="Rows at most", ge=1, le=MAX_ROWS, strict=True)] = 100,
        offset: OFFSET = 0,
    ) -> str:
        return await pool.call(run_query, sql=query, params=params, limit=limit, offset=offset, max_output=cut)

    @server.tool(annotations=READ_ONLY, structured_output=False)
    async def list_tables(
        schema: Annotated[str, where] = dialect.schema,
        pattern: Annotated[str, Field(description="Glob for the names, such as order*", max_length=200)] = "*",
        offset: OFFSET = 0,
    ) -> str:
        """List the tables and views of a schema as JSON: name, type, number of columns, and a row_estimate where it
        costs nothing; and the names of all schemas. Call it first."""
        return await pool.call(tables, schema=schema, pattern=pattern, offset=offset, max_output=cut)

    @server.tool(annotations=READ_ONLY)
    async def describe_table(table: TABLE, schema: Annotated[str, where] = dialect.schema) -> TableDescription:
        """Describe a table or view: columns with type, nullability and default, primary key, indexes, foreign keys,
        and three sample rows. Call it before writing a query."""
        seconds = min(SAMPLE_TIME, timeout / 4)
        found = await pool.call(describe, schema=schema, table=table, seconds=seconds, max_output=cut)
        return TableDescription.model_validate_json(found)

    @server.tool(
        annotations=READ_ONLY,
        structured_output=False,
        description="Show the plan of a statement without running it, one step a line:"
        f" {dialect.plan}. Use it when a query is slow.",
    )
    async def explain_query(query: Annotated[str, sql], params: Annotated[Params, values] = None) -> str:
        return await pool.call(explain, sql=query, params=params, max_output=cut)

    @server.resource("schema://{schema}/{table}", mime_type="application/sql", security=NAME)
    async def create_statement_of(schema: str, table: str) -> str:
        """The CREATE statement of a table or view, with its indexes and triggers."""
        try:
            return await pool.call(create_statement, schema=schema, table=table, max_output=cut)
        except ToolError as exc:
            raise (ResourceNotFoundError if "no such" in str(exc) else ResourceError)(str(exc)) from None

    return server


# -------------------------------------------------------------------------------------------------- command line


def check_file(file: str | Path) -> Path:
    """The absolute path of an SQLite database that can be read. Raises ConfigError: nothing is created by a typo."""
    path = Path(os.path.realpath(os.path.expanduser(file)))
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{file} cannot be opened: {getattr(exc, 'strerror', exc)}; name an SQLite file") from None
    if not stat.S_ISREG(mode):  # opening a FIFO would wait for ever
        raise ConfigError(f"{file} is a {'directory' if stat.S_ISDIR(mode) else 'device'}; name an SQLite file")
    try:
        open_files([("main", f"{path.as_uri()}?mode=ro")], busy_time=0).close()
    except sqlite3.Error as exc:
        code = exc.sqlite_errorname
        if not code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):  # locked just now is no reason not to start
            raise ConfigError(f"{file} cannot be served: {message_for(exc) or code}") from None
    return path


def name_schemas(names: Sequence[str], paths: Sequence[Path]) -> list[tuple[str, str]]:
    """Schema names and URIs: the first file is main; several files also go by their names on the command line."""
    # as_uri escapes ?, # and %: in a URI put together by hand they would open another file.
    uris = [f"{path.as_uri()}?mode=ro" for path in paths]
    schemas = [("main", uris[0])]
    taken = {"main", "temp"}
    for file, uri in zip(names, uris, strict=True) if len(names) > 1 else ():
        stem = re.sub(r"\W", "_", Path(file).stem) or "db"
        number = 1
        name = stem
        while name.lower() in taken:
            number += 1
            name = f"{stem}_{number}"
        taken.add(name.lower())
        schemas.append((name, uri))
    return schemas


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0.1 <= float(text) <= 25:  # a tool call may take 30 s in all
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.1 to 25")


def build(args: argparse.Namespace, options: Options) -> DatabaseServer:
    """The server that the command line asks for; without a name on it, DATABASE_URL says which database."""
    url = os.environ.get("DATABASE_URL", "")
    if not args.files and not url:
        raise ConfigError("name SQLite files or a postgresql:// URL, or set DATABASE_URL")
    if not args.files and not url.startswith(POSTGRES):
        raise ConfigError("DATABASE_URL does not begin with postgresql://; set another one, or name SQLite files")
    for place, word in enumerate(sys.argv):  # what is printed for a client's configuration must hold no password
        if word.startswith(POSTGRES):
            sys.argv[place] = "postgresql://USER:PASSWORD@HOST/DATABASE"
    files: list[str] = args.files or [url]
    server = build_server(files, timeout=args.timeout, allow_superuser=args.allow_superuser, options=options)
    asyncio.run(server.pool.check())
    server.variables = () if args.files else ("DATABASE_URL",)
    return server


def main() -> None:
    """The command line: `db_server.py FILE.db [FILE.db ...]`, or `db_server.py postgresql://...`."""
    parser = argument_parser("db-server", "Serve SQLite files, or a PostgreSQL database, to MCP clients, read-only.")
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE.db",
        help="SQLite files, several become schemas; or one postgresql:// URL (better in DATABASE_URL: others can see"
        " the command line)",
    )
    parser.add_argument(
        "--timeout", type=_seconds, default=TIMEOUT, metavar="SECONDS", help="for one statement (default: %(default)s)"
    )
    parser.add_argument(
        "--allow-superuser", action="store_true", help="serve PostgreSQL to a role that can do more than read"
    )
    serve(parser, build)


if __name__ == "__main__":
    main()
