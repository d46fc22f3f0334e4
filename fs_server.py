# /// script
# requires-python = ">=3.11"
# dependencies = ["mcp>=2.3,<3"]
# ///
"""An MCP server that lets a language model read, list, find and search the files of the directories you name.

    python fs_server.py DIR [DIR ...]

Trust boundary: whatever the model asks for, nothing outside those directories is opened, listed or changed, and
nothing at all is changed without --write.
Files that hold secrets by convention (.env, private keys, cloud credentials) are listed but not opened.
Not defended against: what the files themselves say to the model, and hard links or bind mounts that somebody
put inside a directory and that lead out of it: they look like any other file.
"""

import asyncio
import base64
import codecs
import difflib
import fnmatch
import hashlib
import io
import json
import mimetypes
import os
import re
import secrets
import stat
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar
from urllib.parse import quote

import anyio
from common import (
    MAX_PATH,
    READ_ONLY,
    ConfigError,
    Handle,
    Located,
    Options,
    Sandbox,
    Server,
    argument_parser,
    audit,
    close_handle,
    explained,
    in_thread_of_its_own,
    make_directory_at,
    open_at,
    open_directory_at,
    open_file_at,
    page,
    printable,
    remove_at,
    rename_new_at,
    replace_at,
    serve,
    stat_at,
    trailer,
    writable_at,
)
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import (
    AudioContent,
    BlobResourceContents,
    CallToolResult,
    EmbeddedResource,
    ImageContent,
    ToolAnnotations,
)
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import SchemaError, SchemaValidator, core_schema

# -------------------------------------------------------------------------------------------------------- limits

MAX_FILE = 10_000_000  # bytes: a media file, a searched file, and the default for a whole text file
MAX_DEPTH = 100  # levels a walk goes down: each holds a descriptor, and a process has about 1,000
MAX_LINE = 500  # characters of one matching line shown; minified files have lines of megabytes
MAX_REGEX_LINE = 2_000  # characters of a line that a regular expression sees: the engine may need 50 µs for each
WALK_LIMIT = 25.0  # seconds: a walk ends before the call's own limit and answers with what it has
CHUNK = 1 << 20  # bytes read at a time when a large file is scanned

JUNK = frozenset(
    {".git", ".hg", ".svn", "node_modules", "__pycache__", ".venv", "venv", ".tox", ".nox", ".mypy_cache"}
    | {".pytest_cache", ".ruff_cache", ".gradle", ".terraform", ".next", ".idea", ".DS_Store"}
)
SECRET_DIRECTORIES = frozenset({".ssh", ".gnupg", ".aws", ".azure", ".kube", ".docker", "gcloud", ".password-store"})
SECRET_FILES = (
    ".env .env.* *.env .envrc *.pem *.key *.p12 *.pfx *.jks *.keystore *.kdbx *.ppk *.ovpn id_rsa* id_dsa* id_ecdsa*"
    " id_ed25519* .netrc _netrc .pgpass .my.cnf .npmrc .pypirc .git-credentials .htpasswd .vault-token .dockercfg"
    " .boto .s3cfg rclone.conf credentials.json client_secret*.json service-account*.json *.tfstate *.tfstate.backup"
    " application_default_credentials.json secrets.yaml secrets.yml secrets.json secrets.toml master.key shadow"
).split()
NOT_SECRET = (".env.example", ".env.sample", ".env.template", ".env.dist", "*.pub")

# ------------------------------------------------------------------------------------------------- result models


class FileInfo(BaseModel):
    """What `get_file_info` returns; times are ISO 8601 in UTC, sizes in bytes."""

    path: str
    type: str
    size: int
    modified: str
    accessed: str
    created: str | None
    permissions: str
    mime_type: str | None
    link_target: str | None


class AllowedDirectories(BaseModel):
    """What `list_allowed_directories` returns."""

    directories: list[str]


class Edit(BaseModel):  # noqa: D101
    # No docstring: it would be part of the list of tools. The names are those of the reference server.
    model_config = ConfigDict(extra="forbid", strict=True)

    oldText: Annotated[str, Field(min_length=1, max_length=1_000_000)]  # noqa: N815
    newText: Annotated[str, Field(max_length=1_000_000)]  # noqa: N815


# ----------------------------------------------------------------------------------------------------- the tools
#
# What the model sees. Each tool checks its arguments, calls one of the functions below it in this file, and returns.

REPLACES = ToolAnnotations(read_only_hint=False, destructive_hint=True, idempotent_hint=True, open_world_hint=False)
EDITS = ToolAnnotations(read_only_hint=False, destructive_hint=True, idempotent_hint=False, open_world_hint=False)
ADDS = ToolAnnotations(read_only_hint=False, destructive_hint=False, idempotent_hint=True, open_world_hint=False)
MOVES = ToolAnnotations(read_only_hint=False, destructive_hint=False, idempotent_hint=False, open_world_hint=False)

Path_ = Annotated[str, Field(description="relative or absolute", max_length=16_384)]
Offset = Annotated[int, Field(description="entries to skip", ge=0, strict=True)]
Glob = Annotated[str, Field(max_length=1000)]
Exclude = Annotated[
    list[Glob] | None,
    Field(description="globs left out, besides .git, node_modules etc.; [] shows those too", max_length=100),
]


