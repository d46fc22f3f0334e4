# /// script
# requires-python = ">=3.11"
# dependencies = ["mcp>=2.3,<3", "aiosqlite>=0.22,<0.23"]
# ///
"""An MCP server that lets a language model query the SQLite files you name, and never change a byte of them.

    python db_server.py FILE.db [FILE.db ...]

Trust boundary: SQL from the model runs in a worker process, on connections that SQLite itself holds read-only;
whatever it does there, the process ends at the time limit and cannot take more memory than its limit.
Not defended against: what the rows themselves say to the model, and reading: all of the named files is readable.
"""
# ruff: noqa: S608 - SQL is put together here from constants and quoted names

import sys
from importlib.util import find_spec

if sys.version_info < (3, 11) or not find_spec("mcp"):
    __import__("serving")  # says what is missing, and exits

import json
import math
import os
import re
import signal
import sqlite3
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple
from urllib.parse import quote

import anyio
from anyio import BrokenWorkerProcess, CapacityLimiter, to_process
from pydantic_core import to_json

# A worker process imports this file too. What it does not need (the SDK takes ten times as long to import as all that
# it does need) is imported in the functions that only the server calls.
if TYPE_CHECKING:
    from serving import Options, Server

# -------------------------------------------------------------------------------------------------------- limits

TIMEOUT = 5.0  # seconds for one statement, unless --timeout says otherwise
GRACE = 0.5  # seconds more until its process ends: the SQL was inside one C function and did not see the limit
SAMPLE_TIME = 1.0  # seconds for the sample rows of describe_table: a view may be slow, its description is not
BUSY_TIME = 2.0  # seconds to wait for a file that another program has locked
CALL_TIME = 28.5  # seconds of a call, its turn in the queue included; serving.py ends it after 30
MAX_SQL = 100_000  # characters of one statement: SQLite's parser takes seconds for megabytes
MAX_CELL = 10_000  # characters of one cell: a quarter of a result
MAX_NAME = 1_000  # characters of a name or an error: a column without AS is named by its whole expression
MAX_RESULT = 64 * 2**20  # characters of a result when --max-output sets no limit: the server's memory has one
MAX_HEAP = 128 * 2**20  # bytes that SQLite may allocate in one process: sorts, groups, temporary tables, page cache
MAX_PROCESS = 768 * 2**20  # bytes of address space of one worker, where the system can limit it (Linux)
SAFE_INTEGER = 2**53  # above it, JavaScript clients lose digits
SAMPLE_ROWS = 3
SAMPLE_CELL = 200  # characters of one cell in the sample rows
MAX_RESOURCES = 1_000  # tables listed as resources; others can be read all the same

# ------------------------------------------------------------------------------------------------------ the tools

Params = list[Any] | dict[str, Any] | None

# A table or view: table, schema, type; columns with name, type, nullable, default and generated, on PostgreSQL also
# comment and enum labels (values); primary_key; indexes with name, columns, unique and partial; foreign_keys with
# columns, table, references (none: the primary key), on_update and on_delete; sample_rows; note.
Description = dict[str, Any]


class QueryError(Exception):
    """Something that the model can act on: one sentence."""


class Answer(NamedTuple):
    """A result, and what its trailer has to say."""

    text: str
    facts: Sequence[str] = ()
    resume: Mapping[str, object] = {}


class Dialect(NamedTuple):
    """What the model is told about one kind of database."""

    name: str = "SQLite"
    schema: str = "main"
    schemas: str = "Attached file; main is the first"
    params: str = "List for ? placeholders, object for :name placeholders"
    reads: str = "SELECT, WITH, VALUES, EXPLAIN, PRAGMA table_info ..."
    values: str = "Integers beyond 2^53 and infinities come as strings"
    plan: str = "SCAN reads every row, SEARCH uses an index, TEMP B-TREE sorts"


def build(database: Any, served: str, options: "Options", name: str = "db-server") -> "Server":
    """A server with the tools and resources on any kind of database, as `Files` is one; `served` says to the model what
    it queries, such as "shop.db as main".

    A database has the attributes `dialect` and `seconds` (for one statement), and these methods, which raise
    QueryError: `query`, `explain`, `tables` and `create_statement` return an Answer, `describe` a Description,
    `all_tables` schema, name and type of at most MAX_RESOURCES tables. What `running` opens is closed at its end, and
    several clients may be inside at once. `check` raises any error when the database cannot be served just now.
    """
    from mcp.server.mcpserver.exceptions import ResourceError, ResourceNotFoundError, ToolError
    from mcp.server.mcpserver.resources.templates import ResourceSecurity
    from mcp.shared.exceptions import MCPError
    from mcp_types import INTERNAL_ERROR, Resource

    import serving

    def resource(schema: str, table: str, kind: str) -> Resource:
        uri, about = f"schema://{quote(schema, '')}/{quote(table, '')}", f"CREATE statement of the {kind} {table}"
        return Resource(uri=uri, name=f"{schema}.{table}", description=about, mime_type="application/sql")

    class DatabaseServer(serving.Server):
        """Lists the tables there are just now as resources."""

        async def list_resources(self) -> list[Resource]:
            """One resource for each table or view. Raises MCPError."""
            try:
                found = await self.checked("resources/list", {}, lambda: answer(database.all_tables()))
            except ToolError as exc:
                raise MCPError(INTERNAL_ERROR, str(exc)) from None
            return [resource(*row) for row in found]

    about = f"Read-only SQL ({database.dialect.name}) on {served}. Begin with list_tables and describe_table."
    server = DatabaseServer(name, about, options, lifespan=lambda _: database.running())  # pyright: ignore[reportUnknownLambdaType]
    server.health = database.check
    add_tools(server, database, options.max_output)
    names = ResourceSecurity(exempt_params={"schema", "table"})  # of tables, whatever they look like, are no paths

    @server.resource("schema://{schema}/{table}", mime_type="application/sql", security=names)
    async def create_statement(schema: str, table: str) -> str:
        """The CREATE statement of a table or view, with its indexes and triggers."""
        try:
            return await answer(database.create_statement(schema, table, options.max_output))
        except ToolError as exc:
            raise (ResourceNotFoundError if "no such" in str(exc) else ResourceError)(str(exc)) from None

    return server


