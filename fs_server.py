# /// script
# requires-python = ">=3.11"
# dependencies = ["mcp>=2.3,<3"]
# ///
"""An MCP server that lets a language model read, list, find and search the files of the directories you name.

    python fs_server.py DIR [DIR ...]

Trust boundary: whatever the model asks for, nothing outside those directories is opened or listed, and nothing is
changed: there is no code here that writes. Files that hold secrets by convention (.env, private keys, cloud
credentials) are listed but not opened.
Not defended against: what the files themselves say to the model, and hard links or bind mounts that somebody put
inside a directory and that lead out of it: they look like any other file.
"""

import sys

try:
    import serving  # first of all: it checks Python and mcp, and imports the SDK with the garbage collector off
except ModuleNotFoundError as missing:
    sys.stderr.write(f"fs_server.py needs {missing.name}.py: copy it into the same directory\n")
    sys.exit(2)

import argparse
import asyncio
import base64
import codecs
import io
import json
import mimetypes
import os
import re
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial, wraps
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast
from urllib.parse import quote

import anyio
import mcp_types as types
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import Field
from pydantic_core import SchemaError, SchemaValidator, core_schema

from common import MAX_PATH, ConfigError, Directory, Located, Sandbox, explained, page, printable, trailer

Method = TypeVar("Method", bound=Callable[..., Any])

# -------------------------------------------------------------------------------------------------------- limits

MAX_FILE = 10_000_000  # bytes: a media file, a searched file, and the default for a whole text file
MAX_DEPTH = 100  # levels a walk goes down: each holds a descriptor, and a process has about 1,000
MAX_LINE = 500  # characters of one matching line shown; minified files have lines of megabytes
MAX_REGEX_LINE = 2_000  # characters of a line that a regular expression sees: the engine may need 50 µs for each
WALK_LIMIT = 25.0  # seconds: a walk ends before the call's own limit and answers with what it has
CHUNK = 1 << 20  # bytes read at a time when a large file is scanned
SMALL = 1 << 16  # bytes: most files come with one read of this size
TRAILER = 130  # characters left for the line that says how a text continues
LEAST = 80  # characters of a text that come however small a result may be: one without progress never ends

# Directories that tools fill and that would drown what a person wrote: a walk enters them only when asked to.
JUNK = set(".git .hg .svn node_modules __pycache__ .venv venv .tox .nox .mypy_cache .pytest_cache .ruff_cache".split())
# Names by which secrets are known; they are matched in lower case, as some disks do not tell .ENV from .env.
SECRET_DIRECTORIES = (".ssh", ".gnupg", ".aws", ".azure", ".kube", ".docker", "gcloud", ".password-store")
SECRET_FILES = (
    ".env .env.* *.env .envrc *.{pem,key,p12,pfx,jks,keystore,kdbx,ppk,ovpn} id_{rsa,dsa,ecdsa,ed25519}* .netrc _netrc"
    " .pgpass .my.cnf .npmrc .pypirc .git-credentials .htpasswd .vault-token .dockercfg .boto .s3cfg rclone.conf shadow"
    " {credentials,client_secret*,service-account*,application_default_credentials}.json secrets.{yaml,yml,json,toml}"
    " *.tfstate *.tfstate.backup"
).split()
NOT_SECRET = (".env.example", ".env.sample", ".env.template", ".env.dist", "*.pub")

# ------------------------------------------------------------------------------------------------ a call in a thread


@dataclass
class Call:
    """One running call, as the thread that does its work and the event loop that waits for it both see it."""

    deadline: float = field(default_factory=lambda: time.monotonic() + WALK_LIMIT)
    cancelled: bool = False
    visited: int = 0  # entries
    left_out: Counter[str] = field(default_factory=Counter[str])  # such as "skipped % binary files": 3

    def over(self) -> bool:
        """Whether the thread must stop: its time is up, or nobody waits for it any more."""
        return self.cancelled or time.monotonic() > self.deadline

    def notes(self) -> list[str]:
        """What the result lacks, as facts for its trailer."""
        late = [f"stopped after {WALK_LIMIT:g} s: give a narrower path or glob"] if self.over() else []
        return late + [fact.replace("%", str(count)) for fact, count in sorted(self.left_out.items())]

    def skip(self, what: str, instead: str = "") -> str:
        """Count something that was left out; returns what is there instead of it."""
        self.left_out[f"skipped % {what}"] += 1
        return instead


CALL: ContextVar[Call] = ContextVar("CALL")  # the call that this thread works for

THREADS = ThreadPoolExecutor(500, "fs")  # they are made at need; a disk that hangs must not use them all up
WALKERS = anyio.CapacityLimiter(2)  # walks at a time: three, passing the interpreter's lock around, take twice as long
REGEX_WALKERS = anyio.CapacityLimiter(1)  # the regex engine holds the interpreter's lock: two would starve the others
OFFERED: dict[Callable[..., Any], tuple[types.ToolAnnotations, bool]] = {}  # the methods that are tools


