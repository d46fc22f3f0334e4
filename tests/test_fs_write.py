"""The file server that writes: what is on disk after each call, whatever happens meanwhile."""

import fcntl
import json
import os
import random
import re
import resource
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
from conftest import Stdio, calls_during_a_race
from mcp import Client
from mcp.server.mcpserver.exceptions import ToolError

from common import Sandbox
from fs_server import CALL, Call
from fs_write_server import TEMPORARY, Edit, Target, WritableFiles, build_server
from serving import Options

pytestmark = pytest.mark.anyio

Start = Callable[..., Stdio]
Edits = list[dict[str, str]]
OUTSIDE = "outside, never to be changed"
NOTE = b"one\ntwo\nthree\n"
BOM = b"\xef\xbb\xbf"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for directory in ("root/sub", "outside"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "root" / "note.txt").write_bytes(NOTE)
    (tmp_path / "outside" / "file.txt").write_text(OUTSIDE)
    return tmp_path / "root"


@pytest.fixture
def disk() -> Iterator[Path]:
    """A directory in memory if there is such a disk: in a race, waiting for a real one would take minutes."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        yield Path(name)


def snapshot(directory: Path) -> dict[str, bytes | str | None]:
    """Everything below a directory, with what it holds."""
    found: dict[str, bytes | str | None] = {}
    for path in directory.rglob("*"):
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(directory))] = content
    return found


def edit(old: str, new: str) -> dict[str, str]:
    return {"oldText": old, "newText": new}


async def call(roots: Path | Sequence[Path], tool: str, **arguments: Any) -> str:
    """The text of the answer; before that of an error stands "error: ". `deny` and `options` are for the server."""
    started = {name: arguments.pop(name) for name in ("deny", "options") if name in arguments}
    async with Client(build_server([roots] if isinstance(roots, Path) else roots, **started)) as client:
        result = await client.call_tool(tool, arguments)
    return "error: " * bool(result.is_error) + str(result.content[0].text)  # pyright: ignore


async def test_the_tools_for_reading_are_there_and_four_that_say_what_they_may_destroy(root: Path) -> None:
    async with Client(build_server([root])) as client:
        tools = {tool.name: tool.annotations for tool in (await client.list_tools()).tools}
    hints = {name: (a.destructive_hint, a.idempotent_hint) for name, a in tools.items() if a and not a.read_only_hint}
    changing, adding = {"write_file": (True, True), "edit_file": (True, False)}, {"create_directory": (False, True)}
    assert (len(tools), hints) == (13, {**changing, **adding, "move_file": (False, False)})


FORMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "write": ("write_file", "path", {"content": "evil"}),
    "edit": ("edit_file", "path", {"edits": [edit("evil", "more")]}),
    "make": ("create_directory", "path", {}),
    "move to": ("move_file", "destination", {"source": "other"}),
    "move from": ("move_file", "source", {"destination": "moved"}),
}
ANYHOW, BUT_MAKE = list(FORMS), ["write", "edit", "move to", "move from"]
BAD_PATHS: list[tuple[str, list[str], list[str]]] = [
    ("outside", ANYHOW, ["../outside/file.txt", "../outside/new", "/tmp/fs-server-new", "link/file.txt", "link/new"]),
    ("outside", ["write", "edit", "make"], ["link_file", "link_missing"]),
    ("allowed directory", BUT_MAKE, [".", "deep", "deep/root"]),
    ("--allow-secrets", ANYHOW, [".env", "sub/.ssh/config", ".ssh"]),
    ("left alone", ANYHOW, [f"sub/{TEMPORARY}", TEMPORARY.upper(), "sub/x.private"]),
    ("NUL|too long|not a directory", ANYHOW, ["a\0b", "x" * 300, "note.txt/x"]),
    ("create_directory", BUT_MAKE, ["no/such/file.txt"]),
    ("leave the slash out|is a directory|never opened", ["write", "edit"], ["new/", "sub", "fifo"]),
    ("not a directory", ["make"], ["note.txt", "fifo"]),
    ("not overwritten|invalid argument", ["move to"], ["other", "other/inner"]),
    ("not overwritten", ["move to"], ["sub", "note.txt", "fifo", "link_file", "link_missing"]),
    ("not found: missing", ["move from"], ["missing"]),
]


@pytest.mark.parametrize("form", FORMS)
async def test_what_may_not_be_changed_is_left_alone(root: Path, form: str) -> None:
    for link, target in (("link", ""), ("link_file", "file.txt"), ("link_missing", "missing.txt")):
        (root / link).symlink_to(f"../outside/{target}")
    for directory in ("other/full", "deep/root", ".ssh"):
        (root / directory).mkdir(parents=True)
    (root / ".env").write_text("hunter2")
    os.mkfifo(root / "fifo")
    before, (tool, name, arguments) = snapshot(root.parent), FORMS[form]
    for message, forms, paths in BAD_PATHS:
        for path in paths if form in forms else ():
            roots = [root, root / "deep" / "root"][: 1 + path.startswith("deep")]
            answer = await call(roots, tool, deny=["*.PRIVATE"], **arguments, **{name: path})
            assert re.fullmatch(f"error: .*({message}).*", answer), (path, answer)
    assert snapshot(root.parent) == before


async def test_a_directory_is_not_moved_to_where_its_protected_files_could_be_read(root: Path) -> None:
    for deny, answer in (("sub/*/code*", "error: sub stays"), ("other/**", "error: sub stays"), ("code/", "moved sub")):
        assert answer in await call(root, "move_file", source="sub", destination="open", deny=[deny])


@pytest.mark.parametrize("dir_fd", [True, False])
async def test_files_and_directories_are_made_replaced_and_moved_and_the_answer_says_so(
    root: Path, disk: Path, dir_fd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.HAS_DIR_FD", dir_fd)
    (root / "alias").symlink_to("note.txt")
    (root / "trap").hardlink_to(root.parent / "outside" / "file.txt")
    (root / "full").mkdir()
    one, two, far = str(root / "made" / "n.txt"), str(root / "two.txt"), disk.stat().st_dev != root.stat().st_dev
    make, write = ("create_directory", "path"), ("write_file", "path", "content")
    move = ("move_file", "source", "destination")
    for (tool, *names), values, answer in (
        (make, ["a/b"], "created a/b"),
        (make, ["a/b"], "a/b was there already"),
        (write, ["a/b/new", "käse\r\n"], "created a/b/new: 7 bytes"),
        (write, ["alias", ""], "replaced alias: 14 bytes before, 0 bytes now"),
        (write, ["trap", "inside"], f"replaced trap: {len(OUTSIDE)} bytes before, 6 bytes now"),
        (move, ["note.txt", "sub/n.txt"], "moved note.txt to sub/n.txt"),
        (move, ["sub/n.txt", "trap"], "not overwritten"),
        (move, ["sub", "full"], "not overwritten"),
        (move, ["trap", "archive/"], "leave the slash out"),
        (move, ["sub", "made/"], "moved sub to made/"),
        (move, ["alias", "link"], "moved alias to link"),
        (move, [one, two], f"moved {one} to {two}"),
        (move, ["trap", str(disk / "far")], "another disk" if far else "moved"),
    ):
        assert answer in await call([root, disk], tool, **dict(zip(names, values, strict=True)))
    made = {"a": None, "a/b": None, "a/b/new": "käse\r\n".encode(), "link": "note.txt", "two.txt": b"", "made": None}
    assert snapshot(root) == {**made, "full": None, **({"trap": b"inside"} if far else {})}
    assert (root.parent / "outside" / "file.txt").read_text() == OUTSIDE
    os.umask(umask := os.umask(0))
    assert stat.S_IMODE((root / "a" / "b" / "new").stat().st_mode) == 0o666 & ~umask


async def test_a_whole_file_is_written_as_given_but_for_its_mark_and_nothing_else_is_left(root: Path) -> None:
    for leave, before, content, after in (
        ("touch", BOM + b"old", "new", BOM + b"new"),
        ("mkfifo", BOM + b"old", "\ufeff\ufeffnew", BOM + b"new"),
        ("ln -s ../outside/file.txt", BOM + b"old", "", b""),
        ("ln ../outside/file.txt", b"old", "\ufeffnew", BOM + b"new"),  # a mark that is wanted
        ("touch", b"a\r\nb\r\n", "a\nb\r\nc\r", b"a\nb\r\nc\r"),
    ):
        subprocess.run([*leave.split(), TEMPORARY], cwd=root, check=True)
        (root / "note.txt").write_bytes(before)
        await call(root, "write_file", path="sub/../note.txt", content=content)
        assert snapshot(root) == {"note.txt": after, "sub": None}
    assert (root.parent / "outside" / "file.txt").read_text() == OUTSIDE
    (root / "note.txt").write_bytes(b"caf\xe9")
    assert '"latin-1" fits' in await call(root, "edit_file", path="note.txt", edits=[edit("caf", "x")])


async def test_mode_owner_and_attributes_survive_and_the_audit_log_tells_of_each_change(root: Path) -> None:
    note, log = root / "note.txt", Options(audit_log=root.parent / "audit")
    if os.geteuid() == 0:
        os.chown(note, 12345, 23456)
    note.chmod(0o4751)
    with suppress(OSError):  # not every disk has them
        os.setxattr(note, "user.test", b"kept")
    before = (note.stat()[0], *note.stat()[4:6], os.listxattr(note))  # with the mode, the user and the group
    await call(root, "edit_file", path="note.txt", edits=[edit("two", "2")], options=log)
    await call(root, "write_file", path="note.txt", content="all new", options=log)
    assert (note.stat()[0], *note.stat()[4:6], os.listxattr(note)) == before
    await call(root, "write_file", path="new", content="1", options=log)
    await call(root, "move_file", source="new", destination="newer", options=log)
    first, second, third, fourth = map(json.loads, (root.parent / "audit").read_text().splitlines())
    assert (first["path"], first["bytes_before"], first["bytes_after"]) == ("note.txt", 14, 12)
    assert (second["bytes_before"], second["bytes_after"]) == (12, 7)
    assert (third["bytes_before"], fourth["path"], fourth["destination"]) == (0, "new", "newer")


AS_NOBODY = """
import os, sys, fs_write_server
sys.argv[:1] = os.setgroups([]) or os.setresgid(*[65534] * 3) or os.setresuid(*[65534] * 3) or []
fs_write_server.main()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs files of several users")
def test_rights_of_another_user_do_not_become_rights_of_the_servers_user(stdio: Start) -> None:
    with tempfile.TemporaryDirectory() as name:  # another user cannot get into pytest's own directories
        root = Path(name)
        root.chmod(0o777)
        for file, mode, group in (("program", 0o4777, 65534), ("shared", 0o666, 0), ("closed", 0o644, 0)):
            (root / file).write_text("old")
            os.chown(root / file, 0, group)
            (root / file).chmod(mode)
        server = stdio("-c", AS_NOBODY, "fs_write_server.py", name)
        for file in ("program", "shared", "closed"):
            message = server.call("write_file", path=file, content="new")["content"][0]["text"]
        assert message.startswith("permission denied: closed; ask the user to permit it")
        found = {path.name: (stat.S_IMODE(path.stat().st_mode), path.read_text()) for path in root.iterdir()}
    assert found == {"program": (0o777, "new"), "shared": (0o606, "new"), "closed": (0o644, "old")}


