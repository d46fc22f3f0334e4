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

import json
import logging
import os
import re
import signal
import sqlite3
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing, suppress
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

# A worker process imports this file too. What only the server needs is left out there: the SDK takes ten times as long
# to import as all the rest.
if TYPE_CHECKING or "anyio.to_process" not in getattr(sys, "orig_argv", ()):
    try:
        import serving  # first of all: it checks Python and mcp, and imports the SDK with the garbage collector off
        import aiosqlite  # isort: skip
        from common import ConfigError, trailer
    except ModuleNotFoundError as missing:
        sys.stderr.write(f"db_server.py needs {missing.name}: copy {missing.name}.py beside it, or pip install it\n")
        sys.exit(2)

    from typing import Annotated  # Python 3.8, which gets the line of serving.py, lacks it

    from mcp.server.mcpserver.exceptions import MCPServerError, ResourceNotFoundError
    from mcp.server.mcpserver.resources.templates import ResourceSecurity
    from mcp.shared.exceptions import MCPError
    from mcp_types import INTERNAL_ERROR, Resource
    from pydantic import Field

import anyio
from anyio import BrokenWorkerProcess, CapacityLimiter, to_process
from pydantic_core import to_json

# -------------------------------------------------------------------------------------------------------- limits

TIMEOUT = 5.0  # seconds for one statement, unless --timeout says otherwise
GRACE = 0.5  # seconds more until its process ends: the SQL was inside one C function and did not see the limit
SAMPLE_TIME = 1.0  # seconds for the sample rows of describe_table: a view may be slow, its description is not
BUSY_TIME = 2.0  # seconds to wait for a file that another program has locked
CALL_TIME = 26.5  # seconds of a call, its turn in the queue included; a worker may have to start, and 30 are the end
MAX_CELL = 10_000  # characters of one cell: a quarter of a result
MAX_NAME = 1_000  # characters of a name or an error: a column without AS is named by its whole expression
MAX_RESULT = 64 * 2**20  # characters of a result when --max-output sets no limit: the server's memory has one
MAX_HEAP = 128 * 2**20  # bytes that SQLite may allocate in one process: sorts, groups, temporary tables, page cache
MAX_PROCESS = 768 * 2**20  # bytes of address space of one worker, where the system can limit it (Linux)
SAFE_INTEGER = 2**53  # above it, JavaScript clients lose digits
SAMPLE_CELL = 200  # characters of one cell in the sample rows
MAX_RESOURCES = 1_000  # tables listed as resources; others can be read all the same

# ------------------------------------------------------------------------------------------------------ the tools

Params = list[Any] | dict[str, Any] | None

# A table or view: table, schema, type; columns with name, type, nullable, default and generated, on PostgreSQL also
# comment and enum labels (values); primary_key; indexes with name, columns, unique and partial; foreign_keys with
# columns, table, references (none: the primary key), on_update and on_delete; sample_rows; note.
Description = dict[str, Any]
Catalog = Sequence[tuple[str, str, str]]  # schema, name and type of each table and view


class QueryError(Exception):
    """Something that the model can act on: one sentence."""


class Answer(NamedTuple):
    """A result, and what its trailer has to say."""

    text: str
    facts: Sequence[str] = ()
    resume: Mapping[str, object] = {}


if TYPE_CHECKING or "anyio.to_process" not in getattr(sys, "orig_argv", ()):  # the arguments of the tools
    # SQLite's parser takes seconds for megabytes.
    Sql = Annotated[str, Field(description="One statement that reads: SELECT, WITH or VALUES", max_length=100_000)]
    Values = Annotated[Params, Field(description="List for ? ($1 ... on PostgreSQL), object for :name placeholders")]
    Limit = Annotated[int, Field(description="Rows at most", ge=1, le=1_000_000, strict=True)]
    Offset = Annotated[int, Field(description="How many to skip: a cut result says it", ge=0, le=2**53, strict=True)]
    Schema = Annotated[str, Field(description="Schema; list_tables names them all", max_length=200)]
    Table = Annotated[str, Field(description="Name of a table or view, or schema.name", max_length=1000)]
    Pattern = Annotated[str, Field(description="Glob for the names, such as order*", max_length=200)]