def build_server(
    directories: Sequence[str | Path],
    *,
    deny: Sequence[str] = (),
    allow_secrets: bool = False,
    write: bool = False,
    options: Options | None = None,
) -> Server:
    """The file server over existing `directories`; files that match a glob in `deny` are never opened, and nothing is
    changed without `write`. Raises ConfigError."""
    options = options or Options()
    try:
        files = Files(directories, deny, allow_secrets)
    except ToolError as exc:
        raise ConfigError(f"--deny: {exc}") from None
    names = ", ".join(printable(root.path) for root in files.sandbox.roots)
    does = "Reads, lists, finds, searches and changes" if write else "Reads, lists, finds and searches"
    health = in_thread_of_its_own(files.sandbox.check)
    server = Server("fs-server", f"{does} the files in {names}, and nothing else.", options, health=health)
    max_output = options.max_output

    @server.tool(annotations=READ_ONLY, structured_output=False)
    async def read_file(
        path: Path_,
        encoding: Annotated[str, Field(description="of the text", max_length=40)] = "utf-8",
        max_size: Annotated[
            int, Field(description="bytes: refuse a whole file above this", ge=1, le=100_000_000, strict=True)
        ] = MAX_FILE,
        head: Annotated[int, Field(description="first lines only (0: all), from offset on", ge=0, strict=True)] = 0,
        tail: Annotated[int, Field(description="last lines only (0: all)", ge=0, strict=True)] = 0,
        offset: Annotated[int, Field(description="lines to skip", ge=0, strict=True)] = 0,
        column: Annotated[int, Field(description="characters to skip in the first line", ge=0, strict=True)] = 0,
    ) -> str:
        """Read a text file. Whole files up to max_size; head, tail and offset read part of a file of any size. A long
        text is cut at a line, and its last line names the arguments that continue. Binary files and text in another
        encoding are errors; read_media_file reads images and audio."""
        if tail and (head or offset):
            raise ToolError("tail cannot be combined with head or offset; give tail alone, or head and offset")
        wanted = Slice(head, tail, offset, column)
        return str(await in_thread(lambda work: read_part(files, path, encoding, max_size, wanted, max_output, work)))

    @server.tool(annotations=READ_ONLY, structured_output=False)
    async def read_media_file(path: Path_) -> CallToolResult:
        """Read an image or audio file, or any other file as a binary resource, with its MIME type. Up to 10 MB."""
        return await in_thread(lambda _: read_media(files, path))

    @server.tool(annotations=READ_ONLY, structured_output=False)
    async def read_multiple_files(
        paths: Annotated[list[Path_], Field(description="files", min_length=1, max_length=100)],
    ) -> str:
        """Read several UTF-8 text files in one call, each under a header line. A file that cannot be read is reported
        in its place and the others still come. All share one result's length; the last line says what is left."""
        return await in_thread(lambda work: read_parts(files, paths, max_output, work))

    @server.tool(annotations=READ_ONLY, structured_output=False)
    async def list_directory(
        ctx: Context[Any, Any],
        path: Path_ = ".",
        pattern: Annotated[str, Field(description="glob that names must match", max_length=1000)] = "*",
        recursive: Annotated[bool, Field(description="also what is below", strict=True)] = False,
        offset: Offset = 0,
    ) -> str:
        """List a directory: one JSON object a line with path, type, size in bytes and time of modification (UTC). Use
        directory_tree for an overview. Recursive listings do not enter .git, node_modules and the like unless the
        pattern names them."""

        def listed(work: Work) -> str:
            walk = Walk(files, path, work, asked=pattern)
            with closing(walk.listings(MAX_DEPTH if recursive else 1)) as listings:
                if recursive:
                    found: Iterable[tuple[Listing, os.DirEntry[str]]] = walk.matching(pattern, listings)
                else:
                    found = list(walk.matching(pattern, [next(listings)]))
                    if not found and "/" in pattern:
                        raise ToolError(f"nothing in {walk.shown} itself matches {pattern}; set recursive=true")
                return walk.page(found, "entries", max_output, offset, render=partial(list_line, walk.shown))

        return await walk_in_thread(ctx, listed)

    @server.tool(annotations=READ_ONLY, structured_output=False)
    async def directory_tree(
        ctx: Context[Any, Any],
        path: Path_ = ".",
        max_depth: Annotated[int, Field(description="levels", ge=1, le=MAX_DEPTH, strict=True)] = MAX_DEPTH,
        exclude_patterns: Exclude = None,
        offset: Offset = 0,
    ) -> str:
        """Show the files and directories below a path as an indented tree: in each directory first its files, then its
        subdirectories. Directories that were not entered are marked. For sizes and times use list_directory."""

        def drawn(work: Work) -> str:
            walk = Walk(files, path, work, exclude_patterns)
            with closing(tree_lines(walk, max_depth)) as lines:
                return walk.page(lines, "lines", max_output, offset)

        return await walk_in_thread(ctx, drawn)

    @server.tool(annotations=READ_ONLY, structured_output=False)
    async def search_files(
        ctx: Context[Any, Any],
        path: Path_,
        pattern: Annotated[
            str, Field(description="glob: *.py for names at any depth, src/**/*.ts for paths", max_length=1000)
        ],
        exclude_patterns: Exclude = None,
        offset: Offset = 0,
    ) -> str:
        """Find files and directories below a path whose name matches a glob, one path a line. Knows *, ?, **, [a-z]
        and {a,b}; case matters. To search in the text of files use search_text."""

        def found(work: Work) -> str:
            walk = Walk(files, path, work, exclude_patterns, asked=pattern)
            with closing(walk.listings()) as listings:
                entries = walk.matching(pattern, listings)
                paths = (joined(walk.shown, listing.prefix + entry.name) for listing, entry in entries)
                return walk.page(paths, "matches", max_output, offset)

        return await walk_in_thread(ctx, found)

    @server.tool(annotations=READ_ONLY, structured_output=False)
    async def search_text(
        ctx: Context[Any, Any],
        path: Path_,
        pattern: Annotated[str, Field(description="text, or a regular expression", min_length=1, max_length=1000)],
        regex: Annotated[bool, Field(description="Rust syntax: no look-around", strict=True)] = False,
        glob: Annotated[str, Field(description="search only files that match, such as *.py", max_length=1000)] = "",
        ignore_case: Annotated[bool, Field(strict=True)] = False,
        context: Annotated[int, Field(description="lines around a match", ge=0, le=20, strict=True)] = 0,
        max_matches: Annotated[int, Field(ge=1, le=10_000, strict=True)] = 200,
        offset: Annotated[int, Field(description="matches to skip", ge=0, strict=True)] = 0,
    ) -> str:
        """Search the lines of text files below a path (or of one file): file:line:text for each match. Long lines are
        clipped. The last line says what was skipped: binary, secret and unreadable files, and those above 10 MB."""

        def searched(work: Work) -> str:
            search = TextSearch(files, path, Query(pattern, regex, ignore_case, context), glob, work)
            with closing(search.matches()) as matches:
                return search.walk.page(matches, "matches", max_output, offset, limit=max_matches)

        return await walk_in_thread(ctx, searched, REGEX_WALKERS if regex else WALKERS)

    @server.tool(annotations=READ_ONLY)
    async def get_file_info(path: Path_) -> FileInfo:
        """Tell a file's or directory's type, size, times (UTC), permissions and MIME type; for a symlink those of its
        target, and where it leads."""
        return await in_thread(lambda _: file_info(files, path))

    @server.tool(annotations=READ_ONLY)
    async def list_allowed_directories() -> AllowedDirectories:
        """List the directories that this server may read. Relative paths are looked up in each of them in turn."""
        return AllowedDirectories(directories=[printable(root.path) for root in files.sandbox.roots])

    if write:
        add_writing_tools(server, files)
    return server


# ------------------------------------------------------------------------------------------------------ patterns


def linear_regex(pattern: str) -> Callable[[str], bool]:
    """A predicate that is true where `pattern` is found. Raises ToolError for a pattern that does not compile.

    Python's own `re` needs exponential time for patterns like `(a+)+$`, and nothing can interrupt it. Pydantic
    carries Rust's regex engine, which is linear in the text and has no look-around and no back-references.
    """
    try:
        return SchemaValidator(core_schema.str_schema(pattern=pattern, strict=True)).isinstance_python
    except SchemaError as exc:
        reason = str(exc).splitlines()[-1].strip().removeprefix("error: ").removeprefix("SchemaError: ")
        raise ToolError(
            f"the pattern is no valid regular expression ({reason}); use Rust's regex syntax, or regex=false"
        ) from None


GLOB_PARTS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def glob_regex(pattern: str) -> str:
    """A glob as a regular expression: `*` and `?` stay in one name, `**` crosses directories, `[a-z]`, `{a,b}`.

    A glob without a slash is matched against names at any depth. The result is anchored at both ends.
    """
    text = pattern.removeprefix("./").strip("/")
    out, depth = ["(?s)^(?:.*/)?" if "/" not in text else "(?s)^"], 0
    for part in re.findall(r"\*\*/|\*\*|\[!?\]?[^\]/]*\]|.", text, re.DOTALL):
        if part in GLOB_PARTS:
            out.append(GLOB_PARTS[part])
        elif part == "{" and "}" in text:
            depth += 1
            out.append("(?:")
        elif part == "}" and depth:
            depth -= 1
            out.append(")")
        elif part == "," and depth:
            out.append("|")
        elif len(part) > 1:
            body = "".join(c if c == "-" else re.escape(c) for c in part[1:-1].removeprefix("!"))
            out.append(f"[^/{body}]" if part[1] == "!" else f"[{body}]")
        else:
            out.append(re.escape(part))
    return "".join(out) + "$"


def glob_matcher(*patterns: str) -> Callable[[str], bool]:
    """A predicate over relative paths, true if any of the globs matches. Raises ToolError for one that climbs out."""
    for pattern in patterns:
        # It would match nothing anyway: patterns are compared with paths that a walk found, they open nothing.
        if pattern.startswith(("/", "~/")) or ".." in pattern.split("/") or "\0" in pattern:
            raise ToolError(f"the pattern {pattern!r} leads out; patterns are relative to path, such as **/*.py")
        if not pattern.removeprefix("./").strip("/"):  # such as --deny with a variable that is not set
            raise ToolError(f"the glob {pattern!r} is empty and matches nothing; give one such as *.py")
    try:
        return linear_regex("|".join(glob_regex(pattern) for pattern in patterns) or r"[^\s\S]")
    except ToolError:
        wrong = " or ".join(repr(pattern[:100]) for pattern in patterns[:10])
        raise ToolError(f"the glob {wrong} is not valid: check its brackets and braces, or make it shorter") from None


# --------------------------------------------------------------------------------------------- work in a thread

T = TypeVar("T")


