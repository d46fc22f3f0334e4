"""What the three servers share. Copy this file together with the server that you copy.

In this order: the command line's options, the result budget, a token bucket, a TTL cache, a path sandbox,
a server that checks, bounds and records every tool call, serving it over HTTP, and the command line. Nothing here
knows about files, databases or HTTP APIs as such, and nothing is imported that one of the servers does not need.
"""

# ruff: noqa: E402 - the garbage collector is stopped before the SDK is imported, so imports come after it

import gc

# Importing the SDK makes 120,000 objects that all stay; looking for garbage among them is a sixth of the start-up.
gc.disable()

import argparse
import asyncio
import errno
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import os
import re
import signal
import socket
import stat
import sys
import time
import weakref
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar, cast

import anyio
import anyio.to_thread
from mcp.server import MCPServer
from mcp.server.lowlevel.helper_types import ReadResourceContents
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ResourceError, ToolError, UnexpectedToolError
from mcp.server.stdio import stdio_server
from mcp.shared.message import SessionMessage
from mcp_types import CallToolResult, InputRequiredResult, TextContent, Tool, ToolAnnotations
from mcp_types.jsonrpc import jsonrpc_message_adapter
from pydantic import AnyUrl, ValidationError

gc.freeze()
gc.enable()

__version__ = "0.1.0"

# ---------------------------------------------------------------------------------------------- limits and options

T = TypeVar("T")

MAX_OUTPUT = 40_000  # characters: about 10,000 tokens, below the 25,000 at which clients cut a result themselves
MAX_MESSAGE = 1 << 27  # bytes of one message: a text of 10 MB takes six times that in JSON at worst
TIME_LIMIT = 30.0  # seconds a tool may run; clients drop results at 60
MAX_AUDIT_VALUE = 200  # characters of one argument kept in an audit line, and items of one list or object
MAX_AUDIT_DEPTH = 20  # levels of an argument kept in an audit line

READ_ONLY = ToolAnnotations(read_only_hint=True, open_world_hint=False)


class ConfigError(Exception):
    """A mistake in how the server was started: reported as one line on stderr, exit code 2."""


@dataclass(frozen=True)
class Options:
    """What every server can be started with: `max_output` in characters (0 = no limit), `rate_limit` as calls per
    seconds, `audit_log` as the file to append to."""

    max_output: int = MAX_OUTPUT
    rate_limit: tuple[int, float] | None = None
    audit_log: Path | None = None


# ------------------------------------------------------------------------------------------------- result budget


def trailer(*facts: str, **resume: object) -> str:
    """The last line of a result that was cut: what is missing, and the exact arguments that continue.

    >>> trailer("lines 1-812 of 2310 shown", offset=812)
    '[lines 1-812 of 2310 shown; continue with offset=812]'
    """
    arguments = " ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in resume.items())
    return "[" + "; ".join([*facts, f"continue with {arguments}"] if resume else facts) + "]"


def page(
    items: Iterable[T],
    noun: str,
    *,
    max_output: int,
    offset: int = 0,
    limit: int | None = None,
    render: Callable[[T], str] = str,
    notes: Callable[[], Sequence[str]] = tuple[str, ...],
) -> str:
    """The items from `offset` on, one a line, as many as fit in `max_output` characters and `limit` items.

    A trailer says what was cut. `items` may be lazy: it is read no further than the page needs, and its total is then
    not told. `notes` is asked at the end for what else the reader must know, such as what was skipped. Raises
    ToolError for an offset past the end.
    """
    lines: list[str] = []
    used, seen, more = 0, 0, False
    for item in items:
        seen += 1
        if seen <= offset:
            continue
        line = "" if len(lines) == limit else render(item)
        # The first line is always shown, however long: a page that shows nothing could not be continued.
        if lines and (len(lines) == limit or (max_output and used + len(line) >= max_output)):
            more = True
            break
        lines.append(line)
        used += len(line) + 1
    if offset and not lines:
        raise ToolError(f"offset={offset} is past the end: there are {seen} {noun}; use a smaller offset")
    facts, end = list(notes()), offset + len(lines)
    if more:
        total = f" of {len(items)}" if isinstance(items, Sized) else ""
        facts.insert(0, f"{noun} {offset + 1}-{end}{total} shown")
    elif not lines:
        facts.insert(0, f"no {noun}")
    if facts:
        lines.append(trailer(*facts, **({"offset": end} if more else {})))
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------- token bucket