def add_tools(server: "serving.Server", database: Any, max_output: int) -> None:
    """The four tools. None of them writes, and nothing here could make one."""

    @server.tool(annotations=serving.READ_ONLY, structured_output=False)
    async def query_database(query: Sql, params: Values = None, limit: Limit = 100, offset: Offset = 0) -> str:
        """Run one SQL statement that reads and return JSON: columns, rows, row_count, truncated. A cut result ends with
        a line that says how to continue. Blobs come as their size, cells over 10,000 characters cut, with their length;
        exact numerics, integers beyond 2^53, NaN and infinities as strings; a JSON null like a NULL. A slow statement
        is stopped: filter and aggregate in SQL."""
        return await answer(database.query(query, params, limit, offset, max_output))

    @server.tool(annotations=serving.READ_ONLY, structured_output=False)
    async def list_tables(schema: Schema = database.schema, pattern: Pattern = "*", offset: Offset = 0) -> str:
        """List the tables and views of a schema as JSON: name, type, and a row_estimate where it costs nothing; and the
        names of all schemas. Call it first."""
        return await answer(database.tables(schema, pattern, offset, max_output))

    @server.tool(annotations=serving.READ_ONLY)
    async def describe_table(table: Table, schema: Schema = database.schema) -> Description:
        """Describe a table or view: columns with type, nullability and default, primary key, indexes, foreign keys,
        and three sample rows. Call it before writing a query."""
        return await answer(database.describe(schema, table, max_output))

    @server.tool(annotations=serving.READ_ONLY, structured_output=False)
    async def explain_query(query: Sql, params: Values = None) -> str:
        """Show the plan of a statement without running it, one step a line. Use it when a query is slow: see whether
        it reads all rows or uses an index, and what it sorts."""
        return await answer(database.explain(query, params, max_output))


def build(database: Any, served: str, options: "serving.Options", name: str = "db-server") -> "serving.Server":
    """A server with the tools and resources on any kind of database, as `Files` is one; `served` says to the model what
    it queries, such as "shop.db as main".

    A database has the attributes `kind` (its name), `schema` (the first to look in) and `seconds` (for one statement),
    and these methods, which raise QueryError: `query` and `tables` return an Answer, `explain` and `create_statement` a
    text, `describe` a Description, `all_tables` the Catalog of at most MAX_RESOURCES tables. What `running` opens is
    closed at its end, and several clients may be inside at once. `check` raises any error when the database cannot be
    served just now. Raises ConfigError.
    """

    class DatabaseServer(serving.Server):
        """Lists the tables there are just now as resources."""

        async def list_resources(self) -> list[Resource]:
            """One resource for each table or view. Raises MCPError."""
            try:
                found = await self.checked("resources/list", {}, lambda: answer(database.all_tables()))
            except MCPServerError as exc:
                raise MCPError(INTERNAL_ERROR, str(exc)) from None
            uris = [(f"schema://{quote(s, '')}/{quote(t, '')}", f"{s}.{t}") for s, t, _ in found]
            return [Resource(uri=uri, name=name, mime_type="application/sql") for uri, name in uris]

    if not 0.1 <= database.seconds <= 25:  # a tool call may take 30 s in all
        raise ConfigError(f"--timeout {database.seconds:g} is not a number of seconds from 0.1 to 25")
    about = f"Read-only SQL ({database.kind}) on {served}; a statement is stopped after {database.seconds:g} s"
    server = DatabaseServer(name, about, options, lifespan=lambda _: database.running())  # pyright: ignore[reportUnknownLambdaType]
    server.health = database.check
    add_tools(server, database, options.max_output)
    names = ResourceSecurity(exempt_params={"schema", "table"})  # of tables, whatever they look like, are no paths

    @server.resource("schema://{schema}/{table}", mime_type="application/sql", security=names)
    async def create_statement(schema: str, table: str) -> str:
        """The CREATE statement of a table or view, with its indexes and triggers."""
        return await answer(database.create_statement(schema, table, options.max_output))

    return server


async def answer(result: Awaitable[Any]) -> Any:
    """What a database answers, an Answer with its trailer; a QueryError as the error that the model is shown."""
    try:
        found = await result
    except (QueryError, SystemExit) as exc:  # the second are the last words of a worker
        # To a resource it is nearly always a wrong name; of a tool, it counts as a ToolError.
        raise ResourceNotFoundError(" ".join(str(exc).split())[:MAX_NAME]) from None
    if not isinstance(found, Answer):
        return found
    return f"{found.text}\n{trailer(*found.facts, **found.resume)}" if found.facts else found.text


# ------------------------------------------------------------------------------------------------- results as JSON

dumps = json.JSONEncoder(ensure_ascii=False).encode