@dataclass
class Work:
    """What a worker thread and its waiting call know of each other."""

    deadline: float = field(default_factory=lambda: time.monotonic() + WALK_LIMIT)
    visited: int = 0
    cancelled: bool = False

    def over(self) -> bool:
        """Whether the thread must stop: its time is up, or nobody waits for it any more."""
        return self.cancelled or time.monotonic() > self.deadline

    def refuse_late(self) -> None:
        """Raises ToolError when nobody waits any more: who was told that a call failed must not find its work done."""
        if self.over():
            raise ToolError(f"{WALK_LIMIT:g} s were not enough, nothing was changed; make a smaller change")


QUICK = 0.001  # seconds: nearly all disks answer sooner than the event loop could do something else in the meantime
THREADS = ThreadPoolExecutor(500, "fs")  # they are made at need; a disk that hangs must not use them all up
WALKERS = anyio.CapacityLimiter(2)  # walks at a time: three, passing the interpreter's lock around, take twice as long
REGEX_WALKERS = anyio.CapacityLimiter(1)  # the regex engine holds the interpreter's lock: two would starve the others


async def in_thread(function: Callable[[Work], T], work: Work | None = None) -> T:
    """Run `function` in a worker thread, so that no disk makes another call wait; a cancelled call ends it.

    The event loop itself stands still for the first QUICK seconds: to sleep and be woken by a thread takes it three
    times as long as the thread takes to read a small file.
    """
    work = work or Work()
    future = THREADS.submit(copy_context().run, function, work)
    try:
        with suppress(TimeoutError):
            return future.result(QUICK)
        return await asyncio.wrap_future(future)
    finally:
        work.cancelled = True


async def walk_in_thread(
    ctx: Context[Any, Any], function: Callable[[Work], T], limiter: anyio.CapacityLimiter = WALKERS
) -> T:
    """The same for a walk, of which only a few run at a time.

    A client that asked for progress is told ten times a second how many entries were visited, and once at the end.
    """
    work = Work()
    told = 0

    async def report() -> None:
        nonlocal told
        if work.visited > told:  # each notification must tell more than the one before
            told = work.visited
            await ctx.report_progress(told, message=f"{told} entries visited")  # nothing if nobody asked for it

    async def report_often() -> None:
        while True:
            await asyncio.sleep(0.1)
            await report()

    reporter = asyncio.create_task(report_often())
    try:
        async with limiter:
            result = await in_thread(function, work)
    finally:
        reporter.cancel()
    await report()
    return result


# --------------------------------------------------------------------------------------------------- directories


class Files:
    """The allowed directories, and which of the files in them are not to be opened."""

    def __init__(self, directories: Sequence[str | Path], deny: Sequence[str] = (), allow_secrets: bool = False):
        self.sandbox = Sandbox(directories)
        self.deny = deny
        # What is below a denied directory is denied as well, and in any case: on some disks Private is private.
        names = [glob.rstrip("/") for glob in deny]
        below = (f"{name}/**" if "/" in name else f"**/{name}/**" for name in names)
        self._denied = glob_matcher(*map(str.casefold, (*deny, *below)))
        self._secret = re.compile("$^" if allow_secrets else "|".join(map(fnmatch.translate, SECRET_FILES)))
        self._not_secret = re.compile("|".join(map(fnmatch.translate, NOT_SECRET)))
        self._secret_directories = frozenset[str]() if allow_secrets else SECRET_DIRECTORIES

    def is_secret(self, path: str) -> bool:
        """Whether the file at this path (from its root, symlinks resolved) must not be opened."""
        # Case folded, because on a case-insensitive disk .ENV is .env.
        path = path.casefold()
        parts = path.split("/")
        name = parts[-1]
        if self._denied(printable(path)) or not self._secret_directories.isdisjoint(parts):
            return True
        return self._secret.match(name) is not None and self._not_secret.match(name) is None

    def refuse_secret(self, located: Located) -> None:
        """Raises ToolError if the file is not to be opened, written or moved."""
        if self.is_secret(located.path):
            raise ToolError(
                f"{located.shown} holds secrets by its name and is left alone;"
                " ask the user to start the server with --allow-secrets or without this --deny"
            )

    def open(self, located: Located) -> tuple[int, os.stat_result]:
        """Open one file for reading. Raises ToolError."""
        self.refuse_secret(located)
        return self.sandbox.open_file(located)

    def remove_leftovers(self) -> None:
        """Remove the temporary files of a server that was killed while it wrote. Big trees are not searched to the
        end: what is left there goes with the next write to its directory."""
        for root in self.sandbox.roots:
            with suppress(ToolError):
                for listing in Walk(self, root.path, Work(time.monotonic() + 1)).listings():
                    remove_leftovers(listing.handle)


@dataclass(frozen=True, slots=True)
class Listing:
    """One directory of a walk: `prefix` is its path below the start ("" or ending in "/"); `entries` are sorted.
    `mark` says why it was not listed, if it was not."""

    prefix: str
    depth: int
    handle: Handle
    entries: list[os.DirEntry[str]]
    mark: str = ""


class Walk:
    """The directories below one, in a stable order, each reached from its parent's descriptor; symlinks are not
    followed. `skipped` counts what was left out, and why."""

    def __init__(self, files: Files, path: str, work: Work, exclude: Sequence[str] | None = None, asked: str = ""):
        self.skipped: Counter[str] = Counter()
        self.start = files.sandbox.resolve(path)
        self.shown = self.start.shown
        self._files = files
        self._work = work
        self._excluded = glob_matcher(*exclude) if exclude else None
        # Junk is walked when it is asked for: exclude_patterns=[], or its name in the pattern.
        self._junk = frozenset[str]() if exclude == [] else JUNK - set(re.split(r"[/{},]", asked))

    def notes(self) -> list[str]:
        """What was left out, as facts for a trailer."""
        late = [f"stopped after {WALK_LIMIT:g} s: give a narrower path or glob"] if self._work.over() else []
        return late + [f"skipped {count} {what}" for what, count in sorted(self.skipped.items())]

    def page(self, items: Iterable[T], noun: str, max_output: int, offset: int, **how: Any) -> str:
        """The items from `offset` on that the walk has found, as a result. Raises ToolError."""
        try:
            return page(items, noun, max_output=max_output, offset=offset, notes=self.notes, **how)
        except ToolError:
            if offset and self._work.over():  # the items may be there, further than the walk came
                late = f"stopped after {WALK_LIMIT:g} s, before offset={offset}; give a narrower path or glob"
                raise ToolError(late) from None
            raise

    def matching(self, pattern: str, listings: Iterable[Listing]) -> Iterator[tuple[Listing, os.DirEntry[str]]]:
        """The entries whose path below the start matches a glob. Raises ToolError for a glob that is not valid."""
        matches = glob_matcher(pattern)
        for listing in listings:
            for entry in listing.entries:
                if matches(printable(listing.prefix + entry.name)):
                    yield listing, entry

    def _list(self, handle: Handle, prefix: str, depth: int) -> Listing:
        try:
            with os.scandir(handle) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:
            close_handle(handle)
            raise
        if self._excluded:
            entries = [entry for entry in entries if not self._excluded(printable(prefix + entry.name))]
        self._work.visited += len(entries)
        return Listing(prefix, depth, handle, entries)

    def listings(self, max_depth: int = MAX_DEPTH) -> Generator[Listing]:
        """Each directory before its subdirectories; those that are not entered come with a mark. Raises ToolError
        if the start cannot be listed."""
        with explained(self.shown):
            listing = self._list(self._files.sandbox.open_directory(self.start), "", 0)
        stack = [(listing, iter(listing.entries))]
        try:
            yield listing
            while stack:
                parent, entries = stack[-1]
                entry = next((entry for entry in entries if entry.is_dir(follow_symlinks=False)), None)
                if entry is None:
                    stack.pop()
                    close_handle(parent.handle)
                    continue
                if self._work.over():
                    return
                listing = self._enter(parent, entry.name, max_depth)
                if not listing.mark:
                    stack.append((listing, iter(listing.entries)))
                yield listing
        finally:
            for listing, _ in stack:
                close_handle(listing.handle)

    def _enter(self, parent: Listing, name: str, max_depth: int) -> Listing:
        prefix, depth = f"{parent.prefix}{name}/", parent.depth + 1
        if depth < max_depth and name in self._junk:
            self.skipped[name] += 1
            mark = "skipped"
        elif depth >= max_depth:
            mark = "not listed"
            if depth >= MAX_DEPTH:
                self.skipped[f"directories below {MAX_DEPTH} levels: give a deeper path"] += 1
        else:
            try:
                return self._list(open_directory_at(parent.handle, name), prefix, depth)
            except OSError:
                self.skipped["unreadable directories"] += 1
                mark = "unreadable"
        return Listing(prefix, depth, parent.handle, [], mark)


