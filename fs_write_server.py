# /// script
# requires-python = ">=3.11"
# dependencies = ["mcp>=2.3,<3"]
# ///
"""The file server with four more tools, which write, edit and move the files of the directories you name.

    python fs_write_server.py DIR [DIR ...]

Trust boundary: as in fs_server.py, nothing outside those directories is opened, listed or changed. Files that hold
secrets by convention, or match --deny, are neither changed nor moved; a move overwrites nothing. At every moment a file
is old or new, never half, and what somebody else changes meanwhile is not lost.
Not defended against: what the model chooses to write. Serve a directory that has a history, or a copy.
"""

import sys

try:
    import fs_server  # first of all: it imports serving, which checks Python and mcp
    import serving
except ModuleNotFoundError as missing:
    sys.stderr.write(f"fs_write_server.py needs {missing.name}.py: copy it into the same directory\n")
    sys.exit(2)

import ctypes
import difflib
import errno
import os
import re
import stat
import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Annotated

from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import BaseModel, Field

from common import MIN_SHOWN, Directory, Located, explained, trailer
from fs_server import CALL, MAX_FILE, WALK_LIMIT, Encoding, Files, Path_, mark_of, text_codec, tool

if sys.platform != "win32":
    import fcntl

# -------------------------------------------------------------------------------------------------------- limits

MAX_COMPARED = 10_000  # lines in which a near miss is looked for, or that a diff compares: seconds, whatever they are

# ----------------------------------------------------------------------------------------------------- the tools


class Edit(BaseModel, extra="forbid", strict=True):  # noqa: D101
    # No docstring: it would be part of the list of tools. The names are those of the reference server.
    oldText: Annotated[str, Field(min_length=1, max_length=1_000_000)]  # noqa: N815
    newText: Annotated[str, Field(max_length=1_000_000)]  # noqa: N815


Content = Annotated[str, Field(description="the whole text, as UTF-8", max_length=MAX_FILE)]
Edits = Annotated[list[Edit], Field(description="made in this order", min_length=1, max_length=100)]
DryRun = Annotated[bool, Field(description="only show the diff", strict=True)]
Writes = partial(ToolAnnotations, read_only_hint=False, open_world_hint=False)