EDITS: dict[str, tuple[bytes, Edits, bytes]] = {
    "dollars and backslashes": (b"a $1 \\1 (.*) b", [edit("$1 \\1 (.*)", "$2 \\g<0> [x]")], b"a $2 \\g<0> [x] b"),
    "line separators": ("a\u2028b\x0bc\n".encode(), [edit("b", "B")], "a\u2028B\x0bc\n".encode()),
    # Line endings: a break stands for any kind, and the new text gets the kinds that stand where it goes.
    "crlf": (b"one\r\ntwo\r\n", [edit("one\ntwo", "1\n2\n3")], b"1\r\n2\r\n3\r\n"),
    "at the end of crlf": (b"a\r\nb", [edit("b", "b\nc\n")], b"a\r\nb\r\nc\r\n"),
    "mixed, all of it": (b"a\r\nb\nc\rd\r\n", [edit("a\nb\nc\nd", "A\nB\nC\nD")], b"A\r\nB\nC\rD\r\n"),
    "mixed, a line more": (b"a\nb\r\nc\nd\r\n", [edit("b\nc", "b\nnew\nc")], b"a\nb\r\nnew\nc\nd\r\n"),
    "mixed, a line less": (b"a\nb\r\nc\nd\r\n", [edit("a\nb\nc", "b\nc")], b"b\r\nc\nd\r\n"),
    "mixed, after each other": (b"a\r\nb\nc\n", [edit("a", "a\nx"), edit("b", "y\nb")], b"a\r\nx\r\ny\nb\nc\n"),
    "bare cr": (b"a\rb\n", [edit("a\rb", "a\rc\rd")], b"a\rc\nd\n"),
    "cr only": (b"one\rtwo\rthree\r", [edit("one\ntwo\n", "1\n2\n3\n")], b"1\r2\r3\rthree\r"),
    "latin-1": (b"caf\xe9\n", [edit("café", "thé")], b"th\xe9\n"),
    # Byte-order marks: no text, and there once.
    "bom": (BOM + b"one\n", [edit("\ufeffone", "\ufeff1")], BOM + b"1\n"),
    "utf-16": ("one\ntwo\n".encode("utf-16"), [edit("\ufeffone\ntwo", "zwei ü")], "zwei ü\n".encode("utf-16")),
    "utf-16 big endian": (b"\xfe\xff\0a\0\r\0\n", [edit("a", "b\nc")], b"\xfe\xff\0b\0\r\0\n\0c\0\r\0\n"),
}