def tool(annotations: types.ToolAnnotations = serving.READ_ONLY, *, walks: bool = False) -> Callable[[Method], Method]:
    """Makes a method of Files a tool: it runs in a thread, its Call in CALL. Of those that walk few run at a time."""

    def offer(method: Method) -> Method:
        OFFERED[method] = annotations, walks
        return method

    return offer


def in_thread(method: Callable[..., Any], walks: bool) -> Callable[..., Any]:
    """The method as the SDK calls it: no disk makes another call wait, a cancelled call ends its thread, and a client
    that asked for progress is told ten times a second, and once at the end, how many entries were visited."""

    @wraps(method)
    async def run(ctx: Context[Any, Any], **arguments: Any) -> Any:
        call, told, waiting, context = Call(), 0, None, copy_context()
        context.run(CALL.set, call)
        try:
            async with (REGEX_WALKERS if arguments.get("regex") else WALKERS) if walks else nullcontext():
                future = THREADS.submit(context.run, method, **arguments)
                # The event loop stands still for a moment: to sleep and be woken by a thread takes it three times as
                # long as the thread takes to read a small file. Nearly all disks answer within a millisecond.
                with suppress(TimeoutError):
                    future.result(0.001)
                waiting = future if future.done() else asyncio.wrap_future(future)
                while True:
                    if call.visited > told:  # each notification must tell more than the one before
                        told = call.visited
                        await ctx.report_progress(told, message=f"{told} entries visited")
                    if waiting.done():
                        return waiting.result()
                    await asyncio.wait([cast("asyncio.Future[Any]", waiting)], timeout=0.1)
        finally:
            call.cancelled = True
            if waiting:
                waiting.cancel()  # nobody will ask for its result

    run.__annotations__ = {**method.__annotations__, "ctx": Context}  # by which the SDK knows that it is wanted
    return run


# ----------------------------------------------------------------------------------------------------- the tools


