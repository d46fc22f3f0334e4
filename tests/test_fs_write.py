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
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import product
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


@pytest.fixture(params=[True, False], ids=["", "without dir_fd"])
def _any_platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.HAS_DIR_FD", request.param)


any_platform = pytest.mark.usefixtures("_any_platform")


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


# ------------------------------------------------------------------------------------------------ what is refused

FORMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "write": ("write_file", "path", {"content": "evil"}),
    "edit": ("edit_file", "path", {"edits": [edit("evil", "more")]}),
    "make": ("create_directory", "path", {}),
    "move to": ("move_file", "destination", {"source": "other"}),
    "move from": ("move_file", "source", {"destination": "moved"}),
}
ANYHOW = ["write", "edit", "make", "move to", "move from"]
BAD_PATHS: list[tuple[str, list[str], list[str]]] = [
    ("outside", ANYHOW, ["../outside/file.txt", "../outside/new", "/tmp/fs-server-new", "link/file.txt", "link/new"]),
    ("outside", ["write", "edit", "make"], ["link_file", "link_missing"]),
    ("allowed directory", ["write", "edit", "move to", "move from"], [".", "deep", "deep/root"]),
    ("--allow-secrets", ANYHOW, [".env", "sub/.ssh/config", ".ssh"]),
    ("left alone", ANYHOW, [f"sub/{TEMPORARY}", TEMPORARY.upper(), "sub/x.private"]),
    ("NUL", ANYHOW, ["a\0b"]),
    ("too long", ANYHOW, ["x" * 300]),
    ("not a directory", ANYHOW, ["note.txt/x"]),
    ("create_directory", ["write", "edit", "move to", "move from"], ["no/such/file.txt"]),
    ("leave the slash out", ["write", "edit"], ["new/"]),
    ("is a directory", ["write", "edit"], ["sub"]),
    ("never opened", ["write", "edit"], ["fifo"]),
    ("not a directory", ["make"], ["note.txt", "fifo"]),
    ("not overwritten", ["move to"], ["sub", "note.txt", "fifo", "link_file", "link_missing"]),
    ("itself or inside it", ["move to"], ["other", "other/inner"]),
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
            assert re.fullmatch(f"error: .*{message}.*", answer), (path, answer)
    assert snapshot(root.parent) == before


async def test_a_directory_is_not_moved_to_where_its_protected_files_could_be_read(root: Path) -> None:
    for name in ("sub/node_modules/code.py", "sub/.env", f"too/{'deep/' * 101}file"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("hunter2")
    for source, deny, answer in (
        ("sub", "sub/*/code*", "error: sub has files that --deny protects"),
        ("sub", "sub/**/*.py", "error: sub has files that --deny protects"),
        ("sub", "other/code*", "moved"),
        ("too", "sub/**/code", "could not be searched"),
    ):
        assert answer in await call(root, "move_file", source=source, destination="open", deny=[deny])
    assert "--allow-secrets" in await call(root, "read_file", path="open/.env")  # known by its name wherever it is


@any_platform
async def test_files_and_directories_are_made_or_replaced_and_the_answer_says_which(root: Path) -> None:
    assert await call(root, "create_directory", path="a/b") == "created a/b"
    assert await call(root, "create_directory", path="a/b") == "a/b was there already"
    (root / "a" / "alias").symlink_to("../note.txt")
    (root / "trap").hardlink_to(root.parent / "outside" / "file.txt")
    roots = [root.parent / "outside", root]  # a new file goes to where its directory is
    assert await call(roots, "write_file", path="a/b/new", content="käse\r\n") == "created a/b/new: 7 bytes"
    answer = await call(root, "write_file", path="a/alias", content="")
    assert answer == "replaced a/alias: 14 bytes before, 0 bytes now"
    await call(root, "edit_file", path="trap", edits=[edit(OUTSIDE, "inside")])
    assert (root.parent / "outside" / "file.txt").read_text() == OUTSIDE
    links, directories = {"a/alias": "../note.txt"}, {"a": None, "a/b": None, "sub": None}
    files = {"a/b/new": "käse\r\n".encode(), "note.txt": b"", "trap": b"inside"}
    assert snapshot(root) == {**links, **directories, **files}
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((root / "a" / "b" / "new").stat().st_mode) == 0o666 & ~umask


async def test_a_whole_file_is_written_as_given_but_for_its_byte_order_mark(root: Path) -> None:
    for before, content, after in (
        (BOM + b"old", "new", BOM + b"new"),
        (BOM + b"old", "\ufeff\ufeffnew", BOM + b"new"),
        (BOM + b"old", "", b""),
        (b"old", "\ufeffnew", BOM + b"new"),  # a mark that is wanted
        (b"a\r\nb\r\n", "a\nb\r\nc\r", b"a\nb\r\nc\r"),
    ):
        (root / "file").write_bytes(before)
        await call(root, "write_file", path="file", content=content)
        assert (root / "file").read_bytes() == after
    assert "10000000" in await call(root, "write_file", path="file", content="é" * 5_000_001)
    (root / "file").write_bytes(b"caf\xe9")
    assert '"latin-1" fits' in await call(root, "edit_file", path="file", edits=[edit("caf", "x")])


async def test_mode_owner_and_attributes_survive_and_the_audit_log_tells_of_each_change(root: Path) -> None:
    note, log = root / "note.txt", Options(audit_log=root.parent / "audit")
    if os.geteuid() == 0:
        os.chown(note, 12345, 23456)
    note.chmod(0o4751)
    with suppress(OSError):  # not every disk has them
        os.setxattr(note, "user.test", b"kept")
    before, attributes = note.stat(), os.listxattr(note)
    await call(root, "edit_file", path="note.txt", edits=[edit("two", "2")], options=log)
    await call(root, "write_file", path="note.txt", content="all new", options=log)
    after = note.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert os.listxattr(note) == attributes
    await call(root, "write_file", path="new", content="1", options=log)
    await call(root, "move_file", source="new", destination="newer", options=log)
    first, second, third, fourth = map(json.loads, (root.parent / "audit").read_text().splitlines())
    assert (first["path"], first["bytes_before"], first["bytes_after"]) == ("note.txt", 14, 12)
    assert second["sha256_before"] == first["sha256_after"] != second["sha256_after"]
    assert (third["bytes_before"], third["sha256_before"]) == (None, None)
    assert (fourth["path"], fourth["destination"]) == ("new", "newer")


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
        assert message == "closed is write-protected and left alone; ask the user to permit writing it"
        found = {path.name: (stat.S_IMODE(path.stat().st_mode), path.read_text()) for path in root.iterdir()}
    assert found == {"program": (0o777, "new"), "shared": (0o606, "new"), "closed": (0o644, "old")}


@any_platform
async def test_moving_files_directories_and_links(root: Path, disk: Path) -> None:
    (root / "link").symlink_to("note.txt")
    (root / "other").touch()
    (root / "full").mkdir()
    here, back = str(root / "sub2" / "n.txt"), str(root / "back.txt")
    for source, destination, answer in (
        ("note.txt", "sub/n.txt", "moved note.txt to sub/n.txt"),
        ("sub/n.txt", "other", "not overwritten"),
        ("sub", "full", "not overwritten"),
        ("other", "archive/", "leave the slash out"),
        ("sub", "sub2/", "moved sub to sub2/"),
        ("link", "link2", "moved link to link2"),
        (here, back, f"moved {here} to {back}"),
        ("other", str(disk / "other"), "another disk" if disk.stat().st_dev != root.stat().st_dev else "moved"),
    ):
        assert answer in await call([root, disk], "move_file", source=source, destination=destination)
    assert {"back.txt": NOTE, "link2": "note.txt", "sub2": None, "full": None}.items() <= snapshot(root).items()


EDITS: dict[str, tuple[bytes, Edits, bytes]] = {
    "no final newline": (b"one\ntwo", [edit("two", "2")], b"one\n2"),
    "dollars and backslashes": (b"a $1 \\1 (.*) b", [edit("$1 \\1 (.*)", "$2 \\g<0> [x]")], b"a $2 \\g<0> [x] b"),
    "line separators": ("a\u2028b\x0bc\n".encode(), [edit("b", "B")], "a\u2028B\x0bc\n".encode()),
    # Line endings: a break stands for any kind, and the new text gets the kinds that stand where it goes.
    "crlf": (b"one\r\ntwo\r\n", [edit("one\ntwo", "1\n2\n3")], b"1\r\n2\r\n3\r\n"),
    "at the end of crlf": (b"a\r\nb", [edit("b", "b\nc\n")], b"a\r\nb\r\nc\r\n"),
    "mixed, all of it": (b"a\r\nb\nc\rd\r\n", [edit("a\nb\nc\nd", "A\nB\nC\nD")], b"A\r\nB\nC\rD\r\n"),
    "mixed, a line more": (b"a\nb\r\nc\nd\r\n", [edit("b\nc", "b\nnew\nc")], b"a\nb\r\nnew\nc\nd\r\n"),
    "mixed, a line less": (b"a\nb\r\nc\nd\r\n", [edit("a\nb\nc", "b\nc")], b"b\r\nc\nd\r\n"),
    "mixed, a line before": (b"a\nb\r\nc\n", [edit("b\n", "new\nb\n")], b"a\nnew\r\nb\r\nc\n"),
    "mixed, after each other": (b"a\r\nb\nc\n", [edit("a", "a\nx"), edit("b", "y\nb")], b"a\r\nx\r\ny\nb\nc\n"),
    "bare cr": (b"a\rb\n", [edit("a\rb", "a\rc\rd")], b"a\rc\rd\n"),
    "cr only": (b"one\rtwo\rthree\r", [edit("one\ntwo\n", "1\n2\n3\n")], b"1\r2\r3\rthree\r"),
    "latin-1": (b"caf\xe9\n", [edit("café", "thé")], b"th\xe9\n"),
    # Byte-order marks: no text, and there once.
    "bom": (BOM + b"one\n", [edit("\ufeffone", "\ufeff1")], BOM + b"1\n"),
    "utf-16": ("one\ntwo\n".encode("utf-16"), [edit("\ufeffone\ntwo", "zwei ü")], "zwei ü\n".encode("utf-16")),
    "utf-16 big endian": (b"\xfe\xff\0a\0\r\0\n", [edit("a", "b\nc")], b"\xfe\xff\0b\0\r\0\n\0c\0\r\0\n"),
    "utf-32": ("one\ntwo\n".encode("utf-32"), [edit("two", "zwei")], "one\nzwei\n".encode("utf-32")),
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


BAD_EDITS: dict[str, tuple[Edits, str]] = {
    "several": ([edit("line", "x")], "found 4 times in file (at lines 1, 2, 3, 4), nothing was written"),
    "overlapping": ([edit("aa", "x")], "found 2 times"),
    "gone after the first": ([edit("line one", "1"), edit("line one", "2")], "edit 2: oldText was not found"),
    "near miss": ([edit("line  two", "x")], "at line 2"),
    "nothing like it": ([edit("%%%%%%%%%%", "x")], "no line of the file is like it"),
    "only another kind of break": ([edit("one\nline", "one\r\nline")], "changes nothing"),
    "empty": ([edit("", "x")], "at least 1 character"),
    "nothing but a mark": ([edit("\ufeff", "x")], "changes nothing"),
    "none": ([], "at least 1 item"),
    "wrong key": ([{"old": "a", "new": "b"}], "oldText: field required"),
}


@pytest.mark.parametrize(("edits", "message"), BAD_EDITS.values(), ids=BAD_EDITS.keys())
async def test_an_edit_that_does_not_fit_once_writes_nothing(root: Path, edits: Edits, message: str) -> None:
    (root / "file").write_text(text := "line one\nline two\nline three aaa\nline four\n")
    answer = await call(root, "edit_file", path="file", edits=edits)
    assert answer.startswith("error: ")
    assert message in answer
    assert (root / "file").read_text() == text


async def test_the_nearest_text_is_shown_where_it_differs(root: Path) -> None:
    lines, x = [f"line {n} is one of many" for n in range(200)], "x" * 100
    for text, old, line, mine, found in (
        ("def f():\n  return 1\ndef g():\n  a  b\n", "def g():\n  a b", 4, "  a b", "  a  b"),
        ("\n".join(lines), "\n".join([*lines[50:120], "line 120 is none"]), 121, "line 120 is none", lines[120]),
        ("def add(a, b):\n  a  b\n", "add(a, b):\n  a b", 2, "  a b", "  a  b"),
        ("first line\ntwo", "first line\ntwo\n3", 3, "3", "(the end of the file)"),
        (f"{x * 9}right{x * 9}", f"{x * 9}wrong", 1, f"{x}wrong", f"{x}right{x[5:]}"),
    ):
        (root / "file").write_text(text)
        answer = await call(root, "edit_file", path="file", edits=[edit(old, "new")])
        assert answer.endswith(f"at line {line} (- is oldText, + is the file):\n- {mine}\n+ {found}")


LOG = "".join(f"event number {n * 7919 % 150}\n" for n in range(100_000))
EDIT_BOMBS: dict[str, tuple[str, Edits, str]] = {
    "overlapping itself": ("a" * 3_000_000, [edit("a" * 100_000, "x")], "found 30 times"),
    "anagrams": (("a" * 50 + "b" * 50 + "\n") * 20_000, [edit("ab" * 50, "x")], "no line of the file"),
    "near misses": (LOG, [edit(LOG.replace("number", "numbers")[:90_000], "x")], "differs at line 1 "),
    "one edit of lines that are alike": (f"first\n{LOG}", [edit("first", "1st")], "@@ -1,4 +1,4 @@\n-first"),
    "edits far apart": (f"first\n{LOG}last", [edit("first", "1"), edit("last", "2")], "span 100002 lines"),
    "line breaks of all kinds": ("\r\n\r\r\n\n" * 200_000 + "a", [edit("a", "x\n" * 9)], "\n-a\n"),
}


@pytest.mark.parametrize(("text", "edits", "answer"), EDIT_BOMBS.values(), ids=EDIT_BOMBS.keys())
async def test_an_edit_built_to_take_hours_just_answers(root: Path, text: str, edits: Edits, answer: str) -> None:
    (root / "file").write_bytes(text.encode())
    assert answer in await call(root, "edit_file", path="file", edits=edits, dryRun=True)


async def test_a_diff_has_the_line_numbers_of_the_file_and_is_cut_to_as_many_characters(root: Path) -> None:
    for letter in ("x", "文"):
        (root / "file").write_text("".join(f"{letter * 20} {n}\n" for n in range(1, 1001)))
        arguments = {"path": "file", "edits": [edit(f"{letter} {n}\n", f"changed {n}\n") for n in range(900, 1000)]}
        text = await call(root, "edit_file", **arguments, dryRun=True, options=Options(max_output=1000))
        assert 900 < len(text) <= 1000
        assert re.search(r"\n\[lines 1-\d+ of 2\d\d of the diff shown; read_file shows the file\]$", text)
    edits = [edit("文 900\n", "new\n"), edit(f"{'文' * 20} 500\n", ""), edit("文 700\n", "文 700\nmore\n")]
    diff = await call(root, "edit_file", path="file", edits=edits)
    assert re.findall(r"@@.*@@", diff) == ["@@ -497,7 +497,6 @@", "@@ -698,6 +697,7 @@", "@@ -897,7 +897,7 @@"]
    assert [line[0] for line in diff.splitlines() if line[0] in "-+"] == ["-", "+", "-", "+", "-", "+"]


# --------------------------------------------------------------------------------------------- races and failures


async def test_what_is_left_under_the_temporary_name_is_gone_after_the_next_write(root: Path) -> None:
    for leave in ("touch", "mkfifo", "ln -s ../outside/file.txt", "ln ../outside/file.txt"):
        subprocess.run([*leave.split(), TEMPORARY], cwd=root, check=True)
        await call(root, "write_file", path="sub/../note.txt", content="new")
        assert snapshot(root) == {"note.txt": b"new", "sub": None}
    assert (root.parent / "outside" / "file.txt").read_text() == OUTSIDE


def test_a_call_that_nobody_waits_for_any_more_changes_nothing(root: Path) -> None:
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


def test_what_another_program_has_changed_since_it_was_read_is_not_replaced(root: Path) -> None:
    CALL.set(Call())
    for name in ("note.txt", "new.txt"):
        target = Target(Sandbox([root]).roots[0], name, name, TEMPORARY)
        (root / name).write_text("saved by an editor")
        with pytest.raises(ToolError, match="was changed by another program"):
            target.replace(b"ours")
    assert set(snapshot(root).values()) == {None, b"saved by an editor"}


def test_edits_by_two_processes_lose_none_and_wait_while_a_third_has_the_lock(root: Path, stdio: Start) -> None:
    (root / "list").write_text("".join(f"item {n};\n" for n in range(100)))
    servers, lock = [stdio("fs_write_server.py", str(root)) for _ in range(2)], os.open(root, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    for n in range(100):
        servers[n % 2].start("edit_file", path="list", edits=[edit(f"item {n};", f"done {n};")])
    assert servers[0].text("read_file", path="note.txt").encode() == NOTE
    os.close(lock)
    for n in range(100):
        result = servers[n % 2].receive()["result"]
        assert not result["isError"], result
    assert (root / "list").read_text() == "".join(f"done {n};\n" for n in range(100))


def test_a_full_disk_leaves_the_old_content_and_no_temporary_file(root: Path, stdio: Start) -> None:
    limits = resource.RLIMIT_FSIZE, (100_000, 100_000)
    server = stdio("fs_write_server.py", str(root), preexec_fn=lambda: resource.setrlimit(*limits))
    for path in ("note.txt", "other.txt"):
        result = server.call("write_file", path=path, content="x" * 200_000)
        assert result["isError"]
        assert "file too large" in result["content"][0]["text"]
    assert snapshot(root) == {"note.txt": NOTE, "sub": None}
    server.text("write_file", path="note.txt", content="fits")


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
    before = snapshot(outside)
    new, moved, elsewhere = "dir/new.txt", "dir/moved.txt", "elsewhere.txt"
    calls: list[tuple[str, dict[str, Any]]] = [
        *(("write_file", {"path": path, "content": "written"}) for path in ("dir/file.txt", "file.txt", new)),
        ("edit_file", {"path": "dir/file.txt", "edits": [edit("e", "ee")]}),
        ("create_directory", {"path": "dir/made/deeper"}),
        *(("move_file", {"source": old, "destination": to}) for old, to in ((new, moved), (moved, elsewhere))),
        ("move_file", {"source": elsewhere, "destination": "dir/again.txt"}),
    ]
    server = stdio("fs_write_server.py", str(root))
    for _ in calls_during_a_race(server, SWAPPER, [str(root), str(outside)], calls):
        pass
    assert snapshot(outside) == before
    assert list(root.rglob(TEMPORARY)) == []


@pytest.mark.slow
def test_killed_at_any_moment_the_old_or_the_new_content_is_there_whole(disk: Path) -> None:
    contents = {str(n) * 300_000 for n in range(10)}
    (disk / "file.txt").write_text("0" * 300_000)
    choose = random.Random(3)
    left = 0
    for _ in range(60):
        server = Stdio("fs_write_server.py", str(disk))
        server.initialize()
        for n in range(20):
            server.start("write_file", path="file.txt", content=str(n % 10) * 300_000)
        for _ in range(choose.randrange(6)):
            server.receive()
        server.process.kill()
        assert server.close() == -signal.SIGKILL
        assert (disk / "file.txt").read_text() in contents
        left += (disk / TEMPORARY).exists()
    assert left  # at least one was killed in the middle of a write
    server = Stdio("fs_write_server.py", str(disk))
    server.initialize()
    server.text("write_file", path="file.txt", content="new")
    server.close()
    assert snapshot(disk) == {"file.txt": b"new"}