class WritableFiles(Files):
    """The allowed directories, with the tools that change what is in them besides those that read."""

    name = "fs-write-server"
    does = "Reads, lists, finds, searches and changes"

    @tool(Writes(destructive_hint=True, idempotent_hint=True))
    def write_file(self, path: Path_, content: Content) -> str:
        """Make a new text file, or replace a whole file; the answer says which, with the sizes. All or nothing: the
        file never holds half of the text. To change a part of a file use edit_file."""
        with self._writing(path) as target:
            # Reading does not show a byte-order mark: a content without one does not mean that the file is to lose it.
            if content and mark_of(target.old or b"")[1] == "utf-8":
                content = MARK + content.lstrip(MARK)
            data = content.encode()
            target.replace(data)
        if target.old is None:
            return f"created {target.shown}: {len(data)} bytes"
        return f"replaced {target.shown}: {len(target.old)} bytes before, {len(data)} bytes now"

    @tool(Writes(destructive_hint=True, idempotent_hint=False))
    def edit_file(self, path: Path_, edits: Edits, dryRun: DryRun = False, encoding: Encoding = "utf-8") -> str:  # noqa: N803
        """Replace parts of a text file and return a unified diff. Each oldText must be there exactly once, letter for
        letter; otherwise nothing is written, and the error says where it is or what comes nearest. Line endings stay as
        they are: a line break stands for any kind."""
        with self._writing(path) as target:
            if target.old is None:
                raise ToolError(f"not found: {target.shown}; write_file makes new files")
            draft = Draft(target.old, target.shown, encoding)
            before = draft.text
            for number, edit in enumerate(edits, 1):
                refuse_late()
                draft.replace(edit, number)
            data, diff = draft.encoded(), unified_diff(before, draft.text, target.shown, self.max_output)
            if not dryRun:
                target.replace(data)
        return diff

    @tool(Writes(destructive_hint=False, idempotent_hint=True))
    def create_directory(self, path: Path_) -> str:
        """Make a directory, with the directories above it. One that is there already is fine."""
        located = self.sandbox.resolve(path)
        self.refuse_secret(located)
        directory, answer = located.root, f"{located.shown} was there already"
        with explained(located.shown):
            for part in located.path.split("/") if located.path else ():
                refuse_late()
                name, dir_fd = directory.at(part)
                with suppress(FileExistsError):
                    os.mkdir(name, dir_fd=dir_fd)
                    answer = f"created {located.shown}"
                directory = directory.enter(part)
        return answer

    @tool(Writes(destructive_hint=False, idempotent_hint=False))
    def move_file(self, source: Path_, destination: Path_) -> str:
        """Move or rename a file or directory. The destination is the new path itself; nothing that exists is ever
        overwritten."""
        old, directory, name = self._to_change(source, move=True, slash=True)
        is_directory = stat.S_ISDIR(self.sandbox.reach(old, Directory.stat).st_mode)
        new, target, new_name = self._to_change(destination, move=True, slash=is_directory)
        # Rules without a slash are about names, which move along; others would no longer fit what is in the directory.
        if is_directory and any("/" in glob.rstrip("/") for glob in self.deny):
            raise ToolError(f"{old.shown} stays: directories are not moved where --deny names paths; move its files")
        # In turn with writers: what is being edited must not go away between the last look at it and the rename.
        with turn(directory, old.shown), explained(new.shown):
            refuse_late()
            rename_new(directory, name, target, new_name)
        serving.audit(path=old.shown, destination=new.shown)
        return f"moved {old.shown} to {new.shown}"

    # What the tools have in common.

    def is_secret(self, path: str) -> bool:
        """As for reading. Temporary files are left alone as well: the next write beside one removes it."""
        return super().is_secret(path) or f"/{TEMPORARY}" in f"/{path.casefold()}"

    def _to_change(self, path: str, move: bool = False, slash: bool = False) -> tuple[Located, Directory, str]:
        """Where a path leads that is to be written or moved: also as the directory, open, and the name in it. Raises
        ToolError if it must stay as it is, or ends like that of a directory and must not."""
        located = self.sandbox.resolve(path, follow_last=not move)
        self.refuse_secret(located)
        if any(f"{root.path}/".startswith(f"{located.absolute}/") for root in self.sandbox.roots):
            raise ToolError(f"{located.shown} is or holds an allowed directory, and stays; give a path inside it")
        if path.endswith("/") and not slash:
            raise ToolError(f"{located.shown} is no name for a file but for a directory; leave the slash out")
        if not os.path.lexists(os.path.dirname(located.absolute)):
            raise ToolError(f"not found: the directory of {located.shown}; create_directory makes directories")
        return located, *self.sandbox.parent(located)

    @contextmanager
    def _writing(self, path: str) -> "Generator[Target]":
        """Waits for the turn to write a file, and reads it: until the end of the block nobody else who takes turns
        writes it. Raises ToolError."""
        located, directory, name = self._to_change(path)
        with explained(located.shown), turn(directory, located.shown) as temporary:
            yield Target(directory, name, located.shown, temporary)


def refuse_late() -> None:
    """Raises ToolError when nobody waits any more: who was told that a call failed must not find its work done."""
    if CALL.get().over():
        raise ToolError("there was not enough time, nothing was changed; try again later, or make a smaller change")


# ------------------------------------------------------------------------------------------------------- writing
#
# A file is never written in place. The new content goes to a temporary file in the same directory, to the disk, and
# then to its name, in one step: whatever happens, the old or the new content is there, and a hard link that somebody
# made beforehand keeps the old. Writers in one directory take turns by a lock on the directory. So one name for the
# temporary file is enough, and what a killed server left there is removed by the next write.