def listing(head: Mapping[str, Any], part: str, lines: Iterable[str], limit: int, offset: int, room: int) -> Answer:
    """An object in JSON that has what `head` has, and the list `part`, one of the lines a line: at most `limit`, and as
    many as fit into `room` characters (0: no limit). The first is number `offset`; one more says that there are more.
    Long cells were cut before. Raises QueryError if not even one fits."""
    start = f'{dumps(head)[:-1]}, "{part}": ['
    room = (room or MAX_RESULT) - len(start) - 250  # for what follows the list, and the trailer
    taken, more = list[str](), False
    for line in lines:
        room -= len(line) + 2
        more = len(taken) == limit or room < 0
        if more:
            break
        taken.append(line)
    if more and not taken:
        raise QueryError("one row alone is too long; name fewer columns, or read parts with substr(column, 1, 1000)")
    body = "\n" + ",\n".join(taken) + "\n" if taken else ""
    end = f'], "{part[:-1]}_count": {len(taken)}, "truncated": {dumps(more)}}}'
    facts = [f"{part} {offset + 1}-{offset + len(taken)} shown"] if more else []
    if cells := body.count("… (cut: "):
        facts.append(f"{cells} cells cut, substr(column, start, length) reads on in one")
    return Answer(start + body + end, facts, {"offset": offset + len(taken)} if more else {})


def whole(found: Any, max_output: int, instead: str) -> Any:
    """A description or a text, if it fits: a table can have 2,000 columns. Raises QueryError that says what to do."""
    if len(dumps(found)) > max_output > 0:
        raise QueryError(f"the result has more than {max_output} characters; {instead}")
    return found


# ------------------------------------------------------------------------------------------- names and parameters


def quoted(name: str) -> str:
    """A name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def is_like(name: str, pattern: str) -> bool:
    """Whether a name matches a glob, in any case; also one as SQLite writes it, or with the % of LIKE."""
    return fnmatchcase(name.lower(), (pattern or "*").lower().replace("%", "*").replace("[^", "[!"))


def no_such(kind: str, name: str, catalog: Catalog, main: str = "main") -> QueryError:
    """The error for a name that is misspelt, with the nearest ones: full names of those that are not in `main`."""
    import difflib  # only here: a worker starts faster without it

    inside_last = sorted(catalog, key=lambda found: found[0] == main)[-5_000:]
    names = {there.lower(): there if schema == main else f"{schema}.{there}" for schema, there, _ in inside_last}
    short = name.rpartition(".")[2].strip("\"'`[]").lower()
    close = " or ".join(names[match] for match in difflib.get_close_matches(short[:100], names, 3))
    hint = f"did you mean {close}?" if close else "list_tables and describe_table show what there is"
    return QueryError(f"no such {kind}: {name}; {hint}")


def refuse_unused(names: Collection[str]) -> None:
    """Raise QueryError if there are parameters that the statement does not ask for: their names may be misspelt."""
    if names:
        raise QueryError(f"the statement has no placeholder for {', '.join(names)}; write :name, or leave it out")


# -------------------------------------------------------------------------------------------- four read-only layers
#
# No layer holds alone: mode=ro lets a query ATTACH and write other files, query_only can be switched off by the
# query itself, size limits only stop what is large, and an authorizer is a list that somebody might extend wrongly.

Paths = Sequence[tuple[str, str]]  # schema and path of each file; the first schema is main

# PRAGMAs that only report, where a value says on what, and those that would set something if they were given a value.
REPORTS = "(foreign_key|integrity|quick)_check|[a-z_]+_list|(index|table)_x?info"
SETTINGS = """application_id auto_vacuum busy_timeout cache_size compile_options data_version encoding foreign_keys
 freelist_count journal_mode page_count page_size query_only recursive_triggers schema_version secure_delete
 synchronous temp_store user_version""".split()


def uri(path: str) -> str:
    """A file's name for SQLite, to be read only. as_uri escapes ?, # and %: else they could open another file."""
    return f"{Path(path).as_uri()}?mode=ro"


def open_files(files: Paths) -> sqlite3.Connection:
    """Layer 1: a connection to files that are opened to be read."""
    connection = sqlite3.connect(uri(files[0][1]), uri=True, isolation_level=None, timeout=BUSY_TIME)
    for schema, path in files[1:]:
        connection.execute("ATTACH ? AS ?", (uri(path), schema))
    return connection


def forbid_writing(connection: sqlite3.Connection) -> None:
    """Layer 2: the engine refuses to write, to any attached file."""
    connection.execute("PRAGMA query_only = ON")


def limit_sizes(connection: sqlite3.Connection, attached: int) -> None:
    """Layer 3: nothing more can be attached (VACUUM INTO attaches too), and no statement or heap grows too large."""
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, attached)
    connection.execute("PRAGMA temp_store = MEMORY")  # a sort wrote 2.5 GB of temporary files in three seconds
    connection.execute(f"PRAGMA hard_heap_limit = {MAX_HEAP}")