class TokenBucket:
    """A rate limiter: `capacity` tokens at most, `refill_rate` new ones a second, one token a call.

    A waiting caller takes its token at once, before it is there: `tokens` goes below zero and the next caller waits
    behind it, so callers are served in order. Algorithm: https://en.wikipedia.org/wiki/Token_bucket.
    """

    def __init__(
        self,
        capacity: float,
        refill_rate: float,
        *,
        timer: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if capacity < 1 or refill_rate <= 0:
            raise ValueError("capacity must be at least 1 and refill_rate above 0")
        self.capacity = capacity
        self.refill_rate = refill_rate
        self._timer = timer
        self._sleep = sleep
        self._tokens = float(capacity)
        self._updated = timer()

    @property
    def tokens(self) -> float:
        """How many tokens there are now; below zero while callers wait."""
        now = self._timer()
        self._tokens = min(self.capacity, self._tokens + (now - self._updated) * self.refill_rate)
        self._updated = now
        return self._tokens

    def try_acquire(self) -> float:
        """Take a token and return 0.0, or take nothing and return the seconds until there is one."""
        tokens = self.tokens
        if tokens < 1:
            return (1 - tokens) / self.refill_rate
        self._tokens -= 1
        return 0.0

    async def acquire(self, max_wait: float) -> float:
        """Wait up to `max_wait` seconds for a token and return 0.0; or, if that is not enough, take nothing, do not
        wait, and return the seconds it would have taken. A caller cancelled while it waits costs nothing."""
        wait = self.try_acquire()
        if wait == 0.0 or wait > max_wait:
            return wait
        self._tokens -= 1
        try:
            await self._sleep(wait)
        except BaseException:
            self._tokens += 1
            raise
        return 0.0


# ----------------------------------------------------------------------------------------------------- TTL cache

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Entry(Generic[V]):
    """One cached value: its size in bytes, and when it was stored and expires on the cache's timer."""

    value: V
    size: int
    stored: float
    expires: float


class TTLCache(Generic[K, V]):
    """A cache with at most `maxsize` entries and `max_bytes` bytes, each fresh for `ttl` seconds after it was put.

    The least recently used entry goes first. An entry is expired from the very instant `stored + ttl` on; it stays
    readable through `peek` (for revalidation) until it is evicted, replaced, or removed by `expire`.
    """

    def __init__(
        self,
        maxsize: int,
        ttl: float,
        *,
        max_bytes: int | None = None,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self.maxsize = maxsize
        self.ttl = ttl
        self.max_bytes = max_bytes
        self.timer = timer
        self.currsize = 0
        self.hits = 0
        self.misses = 0
        self._entries: dict[K, Entry[V]] = {}  # in order of use, the oldest first

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        """The fresh value, or None; counts a hit or a miss."""
        entry = self._entries.get(key)
        if entry is None or self.timer() >= entry.expires:
            self.misses += 1
            return None
        self.hits += 1
        self._entries[key] = self._entries.pop(key)
        return entry.value

    def peek(self, key: K) -> Entry[V] | None:
        """The entry as it is stored, expired or not; counts nothing and is no use."""
        return self._entries.get(key)

    def put(self, key: K, value: V, *, ttl: float | None = None, size: int = 0) -> None:
        """Store a value of `size` bytes; one that is larger than the whole cache is not kept."""
        self.discard(key)
        if self.max_bytes is not None and size > self.max_bytes:
            return
        now = self.timer()
        self._entries[key] = Entry(value, size, now, now + (self.ttl if ttl is None else ttl))
        self.currsize += size
        while len(self._entries) > self.maxsize or (self.max_bytes is not None and self.currsize > self.max_bytes):
            self.discard(next(iter(self._entries)))

    def discard(self, key: K) -> None:
        """Remove an entry if it is there."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.currsize -= entry.size

    def expire(self) -> None:
        """Remove every entry that is no longer fresh."""
        now = self.timer()
        for key in [key for key, entry in self._entries.items() if now >= entry.expires]:
            self.discard(key)

    def clear(self) -> None:
        """Remove everything; the counters stay."""
        self._entries.clear()
        self.currsize = 0


# -------------------------------------------------------------------------------------------------- path sandbox
#
# Resolving a path and then opening it by name is a race: between the two, another process can put a symlink where
# a directory was. So a path is resolved only to learn where it leads; what is opened is reached from the root's
# descriptor, one component at a time, and no component may be a symlink. A swap makes the call fail, never leak.

HAS_DIR_FD = os.open in os.supports_dir_fd and os.stat in os.supports_dir_fd and os.scandir in os.supports_fd
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | _NOFOLLOW
# Passing through a directory needs no right to list it; O_PATH (Linux) asks for none.
_PASS = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0) | _NOFOLLOW
# Without O_NONBLOCK, opening a FIFO waits for a writer, for ever; without O_NOCTTY a terminal can become ours.
_FILE = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0) | _NOFOLLOW

MAX_PATH = 16_384  # characters of a path as it is shown, as every message and every found path repeats it

Handle = int | str
"""An open directory: a descriptor, or (Windows) its path, which is checked again after every open."""


def open_at(parent: Handle, name: str, flags: int = 0, mode: int = 0o666) -> int:
    """Open `name`, one component, in the directory `parent`, never through a symlink. Raises OSError."""
    if isinstance(parent, int):
        return os.open(name, _FILE | flags, mode, dir_fd=parent)
    path = os.path.join(parent, name)
    fd = os.open(path, _FILE | flags, mode)
    if os.path.realpath(path) != path:  # Windows has no O_NOFOLLOW: refuse after the fact what it would have refused
        os.close(fd)
        raise OSError(errno.ELOOP, "replaced by a link")
    return fd


def open_file_at(parent: Handle, name: str) -> tuple[int, os.stat_result]:
    """Open a regular file for reading; a FIFO, socket or device is refused, so no read can hang. Raises OSError."""
    fd = open_at(parent, name)
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        os.close(fd)
        raise OSError(errno.EISDIR if stat.S_ISDIR(info.st_mode) else errno.ENXIO, "not a regular file")
    return fd, info


def open_directory_at(parent: Handle, name: str, flags: int = _DIRECTORY) -> Handle:
    """Open the subdirectory `name`, never through a symlink; the caller closes it. Raises OSError."""
    if isinstance(parent, int):
        return os.open(name, flags, dir_fd=parent)
    path = os.path.join(parent, name)
    if os.path.realpath(path) != path:
        raise OSError(errno.ELOOP, "replaced by a link")
    if not os.path.isdir(path):
        raise OSError(errno.ENOTDIR, "not a directory")
    return path


def _at(parent: Handle, name: str) -> tuple[str, int | None]:
    """A name in a directory as the path and the `dir_fd` that the functions of `os` take."""
    return (name, parent) if isinstance(parent, int) else (os.path.join(parent, name), None)


def stat_at(parent: Handle, name: str) -> os.stat_result:
    """`lstat` of `name` in the directory `parent`. Raises OSError."""
    path, dir_fd = _at(parent, name)
    return os.stat(path, dir_fd=dir_fd, follow_symlinks=False)


def writable_at(parent: Handle, name: str) -> bool:
    """Whether the system would let this process write the file in place."""
    path, dir_fd = _at(parent, name)
    return os.access(path, os.W_OK, dir_fd=dir_fd, effective_ids=os.access in os.supports_effective_ids)


def make_directory_at(parent: Handle, name: str) -> None:
    """Make the subdirectory `name`. Raises OSError."""
    path, dir_fd = _at(parent, name)
    os.mkdir(path, dir_fd=dir_fd)


def remove_at(parent: Handle, name: str) -> None:
    """Remove the file `name`. Raises OSError."""
    path, dir_fd = _at(parent, name)
    os.unlink(path, dir_fd=dir_fd)


def replace_at(parent: Handle, old: str, new: str) -> None:
    """Rename `old` to `new` in one directory, in place of what is there. Raises OSError."""
    (source, dir_fd), (target, _) = _at(parent, old), _at(parent, new)
    os.replace(source, target, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)


def rename_new_at(parent: Handle, name: str, to: Handle, new: str) -> None:
    """Rename to a name that must not exist. Raises OSError: FileExistsError if it does.

    `rename` replaces what exists. Linux has a call that does not; elsewhere the name is looked at just before.
    """
    if isinstance(parent, int) and isinstance(to, int):
        import ctypes

        renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        no_replace = 1
        if renameat2 and renameat2(parent, os.fsencode(name), to, os.fsencode(new), no_replace) == 0:
            return
        number = ctypes.get_errno() if renameat2 else errno.ENOSYS
        if number not in (errno.ENOSYS, errno.EINVAL):  # these two: the system or the file system does not know it
            raise OSError(number, os.strerror(number))
    try:
        stat_at(to, new)
    except FileNotFoundError:
        pass
    else:
        raise FileExistsError(errno.EEXIST, "exists")
    (source, from_fd), (target, to_fd) = _at(parent, name), _at(to, new)
    os.rename(source, target, src_dir_fd=from_fd, dst_dir_fd=to_fd)


def close_handle(handle: Handle) -> None:
    """Close what `open_directory_at` or `Sandbox.open_directory` returned."""
    if isinstance(handle, int):
        os.close(handle)


_ESCAPED = re.compile(rb"\\x(0[1-9a-f]|1[0-9a-f]|7f|[89a-f][0-9a-f])")


def printable(name: str) -> str:
    r"""A file name as text that can be shown on one line and passed back: bytes that are no UTF-8 and characters
    that do not print become `\xNN`. A raw lone surrogate would end the server, a newline would forge an entry."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else "".join(f"\\x{b:02x}" for b in os.fsencode(c)) for c in name)


def unprintable(shown: str) -> str:
    """The name that `printable` shows as `shown`. Escapes of `.`, `/` and NUL are left alone: nothing to smuggle."""
    if "\\x" not in shown or not shown.isprintable():
        return shown
    return os.fsdecode(_ESCAPED.sub(lambda match: bytes([int(match[1], 16)]), shown.encode()))


@contextmanager
def explained(shown: str) -> Generator[None]:
    """Turns an OSError inside the block into a ToolError that names `shown`, the path as the caller gave it."""
    try:
        yield
    except OSError as exc:
        raise ToolError(describe_os_error(exc, shown)) from None


def describe_os_error(exc: OSError, shown: str) -> str:
    """One sentence for the model. The exception's own text names host paths, so only its number is used."""
    match exc.errno:
        case errno.ENOENT:
            return f"not found: {shown}; list_directory shows what is there"
        case errno.ENOTDIR:
            return f"not a directory: {shown}; use the path of a directory, or read_file for a file"
        case errno.EISDIR:
            return f"{shown} is a directory; use list_directory or directory_tree"
        case errno.EEXIST:
            return f"{shown} exists and is not overwritten; give a new path, below it if it is a directory"
        case errno.ENXIO | errno.ENODEV:
            return f"{shown} is not a regular file (a FIFO, socket or device) and is never opened; choose another"
        case errno.EACCES | errno.EPERM:
            return f"permission denied: {shown}; the server's user has no right to this, choose another path"
        case errno.EXDEV:
            return f"{shown} is on another disk, and files are moved on one disk only; write the file there instead"
        case errno.ELOOP:
            return f"{shown} is a symlink loop, or was replaced by a symlink just now; check it and try again"
        case errno.ENAMETOOLONG:
            return f"a name in the path is too long for the file system: {shown[:80]}…; shorten it"
        case errno.EMFILE | errno.ENFILE:
            return "too many files are open in the server just now; try again in a second"
        case _:
            return f"cannot open or change {shown} ({os.strerror(exc.errno or errno.EIO).lower()}); try another path"


@dataclass(frozen=True)
class Root:
    """One allowed directory: its resolved path, and the handle that everything in it is reached from."""

    path: str
    handle: Handle


@dataclass(frozen=True)
class Located:
    """A path that leads into a root: `parts` below it, free of symlinks when it was resolved; `shown` for messages."""

    root: Root
    parts: tuple[str, ...]
    shown: str

    @property
    def path(self) -> str:
        """The path below the root, with `/`; "" for the root itself."""
        return "/".join(self.parts)


def _walk(root: Handle, parts: Sequence[str], last: int) -> Handle:
    """From a root's handle through `parts`, no symlink anywhere; the last one is opened with the flags `last`."""
    # Not os.dup: a duplicate shares its place in the listing, and two listings at a time would each miss entries.
    handle = os.open(os.curdir, _PASS if parts else last, dir_fd=root) if isinstance(root, int) else root
    for number, part in enumerate(parts, 1):
        try:
            child = open_directory_at(handle, part, last if number == len(parts) else _PASS)
        finally:
            close_handle(handle)
        handle = child
    return handle


class Sandbox:
    """Opens files and directories inside the allowed directories, and nothing else.

    `roots` must exist. Each is held open, so what it is called later does not matter.
    """

    def __init__(self, roots: Iterable[str | Path]) -> None:
        self.roots: list[Root] = []
        for given in roots:
            if given == "":  # a variable that is not set; it would stand for the current directory
                raise ConfigError("an empty name is no directory; name an existing directory")
            path = os.path.realpath(os.path.expanduser(given))
            if not os.path.isdir(path):
                raise ConfigError(f"{given} is not a directory; name an existing directory")
            try:
                handle: Handle = os.open(path, _DIRECTORY) if HAS_DIR_FD else path
            except OSError as exc:
                raise ConfigError(f"{given} cannot be opened: {exc.strerror}; choose another directory") from None
            root = Root(path, handle)
            weakref.finalize(root, close_handle, handle)
            self.roots.append(root)

    def check(self) -> None:
        """Raises OSError when an allowed directory is gone, cannot be listed, or another one has taken its place."""
        for root in self.roots:
            if isinstance(root.handle, int) and not os.path.samestat(os.stat(root.path), os.fstat(root.handle)):
                raise FileNotFoundError(errno.ENOENT, "another directory has taken the place of", root.path)
            with os.scandir(root.path) as entries:
                next(entries, None)

    def resolve(self, untrusted: str, *, follow_last: bool = True) -> Located:
        """Find where a path leads; relative ones are looked up in each root in turn. Raises ToolError if outside.

        `follow_last=False` keeps a symlink in the last component as it is, to look at the link itself.
        """
        if not untrusted or "\0" in untrusted:
            raise ToolError('the path is empty or contains a NUL byte; give a path such as "." or "notes/todo.txt"')
        if len(printable(untrusted)) > MAX_PATH:
            raise ToolError(f"the path is longer than {MAX_PATH} characters; give a shorter one")
        inside: list[Located] = []
        for candidate in dict.fromkeys([untrusted, unprintable(untrusted)]):
            for root in self.roots:
                located = self._locate(os.path.join(root.path, candidate), untrusted, follow_last)
                if located is None:
                    continue
                if os.path.lexists(os.path.join(located.root.path, *located.parts)):
                    return located
                inside.append(located)
        if not inside:  # the same words whether or not anything is there: an error must not tell what exists outside
            raise ToolError(
                f"{printable(untrusted)} is outside the allowed directories; list_allowed_directories names them"
            )
        # What does not exist yet belongs where its directory is.
        homes = [new for new in inside if os.path.isdir(os.path.join(new.root.path, *new.parts[:-1]))]
        return (homes or inside)[0]

    def _locate(self, path: str, untrusted: str, follow_last: bool) -> Located | None:
        try:
            if follow_last:
                real = os.path.realpath(path)
            else:
                parent, name = os.path.split(path.rstrip(os.sep))
                real = os.path.join(os.path.realpath(parent), name)
                if name in ("", os.curdir, os.pardir):
                    real = os.path.realpath(path)
        except (OSError, ValueError):  # ValueError: text that cannot be a file name, such as a lone surrogate
            return None
        for root in self.roots:
            # Comparing with the separator keeps /data out of reach of /data_private's paths, and the reverse.
            if real == root.path or real.startswith(root.path.rstrip(os.sep) + os.sep):
                parts = tuple(real[len(root.path) :].strip(os.sep).split(os.sep)) if real != root.path else ()
                return Located(root, parts, printable(untrusted))
        return None

    def open_directory(self, located: Located) -> Handle:
        """Open a directory for listing; the caller closes it with `close_handle`. Raises ToolError."""
        with explained(located.shown):
            return _walk(located.root.handle, located.parts, _DIRECTORY)

    @contextmanager
    def parent(self, located: Located, *, for_writing: bool = False) -> Generator[tuple[Handle, str]]:
        """The directory that a path is in, open until the end of the block, and the path's name in it ("." for an
        allowed directory itself). An OSError in the block becomes a ToolError."""
        try:
            handle = _walk(located.root.handle, located.parts[:-1], _DIRECTORY if for_writing else _PASS)
        except OSError as exc:
            hint = "; create_directory makes directories" if for_writing else ""
            raise ToolError(describe_os_error(exc, located.shown) + hint) from None
        try:
            with explained(located.shown):
                yield handle, located.parts[-1] if located.parts else os.curdir
        finally:
            close_handle(handle)

    def open_file(self, located: Located) -> tuple[int, os.stat_result]:
        """Open a regular file for reading; the caller closes the descriptor. Raises ToolError."""
        with self.parent(located) as (parent, name):
            return open_file_at(parent, name)

    def stat(self, located: Located) -> os.stat_result:
        """`lstat` of the path. Raises ToolError."""
        with self.parent(located) as (parent, name):
            return stat_at(parent, name)


# ---------------------------------------------------------------------------------------------------- the server

_SECRET_NAME = re.compile(r"pass|secret|token|api[-_]?key|auth|credential|cookie", re.IGNORECASE)


def _for_audit(value: Any, name: str = "", depth: int = 0) -> Any:
    """Arguments as they may be written down: secrets by their name are masked, what is long or deep is cut."""
    if _SECRET_NAME.search(name):
        return "***"
    if isinstance(value, str) and len(value) > MAX_AUDIT_VALUE:
        return f"{value[:MAX_AUDIT_VALUE]}… ({len(value)} characters)"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such number, and who reads the log may not either
    if isinstance(value, Mapping | list) and depth == MAX_AUDIT_DEPTH:
        return "…"  # nested to the interpreter's limit it would end the call here, without a line in the log
    if isinstance(value, Mapping):
        items = islice(cast("Mapping[object, Any]", value).items(), MAX_AUDIT_VALUE)
        return {str(k)[:MAX_AUDIT_VALUE]: _for_audit(v, str(k), depth + 1) for k, v in items}
    if isinstance(value, list):
        return [_for_audit(item, name, depth + 1) for item in cast("list[Any]", value)[:MAX_AUDIT_VALUE]]
    return value


def _slim(schema: Any) -> Any:
    """A JSON schema without what costs the model tokens and tells it nothing: titles, which repeat the names, and the
    longest texts that are accepted, which no honest call comes near."""
    if isinstance(schema, dict):
        items = cast("dict[str, Any]", schema).items()
        return {k: _slim(v) for k, v in items if not (k in ("title", "maxLength") and isinstance(v, str | int))}
    if isinstance(schema, list):
        return [_slim(item) for item in cast("list[Any]", schema)]
    return schema


_audit_facts: ContextVar[dict[str, object]] = ContextVar("_audit_facts")
_caller: ContextVar[str | None] = ContextVar("_caller", default=None)


def audit(**facts: object) -> None:
    """Add facts to the audit line of the tool call that is running, such as what a write changed."""
    _audit_facts.get({}).update(facts)


def in_thread_of_its_own(check: Callable[[], object]) -> Callable[[], Awaitable[None]]:
    """`check` as the `health` of a Server. One check runs at a time, on no thread of the tools': those of a file system
    that hangs must not use them up."""
    limiter = anyio.CapacityLimiter(1)

    async def health() -> None:
        await anyio.to_thread.run_sync(check, abandon_on_cancel=True, limiter=limiter)

    return health


def caller() -> str | None:
    """Who made the tool call that is running: over HTTP the short hash of their token, or "" if none is needed; None
    over stdio, where it is the person who started the server."""
    return _caller.get()


class Server(MCPServer[Any]):
    """An MCPServer whose tool calls are all checked, bounded in time, and recorded, whatever the tool does.

    Every failure reaches the model as one sentence. `redact` is applied to all text that leaves the server. `health`
    raises when what the server serves is gone.
    """

    def __init__(
        self,
        name: str,
        instructions: str,
        options: Options,
        *,
        redact: Callable[[str], str] = str,
        lifespan: Any = None,
        health: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        # At the SDK's default, INFO, every refused call would add a line to the client's log file.
        super().__init__(name, instructions=instructions, version=__version__, log_level="WARNING", lifespan=lifespan)
        if "opentelemetry.sdk" not in sys.modules:  # spans that nobody collects would be a tenth of a small call
            self.middleware[:] = [m for m in self.middleware if type(m).__name__ != "OpenTelemetryMiddleware"]
        self.options = options
        self._redact = redact
        self._tools: dict[str, Tool] = {}  # as they are listed; made at the first need
        self.health = health
        self.variables: Sequence[str] = ()  # names of environment variables without which it does not start
        self._buckets: dict[str, TokenBucket] = {}  # one for each caller
        self._audit_fd: int | None = None
        if options.audit_log is not None:
            try:
                # Without O_NONBLOCK, opening a FIFO waits for a reader.
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NONBLOCK", 0)
                self._audit_fd = os.open(options.audit_log, flags, 0o600)
            except OSError as exc:
                raise ConfigError(f"cannot write the audit log {options.audit_log}: {exc.strerror}") from None
            weakref.finalize(self, os.close, self._audit_fd)

    def add_tool(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """As in MCPServer; a docstring written over several lines is sent to the model as one."""
        kwargs["description"] = kwargs.get("description") or " ".join((fn.__doc__ or "").split())
        super().add_tool(fn, *args, **kwargs)

    async def serve_streams(self, received: Any, to_send: Any) -> None:
        """Serve one client over a pair of message streams, until the client hangs up."""
        await self._lowlevel_server.run(received, to_send, self._lowlevel_server.create_initialization_options())

    async def list_tools(self) -> list[Tool]:
        """The tools, in the order in which they were added."""
        if not self._tools:
            for tool in await super().list_tools():
                output: dict[str, Any] | None = _slim(tool.output_schema)
                if output:
                    output.pop("description", None)  # the result model's docstring
                slim = {"input_schema": _slim(tool.input_schema), "output_schema": output}
                self._tools[tool.name] = tool.model_copy(update=slim)
        return list(self._tools.values())

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[Any, Any] | None = None
    ) -> CallToolResult:
        """Run one tool within the time limit. Raises ToolError with one sentence that says what to do next."""
        started = time.perf_counter()
        facts: dict[str, object] = {"outcome": "cancelled", "ms": 0.0, "bytes": 0}
        facts |= {"token": caller()} if caller() else {}
        _audit_facts.set(facts)  # worker threads see the same dict
        try:
            await self._refuse_bad_call(name, arguments)
            async with asyncio.timeout(TIME_LIMIT):
                result = cast("CallToolResult", await super().call_tool(name, arguments, context))
            facts |= {"outcome": "error" if result.is_error else "ok", "bytes": self._clean(result)}
            return result
        except TimeoutError:
            facts["outcome"] = "timeout"
            raise ToolError(f"{name} did not finish within {TIME_LIMIT:g} s; ask for less, or for a part") from None
        except ToolError as exc:
            message, size = self._clean_text(self._sentence(name, exc))
            facts |= {"outcome": "error", "bytes": size}
            raise (UnexpectedToolError if isinstance(exc, UnexpectedToolError) else ToolError)(message) from (
                exc.__cause__ if isinstance(exc, UnexpectedToolError) else None
            )
        finally:
            facts["ms"] = round((time.perf_counter() - started) * 1000, 1)
            self._audit(name, arguments, facts)

    async def read_resource(
        self, uri: AnyUrl | str, context: Context[Any, Any] | None = None
    ) -> Iterable[ReadResourceContents] | InputRequiredResult:
        """Read one resource, limited and recorded like a tool call. Raises ResourceError."""
        return await self.recorded("resources/read", {"uri": str(uri)}, partial(super().read_resource, uri, context))

    async def recorded(self, name: str, arguments: dict[str, Any], read: Callable[[], Awaitable[T]]) -> T:
        """Do what a client asks for besides tools, within the rate and the time limit. Raises ResourceError."""
        started = time.perf_counter()
        facts: dict[str, object] = {"outcome": "error", "ms": 0.0}
        facts |= {"token": caller()} if caller() else {}
        try:
            self._take_token()
            async with asyncio.timeout(TIME_LIMIT):
                result = await read()
            facts["outcome"] = "ok"
            return result
        except TimeoutError:
            facts["outcome"] = "timeout"
            raise ResourceError(f"{name} did not finish within {TIME_LIMIT:g} s; try again later") from None
        except ToolError as exc:
            raise ResourceError(str(exc)) from None
        except asyncio.CancelledError:
            facts["outcome"] = "cancelled"
            raise
        finally:
            facts["ms"] = round((time.perf_counter() - started) * 1000, 1)
            self._audit(name, arguments, facts)

    async def _refuse_bad_call(self, name: str, arguments: dict[str, Any]) -> None:
        await self.list_tools()
        if name not in self._tools:
            raise ToolError(f"unknown tool: {name}; this server has {', '.join(self._tools)}")
        # The SDK drops a misspelt argument without a word, and the model believes that it had an effect.
        valid = self._tools[name].input_schema.get("properties", {})
        for argument in arguments:
            if argument not in valid:
                takes = ", ".join(valid) or "no arguments"
                raise ToolError(f"unknown argument: {argument}; {name} takes {takes}")
        self._take_token()

    def _take_token(self) -> None:
        if self.options.rate_limit is None:
            return
        calls, seconds = self.options.rate_limit
        # One caller who uses up the limit must not lock out the others.
        who = caller() or ""
        if who not in self._buckets:
            self._buckets[who] = TokenBucket(calls, calls / seconds)
        bucket = self._buckets[who]
        if wait := bucket.try_acquire():
            raise ToolError(
                f"rate limit reached: {bucket.capacity:g} calls at once, {bucket.refill_rate:g} a second; "
                f"try again in {wait:.1f} s"
            )

    def _sentence(self, name: str, exc: ToolError) -> str:
        if isinstance(exc, UnexpectedToolError):
            return f"{name} failed inside the server; the reason is in the server's log, try other arguments"
        if isinstance(exc.__cause__, ValidationError):
            problems = [
                f"{'.'.join(str(part) for part in error['loc'])}: {error['msg'][:1].lower()}{error['msg'][1:]}"
                + (f" (got {str(error['input'])[:60]!r})" if error["type"] != "missing" else "")
                for error in exc.__cause__.errors(include_url=False)
            ]
            return f"{'; '.join(problems)}; correct the arguments of {name} and call it again"
        return str(exc).removeprefix(f"Error executing tool {name}: ")

    def mask(self, secrets: Sequence[str]) -> None:
        """Also keep these texts out of everything that leaves the server."""
        redact = self._redact

        def redact_more(text: str) -> str:
            text = redact(text)
            for secret in secrets:
                text = text.replace(secret, "***")
            return text

        self._redact = redact_more

    def _clean_text(self, text: str) -> tuple[str, int]:
        """Text that may leave: secrets masked, and no lone surrogate, which cannot be sent; and its size in bytes."""
        text = self._redact(text)
        if text.isascii():  # known at once, while encoding a large text takes as long as reading it
            return text, len(text)
        try:
            return text, len(text.encode())
        except UnicodeEncodeError:
            data = text.encode("utf-8", "backslashreplace")
            return data.decode(), len(data)

    def _clean(self, result: CallToolResult) -> int:
        """Make a result fit to be sent; returns its size in bytes."""
        size = 0
        if result.structured_content is not None:
            # The SDK's text copy of a structured result is indented JSON: half of it is white space.
            text = json.dumps(result.structured_content, ensure_ascii=False, separators=(",", ":"))
            text, size = self._clean_text(text)
            result.structured_content = json.loads(text)
            result.content = [TextContent(type="text", text=text)]
            return size
        for block in result.content:
            if isinstance(block, TextContent):
                block.text, length = self._clean_text(block.text)
                size += length
        return size

    def _audit(self, name: str, arguments: dict[str, Any], facts: dict[str, object]) -> None:
        if self._audit_fd is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "tool": name, "arguments": _for_audit(arguments)} | facts
        try:
            os.write(self._audit_fd, self._redact(json.dumps(line)).encode() + b"\n")
        except OSError:
            logging.getLogger(__name__).error("the audit log cannot be written")


# ---------------------------------------------------------------------------------------------------------- HTTP
#
# Streamable HTTP, without sessions: each request stands alone, so any replica can answer it. The SDK's application
# speaks the protocol and checks Host and Origin, uvicorn serves it; here is who may call, and how long all may take.

MAX_BODY = 4 * 1024 * 1024  # bytes of a request; larger files than that are not written by a model
ARRIVAL_TIME = 15.0  # seconds for a request to arrive whole
ANSWER_TIME = 45.0  # seconds after that to answer it: a tool's 30, and time to send the result
IDLE_TIME = 75.0  # seconds an idle connection stays: clients and proxies would send into one that is closed earlier
DRAIN_TIME = 10  # seconds that calls in flight may still take after SIGTERM
HEALTH_TIME = 5.0  # seconds until a resource that does not answer counts as gone
MAX_CONNECTIONS = 1_000  # or half of the files that the process may open: the rest is for those that calls open
MIN_TOKEN = 32  # characters: such a token cannot be guessed, and its short hash in the audit log tells nothing

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def read_tokens(text: str | None) -> list[str]:
    """The bearer tokens in MCP_AUTH_TOKEN: several, with commas between, while one replaces another."""
    if text is None:
        return []
    tokens = [token.strip() for token in text.split(",")]
    for number, token in enumerate(tokens, 1):
        # A secret that is mounted empty or was cut must not leave the server open, or open to guessing.
        if len(token) < MIN_TOKEN or not re.fullmatch(r"[\w.~+/-]+=*", token, re.ASCII):
            raise ConfigError(
                f"MCP_AUTH_TOKEN: token {number} is no token of {MIN_TOKEN} or more letters, digits and -._~+/= (it has"
                f" {len(token)} characters); make one with `openssl rand -hex 32`, and put commas between several"
            )
    return tokens


def listen(host: str, port: int, *, public: bool) -> list[socket.socket]:
    """Sockets on all addresses of a host. Raises ConfigError, also for an address that is not loopback, if the server
    is not to be `public`."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # What is asked is where the name leads, not how it is spelt: 0, 127.1 and localhost are names as well.
        if not public and not all(ipaddress.ip_address(str(info[4][0])).is_loopback for info in found):
            raise ConfigError(
                f"{host} can be reached from other machines: set MCP_AUTH_TOKEN to a token of {MIN_TOKEN} or more"
                " characters that clients must send, or leave the host out to serve this machine only"
            )
        for family, _, _, _, address in found:
            try:
                sockets.append(socket.create_server((address[0], port), family=family))
            except OSError as exc:
                # A machine without IPv6 still has the name ::1 for localhost.
                if exc.errno != errno.EADDRNOTAVAIL or (not sockets and address is found[-1][4]):
                    raise
            port = port or sockets[-1].getsockname()[1]
    except (OSError, UnicodeError) as exc:
        for bound in sockets:
            bound.close()
        raise ConfigError(f"cannot listen on {host}, port {port}: {getattr(exc, 'strerror', exc)}") from None
    return sockets


class Gate:
    """The outermost ASGI application: /health for everybody, and /mcp for who has a token."""

    def __init__(self, app: Any, server: Server, tokens: Sequence[str]) -> None:
        self.app = app
        self.server = server
        # Digests, so that comparing takes the same time for a token of any length.
        self.tokens = [hashlib.sha256(token.encode()).digest() for token in tokens]
        self._health: TTLCache[str, bool] = TTLCache(1, ttl=0.1)
        self._checking = anyio.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: D102 - ASGI's own signature
        from starlette.responses import JSONResponse, PlainTextResponse

        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        caller = self._authenticate(scope["headers"])
        if scope["path"] == "/health":
            healthy = await self._is_healthy()
            answer = JSONResponse({"status": "ok" if healthy else "unavailable"}, 200 if healthy else 503)
        elif caller is None:
            answer = JSONResponse(
                {"error": "invalid_token", "error_description": "send the header Authorization: Bearer TOKEN"},
                401,
                {"WWW-Authenticate": f'Bearer realm="{self.server.name}", error="invalid_token"'},
            )
        elif scope["path"] != "/mcp":
            # The SDK's router would lead /mcp/ to the Host header's name: to another machine, or from https to http.
            answer = PlainTextResponse("nothing is served here; send requests to /mcp", 404)
        elif scope["method"] != "POST":
            # Without sessions there is nothing to GET or DELETE; a stream of no events would only hold up the end.
            answer = PlainTextResponse("this server has no sessions; send requests with POST", 405, {"Allow": "POST"})
        else:
            _caller.set(caller)
            return await self._call(scope, receive, send)
        return await answer(scope, receive, send)

    def _authenticate(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """The short hash of the caller's token, "" if none is needed, None if it is not valid."""
        if not self.tokens:
            return ""
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        digest = hashlib.sha256(token.strip()).digest()
        # Comparing with == takes longer the more is right, and stopping at a match tells which one it is.
        found = [hmac.compare_digest(digest, known) for known in self.tokens]
        return f"sha256:{digest.hex()[:8]}" if scheme.lower() == b"bearer" and any(found) else None

    async def _is_healthy(self) -> bool:
        """Whether the resource answers. It is asked ten times a second at most: anybody may ask for /health."""
        async with self._checking:
            healthy = self._health.get("")
            if healthy is None:
                healthy = True
                try:
                    with anyio.fail_after(HEALTH_TIME):
                        if self.server.health is not None:
                            await self.server.health()
                except Exception as exc:
                    healthy = False
                    logging.getLogger(__name__).warning("/health: %s", str(exc) or type(exc).__name__)
                self._health.put("", healthy)
            return healthy

    async def _call(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle a request, and stop its work when the client hangs up: nobody else could cancel it."""
        arrived = anyio.Event()

        async def receive_request() -> Any:
            message = await receive()
            if not message.get("more_body"):
                arrived.set()
            return message

        async def stop_when_hung_up() -> None:
            await arrived.wait()
            while (await receive())["type"] != "http.disconnect":
                pass
            tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stop_when_hung_up)
            await self.app(scope, receive_request, send)
            tasks.cancel_scope.cancel()


def _connection_limit() -> int:
    if sys.platform == "win32":
        return MAX_CONNECTIONS
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if files == resource.RLIM_INFINITY else max(32, min(MAX_CONNECTIONS, files // 2))


def _impatient_protocol() -> type[asyncio.Protocol]:
    """uvicorn's HTTP/1.1 with an end to waiting, and to connections. It has none for a request that never arrives whole
    nor for an answer that is never taken: a thousand such connections would use up the descriptors, and the server."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    limit = _connection_limit()
    connections: dict[Any, None] = {}  # the oldest first

    class ImpatientProtocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            # The body is written after the headers, and without this it waits for an acknowledgement: 40 ms a call.
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            cast("Any", transport).max_size = 16_384  # bytes read, and parsed, before others have their turn
            self._timer = self.loop.call_later(ARRIVAL_TIME, self._give_up, False)
            connections[self] = None
            if len(connections) > limit:  # a client needs its connection for milliseconds, an attacker keeps it
                oldest = next(connection for connection in connections if not connection.in_call())
                del connections[oldest]
                oldest.transport.abort()

        def in_call(self) -> bool:
            """Whether a request has arrived whole and is not answered yet."""
            cycle: Any = self.cycle
            return bool(cycle) and not cycle.more_body and not cycle.response_complete

        def data_received(self, data: bytes) -> None:
            if self.timeout_keep_alive_task:  # idle until now
                self._wait(ARRIVAL_TIME)
            super().data_received(data)
            # What still comes of a request that was refused is parsed and dropped. One-byte chunks take so long to
            # parse that two such connections without a token would make everybody else wait for seconds.
            cycle: Any = self.cycle
            refused = cycle and cycle.response_complete and self.conn.their_state is h11.SEND_BODY
            if refused and any(name == b"transfer-encoding" for name, _ in self.headers):
                self.transport.abort()

        def _wait(self, seconds: float) -> None:
            self._timer.cancel()
            self._timer = self.loop.call_later(seconds, self._give_up, False)

        def on_response_complete(self) -> None:
            self._wait(IDLE_TIME)
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            connections.pop(self, None)
            super().connection_lost(exc)

        def shutdown(self) -> None:
            super().shutdown()
            if not self.in_call():  # a request that is still arriving is a new one
                self.transport.close()

        def _give_up(self, answering: bool) -> None:
            if self.in_call() and not answering:
                self._timer = self.loop.call_later(ANSWER_TIME, self._give_up, True)
            else:
                self.transport.abort()

    return ImpatientProtocol


def _url(bound: socket.socket) -> str:
    """Where clients find a bound socket: under the name of this machine's own, if it is bound to all addresses."""
    host, port = bound.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _serve_http(server: Server, sockets: list[socket.socket], hosts: Sequence[str], tokens: list[str]) -> None:
    import uvicorn
    from mcp.server.transport_security import TransportSecuritySettings

    # A web page in somebody's browser can send requests here, and make its own name lead here (DNS rebinding).
    # Its Host or Origin header gives it away: only names that are known to be this server's are answered.
    known = dict.fromkeys([*LOOPBACK, *hosts])
    names = [name for host in known for name in ([host] if _PORT.search(host) else [host, f"{host}:*"])]
    security = TransportSecuritySettings(
        allowed_hosts=names, allowed_origins=[f"{scheme}://{name}" for name in names for scheme in ("http", "https")]
    )
    server.mask(tokens)
    app = server.streamable_http_app(
        json_response=True, stateless_http=True, max_request_body_size=MAX_BODY, transport_security=security
    )
    config = uvicorn.Config(
        cast("Any", Gate(app, server, tokens)),
        http=_impatient_protocol(),
        ws="none",
        # So many are accepted in one go, and three times more before the oldest ones for which they came are closed.
        backlog=_connection_limit() // 8,
        timeout_keep_alive=int(IDLE_TIME),
        log_config=None,
        log_level="error",
        access_log=False,  # it would write down whatever a caller puts into a path; the audit log tells who did what
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_TIME,
    )
    url = _url(sockets[0])
    print(
        f"{server.name} {__version__}: {server.instructions}\n"
        f"Serving {url}/mcp ({'a token is' if tokens else 'no token'} needed) and {url}/health to clients that call it"
        f" {', '.join(known)}; --allowed-host adds a name.",
        file=sys.stderr,
        flush=True,
    )

    def end(*_: object) -> None:
        os._exit(0)  # as over stdio: a worker thread that is stuck must not keep the process alive

    class PromptServer(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(DRAIN_TIME + 1, end)
            await super().shutdown(sockets)

    # uvicorn waits for the calls in flight, and then raises the signal again, for the handler that was there before.
    signal.signal(signal.SIGTERM, end)
    await PromptServer(config).serve(sockets)


# -------------------------------------------------------------------------------------------------- command line


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.splitlines())} (--help shows the usage)\n")


def argument_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options that all servers share; the caller adds its own."""
    parser = _OneLineParser(prog=name, description=description, allow_abbrev=False)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--call", nargs="+", metavar=("TOOL", "name=value"), help="run one tool, print its result, and exit"
    )
    instead.add_argument("--list-tools", action="store_true", help="print the tools with their parameters, and exit")
    instead.add_argument(
        "--http",
        type=_address,
        metavar="[HOST:]PORT",
        help="serve Streamable HTTP instead of stdio, to this machine only if no host is given; to others only with a"
        " token in MCP_AUTH_TOKEN, which clients must send",
    )
    parser.add_argument(
        "--allowed-host",
        type=_host,
        action="append",
        default=[],
        metavar="NAME[:PORT]",
        help="a name that clients call this server by, in the Host and Origin headers (with --http)",
    )
    parser.add_argument("--audit-log", type=Path, metavar="FILE", help="append one JSON line a call to FILE")
    parser.add_argument(
        "--max-output",
        type=_not_negative,
        default=MAX_OUTPUT,
        metavar="CHARS",
        help="characters in a result at most, 0 = no limit (default: %(default)s)",
    )
    parser.add_argument("--rate-limit", type=_rate, metavar="CALLS/SECONDS", help="refuse calls above this rate")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def _not_negative(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


_PORT = re.compile(r":\d+\Z")


def _host(text: str) -> str:
    if not re.fullmatch(r"([a-z0-9._-]+|\[[0-9a-f:.]+\])(:\d+)?", text.lower()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a host name, such as mcp.example.com")
    return text.lower()


def _address(text: str) -> tuple[str, int]:
    host, separator, port = text.rpartition(":")
    brackets = host.startswith("[") and host.endswith("]")
    valid = port.isascii() and port.isdigit() and int(port) <= 65_535 and bool(host) == bool(separator)
    if not valid or (":" in host and not brackets):
        raise argparse.ArgumentTypeError(f"{text!r} is not [HOST:]PORT, such as 8000, 0.0.0.0:8000 or [::1]:8000")
    return (host[1:-1] if brackets else host) or "127.0.0.1", int(port)


def _own_name(host: str) -> list[str]:
    """The Host header of clients that use the address that is served; 0.0.0.0 and :: are no such address."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return [host.lower()]
    return [] if address.is_unspecified else [f"[{address}]" if address.version == 6 else str(address)]


def _rate(text: str) -> tuple[int, float]:
    with suppress(ValueError, ZeroDivisionError):
        calls, seconds = text.split("/")
        if int(calls) >= 1 and 0 < int(calls) / float(seconds) < float("inf"):
            return int(calls), float(seconds)
    raise argparse.ArgumentTypeError(f"{text!r} is not CALLS/SECONDS, such as 60/60")


def serve(parser: argparse.ArgumentParser, build: Callable[[argparse.Namespace, Options], Server]) -> None:
    """Read the command line, build the server, and do what was asked: serve over stdio, or run one tool."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed: the next file that is opened would take its place
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(number, "r+", closefd=False))  # noqa: SIM115 - for as long as the process lives
    args = parser.parse_args()
    try:
        if args.allowed_host and not args.http:
            raise ConfigError("--allowed-host is for --http only; leave it out, or add --http PORT")
        tokens = read_tokens(os.environ.get("MCP_AUTH_TOKEN")) if args.http else []
        server = build(args, Options(args.max_output, args.rate_limit, args.audit_log))
        sockets = listen(*args.http, public=bool(tokens)) if args.http else []
    except ConfigError as exc:
        parser.error(str(exc))
    # Ctrl-C ends the process at once; Python's own handler would wait for the thread that reads stdin.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if args.list_tools:
        anyio.run(_print_tools, server)
    elif args.call:
        sys.exit(anyio.run(_call_once, parser, server, args.call))
    elif args.http:
        anyio.run(_serve_http, server, sockets, [*_own_name(args.http[0]), *args.allowed_host], tokens)
    else:
        if sys.stdin.isatty():
            _greet(server, parser.prog)
        anyio.run(_serve_stdio, server)


class _Pipes:
    """Stdin and stdout as the two message streams that a server is run over, both in one object.

    Served on the event loop itself. The SDK's transport moves every line through worker threads, and every message
    through two more queues: that is more than half of what a small call costs.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._turn = asyncio.Lock()

    @classmethod
    async def open(cls) -> "_Pipes | None":
        """None where the event loop cannot wait for them (a file, a terminal, Windows): the SDK's has to do."""
        ends = [os.fstat(0), os.fstat(1)]
        if sys.platform == "win32" or not all(stat.S_ISFIFO(end.st_mode) or stat.S_ISSOCK(end.st_mode) for end in ends):
            return None
        if os.path.samestat(*ends):  # one socket for both ways: asyncio would take what comes in for a hang-up
            return None
        # The protocol moves to descriptors of its own, so that a stray print, or a child process, cannot write into it.
        stdin, stdout = os.fdopen(os.dup(0), "rb", buffering=0), os.fdopen(os.dup(1), "wb", buffering=0)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        os.dup2(2, 1)
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=MAX_MESSAGE)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), stdin)
        sink, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, stdout)
        sink.set_write_buffer_limits(high=0)  # drain returns when all is written, not when the rest is small
        return cls(reader, asyncio.StreamWriter(sink, protocol, None, loop))

    async def send(self, message: SessionMessage) -> None:
        async with self._turn:  # large results wait as they are, not as bytes in a buffer besides
            line = jsonrpc_message_adapter.dump_json(message.message, by_alias=True, exclude_unset=True)
            self._writer.write(line + b"\n")
            with suppress(ConnectionError):  # the client has gone; the end of stdin will say so
                await self._writer.drain()

    def __aiter__(self) -> "_Pipes":
        return self

    async def __anext__(self) -> SessionMessage | Exception:
        try:
            line = await self._reader.readline()
            if line:
                return SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
        except ValueError as exc:  # no message of the protocol, or longer than MAX_MESSAGE
            return exc
        raise StopAsyncIteration

    async def __aenter__(self) -> "_Pipes":
        return self

    async def __aexit__(self, *exc: object) -> None:
        pass

    async def aclose(self) -> None:
        pass