TEMPORARY = ".fs-server.tmp"
TURNS = [threading.Lock() for _ in range(64)]  # for this server's own threads, each for some of the directories


@contextmanager
def turn(directory: Directory, shown: str) -> Generator[str]:
    """Waits for the lock of a directory and holds it in the block, which gets the name for its temporary file: another
    each time where other servers cannot be locked out (Windows, many network disks). Raises ToolError."""
    own, fd, temporary = TURNS[hash(directory.path) % len(TURNS)], directory.fd, TEMPORARY + os.urandom(8).hex()
    # Waiting here ends with the call. Waiting for the system's lock does not: so at most one thread does that.
    if not own.acquire(timeout=WALK_LIMIT):
        raise ToolError(f"others are writing beside {shown} all the time, nothing was changed; try again later")
    with ExitStack() as held:
        held.callback(own.release)
        if fd is not None:
            with suppress(OSError):  # a disk without locks
                fcntl.flock(fd, fcntl.LOCK_EX)
                # Not left to the end of the descriptor: a traceback would keep it alive, and with it the lock.
                held.callback(fcntl.flock, fd, fcntl.LOCK_UN)
                temporary = TEMPORARY
        yield temporary


class Target:
    """A file that is about to be written, and what it holds now: None if it does not exist. Raises OSError, or
    ToolError if it is not to be replaced."""

    def __init__(self, directory: Directory, name: str, shown: str, temporary: str) -> None:
        self.directory, self.name, self.shown, self.temporary = directory, name, shown, temporary
        self.seen, self.old = self._state(), None
        if self.seen:
            # A rename needs no right to the file itself: without asking for it, write protection would protect nothing.
            with open(directory.open(name, os.O_RDWR), "rb") as file:
                self.old = file.read(MAX_FILE + 1)
            if len(self.old) > MAX_FILE:
                raise ToolError(f"{shown} has more than {MAX_FILE} bytes, and is left alone; choose a smaller one")

    def _state(self) -> tuple[int, ...] | None:
        """What tells one state of a file from another; None if there is none."""
        with suppress(FileNotFoundError):
            info = self.directory.stat(self.name)
            return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_mode
        return None

    def replace(self, data: bytes) -> None:
        """Put the new content in place. Raises OSError, or ToolError if another program has changed the file since it
        was looked at."""
        (temporary, dir_fd), (path, _) = self.directory.at(self.temporary), self.directory.at(self.name)
        with suppress(FileNotFoundError):  # left by a server that was killed
            os.unlink(temporary, dir_fd=dir_fd)
        # O_EXCL: a symlink or a file that somebody put there is not written to. Until it gets the mode of the old file
        # nobody else may read it; a new file has the usual mode at once.
        fd = self.directory.open(self.temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if self.seen else 0o666)
        try:
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                if self.seen and dir_fd is not None:
                    with open(self.directory.open(self.name)) as old:
                        copy_attributes(old.fileno(), fd)
                os.fsync(fd)
            # A program without locks, such as an editor, would lose what it has saved since the file was read.
            if self._state() != self.seen:
                raise ToolError(f"{self.shown} was changed by another program just now; read it again and repeat this")
            refuse_late()
            os.replace(temporary, path, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        finally:
            with suppress(OSError):  # if all went well, it is not there any more
                os.unlink(temporary, dir_fd=dir_fd)
        serving.audit(path=self.shown, bytes_before=len(self.old or b""), bytes_after=len(data))


def copy_attributes(old: int, new: int) -> None:
    """Give the new file the owner, the extended attributes (ACLs are among them) and the mode of the old one."""
    info = os.fstat(old)
    mode = stat.S_IMODE(info.st_mode)
    with suppress(OSError):  # only root may give a file away, but a group that one is in may be given to it
        os.fchown(new, info.st_uid if os.geteuid() == 0 else -1, info.st_gid)
    now = os.fstat(new)
    # Rights that were another's must not become ours: set-user-ID would run the new text as this user.
    if (now.st_uid, now.st_gid) != (info.st_uid, info.st_gid):
        mode &= 0o777 if now.st_gid == info.st_gid else 0o707
    with suppress(OSError, AttributeError):  # not everywhere
        for attribute in os.listxattr(old):
            # What a program may do was granted to its old content: the system, too, takes it from what is written.
            if not attribute.startswith("security."):
                os.setxattr(new, attribute, os.getxattr(old, attribute))
    os.chmod(new, mode)


# ------------------------------------------------------------------------------------------------------- editing

MARK = "\ufeff"  # a byte-order mark as a character: no text, so it is left out of oldText and newText


class Draft:
    """A file's text while it is edited, with "\n" for each line break; `breaks` are those of the file, in order. Raises
    ToolError for what is no text in the encoding."""

    def __init__(self, data: bytes, shown: str, encoding: str) -> None:
        self.shown = shown
        self.mark, codec = mark_of(data)
        self.codec = codec or text_codec(encoding).removesuffix("-sig")
        text = data[len(self.mark) :].decode(self.codec, "replace")
        self.breaks = re.findall("\r\n?|\n", text)
        self.text = re.sub("\r\n?", "\n", text)
        self.encoded(expected=data)  # what was replaced does not come back as it was

    def encoded(self, expected: bytes | None = None) -> bytes:
        """The bytes of the file with the text as it is now. Raises ToolError."""
        text = "".join(line + end for line, end in zip(self.text.split("\n"), [*self.breaks, ""], strict=True))
        with suppress(UnicodeEncodeError):
            data = self.mark + text.encode(self.codec)
            if expected in (None, data):
                return data
        raise ToolError(f'{self.shown} or a newText is no {self.codec}; pass its encoding, "latin-1" fits any file')

    def replace(self, edit: Edit, number: int) -> None:
        """Make one edit. Raises ToolError unless oldText is there exactly once."""
        old, new = (re.sub("\r\n?", "\n", text.lstrip(MARK)) for text in (edit.oldText, edit.newText))
        if old in ("", new):
            raise ToolError(f"edit {number} changes nothing; give a newText that differs from its oldText")
        places, at = list[int](), -1
        while len(places) <= 10 and (at := self.text.find(old, at + 1)) >= 0:
            places.append(at)
        if len(places) != 1:
            # Looking for more places one by one takes hours where a long oldText overlaps itself; count() is one pass.
            times = max(len(places), self.text.count(old))
            lines = ", ".join(str(self.text.count("\n", 0, at) + 1) for at in places[:10])
            found = f"found {times} times (at lines {lines})" if places else "not found"
            advice = "make it longer, so that it is there once" if places else nearest(self.text, old)
            raise ToolError(f"edit {number}: oldText was {found} in {self.shown}, nothing was written; {advice}")
        # What both texts begin or end with stays as it is, with its line breaks.
        first = alike(old, new)
        last = min(alike(old[::-1], new[::-1]), len(old) - first, len(new) - first)
        start, end, new = places[0] + first, places[0] + len(old) - last, new[first : len(new) - last]
        line, stop = self.text.count("\n", 0, start), self.text.count("\n", 0, end)
        # New line breaks are of the kinds that stand where they go; the last line of a file may have none.
        kinds = self.breaks[line : stop + 1] or self.breaks[-1:] or ["\n"]
        self.breaks[line:stop] = [kinds[min(at, len(kinds) - 1)] for at in range(new.count("\n"))]
        self.text = self.text[:start] + new + self.text[end:]


def alike(one: str | list[str], other: str | list[str]) -> int:
    """How many lines, or characters, at the beginning of both are the same."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def letters(line: str) -> set[str]:
    """All that stands side by side in a line, three characters each: lines are alike if they share many."""
    return set(re.findall("(?=(...))", f"  {line.strip()[:100]} "))


def nearest(text: str, old: str) -> str:
    """The place in the text that comes nearest to `old`, and the first line there that differs.

    Lines are compared by what they share (trigrams, as PostgreSQL's pg_trgm does): a letter-by-letter comparison takes
    milliseconds for two lines, and a text can be made that wants it for every line.
    """
    lines, wanted = text.split("\n", MAX_COMPARED)[:MAX_COMPARED], old.split("\n")
    anchor = max(range(len(wanted)), key=lambda at: len(wanted[at].strip()))
    sought = letters(wanted[anchor])
    likeness = [len(sought & found) / len(sought | found) for found in map(letters, lines)]
    where = likeness.index(max(likeness))
    if likeness[where] < 0.3:  # as in pg_trgm
        return "no line of the file is like it: read the file and copy the text from there"
    start = max(0, where - anchor)
    there = [*lines[start : start + len(wanted)], "(the end of the file)"]
    line = alike(wanted, there)
    at = max(0, alike(wanted[line], there[line]) - 100)  # in a long line, a little before the difference
    mine, found = wanted[line][at : at + 200], there[line][at : at + 200]
    return f"the nearest text differs at line {start + line + 1} (- is oldText, + is the file):\n- {mine}\n+ {found}"


def unified_diff(before: str, after: str, shown: str, max_output: int) -> str:
    """What the edits change, with three lines of context."""
    old, new = (re.findall("[^\n]*\n|[^\n]+", text) for text in (before, after))
    # Only the lines from the first to the last change are compared: difflib takes minutes for a long log whose lines
    # are alike.
    start = max(0, alike(old, new) - 3)
    same = min(alike(old[::-1], new[::-1]), len(old) - start - 3, len(new) - start - 3)
    old, new = (lines[start : len(lines) - max(0, same - 3)] for lines in (old, new))
    if len(old) + len(new) > MAX_COMPARED:
        return f"(the edits span {len(new)} lines, too many for a diff; read_file shows the file)\n"
    diff = ""
    for line in difflib.unified_diff(old, new, shown, shown):
        if line.startswith("@@"):
            line = re.sub(r"(?<=[-+])\d+", lambda number: str(int(number[0]) + start), line)
        diff += line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
    if max_output and len(diff) > max_output:
        kept = diff[: max(max_output - 80, MIN_SHOWN)].rpartition("\n")[0] + "\n"  # 80: about what the trailer takes
        return kept + trailer(f"the diff has {len(diff) - len(kept)} more characters; read_file shows the file")
    return diff or "(all in all, no line is changed)\n"


# -------------------------------------------------------------------------------------------------------- moving


def rename_new(source: Directory, name: str, target: Directory, new: str) -> None:
    """Rename to a name that must not exist. Raises OSError: FileExistsError if it does.

    `rename` itself replaces what exists, and looking before is a race. Linux has a call that does not, on most disks.
    Elsewhere looking just before must do, and what another program makes in that moment is lost.
    """
    (old, from_fd), (path, to_fd) = source.at(name), target.at(new)
    renameat2 = None if from_fd is None else getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 and renameat2(from_fd, os.fsencode(old), to_fd, os.fsencode(path), 1) == 0:  # 1: RENAME_NOREPLACE
        return
    if renameat2 and ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL):  # the system or the disk does not know it
        raise OSError(ctypes.get_errno(), "not renamed")
    if os.path.lexists(os.path.join(target.path, new)):
        raise FileExistsError(errno.EEXIST, "exists")
    os.rename(old, path, src_dir_fd=from_fd, dst_dir_fd=to_fd)


# ---------------------------------------------------------------------------------------------------------- main

build_server = partial(fs_server.build_server, kind=WritableFiles)
main = partial(fs_server.main, WritableFiles)

if __name__ == "__main__":
    main()