def type_of(mode: int) -> str:
    """The file type in a `st_mode`, as one word."""
    letters = {"-": "file", "d": "directory", "l": "symlink", "p": "fifo", "s": "socket"}
    return letters.get(stat.filemode(mode)[0], "device")


def iso(seconds: float) -> str:
    """A time stamp as ISO 8601 in UTC, to the second."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (OverflowError, ValueError, OSError):  # file systems can hold years that the calendar cannot
        return f"{seconds:.0f} s after 1970"


def joined(directory: str, relative: str) -> str:
    """A path that begins with the one that the caller gave, so that it can be passed back."""
    return f"{directory.rstrip('/')}/{printable(relative)}"


def list_line(shown: str, found: tuple[Listing, os.DirEntry[str]]) -> str:
    """One entry of a directory as a line of JSON. The directory must still be open: this asks for the file's size."""
    listing, entry = found
    line: dict[str, Any] = {"path": joined(shown, listing.prefix + entry.name)}
    try:
        info = entry.stat(follow_symlinks=False)
    except OSError:
        line["type"] = "unreadable"
    else:
        line |= {"type": type_of(info.st_mode), "size": info.st_size, "modified": iso(info.st_mtime)}
    return json.dumps(line, ensure_ascii=False, separators=(",", ":"))


def tree_lines(walk: Walk, max_depth: int) -> Generator[str]:
    """A tree, one space of indentation a level: a directory, its files, then its subdirectories."""
    yield f"{walk.shown.rstrip('/')}/"
    for listing in walk.listings(max_depth):
        if listing.depth:
            name = printable(listing.prefix[:-1].rpartition("/")[2])
            yield f"{' ' * listing.depth}{name}/{f' [{listing.mark}]' if listing.mark else ''}"
        indent = " " * (listing.depth + 1)
        for entry in listing.entries:
            if entry.is_symlink():
                yield f"{indent}{printable(entry.name)} [symlink]"
            elif not entry.is_dir(follow_symlinks=False):
                yield indent + printable(entry.name)


# -------------------------------------------------------------------------------------------------- text of files

# Not encodings of text, or with decoders that need quadratic time.
NOT_TEXT = frozenset({"idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined"})
STATEFUL = ("iso2022", "hz", "utf-7")  # encodings in which a byte's meaning depends on those before it


def newline_in(encoding: str) -> bytes:
    """The bytes of a newline. Raises ToolError for what is not an encoding of text."""
    with suppress(LookupError, ValueError):
        if codecs.lookup(encoding).name not in NOT_TEXT:
            return "\n".encode(encoding)
    raise ToolError(f"unknown text encoding: {encoding[:40]}; use utf-8, utf-16, latin-1, cp1252 or another")


@dataclass(frozen=True)
class Slice:
    """Which part of a text is wanted: `head` or `tail` lines, `offset` lines and then `column` characters skipped."""

    head: int = 0
    tail: int = 0
    offset: int = 0
    column: int = 0


def end_of_lines(data: bytes, lines: int) -> int:
    """Where the first `lines` lines end, or the length of data that has fewer."""
    end = 0
    for _ in range(lines):
        found = data.find(b"\n", end)
        if found < 0:
            return len(data)
        end = found + 1
    return end


@dataclass(frozen=True)
class Part:
    """A part of a text; when it was cut, the fact to tell and the arguments that continue."""

    text: str
    fact: str = ""
    resume: dict[str, object] = field(default_factory=dict[str, object])

    def __str__(self) -> str:
        return self.text + (trailer(self.fact, **self.resume) if self.fact else "")


class Text:
    """A file as text: opened once, scanned in chunks, so that any part of a file of any size takes little memory."""

    def __init__(self, fd: int, size: int, shown: str, encoding: str, max_size: int, work: Work) -> None:
        self.shown = shown
        self.encoding = encoding
        self.max_size = max_size
        self.work = work
        self.size = size
        self.source: BinaryIO = open(fd, "rb", buffering=0)  # noqa: SIM115 - closed by close()

    def prepare(self, wanted: Slice) -> None:
        """Check the encoding and the size before anything is returned. Raises ToolError."""
        # Lines can be found in the bytes only where a newline is a byte of its own, and a text can be entered in the
        # middle only where bytes mean the same everywhere; others, such as UTF-16, are converted as a whole.
        convert = newline_in(self.encoding) != b"\n" or codecs.lookup(self.encoding).name.startswith(STATEFUL)
        if self.size > self.max_size and (wanted == Slice() or convert):
            raise ToolError(
                f"{self.shown} has {self.size} bytes, more than max_size={self.max_size};"
                + (" raise max_size" if convert else " read a part with head, tail or offset, or raise max_size")
            )
        if self.size == 0 or convert:  # size 0: files in /proc have content all the same
            with open(self.source.fileno(), "rb", closefd=False) as file:  # buffered: /proc gives a page at a time
                data = file.read(self.max_size + 1) or b""
            if len(data) > self.max_size:
                raise ToolError(f"{self.shown} has more than max_size={self.max_size} bytes; raise max_size")
            if convert:
                data = self.decode(data, 0, final=True).encode("utf-8", "surrogatepass")
                self.encoding = "utf-8"
            self.source.close()
            self.source, self.size = io.BytesIO(data), len(data)
        elif codecs.lookup(self.encoding).name == "utf-8":
            self.refuse_binary(self.read(0, 8192))

    def refuse_binary(self, data: bytes) -> None:
        """Text in UTF-8 has no NUL bytes; a UTF-16 file starts with a mark that names it."""
        if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise ToolError(f'{self.shown} is not utf-8: it starts with a UTF-16 mark; pass encoding="utf-16"')
        if b"\0" in data:
            raise ToolError(
                f"{self.shown} looks binary (it has NUL bytes); use read_media_file or get_file_info,"
                ' or pass encoding="latin-1" to see every byte as a character'
            )

    def close(self) -> None:
        """Close the file."""
        self.source.close()

    def read(self, position: int, count: int) -> bytes:
        """`count` bytes at `position`, fewer only at the end of the file."""
        if self.work.over():
            raise ToolError(f"{self.shown} is too large to scan in {WALK_LIMIT:g} s; use tail, or a smaller offset")
        self.source.seek(position)
        # The space for `count` bytes would be set aside first: for a small file, 10 MB take longer than reading it.
        count = max(0, min(count, self.size - position))
        data = self.source.read(count) or b""
        while 0 < len(data) < count and (more := self.source.read(count - len(data))):
            data += more
        if len(data) < count:  # files in /sys are shorter than they claim
            self.size = position + len(data)
        return data

    def decode(self, data: bytes, position: int, *, final: bool) -> str:
        """Bytes as text, never with replacement characters. Raises ToolError that names the byte and a way out."""
        if codecs.lookup(self.encoding).name == "utf-8":
            self.refuse_binary(data)
        try:
            return codecs.getincrementaldecoder(self.encoding)("strict").decode(data, final)
        except UnicodeError as exc:
            at = position + exc.start if isinstance(exc, UnicodeDecodeError) else position
            byte = f"byte 0x{data[at - position]:02x} at position {at}" if at - position < len(data) else "its end"
            raise ToolError(
                f'{self.shown} is not valid {self.encoding} ({byte}); pass its encoding, such as "cp1252" or "utf-16",'
                ' or "latin-1", which decodes anything'
            ) from None

    def count_lines(self) -> int:
        """How many lines the file has; a last line without a newline counts."""
        newlines, last = 0, b"\n"
        for position in range(0, self.size, CHUNK):
            chunk = self.read(position, CHUNK)
            newlines, last = newlines + chunk.count(b"\n"), chunk[-1:]
        return newlines + (last != b"\n")

    def start_of_line(self, offset: int) -> int:
        """The position of the first byte after `offset` lines. Raises ToolError past the end."""
        if not offset:
            return 0
        missing = offset
        for position in range(0, self.size, CHUNK):
            chunk = self.read(position, CHUNK)
            newlines = chunk.count(b"\n")
            if newlines >= missing:
                start = position + end_of_lines(chunk, missing)
                if start < self.size:
                    return start
                break
            missing -= newlines
        raise ToolError(
            f"offset={offset} is past the end of {self.shown}, which has {self.count_lines()} lines;"
            " use a smaller offset"
        )

    def start_of_tail(self, tail: int) -> tuple[int, int]:
        """Where the last `tail` lines start, and how many there are: fewer in a shorter file. Reads backwards."""
        newlines = 0
        # A newline at the very end ends the last line and starts none.
        end = self.size - (self.size > 0 and self.read(self.size - 1, 1) == b"\n")
        while end > 0:
            position = max(0, end - CHUNK)
            chunk = self.read(position, end - position)
            here = chunk.count(b"\n")
            if newlines + here >= tail:
                at = len(chunk)
                for _ in range(tail - newlines):
                    at = chunk.rfind(b"\n", 0, at)
                return position + at + 1, tail
            newlines, end = newlines + here, position
        return 0, newlines + 1

    def skip_column(self, position: int, column: int) -> int:
        """The position `column` characters after `position`."""
        while column:
            window = self.read(position, min(4 * column, CHUNK) + 4)
            text = self.decode(window, position, final=False)[:column]
            if not text:
                raise ToolError(f"column={column} more than {self.shown} has; use a smaller column")
            column -= len(text)
            position += len(text.encode(self.encoding))
        return position

    def part(self, wanted: Slice, max_output: int) -> Part:
        """The wanted part, or as much of it as fits in `max_output` characters."""
        if self.size == 0:
            return Part("[the file is empty]")
        lines = wanted.head
        if wanted.tail:
            start, lines = self.start_of_tail(wanted.tail)
        else:
            start = self.start_of_line(wanted.offset)
        start = self.skip_column(start, wanted.column)
        data = self.read(start, max(max_output, 16) if max_output else self.max_size)
        if not data:
            raise ToolError(f"{self.shown} became shorter while it was read; read it again")
        end = end_of_lines(data, lines) if lines else len(data)
        if start + len(data) >= self.size or (lines and data.count(b"\n", 0, end) == lines):
            return Part(self.decode(data[:end], start, final=True))
        return self.cut(wanted, lines, start, data)

    def cut(self, wanted: Slice, lines: int, start: int, data: bytes) -> Part:
        """End at the last whole line; a line that is longer than a whole result is cut inside."""
        end = data.rfind(b"\n") + 1
        text = self.decode(data[:end] or data, start, final=bool(end))
        count = data.count(b"\n")
        if wanted.tail:
            resume: dict[str, object] = {"tail": lines - count}
            fact = f"lines 1-{count} of the last {lines} shown"
        else:
            resume = {"offset": wanted.offset + count}
            if lines:
                resume["head"] = lines - count
            of = f" of {self.count_lines()}" if self.size <= self.max_size else ""
            fact = f"lines {wanted.offset + 1}-{wanted.offset + count}{of} shown"
        if end:
            return Part(text, fact, resume)
        until = wanted.column + len(text)
        fact = f"characters {wanted.column + 1}-{until} of one long line shown"
        return Part(f"{text}\n", fact, resume | {"column": until})