@pytest.mark.parametrize(("before", "edits", "after"), EDITS.values(), ids=EDITS.keys())
async def test_edits(root: Path, before: bytes, edits: Edits, after: bytes) -> None:
    (root / "file").write_bytes(before)
    arguments = {"path": "file", "edits": edits, "encoding": "latin-1" if b"caf\xe9" in before else "utf-8"}
    dry = await call(root, "edit_file", **arguments, dryRun=True)
    assert (root / "file").read_bytes() == before
    assert await call(root, "edit_file", **arguments) == dry
    assert (root / "file").read_bytes() == after
    assert dry.startswith("--- file\n+++ file\n@@ ")


def near(line: int, mine: str, found: str) -> str:
    return f"at line {line} (- is oldText, + is the file):\n- {mine}\n+ {found}(end)"


FOUR = "line one\nline two\nline three aaa\nline four\n"
LOG = "".join(f"event number {n * 7919 % 150}\n" for n in range(100_000))
LINES, X = [f"line {n} is one of many" for n in range(200)], "x" * 100
ANSWERS: dict[str, tuple[str, Edits, str]] = {
    "several": (FOUR, [edit("line", "x")], "found 4 times (at lines 1, 2, 3, 4) in file, nothing was written"),
    "overlapping": (FOUR, [edit("aa", "x")], "found 2 times"),
    "gone after the first": (FOUR, [edit("e one", "1"), edit("e one", "2")], "edit 2: oldText was not found"),
    "nothing like it": (FOUR, [edit("%%%%%%%%%%", "x")], "no line of the file is like it"),
    "only another kind of break": (FOUR, [edit("one\nline", "one\r\nline")], "changes nothing"),
    "empty": (FOUR, [edit("", "x")], "at least 1 character"),
    "nothing but a mark": (FOUR, [edit("\ufeff", "x")], "changes nothing"),
    # The nearest text is shown where it differs.
    "spaces": ("def f():\n  return 1\ng():\n  a  b\n", [edit("g():\n  a b", "")], near(4, "  a b", "  a  b")),
    "many lines": ("\n".join(LINES), [edit("\n".join([*LINES[50:120], "none"]), "")], near(121, "none", LINES[120])),
    "past the end": ("first line\ntwo", [edit("first line\ntwo\n3", "")], near(3, "3", "(the end of the file)")),
    "a long line": (f"{X * 9}right{X * 9}", [edit(f"{X * 9}wrong", "")], near(1, f"{X}wrong", f"{X}right{X[5:]}")),
    # Built to take hours.
    "overlapping itself": ("a" * 3_000_000, [edit("a" * 100_000, "x")], "found 30 times"),
    "anagrams": (("a" * 50 + "b" * 50 + "\n") * 20_000, [edit("ab" * 50, "x")], "no line of the file"),
    "near misses": (LOG, [edit(LOG.replace("number", "numbers")[:90_000], "x")], "differs at line 1 "),
    "one edit of lines that are alike": (f"first\n{LOG}", [edit("first", "1st")], "@@ -1,4 +1,4 @@\n-first"),
    "edits far apart": (f"first\n{LOG}last", [edit("first", "1"), edit("last", "2")], "span 100002 lines"),
    "line breaks of all kinds": ("\r\n\r\r\n\n" * 200_000 + "a", [edit("a", "x\n" * 9)], "\n-a\n"),
}