def authorize(action: int, name: str | None, detail: str | None, schema: str | None, _: str | None) -> int:
    """Layer 4: what a statement may do is a list, and everything that is not on it is denied. SQLite asks this while it
    compiles a statement; the meaning of the names depends on the action."""
    name, allowed = name or "", False
    if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE):
        allowed = name != "sqlite_stmt"  # that table shows the statements of other callers
    elif action == sqlite3.SQLITE_FUNCTION:
        # Foreign code, and a write to an FTS index.
        allowed = str(detail).lower() not in ("load_extension", "fts3_tokenizer", "optimize")
    elif action == sqlite3.SQLITE_PRAGMA:
        allowed = bool(re.fullmatch(REPORTS, name.lower())) or (name.lower() in SETTINGS and not detail)
    elif action in (sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE):
        # An R-tree prepares statements that would write these tables of its own before it can be read; run from a
        # query, they are stopped by the first two layers. Every virtual table, such as json_each, must declare columns.
        declares = (sqlite3.SQLITE_UPDATE, "sqlite_master", "main")
        allowed = name.endswith(("_node", "_rowid", "_parent")) or (action, name, schema) == declares
    return sqlite3.SQLITE_OK if allowed else sqlite3.SQLITE_DENY


@lru_cache(maxsize=1)
def open_read_only(files: Paths, _: object = None) -> sqlite3.Connection:
    """A connection with all four layers; the authorizer last, because it would deny the others their PRAGMAs. A worker
    keeps it until what the paths lead to, the second argument, has changed: a file that was replaced must not be read
    from its old inode."""
    connection = open_files(files)
    forbid_writing(connection)
    limit_sizes(connection, len(files) - 1)
    if sys.version_info >= (3, 12):  # "Titel" is a column or an error; by an old rule it could be the text Titel
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_DQS_DML, False)
        connection.setconfig(sqlite3.SQLITE_DBCONFIG_DQS_DDL, False)
    connection.set_authorizer(authorize)
    return connection


def stop_after(seconds: float) -> tuple[Callable[[], bool], int]:
    """A progress handler that ends what runs on a connection after `seconds`. To be asked every 10,000 steps costs next
    to nothing."""
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() > deadline, 10_000


# ------------------------------------------------------------------------------------------- cells and rows, as JSON


def read_text(width: int, data: bytes) -> str:
    r"""A TEXT cell of at most `width` characters. Bytes that are no UTF-8 become `\xNN`: an error would hide the row.
    SQLite hands over one cell at a time, so cutting here keeps a row of many long texts out of memory."""
    text = data.decode("utf-8", "backslashreplace")
    return text if len(text) <= width else f"{text[:width]}… (cut: {width} of {len(text)} characters)"


def in_words(cell: Any) -> Any:
    """A cell as JSON can have it: a blob, and what JavaScript would round, in words."""
    if type(cell) is bytes:
        return f"(blob, {len(cell)} bytes; hex(column) shows them)"
    return str(cell) if type(cell) is int and abs(cell) > SAFE_INTEGER else cell


def json_lines(rows: Iterator[Sequence[Any]]) -> Iterator[str]:
    """Rows as JSON lists. Fetched and encoded eight at a time, which is a fifth faster than one after the other; with
    more of them, large blobs would not fit into a worker."""
    while batch := list(islice(rows, 8)):
        # Most cells are of other types, and not worth a call.
        if [c for row in batch for c in row if type(c) is bytes or (type(c) is int and in_words(c) is not c)]:
            batch = [list(map(in_words, row)) for row in batch]
        yield from [to_json(row, inf_nan_mode="strings").decode() for row in batch]


# ------------------------------------------------------------------------------------------ what is in a database


# This reads nothing but sqlite_master: SQLite's own pragma_table_list compiles every view, and a view can be made to
# take for ever. What no user has made is left out: virtual tables keep their data in tables of their own.
OBJECTS = """SELECT '{0}', name, CASE WHEN type = 'table' AND rootpage = 0 THEN 'virtual' ELSE type END
FROM "{0}".sqlite_master WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' AND name NOT IN (
SELECT v.name || '_' || value FROM "{0}".sqlite_master v, json_each('["data", "idx", "content", "docsize", "config",
"segments", "segdir", "stat", "node", "rowid", "parent"]') WHERE v.type = 'table' AND v.rootpage = 0)"""
COLUMNS = """SELECT 'main', c.name, '' FROM "{0}".sqlite_master AS o, pragma_table_xinfo(o.name, '{0}') AS c
WHERE o.type = 'table' AND rootpage > 0"""  # of tables only: to ask for the columns of a view compiles it


def in_all(schemas: Iterable[str], sql: str) -> str:
    """SQL for what `sql` finds in each of the schemas."""
    return " UNION ALL ".join(map(sql.format, schemas))


