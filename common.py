"""The small parts that people copy first. Each of the four sections stands by itself, and none knows a server.

    result budget     page, trailer       what is cut says so, and how to continue
    token bucket      TokenBucket         how often something may happen
    TTL cache         TTLCache            answers that stay good for a while
    path sandbox      Sandbox, Directory  files inside the allowed directories, and nothing else

Everything that a model may read about a mistake is a `ToolError` of one sentence, which says what to do next.
"""

import asyncio
import errno
import json
import math
import os
import re
import stat
import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from mcp.server.mcpserver.exceptions import ToolError

K = TypeVar("K")
V = TypeVar("V")
Timer = Callable[[], float]
Sleep = Callable[[float], Awaitable[None]]


class ConfigError(Exception):
    """A mistake in how a server was started: reported as one line on stderr, exit code 2."""


# ------------------------------------------------------------------------------------------------- result budget

MIN_SHOWN = 600  # characters of a first item shown however small the page: a cut path could not be passed back


def trailer(*facts: str, **resume: object) -> str:
    """The last line of a result that was cut: what is missing, and the exact arguments that continue.

    >>> trailer("lines 1-812 of 2310 shown", offset=812)
    '[lines 1-812 of 2310 shown; continue with offset=812]'
    """
    arguments = " ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in resume.items())
    return "[" + "; ".join([*facts, f"continue with {arguments}"] if resume else facts) + "]"


def page(
    items: Iterable[Any],
    noun: str,
    *,
    max_output: int,
    offset: int = 0,
    limit: int | None = None,
    render: Callable[[Any], str] = str,
    notes: Callable[[], Sequence[str]] = tuple,
) -> str:
    """The items from `offset` on, one a line: as many as fit, with the trailer, in `max_output` characters (0: all)
    and `limit` items.

    `items` may be lazy: it is read no further than the page needs, and its total is then not told. `notes` is asked at
    the end for what else the reader must know, such as what was skipped. A single item that is longer than the page is
    cut, and says so. Raises ToolError for an offset past the end.
    """
    lines: list[str] = []
    used, more = 0, False
    for item in islice(items, offset, None):
        if lines and (len(lines) == limit or (max_output and used > max_output)):
            more = True
            break
        lines.append(render(item))
        used += len(lines[-1]) + 1
    if offset and not lines:
        raise ToolError(f"offset={offset} is past the end of the {noun}; use a smaller offset")
    while True:
        end = offset + len(lines)
        of = f" of {len(items)}" if isinstance(items, Sized) else ""
        shown = f"{noun} {offset + 1}-{end}{of} shown" if more else "" if lines else f"no {noun}"
        facts = [fact for fact in (shown, *notes()) if fact]
        last = trailer(*facts, **({"offset": end} if more else {})) if facts else ""
        if not max_output or used + len(last) <= max_output or len(lines) <= 1:
            break
        used -= len(lines.pop()) + 1
        more = True
    room = max(max_output - len(last) - 40, MIN_SHOWN)
    if max_output and used + len(last) > max_output and lines and len(lines[0]) > room:
        lines[0] = f"{lines[0][:room]}…[{len(lines[0]) - room} more characters]"
    return "\n".join([*lines, last] if last else lines)


# -------------------------------------------------------------------------------------------------- token bucket