async def _serve_stdio(server: Server) -> None:
    pipes: Any = await _Pipes.open()
    async with nullcontext((pipes, pipes)) if pipes else stdio_server() as (received, to_send):
        await server.serve_streams(received, to_send)
    # The client has gone. A worker thread that is stuck in a system call must not keep the process alive.
    sys.stderr.flush()
    os._exit(0)


def _greet(server: Server, prog: str) -> None:
    """Tell a person who started the server on a terminal what it is waiting for."""
    script = os.path.abspath(sys.argv[0])
    command = [sys.executable, script] if script.endswith(".py") else [script]
    arguments = [os.path.abspath(a) if os.path.exists(a) else a for a in sys.argv[1:]]
    entry: dict[str, Any] = {"command": command[0], "args": [*command[1:], *arguments]}
    if server.variables:
        entry["env"] = dict.fromkeys(server.variables, "...")
    print(
        f"{server.name} {__version__}: {server.instructions}\n\n"
        f"It speaks MCP on stdin and stdout and is meant to be started by a client. For Claude Desktop, put this into"
        f" claude_desktop_config.json:\n\n{json.dumps({'mcpServers': {prog: entry}}, indent=2)}\n\n"
        f"To try a tool without a client: --list-tools, then --call TOOL name=value. Waiting; Ctrl-C ends.",
        file=sys.stderr,
    )