def add_tools(server: "Server", database: Any, max_output: int) -> None:
    """The four tools. None of them writes, and nothing here could make one."""
    from pydantic import Field

    from serving import READ_ONLY

    name, schema, schemas, placeholders, reads, special, plan = database.dialect
    sql = Field(description=f"One {name} statement that reads", max_length=MAX_SQL)
    values = Field(description=placeholders)
    where = Field(description=schemas, max_length=200)
    which = Field(description="Name of a table or view, or schema.name", max_length=1000)
    most = Field(description="Rows at most", ge=1, le=1_000_000, strict=True)
    skip = Field(description="Skip so many: what a cut result said", ge=0, le=SAFE_INTEGER, strict=True)
    glob = Field(description="Glob for the names, such as order*", max_length=200)

    about = (
        f"Run one SQL statement that reads ({reads}) and return JSON: columns, rows, row_count, truncated. A cut result"
        f" ends with a line that says how to continue. {special}, blobs as their size, cells over 10,000 characters"
        f" cut, with their length. A statement is stopped after {database.seconds:g} s: filter and aggregate in SQL."
    )

    @server.tool(annotations=READ_ONLY, structured_output=False, description=about)
    async def query_database(
        query: Annotated[str, sql],
        params: Annotated[Params, values] = None,
        limit: Annotated[int, most] = 100,
        offset: Annotated[int, skip] = 0,
    ) -> str:
        return await answer(database.query(query, params, limit, offset, max_output))

    @server.tool(annotations=READ_ONLY, structured_output=False)
    async def list_tables(
        schema: Annotated[str, where] = schema, pattern: Annotated[str, glob] = "*", offset: Annotated[int, skip] = 0
    ) -> str:
        """List the tables and views of a schema as JSON: name, type, and a row_estimate where it costs nothing; and the
        names of all schemas. Call it first."""
        return await answer(database.tables(schema, pattern, offset, max_output))

    @server.tool(annotations=READ_ONLY)
    async def describe_table(table: Annotated[str, which], schema: Annotated[str, where] = schema) -> Description:
        """Describe a table or view: columns with type, nullability and default, primary key, indexes, foreign keys,
        and three sample rows. Call it before writing a query."""
        return await answer(database.describe(schema, table, max_output))

    about = f"Show the plan of a statement without running it, one step a line: {plan}. Use it when a query is slow."

    @server.tool(annotations=READ_ONLY, structured_output=False, description=about)
    async def explain_query(query: Annotated[str, sql], params: Annotated[Params, values] = None) -> str:
        return await answer(database.explain(query, params, max_output))


async def answer(result: Awaitable[Any]) -> Any:
    """What a database answers, an Answer with its trailer; a QueryError as the error that the model is shown."""
    from mcp.server.mcpserver.exceptions import ToolError

    from common import trailer

    try:
        found = await result
    except QueryError as exc:
        raise ToolError(" ".join(str(exc).split())[:MAX_NAME]) from None
    if not isinstance(found, Answer):
        return found
    return f"{found.text}\n{trailer(*found.facts, **found.resume)}" if found.facts else found.text


# ------------------------------------------------------------------------------------------------- results as JSON

dumps = partial(json.dumps, ensure_ascii=False)


def fill(lines: Iterable[str], limit: int, room: int) -> tuple[str, int, bool]:
    """As many of the lines as fit, how many they are, and whether there are more. Raises QueryError if none fits."""
    taken: list[str] = []
    more = False
    for line in lines:
        room -= len(line) + 2
        more = len(taken) == limit or room < 0
        if more:
            break
        taken.append(line)
    if room < 0 and not taken:
        raise QueryError("one row alone is too long; name fewer columns, or read parts with substr(column, 1, 1000)")
    return "\n" + ",\n".join(taken) + "\n" if taken else "", len(taken), more


def rows_answer(
    names: Iterable[str], lines: Iterable[str], limit: int, offset: int, max_output: int, see: str = "column"
) -> Answer:
    """Rows as far as `limit` and `max_output` (0: no limit) allow, one a line; `lines` are rows as JSON lists, of which
    the first is number `offset` and one more than `limit` says that there are more. Long cells were cut before; `see`
    is what reads on in one, in SQL. Raises QueryError if not even one row fits."""
    head = dumps({"columns": [name[:MAX_NAME] for name in names]})[:-1] + ', "rows": ['
    # What is subtracted is for the last line and the trailer.
    body, rows, more = fill(lines, limit, (max_output or MAX_RESULT) - len(head) - 250)
    facts = [f"rows {offset + 1}-{offset + rows} shown"] if more else []
    if cells := body.count("… (cut: ") and len(re.findall(r'… \(cut: \d+ of \d+ characters\)"', body)):
        facts.append(f"{cells} cells cut, substr({see}, start, length) reads on in one")
    text = f'{head}{body}], "row_count": {rows}, "truncated": {json.dumps(more)}}}'
    return Answer(text, facts, {"offset": offset + rows} if more else {})


def tables_answer(
    schema: str, schemas: Sequence[str], entries: Sequence[Mapping[str, Any]], offset: int, max_output: int
) -> Answer:
    """The tables of a schema from `offset` on, one a line, in the form of a query's result. An entry has `name` and
    `type`, and `row_estimate` if it is known. Raises QueryError."""
    if offset and offset >= len(entries):
        raise QueryError(f"offset={offset} is past the end: there are {len(entries)} tables; use a smaller offset")
    head = dumps({"schema": schema, "schemas": schemas})[:-1] + ', "tables": ['
    lines = map(dumps, entries[offset:])
    body, taken, more = fill(lines, len(entries), (max_output or MAX_RESULT) - len(head) - 150)
    facts = [f"tables {offset + 1}-{offset + taken} of {len(entries)} shown"] if more else []
    text = f'{head}{body}], "table_count": {len(entries)}}}'
    return Answer(text, facts, {"offset": offset + taken} if more else {})