@pytest.mark.parametrize(("text", "edits", "answer"), ANSWERS.values(), ids=ANSWERS.keys())
async def test_an_edit_that_does_not_fit_once_writes_nothing(root: Path, text: str, edits: Edits, answer: str) -> None:
    (root / "file").write_bytes(text.encode())
    told = await call(root, "edit_file", path="file", edits=edits)
    assert answer in f"{told}(end)"
    assert told.startswith("error: ") == ((root / "file").read_bytes() == text.encode())


async def test_a_diff_has_the_line_numbers_of_the_file_and_is_cut_to_as_many_characters(root: Path) -> None:
    for letter in ("x", "文"):
        (root / "file").write_text("".join(f"{letter * 20} {n}\n" for n in range(1, 1001)))
        arguments = {"path": "file", "edits": [edit(f"{letter} {n}\n", f"changed {n}\n") for n in range(900, 1000)]}
        text = await call(root, "edit_file", **arguments, dryRun=True, options=Options(max_output=1000))
        assert 900 < len(text) <= 1000
        assert re.search(r"\n\[the diff has \d+ more characters; read_file shows the file\]$", text)
    edits = [edit("文 900\n", "new\n"), edit(f"{'文' * 20} 500\n", ""), edit("文 700\n", "文 700\nmore\n")]
    diff = await call(root, "edit_file", path="file", edits=edits)
    assert re.findall(r"@@.*@@", diff) == ["@@ -497,7 +497,6 @@", "@@ -698,6 +697,7 @@", "@@ -897,7 +897,7 @@"]