def read_part(
    files: Files, path: str, encoding: str, max_size: int, wanted: Slice, max_output: int, work: Work
) -> Part:
    """What `read_file` answers. Raises ToolError."""
    located = files.sandbox.resolve(path)
    fd, info = files.open(located)
    text = Text(fd, info.st_size, located.shown, encoding, max_size, work)
    with closing(text), explained(text.shown):
        text.prepare(wanted)
        return text.part(wanted, max_output)


def read_parts(files: Files, paths: Sequence[str], max_output: int, work: Work) -> str:
    """What `read_multiple_files` answers: every file under a header, within one budget."""
    parts: list[str] = []
    used = 0
    for number, path in enumerate(paths):
        if parts and max_output and used >= max_output:
            fact = f"files 1-{number} of {len(paths)} shown"
            rest = trailer(fact, paths=list(paths[number:]))
            if len(rest) > max_output:  # paths can be so long that their list would be the larger part of the result
                rest = trailer(f"{fact}; continue with the last {len(paths) - number} of these paths")
            parts.append(rest)
            break
        left = max(1, max_output - used) if max_output else 0
        try:
            part = read_part(files, path, "utf-8", MAX_FILE, Slice(), left, work)
            if part.fact:
                part = Part(part.text, f"{part.fact}, read_file has the rest", {"path": path} | part.resume)
            text = str(part)
        except ToolError as exc:
            text = f"[error: {exc}]"
        parts.append(f"==> {printable(path)[:MAX_PATH]} <==\n{text.removesuffix(chr(10))}")
        used += len(parts[-1]) + 1
    return "\n".join(parts)


# -------------------------------------------------------------------------------------------------------- search


