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
from itertools import islice, product
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

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
    lines, used, more, room = list[str](), 0, False, max_output or math.inf
    for item in islice(items, offset, None):
        if more := len(lines) == limit or used > room:
            break
        lines.append(render(item))
        used += len(lines[-1]) + 1
    if offset and not lines:
        raise ToolError("; ".join([f"offset={offset} is past the end of the {noun}; use a smaller one", *notes()]))
    of = f" of {len(items)}" if isinstance(items, Sized) else ""
    while True:
        end = offset + len(lines)
        shown = f"{noun} {offset + 1}-{end}{of} shown" if more else f"no {noun}"
        facts = [*([shown] if more or not lines else []), *notes()]
        last = trailer(*facts, **({"offset": end} if more else {})) if facts else ""
        if used + len(last) <= room or len(lines) <= 1:
            break
        used -= len(lines.pop()) + 1
        more = True
    most = max(max_output - len(last) - 40, MIN_SHOWN)
    if lines and used + len(last) > room and len(lines[0]) > most:
        lines[0] = f"{lines[0][:most]}…[{len(lines[0]) - most} more characters]"
    return "\n".join([*lines, last] if last else lines)


# -------------------------------------------------------------------------------------------------- token bucket


class TokenBucket:
    """A rate limiter: `capacity` tokens at most, `refill_rate` new ones a second, one token a call.

    A full bucket lets `capacity` calls through at once, so up to twice the rate can pass in the first period. A waiting
    caller takes its token at once, before it is there: `tokens` goes below zero and the next caller waits behind it, so
    callers are served in order. Algorithm: https://en.wikipedia.org/wiki/Token_bucket.
    """

    def __init__(self, capacity: int, refill_rate: float, timer: Timer = time.monotonic, sleep: Sleep = asyncio.sleep):
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
        wait = max(0.0, (1 - self.tokens) / self.refill_rate)
        if not wait:
            self._tokens -= 1
        return wait

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


class Entry(NamedTuple, Generic[V]):
    """One cached value: its size in bytes, and when it expires on the cache's timer."""

    value: V
    size: int
    expires: float


class TTLCache(Generic[K, V]):
    """A cache with at most `maxsize` entries and `max_bytes` bytes, each fresh for `ttl` seconds after it was put.

    The least recently used entry goes first. An entry is expired from the very instant on when `ttl` seconds are over,
    and is removed when somebody asks for it, or when its room is needed.
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
            return self.discard(key)
        self._entries[key] = self._entries.pop(key)  # now the youngest
        return entry.value

    def put(self, key: K, value: V, *, ttl: float | None = None, size: int = 0) -> None:
        """Store a value of `size` bytes; one that is larger than the whole cache is not kept."""
        self.discard(key)
        if size > self.max_bytes:
            return
        self._entries[key] = Entry(value, size, self.timer() + (self.ttl if ttl is None else ttl))
        self.currsize += size
        while len(self._entries) > self.maxsize or self.currsize > self.max_bytes:
            self.discard(next(iter(self._entries)))

    def discard(self, key: K) -> None:
        """Remove an entry if it is there."""
        if entry := self._entries.pop(key, None):
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
# Without O_NONBLOCK, opening a FIFO waits for a writer, for ever; without O_NOCTTY a terminal can become ours.
TO_READ = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0) | NO_FOLLOW

ERRORS = {
    errno.ENOENT: "not found: {}; list its directory to see what is there",
    errno.EISDIR: "{} is a directory; list it instead",
    errno.EEXIST: "{} exists and is not overwritten; give a new path, below it if it is a directory",
    errno.ENXIO: "{} is not a regular file (a FIFO, socket or device) and is never opened; choose another",
    errno.EACCES: "permission denied: {}; ask the user to permit it, or choose another path",
    errno.EXDEV: "{} is on another disk, and files are moved on one disk only; write the file there instead",
}


@contextmanager
def explained(shown: str) -> Generator[None]:
    """Turns an OSError in the block into a ToolError that names `shown`, the path as the caller gave it. The error's
    own text would name paths of the host, so only its number is used."""
    try:
        yield
    except OSError as exc:
        number = exc.errno or errno.EIO
        generic = f"cannot open or change {{}} ({os.strerror(number).lower()}); try again, or another path"
        raise ToolError(ERRORS.get(number, generic).format(shown)) from None


_ESCAPED = re.compile(rb"\\x(0[1-9a-f]|1[0-9a-f]|7f|[89a-f][0-9a-f])")


def printable(name: str) -> str:
    r"""A file name as text that can be shown on one line and passed back: bytes that are no UTF-8 and characters
    that do not print become `\xNN`. A raw lone surrogate would end the server, a newline would forge an entry."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else "".join(f"\\x{b:02x}" for b in os.fsencode(c)) for c in name)