def in_attached(connection: sqlite3.Connection, sql: str) -> list[Any]:
    """What `sql` finds in each of the attached databases."""
    schemas = [row[1] for row in connection.execute("PRAGMA database_list") if row[1] != "temp"]
    return connection.execute(in_all(schemas, sql)).fetchall()


def find_table(catalog: Catalog, schema: str, table: str) -> tuple[str, str, str]:
    """Schema, name and type of a table or view. Raises QueryError that suggests the nearest name."""
    known = {f"{found[0]}.{found[1]}".lower(): found for found in catalog}
    if found := known.get(f"{schema}.{table}".lower()) or known.get(table.lower()):
        return found
    raise no_such("table", f"{schema}.{table}", catalog)


# ------------------------------------------------------------------------------- what a worker does: the model's SQL


class Named(dict[str, Any]):
    """Parameters by name. SQLite asks for each placeholder once, and what is then left has none."""

    def __getitem__(self, name: str) -> Any:
        return self.pop(name)


def execute(connection: sqlite3.Connection, sql: str, params: Params) -> sqlite3.Cursor:
    """Run the model's statement, one that returns rows. Raises QueryError, or what sqlite3 raises."""
    named = Named({name.lstrip(":@$"): value for name, value in params.items()} if isinstance(params, dict) else {})
    try:
        cursor = connection.execute(sql.rstrip("; \t\r\n"), named if isinstance(params, dict) else params or ())
    except sqlite3.OperationalError as exc:
        if not (missing := re.match(r"no such (table|column): (\S+)", str(exc))):
            raise
        catalog = in_attached(connection, OBJECTS if missing[1] == "table" else COLUMNS)
        raise no_such(missing[1], missing[2], catalog) from None
    if cursor.description is None:
        raise QueryError("the statement is empty; write a SELECT, WITH or VALUES")
    refuse_unused(named)
    return cursor