@dataclass(frozen=True)
class Query:
    """What `search_text` looks for."""

    pattern: str
    regex: bool
    ignore_case: bool
    context: int

    def find(self, line: str) -> int:
        """Where the text that is looked for stands in a line; -1 if it does not, or if that is not known."""
        if self.regex:
            return -1
        return line.casefold().find(self.pattern.casefold()) if self.ignore_case else line.find(self.pattern)

    def clip(self, line: str) -> str:
        """A line as it is shown: a long one is cut around the match, and says so."""
        if len(line) <= MAX_LINE:
            return line
        start = max(0, self.find(line) - MAX_LINE // 4)
        end = start + MAX_LINE
        before = f"[{start} characters]…" if start else ""
        return before + line[start:end] + (f"…[{len(line) - end} characters]" if end < len(line) else "")


def matches_in(data: bytes, name: str, query: Query, predicate: Callable[[str], bool]) -> Iterator[str]:
    """Each match as `name:line:text`, with its context lines as `name-line-text`, every line once."""
    text = data.decode("utf-8", "backslashreplace")
    if query.ignore_case and not query.regex and query.find(text) < 0:  # most files: looked at as a whole, not by line
        return
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    found = [number for number, line in enumerate(lines) if predicate(line.removesuffix("\r"))]
    printed = 0  # lines before this one have been given
    for index, number in enumerate(found):
        following = found[index + 1] if index + 1 < len(found) else len(lines)
        first, last = max(printed, number - query.context), min(number + query.context, following - 1, len(lines) - 1)
        group = ["--"] if query.context and printed and first > printed else []
        for at in range(first, last + 1):
            mark = ":" if at == number else "-"
            group.append(f"{name}{mark}{at + 1}{mark}{query.clip(lines[at].removesuffix(chr(13)))}")
        printed = last + 1
        yield "\n".join(group)


class TextSearch:
    """Searches the files below a path for a text; `skipped` counts those it could not search, and why."""

    def __init__(self, files: Files, path: str, query: Query, glob: str, work: Work) -> None:
        self.walk = Walk(files, path, work, asked=glob)
        self._skipped = self.walk.skipped
        self._files = files
        self._work = work
        self._query = query
        # Bytes without which a file cannot match, so that most files are put aside without being decoded.
        plain = not (query.regex or query.ignore_case)
        self._needle = query.pattern.encode("utf-8", "surrogatepass") if plain else b""
        self._wanted = glob_matcher(glob) if glob else None
        self._predicate = self._line_predicate()

    def _line_predicate(self) -> Callable[[str], bool]:
        query = self._query
        if "\n" in query.pattern and not query.regex:
            raise ToolError("the pattern has a line break, but lines are searched one by one; search for one line")
        if self._needle:
            return lambda line: query.pattern in line
        if not query.regex:
            return lambda line: query.find(line) >= 0
        found = linear_regex(("(?i)" if query.ignore_case else "") + query.pattern)

        def matches(line: str) -> bool:
            if len(line) > MAX_REGEX_LINE:
                self._skipped[f"line ends after {MAX_REGEX_LINE} characters (plain text is searched to the end)"] += 1
            return not self._work.over() and found(line[:MAX_REGEX_LINE])

        return matches

    def matches(self) -> Generator[str]:
        """All matches, file by file. Raises ToolError."""
        start = self.walk.start
        if start.parts and not stat.S_ISDIR(self._files.sandbox.stat(start).st_mode):
            yield from self._in_file(*self._files.open(start), start.shown)
            return
        for listing in self.walk.listings():
            for entry in listing.entries:
                if self._work.over():
                    return
                if not entry.is_file(follow_symlinks=False):
                    continue
                relative = listing.prefix + entry.name
                if self._wanted and not self._wanted(printable(relative)):
                    continue
                if self._files.is_secret(f"{start.path}/{relative}" if start.parts else relative):
                    self._skipped["secret files"] += 1
                    continue
                try:
                    fd, info = open_file_at(listing.handle, entry.name)
                except OSError:
                    self._skipped["unreadable files"] += 1
                    continue
                yield from self._in_file(fd, info, joined(start.shown, relative))

    def _in_file(self, fd: int, info: os.stat_result, name: str) -> Iterator[str]:
        self._work.visited += 1
        try:
            if info.st_size > MAX_FILE:
                self._skipped[f"files larger than {MAX_FILE} bytes"] += 1
                return
            data = os.read(fd, info.st_size or 4096)
            if data and not info.st_size:  # files in /proc have content all the same, and give a page at a time
                with open(fd, "rb", closefd=False) as rest:
                    data += rest.read(MAX_FILE) or b""
        except OSError:
            self._skipped["unreadable files"] += 1
            return
        finally:
            os.close(fd)
        if b"\0" in data[:8192]:
            self._skipped["binary files"] += 1
        elif self._needle in data:
            yield from matches_in(data, name, self._query, self._predicate)


# -------------------------------------------------------------------------------------------------- info and media


def file_info(files: Files, path: str) -> FileInfo:
    """What `get_file_info` answers: for a symlink that stays inside, the file it leads to. Raises ToolError."""
    itself = files.sandbox.resolve(path, follow_last=False)
    info = files.sandbox.stat(itself)
    target: str | None = None
    if stat.S_ISLNK(info.st_mode):
        target = "(outside the allowed directories)"
        with suppress(ToolError):
            located = files.sandbox.resolve(path)
            info = files.sandbox.stat(located)
            target = printable(os.path.join(located.root.path, *located.parts))
    born = getattr(info, "st_birthtime", None)  # the systems that do not tell it have no honest substitute
    return FileInfo(
        path=itself.shown,
        type=type_of(info.st_mode),
        size=info.st_size,
        modified=iso(info.st_mtime),
        accessed=iso(info.st_atime),
        created=None if born is None else iso(born),
        permissions=stat.filemode(info.st_mode),
        mime_type=mime_type(itself.shown) if stat.S_ISREG(info.st_mode) else None,
        link_target=target,
    )


def mime_type(name: str) -> str | None:
    """The MIME type by the name of a file."""
    # The slash: without it, a name may be taken for a URL that tells its own type.
    mime, compression = mimetypes.guess_type(f"/{name}")
    if compression is None:
        return mime
    return "application/gzip" if compression == "gzip" else None


def read_media(files: Files, path: str) -> CallToolResult:
    """What `read_media_file` answers. Raises ToolError."""
    located = files.sandbox.resolve(path)
    shown = located.shown
    fd, info = files.open(located)
    with open(fd, "rb") as file, explained(shown):
        data = file.read(MAX_FILE + 1) or b""
    if not data:
        raise ToolError(f"{shown} is empty; there is nothing to show")
    if len(data) > MAX_FILE:
        size = max(info.st_size, len(data))
        raise ToolError(f"{shown} has {size} bytes, more than the {MAX_FILE} of a media file; ask for a smaller one")
    mime = mime_type(shown) or "application/octet-stream"
    encoded = base64.b64encode(data).decode()
    if mime.startswith("image/"):
        return CallToolResult(content=[ImageContent(data=encoded, mime_type=mime)])
    if mime.startswith("audio/"):
        return CallToolResult(content=[AudioContent(data=encoded, mime_type=mime)])
    blob = BlobResourceContents(uri=f"file:///{quote(shown.lstrip('/'))}", blob=encoded, mime_type=mime)
    return CallToolResult(content=[EmbeddedResource(resource=blob)])


# ------------------------------------------------------------------------------------------------------- writing
#
# A file is never written in place. The new content goes to a temporary file in the same directory, to the disk, and
# then to its name, in one step: whatever happens, the old or the new content is there, and a hard link that somebody
# made beforehand keeps the old. The temporary file is locked while its writer lives, so a leftover can be told.

TEMPORARY = re.compile(r"\.fs-server-[0-9a-f]{16}\.tmp")
LOCK_WAIT = 5.0  # seconds to wait for another writer of the same file


def try_lock(fd: int) -> bool:
    """Lock an open file until it is closed. False only if somebody else has: where there are no locks, always true."""
    try:
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    return True


def remove_leftovers(directory: Handle) -> None:
    """Remove the temporary files in a directory whose writers are gone."""
    with suppress(OSError), os.scandir(directory) as entries:
        for name in [entry.name for entry in entries if TEMPORARY.fullmatch(entry.name)]:
            with suppress(OSError):
                fd, _ = open_file_at(directory, name)
                try:
                    if try_lock(fd):
                        remove_at(directory, name)
                finally:
                    os.close(fd)


@dataclass
class Target:
    """A file that is about to be written: where it is, and what it holds now (None: it does not exist)."""

    directory: Handle
    name: str
    shown: str
    old: bytes | None
    info: os.stat_result | None
    work: Work

    def replace(self, data: bytes) -> None:
        """Put the new content in place, with the mode, owner and extended attributes of the old file. Raises OSError,
        or ToolError if another program has changed the file since it was read."""
        temporary, fd = self.create_temporary()
        try:
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                if self.info is not None:
                    copy_attributes(self, fd)
                os.fsync(fd)
                self.refuse_changed()
                self.work.refuse_late()
                if isinstance(self.directory, str):  # Windows renames no open file; elsewhere its lock is still needed
                    file.close()
                replace_at(self.directory, temporary, self.name)
        except BaseException:
            with suppress(OSError):
                remove_at(self.directory, temporary)
            raise
        if isinstance(self.directory, int):
            with suppress(OSError):  # the name itself reaches the disk with its directory
                os.fsync(self.directory)
        audit(
            path=self.shown,
            bytes_before=None if self.old is None else len(self.old),
            bytes_after=len(data),
            sha256_before=None if self.old is None else hashlib.sha256(self.old).hexdigest(),
            sha256_after=hashlib.sha256(data).hexdigest(),
        )

    def create_temporary(self) -> tuple[str, int]:
        """A new file next to the target, open and locked."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        while True:
            name = f".fs-server-{secrets.token_hex(8)}.tmp"
            # Until it gets the mode of the old file nobody else may read it; a new file has the usual mode at once.
            fd = open_at(self.directory, name, flags, 0o666 if self.info is None else 0o600)
            # Before it was locked, somebody who cleans up may have taken it for a leftover.
            if try_lock(fd) and os.fstat(fd).st_nlink:
                return name, fd
            os.close(fd)

    def refuse_changed(self) -> None:
        """Raises ToolError if the name no longer stands for the file that was read."""
        now: os.stat_result | None = None
        with suppress(FileNotFoundError):
            now = stat_at(self.directory, self.name)
        if identity(now) != identity(self.info):
            raise ToolError(f"{self.shown} was changed by another program just now; read it again, then repeat this")


def identity(info: os.stat_result | None) -> tuple[int, ...] | None:
    """What tells one state of a file from another."""
    return info and (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_mode)


def copy_attributes(target: Target, fd: int) -> None:
    """Give the open file the owner, the extended attributes (ACLs are among them) and the mode of the old one."""
    assert target.info is not None
    mode = stat.S_IMODE(target.info.st_mode)
    if hasattr(os, "fchown"):
        with suppress(OSError):  # only root may give a file away, but a group that one is in may be given to it
            os.fchown(fd, -1, target.info.st_gid)
        with suppress(OSError):
            os.fchown(fd, target.info.st_uid, -1)
        now = os.fstat(fd)
        # Rights that were another's must not become rights of ours: set-user-ID would run the new text as this user.
        if (now.st_uid, now.st_gid) != (target.info.st_uid, target.info.st_gid):
            mode &= 0o777
        if now.st_gid != target.info.st_gid:
            mode &= 0o707
    if hasattr(os, "listxattr"):
        with open(open_at(target.directory, target.name), "rb") as old, suppress(OSError):  # not every disk has them
            for attribute in os.listxattr(old.fileno()):
                with suppress(OSError):  # some belong to the system
                    os.setxattr(fd, attribute, os.getxattr(old.fileno(), attribute))
    if os.chmod in os.supports_fd:  # not on Windows, where a file that may not be written cannot be replaced either
        os.chmod(fd, mode)


@contextmanager
def writing(files: Files, path: str, work: Work) -> Generator[Target]:
    """Opens a file's directory, locks the file if it exists, and reads it: until the end of the block nobody else who
    asks for the lock writes it. Raises ToolError."""
    located = files.sandbox.resolve(path)
    shown = located.shown
    files.refuse_secret(located)
    if not located.parts:
        raise ToolError(f"{shown} is an allowed directory; give the path of a file in it")
    if path.endswith("/") or TEMPORARY.fullmatch(located.parts[-1]):
        raise ToolError(f"{shown} is no name for a file (a directory's, or a temporary file's); choose another")
    with files.sandbox.parent(located, for_writing=True) as (directory, name):
        remove_leftovers(directory)
        try:
            fd, info = open_locked(directory, name, shown, work)
        except FileNotFoundError:
            yield Target(directory, name, shown, None, None, work)
            return
        with open(fd, "rb") as file:
            if info.st_size > MAX_FILE:
                raise ToolError(f"{shown} has {info.st_size} bytes, more than {MAX_FILE}; it is left alone")
            if not writable_at(directory, name):
                raise ToolError(f"{shown} is write-protected and left alone; ask the user to permit writing it")
            target = Target(directory, name, shown, file.read(), info, work)
            if isinstance(directory, str):  # Windows replaces no open file
                file.close()
            yield target


def open_locked(directory: Handle, name: str, shown: str, work: Work) -> tuple[int, os.stat_result]:
    """Open a file, locked until it is closed. Raises OSError, or ToolError if others do not let go of it."""
    patience = time.monotonic() + LOCK_WAIT
    while True:
        fd, info = open_file_at(directory, name)
        try:
            # Whoever held the lock may have put a new file under the name: the lock must be on that one.
            if try_lock(fd) and identity(info) == identity(stat_at(directory, name)):
                return fd, info
        except OSError:
            os.close(fd)
            raise
        os.close(fd)
        if work.over() or time.monotonic() > patience:
            raise ToolError(f"{shown} is being written by another program; try again later")
        time.sleep(0.005)


def write_text(files: Files, path: str, content: str, work: Work) -> str:
    """What `write_file` answers. Raises ToolError."""
    data = content.encode("utf-8", "surrogatepass")
    if len(data) > MAX_FILE:
        raise ToolError(f"the content has {len(data)} bytes, more than {MAX_FILE}; write less")
    with writing(files, path, work) as target:
        target.replace(data)
        if target.old is None:
            return f"created {target.shown}: {len(data)} bytes"
        return f"replaced {target.shown}: {len(target.old)} bytes before, {len(data)} bytes now"


# ------------------------------------------------------------------------------------------------------- editing

MAX_COMPARED = 20_000  # lines of a file in which a near miss is looked for
MAX_RATIOS = 200  # of these lines compared letter by letter: up to 10 ms each
MAX_PAIRS = 5_000_000  # pairs of equal lines that a diff may look at: about a second
# UTF-32 first: its mark begins like that of UTF-16.
BOMS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def decode_to_edit(data: bytes, shown: str, encoding: str) -> tuple[bytes, str, str]:
    """A file's byte-order mark, its text, and the encoding that turns the text back into the same bytes."""
    newline_in(encoding)
    bom, codec = next(((bom, codec) for bom, codec in BOMS if data.startswith(bom)), (b"", encoding))
    try:
        text = data[len(bom) :].decode(codec)
        if bom + text.encode(codec) != data:
            raise ValueError
    except ValueError:
        raise ToolError(
            f'{shown} cannot be edited as {encoding[:40]}; pass its encoding, such as "cp1252", or "latin-1" for any'
        ) from None
    return bom, text, codec


def replace_once(text: str, edit: Edit, number: int, shown: str) -> tuple[str, int, int]:
    """The text with one edit made, and how many characters before and after the edit stay as they are. A line break in
    oldText stands for either kind, and newText gets the kind that stands where it goes. Raises ToolError unless
    oldText is there exactly once."""
    plain, old, new = (part.replace("\r\n", "\n") for part in (text, edit.oldText, edit.newText))
    if old == new:
        raise ToolError(f"edit {number} changes nothing; give a newText that differs from its oldText")
    start = plain.find(old)
    if start < 0:
        raise ToolError(f"edit {number}: oldText was not found in {shown}, nothing was written; {nearest(plain, old)}")
    places = [start]
    while len(places) <= 10 and (start := plain.find(old, start + 1)) >= 0:
        places.append(start)
    if len(places) > 1:
        lines = ", ".join(str(plain.count("\n", 0, at) + 1) for at in places[:10])
        # Looking for more places one by one takes hours where a long oldText overlaps itself; count() takes one pass.
        raise ToolError(
            f"edit {number}: oldText was found {max(len(places), plain.count(old))} times in {shown} (at lines {lines}"
            f"{' ...' if len(places) > 10 else ''}), nothing was written; make it longer, so that it is there once"
        )
    # Where the line breaks of two characters are, as positions in the plain text.
    breaks = [match.start() - count for count, match in enumerate(re.finditer("\r\n", text))]
    first, last = bisect_left(breaks, places[0]), bisect_left(breaks, places[0] + len(old))
    inside = old.count("\n")
    two = last - first > inside / 2 if inside else len(breaks) > plain.count("\n") / 2
    before, after = text[: places[0] + first], text[places[0] + len(old) + last :]
    return before + (new.replace("\n", "\r\n") if two else new) + after, len(before), len(after)


def nearest(text: str, old: str) -> str:
    """The place in the text that comes nearest to `old`, as a short diff, to tell what is wrong with it.

    Comparing two lines letter by letter takes milliseconds, and a text can be made that wants it for every line: so
    lines, their length, their number and the number of comparisons all have a bound.
    """
    lines, wanted = text.split("\n", MAX_COMPARED)[:MAX_COMPARED], old.split("\n")
    anchor = max(range(len(wanted)), key=lambda at: len(wanted[at].strip()))
    matcher = difflib.SequenceMatcher(None, b=wanted[anchor].strip()[:100], autojunk=False)
    best, where, ratios = 0.6, -1, 0
    for at, line in enumerate(lines):
        matcher.set_seq1(line.strip()[:100])
        if ratios < MAX_RATIOS and matcher.real_quick_ratio() > best and matcher.quick_ratio() > best:
            ratios += 1
            if (ratio := matcher.ratio()) > best:
                best, where = ratio, at
    if where < 0:
        return "no line of the file is like it: read the file and copy the text from there"
    start = max(0, where - anchor)
    there = lines[start : start + len(wanted)]
    differs = next((at for at, (a, b) in enumerate(zip(wanted, there, strict=False)) if a != b), len(there) - 1)
    same = next((at for at, (a, b) in enumerate(zip(wanted[differs], there[differs], strict=False)) if a != b), None)
    first, left = max(0, differs - 1), max(0, (len(there[differs]) if same is None else same) - 100)
    shown, found = ([line[left : left + 200] for line in part[first : first + 10]] for part in (wanted, there))
    diff = "\n".join(line for line in difflib.ndiff(shown, found) if not line.startswith("?"))
    return f"the nearest text is at line {start + first + 1} (- is oldText, + is the file):\n{diff}"


def unified_diff(before: str, after: str, head: int, tail: int, shown: str, max_output: int) -> str:
    """What an edit changes, with three lines of context; the first `head` and last `tail` characters are the same."""
    # Only the lines between are compared: difflib takes minutes for a long log whose lines are alike.
    start, end = head + 1, len(before) - tail
    for _ in range(4):
        start = before.rfind("\n", 0, max(0, start - 1)) + 1
        end = before.find("\n", end) + 1 or len(before)
    texts = before[start:end], after[start : len(after) - (len(before) - end)]
    old, new = (re.findall(r"[^\n]*\n|[^\n]+", text.replace("\r\n", "\n")) for text in texts)
    counts, popular = Counter(new), len(new) // 100 + 1  # difflib passes over lines that are more frequent than that
    if 10 * len(old) + sum(counts[line] for line in old if counts[line] <= popular) > MAX_PAIRS:
        return f"(the edits span {len(new)} lines, too many for a diff; read_file shows the file)\n"
    skipped = before.count("\n", 0, start)
    lines: list[str] = []
    used = 0
    diff = list(difflib.unified_diff(old, new, shown, shown))
    for line in diff:
        if line.startswith("@@"):
            line = re.sub(r"(?<=[-+])\d+", lambda number: str(int(number[0]) + skipped), line)
        lines.append(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n")
        used += len(lines[-1])
        if max_output and used > max_output and len(lines) > 1:
            fact = f"lines 1-{len(lines) - 1} of {len(diff)} of the diff shown; read_file shows the file"
            return "".join(lines[:-1]) + trailer(fact)
    return "".join(lines) or "(only the kind of line breaks changes)\n"


def edit_text(
    files: Files, path: str, edits: Sequence[Edit], dry_run: bool, encoding: str, max_output: int, work: Work
) -> str:
    """What `edit_file` answers. Raises ToolError."""
    with writing(files, path, work) as target:
        if target.old is None:
            raise ToolError(f"not found: {target.shown}; write_file makes new files")
        bom, before, codec = decode_to_edit(target.old, target.shown, encoding)
        after, head, tail = before, len(before), len(before)
        for number, edit in enumerate(edits, 1):
            work.refuse_late()
            after, same_before, same_after = replace_once(after, edit, number, target.shown)
            head, tail = min(head, same_before), min(tail, same_after)
        try:
            data = bom + after.encode(codec)
        except UnicodeEncodeError:
            raise ToolError(f"newText has characters that {codec} cannot write; nothing was written") from None
        if len(data) > MAX_FILE:
            raise ToolError(f"the file would have {len(data)} bytes, more than {MAX_FILE}; nothing was written")
        diff = unified_diff(before, after, head, tail, target.shown, max_output)
        if not dry_run:
            target.replace(data)
        return diff


# ------------------------------------------------------------------------------------------ directories and moving


def make_directory(files: Files, path: str) -> str:
    """What `create_directory` answers: each missing part is made below its parent's descriptor. Raises ToolError."""
    located = files.sandbox.resolve(path)
    handle, made = files.sandbox.open_directory(Located(located.root, (), located.shown)), False
    try:
        with explained(located.shown):
            for part in located.parts:
                with suppress(FileExistsError):
                    make_directory_at(handle, part)
                    made = True
                child = open_directory_at(handle, part)
                close_handle(handle)
                handle = child
    finally:
        close_handle(handle)
    return f"created {located.shown}" if made else f"{located.shown} was there already"


def move(files: Files, source: str, destination: str, work: Work) -> str:
    """What `move_file` answers. Raises ToolError."""
    old, new = (files.sandbox.resolve(path, follow_last=False) for path in (source, destination))
    for located in (old, new):
        files.refuse_secret(located)
        if not located.parts:
            raise ToolError(f"{located.shown} is an allowed directory and stays where it is; give a path inside it")
    if old.root == new.root and new.parts[: len(old.parts)] == old.parts:
        raise ToolError(f"{new.shown} is {old.shown} itself or inside it; give a destination elsewhere")
    if any(root.path == os.path.join(old.root.path, *old.parts) for root in files.sandbox.roots):
        raise ToolError(f"{old.shown} is an allowed directory and stays where it is; give a path inside it")
    is_directory = stat.S_ISDIR(files.sandbox.stat(old).st_mode)
    if not is_directory and destination.endswith("/"):
        raise ToolError(f"{new.shown} would be a directory, and {old.shown} is none; give the whole new path")
    if is_directory:
        refuse_unprotecting(files, old, new, work)
    with (
        files.sandbox.parent(old, for_writing=True) as (from_directory, name),
        files.sandbox.parent(new, for_writing=True) as (to_directory, new_name),
    ):
        work.refuse_late()
        rename_new_at(from_directory, name, to_directory, new_name)
    audit(path=old.shown, destination=new.shown)
    return f"moved {old.shown} to {new.shown}"


def refuse_unprotecting(files: Files, old: Located, new: Located, work: Work) -> None:
    """A directory is not moved if a file in it that may not be opened could be under its new path: a glob that was
    given with --deny may name the directory. Raises ToolError."""
    if not files.deny:  # all other rules are about names that move along
        return
    walk = Walk(files, old.shown, work, [])
    for listing in walk.listings():
        for entry in listing.entries:
            below = f"/{listing.prefix}{entry.name}"
            if files.is_secret(old.path + below) and not files.is_secret(new.path + below):
                raise ToolError(f"{old.shown} has files in it that --deny protects where they are, and is not moved")
    if walk.notes():
        raise ToolError(f"{old.shown} could not be searched for files that --deny protects, and is not moved")


# ---------------------------------------------------------------------------------------------- the writing tools


def add_writing_tools(server: Server, files: Files) -> None:
    """Adds the tools that change files: they are there only with --write."""
    THREADS.submit(files.remove_leftovers)  # nobody waits for it: a big or slow tree must not delay the start

    @server.tool(annotations=REPLACES, structured_output=False)
    async def write_file(
        path: Path_, content: Annotated[str, Field(description="the whole text, as UTF-8", max_length=MAX_FILE)]
    ) -> str:
        """Make a new text file, or replace a whole file; the answer says which, with the sizes. All or nothing: the
        file never holds half of the text. To change a part of a file use edit_file."""
        return await in_thread(lambda work: write_text(files, path, content, work))

    @server.tool(annotations=EDITS, structured_output=False)
    async def edit_file(
        path: Path_,
        edits: Annotated[list[Edit], Field(description="made in this order", min_length=1, max_length=100)],
        dryRun: Annotated[bool, Field(description="only show the diff", strict=True)] = False,  # noqa: N803
        encoding: Annotated[str, Field(description="of the text", max_length=40)] = "utf-8",
    ) -> str:
        """Replace parts of a text file and return a unified diff. Each oldText must be there exactly once, letter for
        letter; otherwise nothing is written, and the error says where it is or what comes nearest. Line endings stay as
        they are: a line break stands for any kind."""
        max_output = server.options.max_output
        return await in_thread(lambda work: edit_text(files, path, edits, dryRun, encoding, max_output, work))

    @server.tool(annotations=ADDS, structured_output=False)
    async def create_directory(path: Path_) -> str:
        """Make a directory, with the directories above it. One that is there already is fine."""
        return await in_thread(lambda _: make_directory(files, path))

    @server.tool(annotations=MOVES, structured_output=False)
    async def move_file(source: Path_, destination: Path_) -> str:
        """Move or rename a file or directory. The destination is the new path itself; nothing that exists is ever
        overwritten."""
        return await in_thread(lambda work: move(files, source, destination, work))


# ------------------------------------------------------------------------------------------------------------ main


def main() -> None:
    """The command line: `fs_server.py DIR [DIR ...]`."""
    parser = argument_parser("fs-server", "Serve the files of directories to a language model over MCP.")
    parser.add_argument("directories", nargs="+", metavar="DIR", help="a directory that the model may read")
    parser.add_argument("--allow-secrets", action="store_true", help="also open .env files, private keys and the like")
    parser.add_argument("--write", action="store_true", help="also offer tools that write, edit and move files")
    parser.add_argument(
        "--deny", action="append", default=[], metavar="GLOB", help="never open what matches, or is below it"
    )
    serve(
        parser,
        lambda args, options: build_server(
            args.directories, deny=args.deny, allow_secrets=args.allow_secrets, write=args.write, options=options
        ),
    )


if __name__ == "__main__":
    main()