def shrink(table: Description, max_output: int, elsewhere: str) -> Description:
    """A description that fits: a table can have 2,000 columns, and any number of indexes. `elsewhere` names what can be
    queried for the rest. Raises QueryError."""
    parts = ("columns", "primary_key", "indexes", "foreign_keys", "sample_rows")
    totals = {part: len(table[part]) for part in parts}
    while max_output and len(dumps(table)) > max_output:
        longest = max(totals, key=lambda part: len(dumps(table[part])))
        if not table[longest]:
            raise QueryError(f"the description does not fit into {max_output} characters; query {elsewhere} instead")
        del table[longest][len(table[longest]) * 3 // 4 :]
        cuts = [f"{part} 1-{len(table[part])} of {total}" for part, total in totals.items() if len(table[part]) < total]
        table["note"] = f"too large for one result: {', '.join(cuts)} shown; query {elsewhere} for all columns"
    return table


def fit(text: str, max_output: int, rest: str) -> Answer:
    """As many lines as a result may hold, or as many characters of a single long one; `rest` says how to see more."""
    if not max_output or len(text) <= max_output:
        return Answer(text)
    part = text[: max(0, max_output - len(rest) - 80)]
    part = part[: part.rfind("\n")] if "\n" in part else part
    return Answer(part, [f"characters 1-{len(part)} of {len(text)} shown, for the rest {rest}"])


# ------------------------------------------------------------------------------------------- names and parameters


def quoted(name: str) -> str:
    """A name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def is_like(name: str, pattern: str) -> bool:
    """Whether a name matches a glob, in any case; also one as SQLite writes it, or with the % of LIKE."""
    return fnmatchcase(name.lower(), (pattern or "*").lower().replace("%", "*").replace("[^", "[!"))


def did_you_mean(name: str, known: Iterable[tuple[str, str]]) -> str:
    """The end of a "no such" message: the nearest of the known names, each with what it must be called; or nothing."""
    import difflib  # only here: a worker starts faster without it

    names: dict[str, str] = {}
    for candidate, full in islice(known, 5_000):
        names.setdefault(candidate.lower(), full)
    close = difflib.get_close_matches(name.strip("\"'`[]").lower()[:100], names, 3, 0.6)
    return f"; did you mean {' or '.join(names[match] for match in close)}?" if close else ""


def some(names: Sequence[str]) -> str:
    """The first of the names, and how many more there are."""
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more (list_tables shows them)" if names[20:] else "")


def refuse_too_much(sql: str, params: Params) -> None:
    """Raise QueryError for a statement that takes too long to parse, or that has too many parameters."""
    if len(params or ()) > 32_766:  # SQLite's own default
        raise QueryError(f"{len(params or ())} parameters are more than 32766; pass fewer")
    if (size := len(json.dumps([sql, params]))) > 2_000_000:
        raise QueryError(f"statement and params take {size} bytes, more than 2000000; pass less")


def refuse_unused(names: Collection[str]) -> None:
    """Raise QueryError if there are parameters that the statement does not ask for: their names may be misspelt."""
    if names:
        listed = ", ".join(sorted(names))
        raise QueryError(f"the statement has no placeholder for {listed}; write :name for each, or leave it out")


# -------------------------------------------------------------------------------------------- four read-only layers
#
# No layer holds alone: mode=ro lets a query ATTACH and write other files, query_only can be switched off by the
# query itself, size limits only stop what is large, and an authorizer is a list that somebody might extend wrongly.

ACTION = "SQLITE_(CREATE|DROP|ALTER|INSERT|UPDATE|DELETE|PRAGMA|TRANS|SAVE|ATTACH|DETACH|FUNCTION)"
ACTIONS = {getattr(sqlite3, name): name[7:].replace("_", " ") for name in dir(sqlite3) if re.match(ACTION, name)}
DENIED_FUNCTIONS = {"load_extension", "fts3_tokenizer", "optimize"}  # foreign code, and a write to an FTS index
# Most would set something if they were given a value. For those that end in _check, _list or info, it only says what
# to report on.
PRAGMAS = (
    "application_id auto_vacuum busy_timeout cache_size collation_list compile_options data_version database_list"
    " encoding foreign_key_check foreign_key_list foreign_keys freelist_count function_list index_info index_list"
    " index_xinfo integrity_check journal_mode module_list page_count page_size pragma_list query_only quick_check"
    " recursive_triggers schema_version secure_delete synchronous table_info table_list table_xinfo temp_store"
    " user_version"
).split()


class File(NamedTuple):
    """A file to serve. Its URI says mode=ro."""

    schema: str
    uri: str
    path: str


def open_files(files: Sequence[File], busy_time: float = BUSY_TIME) -> sqlite3.Connection:
    """Layer 1: a connection to files that are opened to be read. The first is `main`."""
    connection = sqlite3.connect(files[0].uri, uri=True, isolation_level=None, timeout=busy_time, cached_statements=16)
    for schema, uri, _ in files[1:]:
        connection.execute("ATTACH ? AS ?", (uri, schema))
    for file in files:  # opening reads nothing; this does
        connection.execute(f"SELECT 1 FROM {quoted(file.schema)}.sqlite_master").fetchone()
    return connection


def forbid_writing(connection: sqlite3.Connection) -> None:
    """Layer 2: the engine refuses to write, to any attached file."""
    connection.execute("PRAGMA query_only = ON")


def limit_sizes(connection: sqlite3.Connection, attached: int) -> None:
    """Layer 3: nothing more can be attached (VACUUM INTO attaches too), and no statement or heap grows too large."""
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, attached)
    connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, 4 * MAX_SQL)
    connection.execute("PRAGMA temp_store = MEMORY")  # a sort wrote 2.5 GB of temporary files in three seconds
    connection.execute(f"PRAGMA hard_heap_limit = {MAX_HEAP}")


class Authorizer:
    """Layer 4: what a statement may do is a list, and everything that is not on it is denied at compile time."""

    refused = ""

    def __call__(self, action: int, name: str | None, detail: str | None, schema: str | None, _: str | None) -> int:
        """SQLite asks this while it compiles a statement; the meaning of the names depends on the action."""
        name, allowed = name or "", False
        if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE):
            allowed = name != "sqlite_stmt"  # that table shows the statements of other callers
        elif action == sqlite3.SQLITE_FUNCTION:
            name = detail or ""
            allowed = name.lower() not in DENIED_FUNCTIONS
        elif action == sqlite3.SQLITE_PRAGMA:
            allowed = name.lower() in PRAGMAS and (not detail or name.lower().endswith(("_check", "_list", "info")))
        elif action == sqlite3.SQLITE_UPDATE and name == "sqlite_master":
            allowed = schema == "main"  # every virtual table, such as json_each, needs it to declare its columns
        elif action in (sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE):
            # An R-tree prepares the statements that would write these tables of its own before it can be read. Run from
            # a query, they are stopped by the first two layers.
            allowed = name.endswith(("_node", "_rowid", "_parent"))
        if not allowed and not self.refused:
            self.refused = f"{ACTIONS.get(action, '')} {name}".strip()
        return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


@lru_cache(maxsize=1)
def open_read_only(files: Sequence[File], _: object = None) -> tuple[sqlite3.Connection, Authorizer]:
    """A connection with all four layers; the authorizer last, because it would deny the others their PRAGMAs. A worker
    keeps it until what the paths lead to, the second argument, has changed: a file that was replaced must not be read
    from its old inode."""
    connection, authorizer = open_files(files), Authorizer()
    forbid_writing(connection)
    limit_sizes(connection, len(files) - 1)
    if sys.version_info >= (3, 12):  # "Titel" is a column or an error; by an old rule it could be the text Titel
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_DQS_DML, False)
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_DQS_DDL, False)
    connection.set_authorizer(authorizer)
    return connection, authorizer


# ------------------------------------------------------------------------------------------- cells and rows, as JSON

CONTINUATION = bytes(range(0x80, 0xC0))  # what follows the first byte of a UTF-8 character


def text_reader(width: int) -> Callable[[bytes], str]:
    r"""What reads a TEXT cell of at most `width` characters. Bytes that are no UTF-8 become `\xNN`: an error would
    hide the row. SQLite hands over one cell at a time, so cutting here keeps a row of many long texts out of memory.
    """

    def read(data: bytes) -> str:
        if len(data) <= width:
            return data.decode("utf-8", "backslashreplace")
        head = data[: 4 * width].decode("utf-8", "backslashreplace")[:width]
        length = len(data.translate(None, CONTINUATION))
        return f"{head}… (cut: {width} of {length} characters)" if length > width else head

    return read


def is_plain(column: Sequence[Any]) -> bool:
    """Whether the cells are all JSON as they are; infinities are not, but the encoder knows them."""
    integers = [cell for cell in column if type(cell) is int]
    small = not integers or -SAFE_INTEGER <= min(integers) <= max(integers) <= SAFE_INTEGER
    return small and bytes not in set(map(type, column))


def plain(cell: Any) -> Any:
    """A cell that is not JSON as it is, in words."""
    if isinstance(cell, bytes):
        return f"(blob, {len(cell)} bytes; hex(column) shows them)"
    return str(cell) if isinstance(cell, int) and abs(cell) > SAFE_INTEGER else cell


def all_lines(rows: Iterator[Sequence[Any]]) -> Iterator[str]:
    """Rows as JSON lists. They are looked at by the column and encoded by pydantic's Rust: both are several times as
    fast as Python is with one cell after the other. At first one by one: a row may be slow, and for nothing."""
    size = 1
    while batch := list(islice(rows, size)):
        if not all(map(is_plain, zip(*batch, strict=True))):
            batch = [[plain(cell) for cell in row] for row in batch]
        yield from (to_json(row, inf_nan_mode="strings").decode() for row in batch)
        size = min(2 * size, 64)  # as many large blobs still fit into a worker's memory


# ------------------------------------------------------------------------------------------ what is in a database

Catalog = Sequence[tuple[str, str, str]]  # schema, name and type of each table and view

# This reads nothing but sqlite_master: SQLite's own pragma_table_list compiles every view, and a view can be made to
# take for ever. What no user has made is left out: virtual tables keep their data in tables of their own.
SHADOWS = '","'.join("data idx content docsize config segments segdir stat node rowid parent".split())
OBJECTS = f"""SELECT name, CASE WHEN type = 'table' AND rootpage = 0 THEN 'virtual' ELSE type END
 FROM {{0}}.sqlite_master WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' AND name NOT IN (
   SELECT v.name || '_' || value FROM {{0}}.sqlite_master v, json_each('["{SHADOWS}"]')
   WHERE v.type = 'table' AND v.rootpage = 0) ORDER BY name"""


def schemas_of(connection: sqlite3.Connection) -> list[str]:
    """The names of the attached databases."""
    return [row[1] for row in connection.execute("PRAGMA database_list") if row[1] != "temp"]


def catalog_of(connection: sqlite3.Connection) -> Catalog:
    """What is in the attached databases."""
    schemas = schemas_of(connection)
    return [(schema, *row) for schema in schemas for row in connection.execute(OBJECTS.format(quoted(schema)))]


def find_table(schemas: Sequence[str], catalog: Catalog, schema: str, table: str) -> tuple[str, str, str]:
    """Schema, name and type of a table or view. Raises QueryError that suggests the nearest name."""
    known = {f"{found[0]}.{found[1]}".lower(): found for found in catalog}
    found = known.get(f"{schema}.{table}".lower()) or known.get(table.lower())
    if not found:
        name = table if "." in table else f"{schema}.{table}"
        raise QueryError(f"no such table: {table}{nearest_table(schemas, catalog, name)}")
    return found


def nearest_table(schemas: Sequence[str], catalog: Catalog, name: str) -> str:
    """The end of a "no such table" message: the nearest names there are, or what there is."""
    schema, _, name = name.rpartition(".")
    if schema and schema.lower() not in map(str.lower, schemas):
        return f"; the schemas are {', '.join(schemas)}"
    names: dict[str, str] = {}
    for place, table, _ in catalog:  # those outside of `main` are found by their full names
        names.setdefault(table, table if place == "main" else f"{place}.{table}")
    known = f"the tables are {some(list(names.values()))}" if names else "the database has no tables"
    return did_you_mean(name, names.items()) or f"; {known}"


# ------------------------------------------------------------------------------- what a worker does: the model's SQL


class Named(dict[str, Any]):
    """Parameters by name that remember which of them the statement has not asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__({name.lstrip(":@$"): value for name, value in values.items()})
        self.unused = set(self)

    def __getitem__(self, name: str) -> Any:
        self.unused.discard(name)
        return super().__getitem__(name)