def test_a_call_that_nobody_waits_for_or_that_another_program_overtakes_changes_nothing(root: Path) -> None:
    files = WritableFiles([root], (), False, 0)
    attempts: list[Callable[[], object]] = [
        lambda: files.write_file("note.txt", "late"),
        lambda: files.edit_file("note.txt", [Edit(oldText="one", newText="1")]),
        lambda: files.create_directory("late"),
        lambda: files.move_file("note.txt", "late"),
    ]
    for late, attempt in product((Call(cancelled=True), Call(deadline=0)), attempts):
        CALL.set(late)
        with pytest.raises(ToolError, match="nothing was changed"):
            attempt()
    assert snapshot(root) == {"note.txt": NOTE, "sub": None}
    CALL.set(Call())
    for name in ("note.txt", "new.txt"):
        target = Target(Sandbox([root]).roots[0], name, name, TEMPORARY)
        (root / name).write_text("saved by an editor")
        with pytest.raises(ToolError, match="was changed by another program"):
            target.replace(b"ours")
    assert set(snapshot(root).values()) == {None, b"saved by an editor"}


def test_two_processes_lose_no_edit_wait_for_a_third_and_survive_a_full_disk(root: Path, stdio: Start) -> None:
    (root / "list").write_text("".join(f"item {n};\n" for n in range(100)))
    limited: dict[str, Any] = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))}
    servers, lock = [stdio("fs_write_server.py", str(root), **limited) for _ in range(2)], os.open(root, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    for n in range(100):
        servers[n % 2].start("edit_file", path="list", edits=[edit(f"item {n};", f"done {n};")])
    assert servers[0].text("read_file", path="note.txt").encode() == NOTE
    os.close(lock)
    results = [servers[n % 2].receive()["result"] for n in range(100)]
    assert not any(result["isError"] for result in results), results
    for path in ("note.txt", "other.txt"):
        result = servers[0].call("write_file", path=path, content="x" * 200_000)
        assert "file too large" in result["content"][0]["text"]
    done = "".join(f"done {n};\n" for n in range(100)).encode()
    assert snapshot(root) == {"list": done, "note.txt": NOTE, "sub": None}


SWAPPER = """
import os, sys
from contextlib import suppress
os.chdir(sys.argv[1])
while True:
    for name in ("dir", "file.txt"):
        with suppress(OSError):
            os.rename(name, "kept"); os.symlink(sys.argv[2] + ("/file.txt" if name == "file.txt" else ""), name)
        with suppress(OSError):
            if os.path.islink(name):
                os.unlink(name)
            os.rename("kept", name)
"""


@pytest.mark.slow
def test_nothing_outside_changes_while_another_process_swaps_directories_for_symlinks(disk: Path, stdio: Start) -> None:
    root, outside = disk / "root", disk / "outside"
    for directory in (root, root / "dir", outside):
        directory.mkdir()
        (directory / "file.txt").write_text("start")
    before, moves = snapshot(outside), ("dir/new.txt", "dir/moved.txt", "elsewhere.txt", "dir/again.txt")
    calls: list[tuple[str, dict[str, Any]]] = [
        *(("write_file", {"path": path, "content": "written"}) for path in ("dir/file.txt", "file.txt", moves[0])),
        ("edit_file", {"path": "dir/file.txt", "edits": [edit("e", "ee")]}),
        ("create_directory", {"path": "dir/made/deeper"}),
        *(("move_file", {"source": old, "destination": to}) for old, to in pairwise(moves)),
    ]
    server = stdio("fs_write_server.py", str(root))
    assert all(calls_during_a_race(server, SWAPPER, [str(root), str(outside)], calls))
    assert snapshot(outside) == before
    assert list(root.rglob(TEMPORARY)) == []


@pytest.mark.slow
def test_killed_at_any_moment_the_old_or_the_new_content_is_there_whole(disk: Path) -> None:
    contents = [str(n) * 3_000_000 for n in range(5)]
    (disk / "file.txt").write_text(contents[0])
    choose, left = random.Random(3), 0
    for _ in range(60):
        server = Stdio("fs_write_server.py", str(disk))
        server.initialize()
        for content in contents:
            server.start("write_file", path="file.txt", content=content)
        for _ in range(choose.randrange(4)):
            server.receive()
        time.sleep(choose.random() / 50)  # else it would always be the same moment after an answer
        server.process.kill()
        assert server.close() == -signal.SIGKILL
        assert (disk / "file.txt").read_text() in contents
        left += (disk / TEMPORARY).exists()
    assert left  # at least one was killed in the middle of a write