def query(connection: sqlite3.Connection, sql: str, params: Params, limit: int, offset: int, max_output: int) -> Answer:
    """What `query_database` answers."""
    width = min(MAX_CELL, max_output // 4) if max_output else MAX_RESULT // 8
    connection.text_factory = partial(read_text, width)
    # An open cursor keeps its read lock, and another program's write waits for it.
    with closing(execute(connection, sql, params)) as cursor:
        names = [column[0][:MAX_NAME] for column in cursor.description]
        lines = json_lines(islice(cursor, offset, offset + limit + 1))
        return listing({"columns": names}, "rows", lines, limit, offset, max_output)


def explain(connection: sqlite3.Connection, sql: str, params: Params, max_output: int) -> str:
    """What `explain_query` answers: one line a step, indented below the step that it belongs to."""
    sql = re.sub(r"^\s*EXPLAIN\b(\s+QUERY\s+PLAN\b)?", "", sql, flags=re.IGNORECASE)
    # The authorizer is not asked about VACUUM before it runs, so look at what the statement was compiled to.
    for _, operation, _, writes, *_ in execute(connection, f"EXPLAIN {sql}", params):
        if operation == "Vacuum" or (operation == "Transaction" and writes):
            raise QueryError("this server only reads: the statement would write; explain a SELECT")
    depth, lines = {0: -1}, list[str]()
    for step, parent, _, detail in execute(connection, f"EXPLAIN QUERY PLAN {sql}", params):
        depth[step] = depth.get(parent, -1) + 1
        lines.append("  " * depth[step] + f"- {detail}")
    return whole("\n".join(lines) or "- no table is read", max_output, "explain a part of the statement")


DESCRIBE = {  # SQL for each part of a Description of table ?1 in schema ?2; a row is one value in JSON
    # A lone INTEGER PRIMARY KEY is the row's number: SQLite says nullable, but it never is NULL. Hidden columns are the
    # arguments of a table-valued function (1) or generated (2, 3).
    "columns": """SELECT json_object('name', name, 'type', type, 'nullable', json(CASE WHEN "notnull" OR (pk AND type
        LIKE 'integer' AND max(pk) OVER () = 1) THEN 'false' ELSE 'true' END), 'default', dflt_value, 'generated',
        json(CASE WHEN hidden > 1 THEN 'true' ELSE 'false' END)) FROM pragma_table_xinfo(?1, ?2) WHERE hidden <> 1""",
    "primary_key": "SELECT json_quote(name) FROM pragma_table_info(?1, ?2) WHERE pk ORDER BY pk",
    "indexes": """SELECT json_object('name', name, 'columns', (SELECT json_group_array(coalesce(name, '(expression)'))
        FROM pragma_index_info(i.name, ?2)), 'unique', json(CASE WHEN "unique" THEN 'true' ELSE 'false' END),
        'partial', json(CASE WHEN partial THEN 'true' ELSE 'false' END)) FROM pragma_index_list(?1, ?2) i""",
    "foreign_keys": """SELECT json_object('columns', json_group_array("from"), 'table', "table", 'references',
        json(CASE WHEN "to" IS NULL THEN '[]' ELSE json_group_array("to") END), 'on_update', on_update,
        'on_delete', on_delete) FROM pragma_foreign_key_list(?1, ?2) GROUP BY id""",
}


def describe(connection: sqlite3.Connection, schema: str, table: str, max_output: int) -> Description:
    """What `describe_table` answers."""
    schema, table, kind = find_table(in_attached(connection, OBJECTS), schema, table)
    found: Description = {"table": table, "schema": schema, "type": kind}
    for part, sql in DESCRIBE.items():
        found[part] = [json.loads(row[0]) for row in connection.execute(sql, (table, schema))]
    connection.set_progress_handler(*stop_after(SAMPLE_TIME))  # a slow view must not hide its columns
    connection.text_factory = partial(read_text, SAMPLE_CELL)
    try:
        rows = connection.execute(f"SELECT * FROM {quoted(schema)}.{quoted(table)} LIMIT 3")
        found |= {"sample_rows": list(map(json.loads, json_lines(rows))), "note": ""}
    except FAILED:
        found |= {"sample_rows": [], "note": f"no sample rows in {SAMPLE_TIME:g} s, or too large; query single columns"}
    return whole(found, max_output, f"query pragma_table_xinfo('{table}', '{schema}') for the columns")


# -------------------------------------------------------------------------------------------------------- errors

FAILED = (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError, OSError)
MESSAGES = {  # by a pattern in SQLite's name for the error, or else the exception's, and its text
    "SQLITE_AUTH|SQLITE_READONLY |not authorized": "this server only reads ({}); write a SELECT or another query",
    "SQLITE_NOMEM|MemoryError": f"the statement needs more than the {MAX_HEAP >> 20} MB of memory it has; read less",
    "SQLITE_(BUSY|LOCKED|INTERRUPT)": "another program has locked the database; try again in a moment",
    "SQLITE_(NOTADB|CORRUPT)": "not an SQLite database, or damaged, or not the whole of it is there; copy it again",
    # Readers of a WAL database announce themselves in a file beside it, and a crash leaves work to be undone.
    r"SQLITE_(READONLY_|CANTOPEN|IOERR)|\[Errno": "it cannot be opened: gone, or in WAL mode in a read-only directory",
    "": "{}; correct the statement or params",
}


def message_for(exc: BaseException) -> str:
    """What the model is told about an error: what is wrong, and what to do."""
    described = f"{getattr(exc, 'sqlite_errorname', type(exc).__name__)} {exc}"
    message = next(message for pattern, message in MESSAGES.items() if re.search(pattern, described))
    return message.format(str(exc).rstrip("."))


# -------------------------------------------------------------------------------------------------- worker process
#
# Nothing interrupts SQLite inside one C function or while it compiles a statement; killing the process does. So SQL
# runs in the worker processes of anyio.to_process: these keep a connection open, and die with a call that is cancelled.


@lru_cache(maxsize=1)
def prepare() -> None:
    """What a worker does once, before it opens files."""
    if sys.platform == "linux":
        import ctypes
        import fcntl
        import resource

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with a server that is killed, at once
        # Rows of many huge blobs are no part of SQLite's heap; the system refuses the process more memory than this.
        with suppress(ValueError, OSError):  # a stricter limit is set already
            resource.setrlimit(resource.RLIMIT_AS, (MAX_PROCESS, MAX_PROCESS))
            fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 2**20)  # bytes: large results go to the server in few pieces


def end_after(seconds: float) -> None:
    """End this process after `seconds`, wherever it is and whether or not the server lives; 0: do not."""
    if hasattr(signal, "setitimer"):  # not on Windows, where only the time of a call ends it
        signal.setitimer(signal.ITIMER_REAL, seconds)