# Types of parameters; those that only one tool has stand there.
Path_ = Annotated[str, Field(description="relative or absolute", max_length=MAX_PATH)]
Paths = Annotated[list[Path_], Field(description="files", min_length=1, max_length=100)]
Encoding = Annotated[str, Field(description="of the text", max_length=40)]
Glob = Annotated[str, Field(max_length=1000)]
Find = Annotated[Glob, Field(description="glob: *.py for names at any depth, src/**/*.ts for paths")]
Exclude = Annotated[list[Glob] | None, Field(description="globs left out besides .git etc.; []: none", max_length=100)]
Recursive = Annotated[bool, Field(description="also what is below", strict=True)]
Depth = Annotated[int, Field(description="levels", ge=1, le=MAX_DEPTH, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
Offset = Annotated[Count, Field(description="entries (files, lines) to skip")]
Size = Annotated[int, Field(description="bytes: refuse a whole file above this", ge=1, le=100_000_000, strict=True)]


class Files:
    """The allowed directories, which of the files in them are not to be opened, and the tools.

    A bigger sibling adds methods that are tools, and is built in the same way. Raises ConfigError.
    """

    name = "fs-server"
    does = "Reads, lists, finds and searches"

    def __init__(self, directories: Sequence[str | Path], deny: Sequence[str], allow_secrets: bool, max_output: int):
        self.sandbox = Sandbox(directories)
        self.max_output = max_output
        self.deny = deny
        denied = [glob.rstrip("/").casefold() for glob in [*deny, *(() if allow_secrets else SECRET_DIRECTORIES)]]
        # What is below a denied directory is denied as well, and in any case: on some disks Private is private.
        below = [f"{glob}/**" if "/" in glob else f"**/{glob}/**" for glob in denied]
        try:
            glob_matcher(*deny)  # so that an error names these alone
            self._denied = glob_matcher(*denied, *below)
        except ToolError as exc:
            raise ConfigError(f"--deny: {exc}") from None
        self._secret = glob_matcher(*([] if allow_secrets else SECRET_FILES))
        self._not_secret = glob_matcher(*NOT_SECRET)

    @tool()
    def read_file(
        self,
        path: Path_,
        encoding: Encoding = "utf-8",
        max_size: Size = MAX_FILE,
        head: Annotated[Count, Field(description="first lines only (0: all), from offset on")] = 0,
        tail: Annotated[Count, Field(description="last lines only (0: all)")] = 0,
        offset: Annotated[Count, Field(description="lines to skip")] = 0,
        column: Annotated[Count, Field(description="characters to skip in the first line")] = 0,
    ) -> str:
        """Read a text file. Whole files up to max_size; head, tail and offset read part of a file of any size. A long
        text is cut at a line, and its last line names the arguments that continue. Binary files and text in another
        encoding are errors; read_media_file reads images and audio."""
        if tail and (head or offset):
            raise ToolError("tail cannot be combined with head or offset; give tail alone, or head and offset")
        return self._text(path, 0, "", encoding, max_size, head, tail, offset, column)

    @tool()
    def read_media_file(self, path: Path_) -> types.CallToolResult:
        """Read an image or audio file, or any other file as a binary resource, with its MIME type. Up to 10 MB."""
        located = self.sandbox.resolve(path)
        with open(self.open(located), "rb") as file, explained(located.shown):
            data = file.read(MAX_FILE + 1)
        if not 0 < len(data) <= MAX_FILE:
            raise ToolError(f"{located.shown} is empty or has more than {MAX_FILE} bytes; choose another file")
        mime = mime_type(located.shown) or "application/octet-stream"
        encoded, kind = base64.b64encode(data).decode(), mime.partition("/")[0]
        if content := {"image": types.ImageContent, "audio": types.AudioContent}.get(kind):
            return types.CallToolResult(content=[content(data=encoded, mime_type=mime)])
        uri = f"file:///{quote(located.shown.lstrip('/'))}"
        blob = types.BlobResourceContents(uri=uri, blob=encoded, mime_type=mime)
        return types.CallToolResult(content=[types.EmbeddedResource(resource=blob)])

    @tool()
    def read_multiple_files(self, paths: Paths, offset: Offset = 0) -> str:
        """Read several UTF-8 text files in one call, each under a header line. A file that cannot be read is reported
        in its place and the others still come. What does not fit in one result is left; the last line says how to
        continue."""

        def under_header(path: str) -> str:
            header = f"==> {printable(path)[:MAX_PATH]} <==\n"
            try:
                # A file that alone is longer than a result is cut, so that the trailer fits as well.
                text = self._text(path, len(header) + TRAILER // 2, path)
            except ToolError as exc:
                text = f"[error: {exc}]"
            return header + text.removesuffix("\n")

        return self._page(paths, "files", offset, render=under_header)

    @tool(walks=True)
    def list_directory(
        self, path: Path_ = ".", pattern: Find = "*", recursive: Recursive = False, offset: Offset = 0
    ) -> str:
        """List a directory: one JSON object a line with path, type, size in bytes and time of modification (UTC). Use
        directory_tree for an overview. Recursive listings do not enter .git, node_modules and the like unless the
        pattern names them."""
        start = self.sandbox.resolve(path)
        recursive = recursive or "/" in pattern  # such a pattern names what is below
        found = matching(pattern, islice(self.walk(start, asked=pattern), None if recursive else 1))
        render = partial(list_line, start.shown)
        # One directory is held whole, so that the result can say of how many entries it is a part.
        return self._page(found if recursive else list(found), "entries", offset, render=render)

    @tool(walks=True)
    def directory_tree(
        self, path: Path_ = ".", max_depth: Depth = MAX_DEPTH, exclude_patterns: Exclude = None, offset: Offset = 0
    ) -> str:
        """Show the files and directories below a path as an indented tree: in each directory first its files, then its
        subdirectories. Directories that were not entered are marked. For sizes and times use list_directory."""
        start = self.sandbox.resolve(path)
        return self._page(tree_lines(start.shown, self.walk(start, exclude_patterns, "", max_depth)), "lines", offset)

    @tool(walks=True)
    def search_files(self, path: Path_, pattern: Find, exclude_patterns: Exclude = None, offset: Offset = 0) -> str:
        """Find files and directories below a path whose name matches a glob, one path a line. Knows *, ?, **, [a-z]
        and {a,b}; case matters. To search in the text of files use search_text."""
        start = self.sandbox.resolve(path)
        found = matching(pattern, self.walk(start, exclude_patterns, asked=pattern))
        return self._page(found, "matches", offset, render=partial(path_of, start.shown))

    @tool(walks=True)
    def search_text(
        self,
        path: Path_,
        pattern: Annotated[str, Field(description="text, or a regular expression", min_length=1, max_length=1000)],
        regex: Annotated[bool, Field(description="Rust syntax: no look-around", strict=True)] = False,
        glob: Annotated[Glob, Field(description="search only files that match, such as *.py")] = "",
        ignore_case: Annotated[bool, Field(strict=True)] = False,
        context: Annotated[int, Field(description="lines around a match", ge=0, le=20, strict=True)] = 0,
        max_matches: Annotated[int, Field(ge=1, le=10_000, strict=True)] = 200,
        offset: Annotated[Count, Field(description="matches to skip")] = 0,
    ) -> str:
        """Search the lines of text files below a path (or of one file): file:line:text for each match. Long lines are
        clipped. The last line says what was skipped: binary, secret and unreadable files, and those above 10 MB."""
        query = Query(pattern, regex, ignore_case, context)
        result = self._page(self._matches(path, query, glob), "matches", offset, limit=max_matches)
        if result.startswith("[no matches") and re.search(LINE_BREAK if regex else "[\r\n]", pattern):
            raise ToolError(f"{result[1:-1]}; lines are searched one by one: search for what stands on one line")
        return result

    @tool()
    def get_file_info(self, path: Path_) -> dict[str, str | int | None]:
        """Tell a file's or directory's type, size, times (UTC), permissions and MIME type; for a symlink those of its
        target, and where it leads."""
        itself = self.sandbox.resolve(path, follow_last=False)
        info, target = self.sandbox.reach(itself, Directory.stat), None
        if stat.S_ISLNK(info.st_mode):
            target = "(outside the allowed directories)"
            with suppress(ToolError):
                located = self.sandbox.resolve(path)
                target = f"{printable(located.absolute)} (not found)"
                info, target = self.sandbox.reach(located, Directory.stat), printable(located.absolute)
        born = getattr(info, "st_birthtime", None)  # the systems that do not tell it have no honest substitute
        mime = mime_type(itself.shown) if stat.S_ISREG(info.st_mode) else None
        what = {"path": itself.shown, "type": type_of(info.st_mode), "size": info.st_size}
        times = {"modified": iso(info.st_mtime), "accessed": iso(info.st_atime), "created": iso(born) if born else None}
        return {**what, **times, "permissions": stat.filemode(info.st_mode), "mime_type": mime, "link_target": target}

    @tool()
    def list_allowed_directories(self) -> dict[str, list[str]]:
        """List the directories that this server may read. Relative paths are looked up in each of them in turn."""
        return {"directories": [printable(root.path) for root in self.sandbox.roots]}

    # What the tools have in common.

    def is_secret(self, path: str) -> bool:
        """Whether the file at this path (from its root, symlinks resolved) must not be opened."""
        path = printable(path.casefold())
        return self._denied(path) or (self._secret(path) and not self._not_secret(path))

    def refuse_secret(self, located: Located) -> None:
        """Raises ToolError if the file is not to be opened, written or moved."""
        if self.is_secret(located.path):
            way = "ask the user to start the server with --allow-secrets or without this --deny"
            raise ToolError(f"{located.shown} holds secrets by its name and is left alone; {way}")

    def open(self, located: Located) -> int:
        """A descriptor of a file, for reading; the caller closes it. Raises ToolError."""
        self.refuse_secret(located)
        return self.sandbox.reach(located, Directory.open)

    def _text(self, path: str, reserved: int, *how: Any) -> str:
        located, limit = self.sandbox.resolve(path), max(self.max_output - reserved, LEAST) if self.max_output else 0
        with open(self.open(located), "rb") as file, explained(located.shown):
            text = Text(file, located.shown, *how)  # must not go before the file is closed: it would warn
            return text.part(limit)

    def _page(self, items: Iterable[Any], noun: str, offset: int, **how: Any) -> str:
        """The items from `offset` on that a walk has found, as a result. Raises ToolError."""
        return page(items, noun, max_output=self.max_output, offset=offset, notes=CALL.get().notes, **how)

    def _matches(self, path: str, query: "Query", glob: str) -> Iterator[str]:
        """All that `search_text` finds, file by file."""
        start, call = self.sandbox.resolve(path), CALL.get()
        if start.path and not stat.S_ISDIR(self.sandbox.reach(start, Directory.stat).st_mode):
            with explained(start.shown):
                yield from query.matches_in(query.text_of(self.open(start)), start.shown)
            return
        for listing, entry, below in matching(glob or "*", self.walk(start, asked=glob)):
            if call.over():
                return
            if not entry.is_file(follow_symlinks=False):
                continue
            if self.is_secret(f"{start.path}/{below}".lstrip("/")):
                call.skip("secret files")
                continue
            try:
                text = query.text_of(listing.directory.open(entry.name))
            except OSError:
                call.skip("unreadable files")
            else:
                yield from query.matches_in(text, path_of(start.shown, (listing, entry, below))) if text else ()

    def walk(
        self, start: Located, exclude: Sequence[str] | None = None, asked: str = "", max_depth: int = MAX_DEPTH
    ) -> Iterator["Listing"]:
        """Each directory from `start` on before its subdirectories, in a stable order; those that are not entered come
        with a mark. Symlinks are not followed, and each directory is reached from its parent's descriptor. Raises
        ToolError if the start cannot be listed."""
        call, excluded = CALL.get(), glob_matcher(*exclude) if exclude else None
        # Junk is walked when it is asked for: exclude_patterns=[], or its name in the pattern.
        junk = set[str]() if exclude == [] else JUNK - set(re.split(r"[/{},]", asked))

        def below(directory: Directory, prefix: str = "", depth: int = 1) -> Iterator[Listing]:
            entries = directory.scan()
            if excluded:
                entries = [entry for entry in entries if not excluded(printable(prefix + entry.name))]
            call.visited += len(entries)
            yield Listing(prefix, directory, entries)
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    continue
                if call.over():
                    return
                inner, mark = f"{prefix}{entry.name}/", "not listed"
                if depth == MAX_DEPTH:
                    call.skip(f"directories below {MAX_DEPTH} levels: give a deeper path")
                elif entry.name in junk and depth < max_depth:
                    mark = call.skip(entry.name, "skipped")
                elif depth < max_depth:
                    try:
                        yield from below(directory.enter(entry.name), inner, depth + 1)
                        continue
                    except OSError:
                        mark = call.skip("unreadable directories", "unreadable")
                yield Listing(inner, directory, [], mark)

        with explained(start.shown):
            yield from below(self.sandbox.reach(start, Directory.enter))


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
        raise ToolError(f"no valid regular expression ({reason}); use Rust's syntax, or regex=false") from None


# Globs are translated, not left to the module glob, which opens by name what it finds and follows links. A brace
# without its partner makes a regular expression that does not compile, and so an error.
GLOB_PARTS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]", "{": "(?:", "}": ")"}


def glob_regex(pattern: str) -> str:
    """A glob as a regular expression: `*` and `?` stay in one name, `**` crosses directories, `[a-z]`, `{a,b}`.

    A glob without a slash is matched against names at any depth. The result is anchored at both ends.
    """
    text = pattern.removeprefix("./").strip("/")
    out, depth = "(?s)^" if "/" in text else "(?s)^(?:.*/)?", 0
    for part in re.findall(r"\*\*/|\*\*|\[!?\]?[^\]/]*\]|.", text, re.DOTALL):
        depth += (part == "{") - (part == "}")
        if part[0] == "[" and len(part) > 1:
            body = "".join(c if c == "-" else re.escape(c) for c in part[1:-1].removeprefix("!"))
            out += f"[^/{body}]" if part[1] == "!" else f"[{body}]"
        elif part == "," and depth:
            out += "|"
        else:
            out += GLOB_PARTS.get(part) or re.escape(part)
    return out + "$"


def glob_matcher(*patterns: str) -> Callable[[str], bool]:
    """A predicate over relative paths, true if any of the globs matches. Raises ToolError for one that is not valid."""
    for pattern in patterns:
        # It would match nothing anyway: patterns are compared with paths that a walk found, they open nothing.
        # It may be empty because of a --deny with a variable that is not set.
        empty = not pattern.removeprefix("./").strip("/")
        if empty or pattern.startswith(("/", "~/")) or ".." in pattern.split("/") or "\0" in pattern:
            raise ToolError(f"the glob {pattern!r} is empty or leads out; globs are relative to path, such as **/*.py")
    try:
        return linear_regex("|".join(glob_regex(pattern) for pattern in patterns) or r"[^\s\S]")
    except ToolError:
        wrong = " or ".join(repr(pattern[:100]) for pattern in patterns[:10])
        raise ToolError(f"the glob {wrong} is not valid: check its brackets and braces, or make it shorter") from None


# ------------------------------------------------------------------------------------------------------ directories


@dataclass(frozen=True)
class Listing:
    """One directory of a walk: `prefix` is its path below the start ("" or ending in "/"); `entries` are sorted, and
    good as long as this holds `directory` open. `mark` says why it was not entered, if it was not."""

    prefix: str
    directory: Directory
    entries: list[os.DirEntry[str]]
    mark: str = ""


Found = tuple[Listing, "os.DirEntry[str]", str]  # with its path below the start, as it is shown


def matching(pattern: str, listings: Iterable[Listing]) -> Iterable[Found]:
    """The entries whose path below the start matches a glob. Raises ToolError for a glob that is not valid."""
    matches, everything = glob_matcher(pattern), pattern == "*"
    for listing in listings:
        for entry in listing.entries:
            path = printable(listing.prefix + entry.name)
            if everything or matches(path):
                yield listing, entry, path


def type_of(mode: int) -> str:
    """The file type in a `st_mode`, as one word."""
    letters = {"-": "file", "d": "directory", "l": "symlink", "p": "fifo", "s": "socket"}
    return letters.get(stat.filemode(mode)[0], "device")


def mime_type(name: str) -> str | None:
    """The MIME type by the name of a file."""
    # The slash: without it, a name may be taken for a URL that tells its own type.
    mime, compression = mimetypes.guess_type(f"/{name}")
    return {None: mime, "gzip": "application/gzip"}.get(compression)


def iso(seconds: float) -> str:
    """A time stamp as ISO 8601 in UTC, to the second."""
    # File systems can hold years that the calendar cannot: they are shown as its first or last.
    within = max(-62_135_596_800, min(seconds, 253_402_300_799))
    return datetime.fromtimestamp(within, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def path_of(shown: str, found: Found) -> str:
    """The path of what was found: it begins with the one that the caller gave, so that it can be passed back."""
    return f"{shown.rstrip('/')}/{found[2]}"


def list_line(shown: str, found: Found) -> str:
    """One entry of a directory as a line of JSON."""
    line: dict[str, Any] = {"path": path_of(shown, found), "type": "unreadable"}
    with suppress(OSError):
        info = found[1].stat(follow_symlinks=False)
        line |= {"type": type_of(info.st_mode), "size": info.st_size, "modified": iso(info.st_mtime)}
    return json.dumps(line, ensure_ascii=False, separators=(",", ":"))


def tree_lines(shown: str, listings: Iterable[Listing]) -> Iterator[str]:
    """A tree, one space of indentation a level: a directory, its files, then its subdirectories."""
    for listing in listings:
        depth = listing.prefix.count("/")
        name = printable(listing.prefix.split("/")[-2]) if depth else shown.rstrip("/")
        yield f"{' ' * depth}{name}/{listing.mark and f' [{listing.mark}]'}"
        for entry in listing.entries:
            if not entry.is_dir(follow_symlinks=False):
                yield f"{' ' * depth} {printable(entry.name)}{' [symlink]' if entry.is_symlink() else ''}"


# -------------------------------------------------------------------------------------------------- text of files

# Not encodings of text, or with decoders that need quadratic time.
NOT_TEXT = frozenset({"idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined"})
# Byte-order marks, and what they mean. UTF-32 first: its mark begins like that of UTF-16.
UTF_32 = {codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be"}
MARKS = {**UTF_32, codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
BEGINS = tuple(MARKS)
BINARY = "it looks binary: it has NUL bytes"


def mark_of(data: bytes) -> tuple[bytes, str]:
    """The byte-order mark that a file starts with, and the encoding it stands for; or nothing twice."""
    if not data.startswith(BEGINS):  # nearly always: a search asks this of every file
        return b"", ""
    return next((mark, codec) for mark, codec in MARKS.items() if data.startswith(mark))


def text_codec(encoding: str) -> str:
    """The one name of an encoding that has many. Raises ToolError for what is not an encoding of text."""
    with suppress(LookupError, ValueError):
        "\n".encode(encoding)  # rot13, say, cannot
        if (name := codecs.lookup(encoding).name) not in NOT_TEXT:
            return name
    raise ToolError(f"unknown text encoding: {encoding[:40]}; use utf-8, utf-16, latin-1, cp1252 or another")


def end_of_lines(text: str, lines: int) -> int:
    """Where the first `lines` lines of a text end; or the length of one that has fewer."""
    if text.count("\n") < lines:
        return len(text)
    return len(text) - len(text.split("\n", lines)[-1])


@dataclass
class Text:
    """An open file, and which part of its text is wanted: `head` or `tail` lines, `offset` lines and then `column`
    characters skipped. It is read forwards in chunks, so that a file of any size takes little memory."""

    file: io.BufferedReader
    shown: str
    naming: str = ""  # the path, where it is another tool than read_file that was called
    encoding: str = "utf-8"
    max_size: int = MAX_FILE
    head: int = 0
    tail: int = 0
    offset: int = 0
    column: int = 0

    def part(self, max_output: int) -> str:
        """The wanted part, or as much of it as fits in `max_output` characters, with the trailer if it was cut. Raises
        ToolError for what cannot be read so, and OSError."""
        self._begin()
        limit, missing = max_output or max(self.max_size, LEAST), self.column
        lines = self._skip_lines(self.offset)
        while missing and (skipped := self._read(min(missing, CHUNK))):
            missing -= len(skipped)
        text = self._read(limit + 1)
        if not text and (lines or self.column):
            past = f"column={self.column}" if self.column else f"offset={self.offset}"
            raise ToolError(f"{past} is past the end of {self.shown}, after {lines} lines; use a smaller one")
        end = end_of_lines(text, self.head) if self.head else len(text)
        self._refuse_undecoded(text[: min(end, limit)])
        return (text[:end] or "[the file is empty]") if end <= limit else self._cut(text, limit)

    def _begin(self) -> None:
        """Look at the start of the file, and go to where the wanted part is counted from."""
        codec = text_codec(self.encoding)
        self.utf_8 = codec == "utf-8"
        self.size = os.fstat(self.file.fileno()).st_size
        if self.size > self.max_size and not (self.head or self.tail or self.offset or self.column):
            way = "read a part with head, tail or offset of read_file, or raise its max_size"
            raise ToolError(f"{self.shown} has {self.size} bytes, more than max_size={self.max_size}; {way}")
        beginning = self.file.peek()
        mark, marked = mark_of(beginning)
        if self.utf_8 and marked not in ("", "utf-8"):
            raise self._undecodable("by its byte-order mark", f'pass encoding="{marked[:6]}" to read_file')
        if self.utf_8 and b"\0" in beginning:
            raise self._undecodable(BINARY)
        start = len(mark) if marked == codec else 0  # a byte-order mark is no text
        # Only where a newline is always the same byte can lines be counted from the end. A log of gigabytes is not read
        # from its beginning for the sake of its last lines.
        if self.tail and codec in ("utf-8", "ascii", "iso8859-1", "cp1252"):
            start = self._before_tail(start)
        self.file.seek(start)
        # What cannot be decoded becomes surrogates, which matter only in the part that is wanted.
        self.stream, self.ahead = io.TextIOWrapper(self.file, self.encoding, "surrogateescape", newline="\n"), ""
        if self.tail:
            # How many lines there are is known only at the end: so there, back, and on to where the last ones begin.
            lines = self._skip_lines(sys.maxsize)
            self.stream.seek(start)
            self._skip_lines(lines - self.tail)

    def _before_tail(self, first: int) -> int:
        """A place in the file that has the last lines behind it, and little else. Reads backwards."""
        newlines, start = 0, self.size
        while start > first and newlines <= self.tail:
            self._refuse_late()
            end, start = start, max(first, start - CHUNK)
            self.file.seek(start)
            newlines += self.file.read(end - start).count(b"\n")
        return start

    def _skip_lines(self, lines: int) -> int:
        """Go on by so many lines; returns how many there were: fewer at the end of the text."""
        seen, last = 0, "\n"
        while seen < lines and (chunk := self._read(CHUNK)):
            end = end_of_lines(chunk, lines - seen)
            self.ahead = chunk[end:] + self.ahead
            seen += chunk.count("\n", 0, end)
            last = chunk[end - 1]
        return seen + (last != "\n")

    def _read(self, count: int) -> str:
        """The next `count` characters, fewer only at the end."""
        self._refuse_late()
        text, self.ahead = self.ahead[:count], self.ahead[count:]
        try:
            # All at once is faster, where the size of all is known.
            return text + self.stream.read(-1 if 0 < self.size < count else count - len(text))
        except UnicodeError:
            raise self._undecodable("a character that is not whole") from None

    def _cut(self, text: str, limit: int) -> str:
        """The whole lines that fit in `limit` characters with the trailer; a line that alone is longer is cut inside.
        Some text comes even if there is no room for both: a page without progress would never end."""
        self.ahead = text + self.ahead
        left = self._skip_lines(sys.maxsize) if self.tail or self.size <= self.max_size else 0
        resume: dict[str, Any] = {"path": self.naming} if self.naming else {}
        room = max(limit - TRAILER - len(trailer(**resume)), LEAST)
        newline = text.rfind("\n", 0, room) + 1
        end = newline or room
        count = text.count("\n", 0, end)
        if self.tail:
            fact = f"lines 1-{count} of the last {left} shown"
            resume["tail"] = left - count
        else:
            of = f" of {self.offset + left}" if left else ""
            fact = f"lines {self.offset + 1}-{self.offset + count}{of} shown"
            resume |= {"offset": self.offset + count} | ({"head": self.head - count} if self.head else {})
        if not newline:
            resume["column"] = self.column + end
            fact = f"characters {self.column + 1}-{self.column + end} of one long line shown"
        rest = trailer(fact + (", read_file has the rest" if self.naming else ""), **resume)
        return text[:end] + ("" if newline else "\n") + rest

    def _refuse_late(self) -> None:
        if CALL.get().over():
            raise ToolError(f"{self.shown} is too large to scan in {WALK_LIMIT:g} s; use tail, or a smaller offset")

    def _refuse_undecoded(self, text: str) -> None:
        if self.utf_8 and "\0" in text:
            raise self._undecodable(BINARY)
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            line = "" if self.tail else f" in line {self.offset + text.count(chr(10), 0, exc.start) + 1}"
            raise self._undecodable(f"byte 0x{ord(text[exc.start]) & 255:02x}{line}") from None

    def _undecodable(self, what: str, way: str = "") -> ToolError:
        text = 'pass its encoding to read_file: "cp1252", "utf-16", or "latin-1", which shows any byte'
        way = way or f"use read_media_file if it is no text, or {text}"
        return ToolError(f"{self.shown} is not valid {self.encoding} ({what}); {way}")


# -------------------------------------------------------------------------------------------------------- search


# A line break in a regular expression; in a [class] it is only one of several choices.
LINE_BREAK = r"[\r\n]|(?<!\\)\\(?:[rn]|x0[adAD])(?![^[]*\])"


class Query:
    """What `search_text` looks for, line by line. Raises ToolError."""

    def __init__(self, pattern: str, regex: bool, ignore_case: bool, context: int) -> None:
        self.pattern = pattern.casefold() if ignore_case else pattern
        self.ignore_case = ignore_case
        self.context = context
        self.found = linear_regex(("(?i)" if ignore_case else "") + pattern) if regex else None
        # Bytes without which a file cannot match, so that most files are put aside without being decoded.
        self.needle = b"" if regex or ignore_case else pattern.encode("utf-8", "surrogatepass")
        self.call = CALL.get()

    # Whole files are looked at first, by what is fastest; lines are made of those only in which there is a match.

    def find(self, text: str) -> int:
        """Where the text that is looked for stands; below zero if it does not, or if that is not known."""
        return -1 if self.found else (text.casefold() if self.ignore_case else text).find(self.pattern)

    def is_in(self, line: str) -> bool:
        """Whether a line matches."""
        if not self.found:
            return self.find(line) >= 0
        if len(line) > MAX_REGEX_LINE:
            self.call.skip(f"line ends after {MAX_REGEX_LINE} characters (plain text is searched to the end)")
            line = line[:MAX_REGEX_LINE]
        return not self.call.over() and self.found(line)

    def clip(self, line: str) -> str:
        """A line as it is shown: a long one is cut around the match, and says so."""
        start = max(0, min(self.find(line) - MAX_LINE // 4, len(line) - MAX_LINE))
        before, after = f"[{start} characters]…" if start else "", len(line) - start - MAX_LINE
        return before + line[start : start + MAX_LINE] + (f"…[{after} characters]" if after > 0 else "")

    def matches_in(self, text: str, name: str) -> Iterator[str]:
        """Each match in a text as `name:line:text`, with its context lines as `name-line-text`, every line once."""
        lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
        numbers = [number for number, line in enumerate(lines) if self.is_in(line)]
        printed = 0  # lines before this one have been given
        for number, following in zip(numbers, [*numbers[1:], len(lines)], strict=False):
            first, last = max(printed, number - self.context), min(number + self.context, following - 1)
            group = ["--"] if self.context and printed and first > printed else []
            for at in range(first, last + 1):
                mark = ":" if at == number else "-"
                group.append(f"{name}{mark}{at + 1}{mark}{self.clip(lines[at])}")
            printed = last + 1
            yield "\n".join(group)

    def text_of(self, fd: int) -> str:
        """The text of an open file; "" if nothing in it can match, or if it is not searched. Closes the file. Raises
        OSError."""
        self.call.visited += 1
        try:  # for most files a file object would cost more than reading them
            data = os.read(fd, SMALL)
            mark, codec = mark_of(data)
            if len(data) == SMALL and os.fstat(fd).st_size > MAX_FILE:
                return self.call.skip(f"files larger than {MAX_FILE} bytes")
            if not mark and data.find(b"\0", 0, 8192) >= 0:
                return self.call.skip("binary files")
            if data and (more := os.read(fd, SMALL)):  # files in /proc give a page at a time
                with open(fd, "rb", closefd=False) as file:
                    data += more + file.read(MAX_FILE)
        finally:
            os.close(fd)
        if self.needle not in data and not mark and self.pattern.isascii():
            return ""
        text = data[len(mark) :].decode(codec or "utf-8", "backslashreplace")
        if not self.pattern.isascii() and not mark and text.encode() != data:
            self.call.left_out["% searched files are not UTF-8, characters beyond ASCII are not found in them"] += 1
        # Most files: looked at as a whole, not by line.
        return text if self.found or self.find(text) >= 0 else ""


# ------------------------------------------------------------------------------------------------------------ main


def build_server(
    directories: Sequence[str | Path],
    deny: Sequence[str] = (),
    allow_secrets: bool = False,
    options: serving.Options | None = None,
    kind: type[Files] = Files,
) -> serving.Server:
    """The file server over existing `directories`; files that match a glob in `deny` are never opened. `kind` may have
    more tools. Raises ConfigError."""
    options = options or serving.Options()
    files = kind(directories, deny, allow_secrets, options.max_output)
    roots = [root.path for root in files.sandbox.roots]
    server = serving.Server(kind.name, f"{kind.does} the files in {', '.join(map(printable, roots))}.", options)
    server.health = partial(asyncio.to_thread, files.sandbox.check)
    server.label = "-".join(part for root in roots for part in Path(root).parts[1:][-2:])
    for method, (annotations, walks) in OFFERED.items():
        if getattr(kind, method.__name__, None) is method:  # not a tool of another kind
            run = in_thread(getattr(files, method.__name__), walks)
            structured = False if method.__annotations__["return"] is str else None
            server.add_tool(run, annotations=annotations, structured_output=structured)
    return server


def main(kind: type[Files] = Files) -> None:
    """The command line: `fs_server.py DIR [DIR ...]`."""
    parser = serving.argument_parser(kind.name, f"{kind.does} the files of directories, for a language model over MCP.")
    parser.add_argument("directories", nargs="+", metavar="DIR", help="a directory with the files")
    parser.add_argument("--allow-secrets", action="store_true", help="also open .env files, private keys and the like")
    parser.add_argument("--deny", action="append", default=[], metavar="GLOB", help="never open what it matches")

    def build(args: argparse.Namespace, options: serving.Options) -> serving.Server:
        return build_server(args.directories, args.deny, args.allow_secrets, options, kind)

    serving.serve(parser, build)


if __name__ == "__main__":
    main()