def execute(connection: sqlite3.Connection, sql: str, params: Params) -> sqlite3.Cursor:
    """Run the model's statement, one that returns rows. Raises QueryError, or what sqlite3 raises."""
    refuse_too_much(sql, params)
    values = Named(params) if isinstance(params, dict) else params or ()
    cursor = connection.execute(sql.rstrip("; \t\r\n"), values)
    if cursor.description is None:
        raise QueryError("the statement returns no rows; write one that does, such as SELECT, WITH or VALUES")
    refuse_unused(values.unused if isinstance(values, Named) else ())
    return cursor


def query(connection: sqlite3.Connection, sql: str, params: Params, limit: int, offset: int, max_output: int) -> Answer:
    """What `query_database` answers."""
    connection.text_factory = text_reader(min(MAX_CELL, max_output // 4) if max_output else MAX_RESULT // 8)
    cursor = execute(connection, sql, params)
    try:
        skipped = sum(1 for _ in islice(cursor, offset))
        if skipped < offset:
            raise QueryError(f"offset={offset} is past the end: the query has {skipped} rows; use a smaller offset")
        names = [column[0] for column in cursor.description]
        return rows_answer(names, all_lines(islice(cursor, limit + 1)), limit, offset, max_output)
    finally:
        cursor.close()  # an open cursor keeps its read lock, and another program's write waits for it


def explain(connection: sqlite3.Connection, sql: str, params: Params, max_output: int) -> Answer:
    """What `explain_query` answers: one line a step, indented below the step that it belongs to."""
    sql = re.sub(r"^\s*EXPLAIN\b(\s+QUERY\s+PLAN\b)?", "", sql, flags=re.IGNORECASE)
    # The authorizer is not asked about VACUUM before it runs, so look at what the statement was compiled to.
    for _, operation, _, writes, *_ in execute(connection, f"EXPLAIN {sql}", params):
        if operation == "Vacuum" or (operation == "Transaction" and writes):
            raise QueryError(MESSAGES["SQLITE_READONLY"])
    depth, lines = {0: -1}, list[str]()
    for step, parent, _, detail in execute(connection, f"EXPLAIN QUERY PLAN {sql}", params):
        depth[step] = depth.get(parent, -1) + 1
        lines.append("  " * depth[step] + f"- {detail}")
    return fit("\n".join(lines) or "- no table is read", max_output, "explain a part of the statement")


def describe(connection: sqlite3.Connection, seconds: float, schema: str, table: str, max_output: int) -> Description:
    """What `describe_table` answers; `seconds` are for the sample rows: a slow view must not hide its columns."""
    schema, table, kind = find_table(schemas_of(connection), catalog_of(connection), schema, table)

    def pragma(name: str, about: str = table) -> list[Any]:
        return connection.execute(f"SELECT * FROM pragma_{name}(?, ?)", (about, schema)).fetchall()

    found: Description = {"table": table, "schema": schema, "type": kind}
    # Hidden columns of kind 1 are the arguments of a table-valued function; 2 and 3 are generated.
    columns = [row[1:] for row in pragma("table_xinfo") if row[6] != 1]
    key = [name for _, name in sorted((row[4], row[0]) for row in columns if row[4])]
    # A lone INTEGER PRIMARY KEY is the row's number: SQLite reports it as nullable, but it never is NULL.
    never_null = [row[0] for row in columns if [row[0]] == key and row[1].upper() == "INTEGER"]
    found["columns"] = [
        {"name": n, "type": t, "nullable": not full and n not in never_null, "default": d, "generated": hidden > 1}
        for n, t, full, d, _, hidden in columns
    ]
    found["primary_key"] = key
    found["indexes"] = [
        {"name": name, "columns": [c or "(expression)" for *_, c in pragma("index_info", name)], **about}
        for _, name, unique, _, part in pragma("index_list")
        for about in [{"unique": unique == 1, "partial": part == 1}]
    ]
    foreign: dict[int, dict[str, Any]] = {}
    for number, _, parent, column, to, on_update, on_delete, _ in pragma("foreign_key_list"):
        end: dict[str, Any] = {"columns": [], "table": parent, "references": []}
        end = foreign.setdefault(number, {**end, "on_update": on_update, "on_delete": on_delete})
        end["columns"].append(column)
        end["references"] += [to] if to else []
    found["foreign_keys"] = list(foreign.values())
    found["sample_rows"], found["note"] = sample(connection, f"{quoted(schema)}.{quoted(table)}", seconds)
    return shrink(found, max_output, "pragma_table_xinfo(table, schema)")


def sample(connection: sqlite3.Connection, table: str, seconds: float) -> tuple[list[Any], str]:
    """The first rows of a table and "", or none and why."""
    limit_time(connection, seconds)
    connection.text_factory = text_reader(SAMPLE_CELL)
    try:
        lines = all_lines(connection.execute(f"SELECT * FROM {table} LIMIT {SAMPLE_ROWS}"))
        return [json.loads(line) for line in lines], ""
    except FAILED:
        return [], f"no sample rows: they took longer than {seconds:g} s, or a value is too large; query single columns"


# -------------------------------------------------------------------------------------------------------- errors

MESSAGES = {  # by what SQLite's name for the error, or else the exception's, and then its text begin with
    r"SQLITE_AUTH|\S+ not authorized": "this server only reads: {} is refused; write a SELECT, or a WITH, VALUES,"
    " EXPLAIN or PRAGMA that reads",
    "SQLITE_NOMEM|MemoryError": f"the statement needs more than the {MAX_HEAP >> 20} MB of memory it may use; sort or"
    " group fewer rows, name fewer columns, and of huge values read only length()",
    "SQLITE_(BUSY|LOCKED)|TimeoutError": "another program has locked the database; try again in a moment",
    "SQLITE_NOTADB": "the file is not an SQLite database, or is encrypted; start the server with another file",
    "SQLITE_CORRUPT": "the database file is damaged, or not the whole of it is there; copy it again, or restore it",
    # Readers of a WAL database announce themselves in a file beside it, and a crash leaves work to be undone.
    "SQLITE_READONLY_": "the database is in WAL mode, or another program crashed, and its directory cannot be written"
    " to; open it once elsewhere, or serve a copy on which PRAGMA journal_mode = DELETE was run",
    "SQLITE_READONLY": "this server only reads: the statement would write; write a SELECT",
    r"SQLITE_(CANTOPEN|IOERR)|\w+ \[Errno": "the database file cannot be opened or read; check that it is there",
}
STOPPED = "the statement was stopped at the limit of {:.3g} s; read fewer rows, by WHERE or an index, or aggregate less"
FAILED = (sqlite3.Error, sqlite3.Warning, UnicodeError, OverflowError, MemoryError, OSError)
NO_SUCH = re.compile(r"no such (table|column): (.+?)(?: - should.*)?$", re.DOTALL)  # newer versions add a hint


def message_for(exc: BaseException, refused: str = "it") -> str:
    """What the model is told about an error: what is wrong, and what to do."""
    described = f"{getattr(exc, 'sqlite_errorname', type(exc).__name__)} {exc}"
    for pattern, message in MESSAGES.items():
        if re.match(pattern, described):
            return message.format(refused)
    return f"{str(exc).rstrip('.')}; correct the statement or params (SQLite {sqlite3.sqlite_version})"


def nearest(connection: sqlite3.Connection, kind: str, name: str, sql: str) -> str:
    """The end of a "no such" message: the nearest names there are, or what there is."""
    if kind == "table":
        return nearest_table(schemas_of(connection), catalog_of(connection), name)
    columns: list[tuple[str, str]] = []
    for schema, table, _ in catalog_of(connection):
        if table.lower() in sql.lower():  # the others are not read: views among them may be slow to compile
            with suppress(sqlite3.Error):  # a view of a table that is gone
                info = "SELECT name, name FROM pragma_table_xinfo(?, ?)"
                columns += connection.execute(info, (table, schema)).fetchall()
    return did_you_mean(name.rpartition(".")[2], columns) or "; describe_table shows the columns"


# -------------------------------------------------------------------------------------------------- worker process
#
# Nothing interrupts SQLite inside one C function or while it compiles a statement; killing the process does. So SQL
# runs in the worker processes of anyio.to_process: these keep a connection open, and die with a call that is cancelled.


@lru_cache(maxsize=1)
def prepare() -> None:
    """What a worker does once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process on the terminal; the server ends us
    if sys.platform != "win32":
        import resource

        threading.Thread(target=end_with_server, daemon=True).start()
        # Rows of many huge blobs are no part of SQLite's heap; the system refuses the process more memory than this.
        with suppress(OSError, ValueError):  # not every system can, and a stricter limit may be set already
            resource.setrlimit(resource.RLIMIT_AS, (MAX_PROCESS, MAX_PROCESS))


def end_with_server() -> None:
    """Wait until the server's end of standard input is closed, and end this process, whatever SQLite is doing."""
    import select

    server = select.poll()
    server.register(0, 0)  # hanging up is always reported
    server.poll()
    os._exit(0)


def end_after(seconds: float) -> None:
    """End this process after `seconds`, wherever it is and whether or not the server lives; 0: do not."""
    if hasattr(signal, "setitimer"):  # not on Windows, where the server looks at the clock
        signal.setitimer(signal.ITIMER_REAL, seconds)


def limit_time(connection: sqlite3.Connection, seconds: float) -> None:
    """Interrupt what runs on the connection after `seconds`; asking every 10,000 steps costs next to nothing."""
    deadline = time.monotonic() + seconds
    connection.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)


def work(files: Sequence[File], seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run `query`, `explain` or `describe` in a worker. Raises QueryError, TimeoutError when the statement was stopped,
    or SystemExit with a sentence, which ends the worker: what ran out of memory must not cost the next caller."""
    prepare()
    end_after(seconds + GRACE)
    try:
        try:
            connection, authorizer = open_read_only(files, tuple(os.stat(file.path)[1:3] for file in files))
        except FAILED as exc:
            raise QueryError(message_for(exc)) from None
        authorizer.refused = ""
        limit_time(connection, seconds)
        connection.text_factory = text_reader(MAX_NAME)  # a name that is not UTF-8 is no reason to fail
        try:
            return function(connection, *arguments)
        except FAILED as exc:
            if getattr(exc, "sqlite_errorname", "") == "SQLITE_INTERRUPT":
                raise TimeoutError from None
            told = message_for(exc, authorizer.refused or "it")
            if found := NO_SUCH.search(str(exc)):
                limit_time(connection, SAMPLE_TIME)
                with suppress(sqlite3.Error):
                    told = f"no such {found[1]}: {found[2]}{nearest(connection, found[1], found[2], str(arguments))}"
            raise (SystemExit if isinstance(exc, MemoryError) else QueryError)(told) from None
    finally:
        end_after(0)


# ------------------------------------------------------------------------------------ the server's side: SQLite files


class Files:
    """SQLite files as a database, see `build`."""

    dialect = Dialect()

    def __init__(self, files: Sequence[File], seconds: float) -> None:
        from asyncio import to_thread  # a worker does not need it

        self.files, self.seconds = tuple(files), seconds
        self.schemas = [file.schema for file in files]
        self.check = partial(to_thread, lambda: [check_file(file.path) for file in files])
        places = CapacityLimiter(4)  # statements run at once, so that a slow one does not hold up a fast one
        self.query = partial(self.work, places, query)
        self.explain = partial(self.work, places, explain)
        # A place of its own, so that slow statements of others do not hold it up.
        self.describe = partial(self.work, CapacityLimiter(1), describe, min(SAMPLE_TIME, seconds / 4))
        self.starting = anyio.Lock()
        self.idle = 0  # workers

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """While a server runs, workers can be started; anyio ends them with the event loop."""
        # Workers are started with `python -m`: without this, an anyio.py lying in the working directory would be run.
        # Afterwards it goes: other Python programs that this process starts would not find their own modules.
        before = os.environ.get("PYTHONSAFEPATH")
        os.environ["PYTHONSAFEPATH"] = "1"
        try:
            yield
        finally:
            if before is None:
                os.environ.pop("PYTHONSAFEPATH", None)

    async def ready(self) -> None:
        """Have an idle worker, if possible."""
        async with self.starting:  # a call waits for the worker that another one is starting already
            for _ in range(0 if self.idle else 2):  # the first try may find one that has just ended
                # anyio forgets a worker whose call is cancelled while it starts: the process would stay for ever.
                with anyio.CancelScope(shield=True), suppress(BrokenWorkerProcess, OSError):
                    await to_process.run_sync(prepare, limiter=CapacityLimiter(1))
                    self.idle = max(1, self.idle)
                    break

    async def work(self, places: CapacityLimiter, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a worker answers, once one of the places is free: waiting calls get their turn, as long as the time of a
        call allows. Raises QueryError."""
        deadline = anyio.current_time() + CALL_TIME
        with anyio.move_on_after(CALL_TIME - 1) as queue:  # the last one to begin still has a second
            async with places:
                queue.deadline = math.inf
                return await self.attempt(deadline, function, *arguments)
        raise QueryError("the statement was queued behind slow ones of others, and not begun; try again")

    async def attempt(self, deadline: float, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a worker answers before the deadline, in the time that a statement may take. Raises QueryError."""
        for _ in range(3):  # idle workers may have died
            await self.ready()
            self.idle = max(0, self.idle - 1)
            began = anyio.current_time()
            seconds = min(self.seconds, max(GRACE, deadline - began))
            try:
                with anyio.fail_after(seconds + 2 * GRACE):  # where the system has alarms, the worker's own is first
                    call = (work, self.files, seconds, function, *arguments)
                    result = await to_process.run_sync(*call, cancellable=True, limiter=CapacityLimiter(1))
                self.idle += 1
                return result
            except SystemExit as exc:
                raise QueryError(str(exc)) from None
            except (BrokenWorkerProcess, OSError) as exc:  # it was stopped, its alarm rang, it crashed, or never began
                if isinstance(exc, TimeoutError) or anyio.current_time() - began >= seconds:
                    late = "; it was queued for the rest of a call's time" if seconds < self.seconds else ""
                    raise QueryError(STOPPED.format(seconds) + late) from None
        raise QueryError("SQLite crashed, or did not start; write the statement in another way")

    # What follows are statements of our own that read sqlite_master only, and the numbers of rows. They run here, so no
    # slow statement holds them up.

    async def read(self, file: File, sql: str, *values: str) -> list[Any]:
        """The rows of a statement of our own on one file. Raises QueryError."""
        import aiosqlite

        try:
            with anyio.fail_after(SAMPLE_TIME + BUSY_TIME):
                async with aiosqlite.connect(file.uri, uri=True, timeout=BUSY_TIME) as connection:
                    connection.text_factory = text_reader(MAX_RESULT // 8)
                    try:
                        return list(await connection.execute_fetchall(sql, values))
                    except BaseException:  # out of time, or cancelled: closing waits for what still runs
                        await connection.interrupt()
                        raise
        except (sqlite3.Error, TimeoutError) as exc:
            raise QueryError(message_for(exc)) from None

    async def catalog(self) -> Catalog:
        """What is in the files."""
        return [(file.schema, *row) for file in self.files for row in await self.read(file, OBJECTS.format("main"))]

    async def tables(self, schema: str, pattern: str, offset: int, max_output: int) -> Answer:
        """What `list_tables` answers."""
        file = next((file for file in self.files if file.schema.lower() == schema.lower()), None)
        if not file:
            raise QueryError(f"no such schema: {schema}; the schemas are {', '.join(self.schemas)}")
        found = [row for row in await self.read(file, OBJECTS.format("main")) if is_like(row[0], pattern)]
        counts = await self.row_estimates(file, [name for name, kind in found if kind == "table"])
        known = {name: {"row_estimate": rows} for name, rows in counts.items()}
        entries = [{"name": name[:MAX_NAME], "type": kind, **known.get(name, {})} for name, kind in found]
        return tables_answer(file.schema, self.schemas, entries, offset, max_output)

    async def row_estimates(self, file: File, tables: Sequence[str]) -> dict[str, int]:
        """How many rows tables have, as far as that costs nothing: counted in a small database, else from ANALYZE."""
        with suppress(QueryError):  # a damaged table; no ANALYZE
            size = await self.read(file, "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size")
            if size[0][0] > 4 * 2**20:  # bytes; to count the rows of less takes milliseconds
                sql = "SELECT tbl, max(CAST(stat AS INTEGER)) FROM sqlite_stat1 GROUP BY tbl"
                return dict(await self.read(file, sql))
            first = tables[:500]  # as many SELECTs may stand in one statement
            counts = " UNION ALL ".join(f"SELECT ?, count(*) FROM {quoted(table)}" for table in first)
            return dict(await self.read(file, counts, *first))
        return {}

    async def create_statement(self, schema: str, table: str, max_output: int) -> Answer:
        """The CREATE statement of a table or view, followed by those of its indexes and triggers."""
        schema, table, _ = find_table(self.schemas, await self.catalog(), schema, table)
        sql = "SELECT sql || ';' FROM sqlite_master WHERE tbl_name = ? AND sql <> '' ORDER BY name <> tbl_name, rowid"
        rows = await self.read(self.files[self.schemas.index(schema)], sql, table)
        text = "\n".join(row[0] for row in rows)
        return fit(text, max_output, "query substr(sql, start, length) of sqlite_master")

    async def all_tables(self) -> Catalog:
        """Schema, name and type of tables and views."""
        twice = "main" if len(self.files) > 1 else ""  # the first of several files also goes by its name
        return [row for row in await self.catalog() if row[0] != twice][:MAX_RESOURCES]


# -------------------------------------------------------------------------------------------------- command line


def check_file(file: str | Path) -> File:
    """An SQLite database that can be read. Raises ConfigError: nothing is created by a typo."""
    from common import ConfigError

    path = Path(os.path.realpath(os.path.expanduser(file)))
    if not os.path.isfile(path):  # opening a FIFO would wait for ever
        raise ConfigError(f"{file} is not there, or is no regular file; name an SQLite file")
    # as_uri escapes ?, # and %: in a URI put together by hand they would open another file.
    found = File("main", f"{path.as_uri()}?mode=ro", str(path))
    try:
        open_files([found], busy_time=0).close()
    except sqlite3.Error as exc:
        if not re.match("SQLITE_(BUSY|LOCKED)", exc.sqlite_errorname):  # locked just now is no reason not to start
            raise ConfigError(f"{file} cannot be served: {message_for(exc)}") from None
    return found


def name_schemas(files: Sequence[str | Path]) -> list[File]:
    """The files with their schema names: the first is main; several also go by their names on the command line."""
    taken = {"main", "temp"}
    found: list[File] = []
    for file in files:
        stem = re.sub(r"\W", "_", Path(file).stem) or "db"
        names = (f"{stem}_{number}" if number > 1 else stem for number in count(1))
        found.append(check_file(file)._replace(schema=next(name for name in names if name.lower() not in taken)))
        taken.add(found[-1].schema.lower())
    return [found[0]._replace(schema="main"), *(found if len(found) > 1 else [])]


def build_server(
    files: Sequence[str | Path], *, timeout: float = TIMEOUT, options: "Options | None" = None
) -> "Server":
    """A server for the named SQLite files. Raises ConfigError when one cannot be served."""
    import serving
    from common import ConfigError

    if not 1 <= len(files) <= 10:  # SQLite attaches ten databases to a connection at most
        raise ConfigError(f"name SQLite files: one at least, and 10 at most; here are {len(files)}")
    found = name_schemas(files)
    names = [f"{Path(file).name} as {opened.schema}" for file, opened in zip(files, found[-len(files) :], strict=True)]
    served = ", ".join(names).encode("utf-8", "backslashreplace").decode()  # a file's name can be any bytes
    server = build(Files(found, timeout), served, options or serving.Options())
    server.label = Path(files[0]).stem
    return server


def from_command_line(args: Any, options: "Options") -> "Server":
    """The server that the command line asks for."""
    from common import ConfigError

    for word in args.files or [os.environ.get("DATABASE_URL", "")]:
        if url := re.match(r"([a-z][a-z0-9+.-]*)://", word, re.IGNORECASE):  # the rest may hold a password
            if url[1].lower() in ("postgresql", "postgres"):
                raise ConfigError("use pg_server.py: DATABASE_URL=... python pg_server.py")
            raise ConfigError(f"this server serves SQLite files, not {url[1]}:// URLs; name the files by their paths")
    if not 0.1 <= args.timeout <= 25:  # a tool call may take 30 s in all
        raise ConfigError(f"--timeout {args.timeout:g} is not a number of seconds from 0.1 to 25")
    return build_server(args.files, timeout=args.timeout, options=options)


def main() -> None:
    """The command line: `db_server.py FILE.db [FILE.db ...]`."""
    import logging

    try:
        import serving

        __import__("aiosqlite")  # say now that it is missing, not when a table is listed
    except ModuleNotFoundError as missing:
        sys.stderr.write(f"db_server.py needs {missing.name}: copy {missing.name}.py beside it, or pip install it\n")
        sys.exit(2)
    # When a worker was killed, asyncio may warn of an "unknown child process": it was not the first to ask for it.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    parser = serving.argument_parser("db-server", "Serve SQLite files to MCP clients, read-only.")
    parser.add_argument("files", nargs="*", metavar="FILE.db", help="SQLite files, several become schemas")
    timeout = "for one statement (default: %(default)s)"
    parser.add_argument("--timeout", type=float, default=TIMEOUT, metavar="SECONDS", help=timeout)
    serving.serve(parser, from_command_line)


if __name__ == "__main__":
    main()