def work(files: Paths, seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run `query`, `explain` or `describe` in a worker. Raises QueryError, TimeoutError when the statement was stopped,
    or SystemExit with a sentence, which ends the worker: what ran out of memory must not cost the next caller."""
    prepare()
    end_after(seconds + GRACE)
    try:
        connection = open_read_only(files, tuple(os.stat(path)[1:3] for _, path in files))
        connection.set_progress_handler(*stop_after(seconds))
        connection.text_factory = partial(read_text, MAX_RESULT)  # a name that is not UTF-8 is no reason to fail
        return function(connection, *arguments)
    except FAILED as exc:
        if getattr(exc, "sqlite_errorname", "") == "SQLITE_INTERRUPT":
            raise TimeoutError from None
        raise (SystemExit if isinstance(exc, MemoryError) else QueryError)(message_for(exc)) from None
    finally:
        end_after(0)


# ------------------------------------------------------------------------------------ the server's side: SQLite files


class Files:
    """SQLite files as a database, see `build`."""

    kind, schema = "SQLite", "main"

    def __init__(self, files: Paths, seconds: float) -> None:
        self.files, self.seconds, self.schemas = files, seconds, [schema for schema, _ in files]
        self.check = partial(anyio.to_thread.run_sync, lambda: [check_file(path) for _, path in files])
        places = anyio.Semaphore(4, fast_acquire=True)  # statements run at once: a slow one does not hold up a fast one
        self.query, self.explain = partial(self.work, places, query), partial(self.work, places, explain)
        # A place of its own, so that slow statements of others do not hold it up.
        self.describe = partial(self.work, anyio.Semaphore(1, fast_acquire=True), describe)
        self.idle = 0  # workers

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """While a server runs, workers can be started; anyio ends them with the event loop."""
        # Workers are started with `python -m`: without this, an anyio.py lying in the working directory would be run.
        # Afterwards it goes: other Python programs that this process starts would not find their own modules.
        self.run = partial(to_process.run_sync, limiter=CapacityLimiter(9))  # anyio's own: the number of processors
        before = os.environ.get("PYTHONSAFEPATH", "")
        os.environ["PYTHONSAFEPATH"] = "1"
        try:
            yield
        finally:
            os.environ["PYTHONSAFEPATH"] = before

    async def work(self, places: anyio.Semaphore, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a worker answers, once one of the places is free: waiting calls get their turn, as long as the time of a
        call allows. Raises QueryError."""
        deadline = time.monotonic() + CALL_TIME
        with anyio.move_on_after(CALL_TIME - 1) as queue:  # the last one to begin still has a second
            async with places:
                queue.deadline += CALL_TIME
                return await self.attempt(min(self.seconds, deadline - time.monotonic()), function, *arguments)
        raise QueryError("the statement was queued behind slow ones of others, and not begun; try again")

    async def attempt(self, seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a worker answers in the time that a statement may take. Raises QueryError."""
        for _ in range(6):  # all the idle workers may have died
            began = time.monotonic()
            try:
                if not self.idle:
                    # anyio forgets a worker whose call is cancelled while it starts: the process would stay for ever.
                    with anyio.CancelScope(shield=True):
                        await self.run(prepare)
                self.idle = max(self.idle - 1, 0)
                result = await self.run(work, self.files, seconds, function, *arguments, cancellable=True)
                self.idle += 1
                return result
            except (BrokenWorkerProcess, OSError) as exc:  # it was stopped, its alarm rang, it crashed, or never began
                if isinstance(exc, TimeoutError) or time.monotonic() - began >= seconds:
                    advice = "as it was queued" if seconds < self.seconds else "read fewer rows, or use an index"
                    raise QueryError(f"the statement was stopped at the limit of {seconds:.3g} s; {advice}") from None
        raise QueryError("SQLite crashed, or did not start; write the statement in another way")

    # What follows are statements of our own that read sqlite_master only, and the numbers of rows. They run here, so no
    # slow statement holds them up.

    async def read(self, sql: str, *values: str) -> list[Any]:
        """The rows of a statement of our own. Raises QueryError."""
        try:
            async with aiosqlite.Connection(partial(open_files, self.files), iter_chunk_size=64) as connection:
                await connection.set_progress_handler(*stop_after(SAMPLE_TIME))
                connection.text_factory = partial(read_text, MAX_RESULT // 8)
                return list(await connection.execute_fetchall(sql, values))
        except sqlite3.Error as exc:
            raise QueryError(message_for(exc)) from None

    async def tables(self, schema: str, pattern: str, offset: int, max_output: int) -> Answer:
        """What `list_tables` answers."""
        if schema not in self.schemas:
            raise QueryError(f"no such schema: {schema}; the schemas are {', '.join(self.schemas)}")
        catalog = await self.read(in_all([schema], OBJECTS) + " ORDER BY 2")
        found = [(name, kind) for _, name, kind in catalog if is_like(name, pattern)]
        known = await self.row_estimates(schema, [name for name, kind in found if kind == "table"])
        entries = [{"name": name[:MAX_NAME], "type": kind, **known.get(name, {})} for name, kind in found]
        head = {"schema": schema, "schemas": self.schemas}
        return listing(head, "tables", map(dumps, entries[offset:]), len(entries), offset, max_output)

    async def row_estimates(self, schema: str, tables: Sequence[str]) -> dict[str, dict[str, int]]:
        """How many rows tables have, as far as that costs nothing: counted in a small file, else from ANALYZE."""
        first = tables[:500]  # as many SELECTs may stand in one statement
        sql = " UNION ALL ".join(f"SELECT ?, count(*) FROM {quoted(schema)}.{quoted(table)}" for table in first)
        if os.stat(dict(self.files)[schema]).st_size > 4 * 2**20:  # counting the rows of less takes milliseconds
            first, sql = (), f"SELECT tbl, max(CAST(stat AS INTEGER)) FROM {quoted(schema)}.sqlite_stat1 GROUP BY tbl"
        with suppress(QueryError):  # a damaged table; no ANALYZE
            return {name: {"row_estimate": rows} for name, rows in await self.read(sql, *first)}
        return {}

    async def create_statement(self, schema: str, table: str, max_output: int) -> str:
        """The CREATE statement of a table or view, followed by those of its indexes and triggers."""
        schema, table, _ = find_table(await self.read(in_all(self.schemas, OBJECTS)), schema, table)
        sql = f"SELECT sql || ';' FROM {quoted(schema)}.sqlite_master WHERE tbl_name = ? AND sql <> ''"
        rows = await self.read(f"{sql} ORDER BY name <> tbl_name, rowid", table)
        return whole("\n".join(row[0] for row in rows), max_output, "query substr(sql, start, length) of sqlite_master")

    async def all_tables(self) -> Catalog:
        """Schema, name and type of tables and views. The first of several files also goes by its name."""
        return (await self.read(in_all(self.schemas[1:] or self.schemas, OBJECTS) + " ORDER BY 1, 2"))[:MAX_RESOURCES]


# -------------------------------------------------------------------------------------------------- command line


def check_file(path: str) -> None:
    """Raise ConfigError for what is no SQLite database that can be read."""
    if not os.path.isfile(path):  # opening a FIFO would wait for ever; nothing is created by a typo
        raise ConfigError(f"{path} is not there, or is no regular file; name an SQLite file")
    try:
        with closing(sqlite3.connect(uri(path), uri=True, timeout=0)) as connection:
            connection.execute("SELECT 1 FROM sqlite_master").fetchone()  # opening reads nothing; this does
    except sqlite3.Error as exc:
        if exc.sqlite_errorname != "SQLITE_BUSY":  # locked just now is no reason not to start
            raise ConfigError(f"{path} cannot be served: {message_for(exc)}") from None


def name_schemas(files: Sequence[str | Path]) -> Paths:
    """The files with their schema names: the first is main; several also go by their names on the command line."""
    found: dict[str, str] = {}
    for file in files:
        schema = re.sub(r"\W", "_", Path(file).stem)
        while schema.lower() in ("main", "temp", *map(str.lower, found)):
            schema += "_2"
        found[schema] = os.path.realpath(os.path.expanduser(file))
        check_file(found[schema])
    return (("main", next(iter(found.values()))), *(found.items() if len(found) > 1 else ()))


def build_server(files: Sequence[str | Path], timeout: float = TIMEOUT, options: Any = None) -> "serving.Server":
    """A server for the named SQLite files. Raises ConfigError when one cannot be served."""
    if not 1 <= len(files) <= 10:  # SQLite attaches ten databases to a connection at most
        raise ConfigError(f"name SQLite files: one at least, and 10 at most; here are {len(files)}")
    found = name_schemas(files)
    served = ", ".join(f"{Path(path).name!r} as {schema}" for schema, path in found)
    server = build(Files(found, timeout), served, options or serving.Options())
    server.label = Path(files[0]).stem
    return server


def from_command_line(args: Any, options: "serving.Options") -> "serving.Server":
    """The server that the command line asks for."""
    for file in args.files or [os.environ.get("DATABASE_URL", "")]:
        if "://" in file:  # the rest may hold a password
            told = f"this server serves SQLite files, not {file.partition('://')[0]}:// URLs; name files by their paths"
            raise ConfigError(f"{told}; for PostgreSQL, use pg_server.py: DATABASE_URL=... python pg_server.py")
    return build_server(args.files, timeout=args.timeout, options=options)


def main() -> None:
    """The command line: `db_server.py FILE.db [FILE.db ...]`."""
    # When a worker was killed, asyncio may warn of an "unknown child process": it was not the first to ask for it.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    parser = serving.argument_parser("db-server", "Serve SQLite files to MCP clients, read-only.")
    parser.add_argument("files", nargs="*", metavar="FILE.db", help="SQLite files, several become schemas")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, metavar="SECONDS", help="for one statement (5)")
    serving.serve(parser, from_command_line)


if __name__ == "__main__":
    main()