class TokenBucket:
    """A rate limiter: `capacity` tokens at most, `refill_rate` new ones a second, one token a call.

    A full bucket lets `capacity` calls through at once, so up to twice the rate can pass in the first period. A waiting
    caller takes its token at once, before it is there: `tokens` goes below zero and the next caller waits behind it, so
    callers are served in order. Algorithm: https://en.wikipedia.org/wiki/Token_bucket.
    """

    def __init__(
        self, capacity: float, refill_rate: float, *, timer: Timer = time.monotonic, sleep: Sleep = asyncio.sleep
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


@dataclass(frozen=True)
class Entry(Generic[V]):
    """One cached value: its size in bytes, and when it was stored and expires on the cache's timer."""

    value: V
    size: int
    stored: float
    expires: float


class TTLCache(Generic[K, V]):
    """A cache with at most `maxsize` entries and `max_bytes` bytes, each fresh for `ttl` seconds after it was put.

    The least recently used entry goes first. An entry is expired from the very instant `stored + ttl` on; it stays
    readable through `peek` (for revalidation) until it is evicted, replaced or discarded.
    """

    def __init__(self, maxsize: int, ttl: float, *, max_bytes: float = math.inf, timer: Timer = time.monotonic) -> None:
        self.maxsize = maxsize
        self.ttl = ttl
        self.max_bytes = max_bytes
        self.timer = timer
        self.currsize = 0
        self._entries: dict[K, Entry[V]] = {}  # in order of use, the oldest first

    def get(self, key: K) -> V | None:
        """The fresh value, or None."""
        entry = self._entries.get(key)
        if entry is None or self.timer() >= entry.expires:
            return None
        self._entries[key] = self._entries.pop(key)
        return entry.value

    def peek(self, key: K) -> Entry[V] | None:
        """The entry as it is stored, expired or not; to look at it is no use of it."""
        return self._entries.get(key)

    def put(self, key: K, value: V, *, ttl: float | None = None, size: int = 0) -> None:
        """Store a value of `size` bytes; one that is larger than the whole cache is not kept."""
        self.discard(key)
        if size > self.max_bytes:
            return
        now = self.timer()
        self._entries[key] = Entry(value, size, now, now + (self.ttl if ttl is None else ttl))
        self.currsize += size
        while len(self._entries) > self.maxsize or self.currsize > self.max_bytes:
            self.discard(next(iter(self._entries)))

    def discard(self, key: K) -> None:
        """Remove an entry if it is there."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.currsize -= entry.size

    def clear(self) -> None:
        """Remove everything; the counters stay."""
        self._entries.clear()
        self.currsize = 0


# -------------------------------------------------------------------------------------------------- path sandbox
#
# Resolving a path and then opening it by name is a race: between the two, another process can put a symlink where
# a directory was. So a path is resolved only to learn where it leads; what is opened is reached from the root's
# descriptor, one component at a time, and no component may be a symlink. A swap makes the call fail, never leak.

MAX_PATH = 16_384  # characters of a path as it is shown, as every message and every found path repeats it

HAS_DIR_FD = os.open in os.supports_dir_fd and os.stat in os.supports_dir_fd and os.scandir in os.supports_fd
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
TO_LIST = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | NO_FOLLOW
# Passing through a directory needs no right to list it; O_PATH (Linux) asks for none.
TO_PASS = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0) | NO_FOLLOW
# Without O_NONBLOCK, opening a FIFO waits for a writer, for ever; without O_NOCTTY a terminal can become ours.
TO_READ = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0) | NO_FOLLOW

ERRORS = {
    errno.ENOENT: "not found: {}; list its directory to see what is there",
    errno.ENOTDIR: "not a directory: {}; use the path of a directory, or read it as a file",
    errno.EISDIR: "{} is a directory; list it instead",
    errno.EEXIST: "{} exists and is not overwritten; give a new path, below it if it is a directory",
    errno.ENXIO: "{} is not a regular file (a FIFO, socket or device) and is never opened; choose another",
    errno.EACCES: "permission denied: {}; the server's user has no right to this, choose another path",
    errno.EXDEV: "{} is on another disk, and files are moved on one disk only; write the file there instead",
    errno.ELOOP: "{} is a symlink loop, or was replaced by a symlink just now; check it and try again",
}


@contextmanager
def explained(shown: str) -> Generator[None]:
    """Turns an OSError in the block into a ToolError that names `shown`, the path as the caller gave it. The error's
    own text would name paths of the host, so only its number is used."""
    try:
        yield
    except OSError as exc:
        reason = os.strerror(exc.errno or errno.EIO).lower()
        sentence = ERRORS.get(exc.errno or 0, f"cannot open or change {{}} ({reason}); try again, or another path")
        raise ToolError(sentence.format(shown)) from None


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


class Directory:
    """An open directory, through which alone the names in it are reached: never through a symlink, and wherever it is
    moved. It is closed when nobody holds it any more; an `os.DirEntry` of it is good only until then.

    Where a platform has no `dir_fd` (Windows) `fd` is None: names are opened by their path and verified afterwards.
    Every method raises OSError.
    """

    def __init__(self, path: str, fd: int | None) -> None:
        self.path = path
        self.fd = fd

    def __del__(self) -> None:
        if self.fd is not None:
            os.close(self.fd)

    def at(self, name: str) -> tuple[str, int | None]:
        """A name in it as the path and the `dir_fd` that the functions of `os` take."""
        return (os.path.join(self.path, name), None) if self.fd is None else (name, self.fd)

    def enter(self, name: str, flags: int = TO_LIST) -> "Directory":
        """The directory `name` in this one; "." for another handle on this one, with a place in the listing of its
        own. TO_PASS as `flags` needs no right to list it, and then it cannot be listed."""
        path, fd = self.at(name)
        if fd is not None:
            return Directory(os.path.join(self.path, name), os.open(name, flags, dir_fd=fd))
        if os.path.realpath(path) != os.path.normpath(path) or not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, "not a directory")
        return Directory(os.path.normpath(path), None)

    def scan(self) -> list[os.DirEntry[str]]:
        """What is in it, sorted by name."""
        with os.scandir(self.path if self.fd is None else self.fd) as found:
            return sorted(found, key=lambda entry: entry.name)

    def stat(self, name: str) -> os.stat_result:
        """`lstat` of a name in it."""
        path, fd = self.at(name)
        return os.stat(path, dir_fd=fd, follow_symlinks=False)

    def open(self, name: str, flags: int = os.O_RDONLY, mode: int = 0o666) -> int:
        """A descriptor of a regular file in it; a FIFO, socket or device is refused, so that no read can hang."""
        path, dir_fd = self.at(name)
        fd = os.open(path, TO_READ | flags, mode, dir_fd=dir_fd)
        kind = os.fstat(fd).st_mode
        # Windows has no O_NOFOLLOW: what it would have refused is refused after the fact.
        swapped = dir_fd is None and os.path.realpath(path) != path
        if stat.S_ISREG(kind) and not swapped:
            return fd
        os.close(fd)
        raise OSError(errno.ELOOP if swapped else errno.EISDIR if stat.S_ISDIR(kind) else errno.ENXIO, "refused")


@dataclass(frozen=True)
class Located:
    """A path that leads into a root: `parts` below it, free of symlinks when it was resolved; `shown` for messages."""

    root: Directory
    parts: tuple[str, ...]
    shown: str

    @property
    def path(self) -> str:
        """The path below the root, with `/`; "" for the root itself."""
        return "/".join(self.parts)

    @property
    def absolute(self) -> str:
        """The whole path; only for looking at it, what is opened is reached through the sandbox."""
        return os.path.join(self.root.path, *self.parts)


class Sandbox:
    """Opens files and directories inside the allowed directories, and nothing else.

    `roots` must exist. Each is held open, so what it is called later does not matter. Raises ConfigError.
    """

    def __init__(self, roots: Iterable[str | Path]) -> None:
        self.roots: list[Directory] = []
        for given in roots:
            path = os.path.realpath(os.path.expanduser(given))
            # An empty name is a variable that is not set; it would stand for the current directory.
            if not given or not os.path.isdir(path):
                raise ConfigError(f"{str(given)!r} is not a directory; name an existing directory")
            try:
                self.roots.append(Directory(path, os.open(path, TO_LIST) if HAS_DIR_FD else None))
            except OSError as exc:
                raise ConfigError(f"{given} cannot be opened: {exc.strerror}; choose another directory") from None

    def check(self) -> None:
        """Raises OSError when an allowed directory is gone, cannot be listed, or another one has taken its place."""
        for root in self.roots:
            if not os.path.samestat(os.stat(root.path), root.enter(os.curdir).stat(os.curdir)):
                raise FileNotFoundError(errno.ENOENT, "another directory has taken the place of", root.path)

    def resolve(self, untrusted: str, *, follow_last: bool = True) -> Located:
        """Find where a path leads; relative ones are looked up in each root in turn. Raises ToolError if outside.

        `follow_last=False` keeps a symlink in the last component as it is, to look at the link itself.
        """
        if not untrusted or "\0" in untrusted or len(printable(untrusted)) > MAX_PATH:
            raise ToolError(
                f'the path is empty, over {MAX_PATH} characters or has a NUL byte; give one like "notes/a.txt"'
            )
        home = untrusted == "~" or untrusted.startswith("~/")  # a directory of that name is ./~
        spellings = [os.path.expanduser(untrusted)] if home else [untrusted, unprintable(untrusted)]
        inside: list[Located] = []
        for spelling in dict.fromkeys(spellings):
            for root in self.roots:
                located = self._locate(os.path.join(root.path, spelling), printable(untrusted), follow_last)
                if located is None:
                    continue
                if os.path.lexists(located.absolute):
                    return located
                inside.append(located)
        if not inside:  # the same words whether or not anything is there: an error must not tell what exists outside
            raise ToolError(
                f"{printable(untrusted)} is outside the allowed directories; list_allowed_directories names them"
            )
        # What does not exist yet belongs where its directory is.
        homes = [new for new in inside if os.path.isdir(os.path.dirname(new.absolute))]
        return (homes or inside)[0]

    def _locate(self, path: str, shown: str, follow_last: bool) -> Located | None:
        parent, name = os.path.split(path.rstrip(os.sep))
        follow = follow_last or name in ("", os.curdir, os.pardir)
        try:
            real = os.path.realpath(path) if follow else os.path.join(os.path.realpath(parent), name)
        except (OSError, ValueError):  # ValueError: text that cannot be a file name, such as a lone surrogate
            return None
        for root in self.roots:
            # Comparing with the separator keeps /data out of reach of /data_private's paths, and the reverse.
            if real == root.path or real.startswith(root.path.rstrip(os.sep) + os.sep):
                return Located(root, tuple(part for part in real[len(root.path) :].split(os.sep) if part), shown)
        return None

    def directory(self, located: Located, flags: int = TO_LIST) -> Directory:
        """The directory itself, open. Raises ToolError."""
        directory = located.root
        with explained(located.shown):
            for part in located.parts[:-1]:
                directory = directory.enter(part, TO_PASS)
            return directory.enter(located.parts[-1] if located.parts else os.curdir, flags)

    def parent(self, located: Located, flags: int = TO_PASS) -> tuple[Directory, str]:
        """The directory that a path is in, open, and the path's name in it ("." for an allowed directory itself).
        Raises ToolError."""
        above = Located(located.root, located.parts[:-1], located.shown)
        return self.directory(above, flags), located.parts[-1] if located.parts else os.curdir

    def open(self, located: Located) -> int:
        """A descriptor of a regular file, for reading; the caller closes it. Raises ToolError."""
        directory, name = self.parent(located)
        with explained(located.shown):
            return directory.open(name)

    def stat(self, located: Located) -> os.stat_result:
        """`lstat` of the path. Raises ToolError."""
        directory, name = self.parent(located)
        with explained(located.shown):
            return directory.stat(name)