def _end_with_reader() -> None:
    """From now on, end without a traceback when whoever reads what is printed, such as `head`, has had enough."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


async def _print_tools(server: Server) -> None:
    _end_with_reader()
    for tool in await server.list_tools():
        required = tool.input_schema.get("required", [])
        print(f"{tool.name}: {tool.description}")
        for name, schema in tool.input_schema.get("properties", {}).items():
            default = "required" if name in required else f"default {json.dumps(schema.get('default'))}"
            print(f"    {name} ({default}): {schema.get('description', '')}")


async def _call_once(parser: argparse.ArgumentParser, server: Server, words: list[str]) -> int:
    """Run one tool through an in-memory client and print the result; returns the exit code."""
    from mcp import Client

    tool, *pairs = words
    tools = {t.name: t.input_schema.get("properties", {}) for t in await server.list_tools()}
    if tool not in tools:
        parser.error(f"unknown tool: {tool}; this server has {', '.join(tools)}")
    arguments: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator:
            parser.error(f"{pair!r} is not name=value; put other arguments before --call")
        arguments[name] = text
        # Only a parameter that is text takes the words as they are; for the others they are JSON.
        if tools[tool].get(name, {}).get("type") != "string":
            with suppress(ValueError):
                arguments[name] = json.loads(text)
    async with Client(server) as client:
        result = await client.call_tool(tool, arguments)
    _end_with_reader()
    out = sys.stderr if result.is_error else sys.stdout
    for block in result.content:
        text = block.text if isinstance(block, TextContent) else block.model_dump_json(exclude_none=True)
        out.buffer.write(text.encode("utf-8", "backslashreplace") + b"\n")
    out.flush()
    return int(result.is_error)