def unprintable(shown: str) -> str:
    """The name that `printable` shows as `shown`. Escapes of `.`, `/` and NUL are left alone: nothing to smuggle."""
    return os.fsdecode(_ESCAPED.sub(lambda match: bytes([int(match[1], 16)]), os.fsencode(shown)))


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

    def enter(self, name: str) -> "Directory":
        """The directory `name` in this one; "." for another handle on this one, with a place in the listing of its
        own."""
        path = os.path.normpath(os.path.join(self.path, name))
        if self.fd is not None:
            return Directory(path, os.open(name, TO_LIST, dir_fd=self.fd))
        if os.path.realpath(path) != path or not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, "not a directory")
        return Directory(path, None)

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
        raise OSError(errno.EISDIR if stat.S_ISDIR(kind) else errno.ENXIO, "refused")


class Located(NamedTuple):
    """A path that leads into a root: `path` is what is below it, with `/`, free of symlinks when it was resolved; ""
    for the root itself. `absolute` is for looking at, what is opened is reached through the sandbox. `shown` is how the
    caller wrote it."""

    root: Directory
    path: str
    absolute: str
    shown: str


class Sandbox:
    """Opens files and directories inside the allowed directories, and nothing else.

    `roots` must exist. Each is held open, so what it is called later does not matter. Raises ConfigError.
    """

    def __init__(self, roots: Iterable[str | Path]) -> None:
        self.roots: list[Directory] = []
        for given in roots:
            path = os.path.realpath(os.path.expanduser(given))
            # An empty name is a variable that is not set; it would stand for the current directory.
            if not given or not os.path.isdir(path) or not os.access(path, os.R_OK | os.X_OK):
                raise ConfigError(f"{str(given)!r} is not a directory that can be read; name one that can")
            self.roots.append(Directory(path, os.open(path, TO_LIST) if HAS_DIR_FD else None))

    def check(self) -> None:
        """Raises OSError when an allowed directory is gone, cannot be listed, or another one has taken its place."""
        for root in self.roots:
            if not os.path.samestat(os.stat(root.path), root.enter(os.curdir).stat(os.curdir)):
                raise FileNotFoundError(errno.ENOENT, "another directory has taken the place of", root.path)

    def resolve(self, untrusted: str, *, follow_last: bool = True) -> Located:
        """Find where a path leads; relative ones are looked up in each root in turn. Raises ToolError if outside.

        `follow_last=False` keeps a symlink in the last component as it is, to look at the link itself.
        """
        shown = printable(untrusted)
        if not untrusted or "\0" in untrusted or len(shown) > MAX_PATH:
            raise ToolError(f"the path is empty, over {MAX_PATH} characters or has a NUL byte; give another")
        home = untrusted.split("/")[0] == "~"  # a directory of that name is ./~
        spellings = [os.path.expanduser(untrusted)] if home else dict.fromkeys([untrusted, unprintable(untrusted)])
        inside: list[Located] = []
        for spelling, root in product(spellings, self.roots):
            if found := self._locate(root, spelling, shown, follow_last):
                if os.path.lexists(found.absolute):
                    return found
                inside.append(found)
        if not inside:  # the same words whether or not anything is there: an error must not tell what exists outside
            raise ToolError(f"{shown} is outside the allowed directories; list_allowed_directories names them")
        # What does not exist yet belongs where its directory is.
        at_home = (found for found in inside if os.path.isdir(os.path.dirname(found.absolute)))
        return next(at_home, inside[0])

    def _locate(self, root: Directory, spelling: str, shown: str, follow_last: bool) -> Located | None:
        base = root.path.rstrip(os.sep)
        at, below = base, spelling.removeprefix(f"{base}/")
        # Most paths hold no symlink and no "..": they lead where they say, which takes a third of the time to find out.
        # Not so on Windows, where a part may hold a backslash or a drive, and lead anywhere.
        for part in below.split("/"):
            at = f"{at}/{part}"
            if not HAS_DIR_FD or part in ("", os.curdir, os.pardir) or os.path.islink(at):
                break
        else:
            return Located(root, below, at, shown)
        path = os.path.join(root.path, spelling)
        parent, name = os.path.split(path.rstrip(os.sep))
        follow = follow_last or name in ("", os.curdir, os.pardir)
        with explained(shown):  # a symlink may be gone between two looks at it
            real = os.path.realpath(path) if follow else os.path.join(os.path.realpath(parent), name)
        for home in self.roots:
            # Comparing with the separator keeps /data out of reach of /data_private's paths, and the reverse.
            if os.path.join(real, "").startswith(os.path.join(home.path, "")):
                return Located(home, real[len(home.path) :].replace(os.sep, "/").strip("/"), real, shown)
        return None

    def parent(self, located: Located) -> tuple[Directory, str]:
        """The directory that a path is in, open, and the path's name in it ("." for an allowed directory itself).
        Raises ToolError."""
        *above, name = located.path.split("/")
        directory = located.root
        with explained(located.shown):
            for part in above:
                directory = directory.enter(part)
        return directory, name or os.curdir

    def reach(self, located: Located, act: Callable[[Directory, str], V]) -> V:
        """What a method of Directory (`open`, `enter`, `stat`) does with the path. Raises ToolError."""
        directory, name = self.parent(located)
        with explained(located.shown):
            return act(directory, name)
