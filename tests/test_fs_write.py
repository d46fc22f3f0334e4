"""The file server with --write: what is on disk after each call, whatever happens meanwhile."""

import json
import os
import random
import re
import resource
import signal
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from common import Options
from conftest import Stdio, calls_during_a_race, ok, refused
from mcp import Client
from mcp.server.mcpserver.exceptions import ToolError

from fs_server import Edit, Files, Work, build_server, edit_text, move, write_text

pytestmark = pytest.mark.anyio

Start = Callable[..., Stdio]
OUTSIDE = "outside, never to be changed"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "note.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file.txt").write_text(OUTSIDE)
    return root


def client_for(*roots: Path, **keywords: Any) -> Client:
    return Client(build_server(roots, write=True, **keywords))


def snapshot(directory: Path) -> dict[str, bytes | str | None]:
    """Everything below a directory, with what it holds."""
    return {
        str(path.relative_to(directory)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in directory.rglob("*")
    }


def leftovers(directory: Path) -> list[Path]:
    return [path for path in directory.rglob(".*") if path.name.startswith(".fs-server-")]


def edit(old: str, new: str) -> dict[str, str]:
    return {"oldText": old, "newText": new}


async def test_without_write_the_tools_are_not_there(root: Path) -> None:
    async with Client(build_server([root])) as client:
        for tool in ("write_file", "edit_file", "create_directory", "move_file"):
            assert "unknown tool" in await refused(client, tool, path="x")


async def test_annotations_say_what_is_destructive_and_idempotent(root: Path) -> None:
    async with client_for(root) as client:
        tools = (await client.list_tools()).tools
    hints = {
        tool.name: (tool.annotations.destructive_hint, tool.annotations.idempotent_hint)
        for tool in tools
        if tool.annotations and not tool.annotations.read_only_hint
    }
    assert hints == {
        "write_file": (True, True),
        "edit_file": (True, False),
        "create_directory": (False, True),
        "move_file": (False, False),
    }


# ---------------------------------------------------------------------------------------------------- write_file


async def test_a_file_is_made_or_replaced_and_the_answer_says_which(root: Path) -> None:
    async with client_for(root) as client:
        assert await ok(client, "write_file", path="new.txt", content="käse\r\n") == "created new.txt: 7 bytes"
        assert (root / "new.txt").read_bytes() == "käse\r\n".encode()
        umask = os.umask(0)
        os.umask(umask)
        assert stat.S_IMODE((root / "new.txt").stat().st_mode) == 0o666 & ~umask
        answer = await ok(client, "write_file", path="note.txt", content="")
        assert answer == "replaced note.txt: 14 bytes before, 0 bytes now"
        assert (root / "note.txt").read_bytes() == b""
    assert leftovers(root) == []


async def test_a_new_file_goes_to_the_allowed_directory_that_has_its_directory(root: Path) -> None:
    second = root.parent / "second"
    (second / "only").mkdir(parents=True)
    async with client_for(root, second) as client:
        await ok(client, "write_file", path="only/new.txt", content="x")
        await ok(client, "write_file", path="new.txt", content="x")
    assert (second / "only" / "new.txt").exists()
    assert (root / "new.txt").exists()


BAD_WRITES = {
    "outside": ("../outside/file.txt", "outside"),
    "new outside": ("../outside/new.txt", "outside"),
    "absolute": ("/tmp/fs-server-test-new.txt", "outside"),
    "through a link": ("link/file.txt", "outside"),
    "new through a link": ("link/new.txt", "outside"),
    "a link to a file": ("link_file", "outside"),
    "a dangling link": ("link_missing", "outside"),
    "the root": (".", "allowed directory"),
    "a directory": ("sub", "is a directory"),
    "below a file": ("note.txt/x", "not a directory"),
    "missing directory": ("no/such/file.txt", "create_directory"),
    "secret": (".env", "--allow-secrets"),
    "secret in a directory": ("sub/.ssh/config", "--allow-secrets"),
    "nul": ("a\0b", "NUL"),
    "fifo": ("fifo", "never opened"),
    "too long": ("x" * 300, "too long"),
    "a new directory": ("new/", "no name for a file"),
    "a temporary file": (f"sub/.fs-server-{'0' * 16}.tmp", "no name for a file"),
}


@pytest.mark.parametrize(("path", "message"), BAD_WRITES.values(), ids=BAD_WRITES.keys())
@pytest.mark.parametrize("tool", ["write_file", "edit_file"])
async def test_what_may_not_be_written_is_refused_and_nothing_changes(
    root: Path, tool: str, path: str, message: str
) -> None:
    (root / "link").symlink_to("../outside")
    (root / "link_file").symlink_to("../outside/file.txt")
    (root / "link_missing").symlink_to("../outside/missing.txt")
    os.mkfifo(root / "fifo")
    before = snapshot(root.parent)
    arguments: dict[str, Any] = {"content": "evil"} if tool == "write_file" else {"edits": [edit("o", "evil")]}
    async with client_for(root) as client:
        assert message in await refused(client, tool, path=path, **arguments)
    assert snapshot(root.parent) == before


async def test_links_inside_are_written_through_and_stay_links(root: Path) -> None:
    (root / "sub" / "alias").symlink_to("../note.txt")
    async with client_for(root) as client:
        await ok(client, "write_file", path="sub/alias", content="new")
    assert (root / "note.txt").read_text() == "new"
    assert (root / "sub" / "alias").is_symlink()


async def test_a_hard_link_made_beforehand_keeps_the_old_content(root: Path) -> None:
    (root / "trap.txt").hardlink_to(root.parent / "outside" / "file.txt")
    async with client_for(root) as client:
        await ok(client, "write_file", path="trap.txt", content="new")
        await ok(client, "edit_file", path="trap.txt", edits=[edit("new", "newer")])
    assert (root.parent / "outside" / "file.txt").read_text() == OUTSIDE
    assert (root / "trap.txt").read_text() == "newer"


async def test_mode_owner_and_extended_attributes_survive(root: Path) -> None:
    note = root / "note.txt"
    note.chmod(0o751)
    if os.geteuid() == 0:
        os.chown(note, 12345, 23456)
    try:
        os.setxattr(note, "user.test", b"kept")
        has_attributes = True
    except OSError:
        has_attributes = False
    before = note.stat()
    async with client_for(root) as client:
        await ok(client, "edit_file", path="note.txt", edits=[edit("two", "2")])
        await ok(client, "write_file", path="note.txt", content="all new")
    after = note.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    if has_attributes:
        assert os.getxattr(note, "user.test") == b"kept"


async def test_too_much_content_is_refused(root: Path) -> None:
    async with client_for(root) as client:
        assert "10000000" in await refused(client, "write_file", path="big", content="é" * 5_000_001)
        assert "at most 10000000" in await refused(client, "write_file", path="big", content="x" * 10_000_001)
    assert not (root / "big").exists()


async def test_the_audit_line_names_sizes_and_hashes_before_and_after(root: Path) -> None:
    log = root.parent / "audit"
    async with client_for(root, options=Options(audit_log=log)) as client:
        await ok(client, "write_file", path="a", content="1")
        await ok(client, "edit_file", path="a", edits=[edit("1", "22")])
        await ok(client, "move_file", source="a", destination="b")
    first, second, third = [json.loads(line) for line in log.read_text().splitlines()]
    assert (first["path"], first["bytes_before"], first["bytes_after"]) == ("a", None, 1)
    assert (second["bytes_before"], second["bytes_after"]) == (1, 2)
    assert second["sha256_before"] == first["sha256_after"]
    assert len(second["sha256_after"]) == 64
    assert (third["path"], third["destination"]) == ("a", "b")


AS_NOBODY = """
import os, sys
import fs_server
sys.argv = sys.argv[1:]
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
fs_server.main()
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
        server = stdio("-c", AS_NOBODY, "fs_server.py", name, "--write")
        for file in ("program", "shared"):
            server.text("write_file", path=file, content="new")
        message = server.call("write_file", path="closed", content="new")["content"][0]["text"]
        assert message == "closed is write-protected and left alone; ask the user to permit writing it"
        found = {path.name: (stat.S_IMODE(path.stat().st_mode), path.read_text()) for path in root.iterdir()}
    assert found == {"program": (0o777, "new"), "shared": (0o606, "new"), "closed": (0o644, "old")}


# ----------------------------------------------------------------------------------------------------- edit_file

EDITS: dict[str, tuple[bytes, list[dict[str, str]], bytes]] = {
    "one": (b"one\ntwo\n", [edit("two", "2")], b"one\n2\n"),
    "several lines": (b"one\ntwo\nthree\n", [edit("one\ntwo\n", "1\n")], b"1\nthree\n"),
    "after each other": (b"a b\n", [edit("a", "b c"), edit("b c b", "d")], b"d\n"),
    "unique only after the first": (b"x x\n", [edit("x x", "x y"), edit("x", "z")], b"z y\n"),
    "deleting": (b"one\ntwo\n", [edit("two\n", "")], b"one\n"),
    "crlf": (b"one\r\ntwo\r\n", [edit("one\ntwo", "1\n2\n3")], b"1\r\n2\r\n3\r\n"),
    "crlf told": (b"one\r\ntwo\r\n", [edit("one\r\ntwo", "1\r\n2")], b"1\r\n2\r\n"),
    "lf stays lf": (b"one\ntwo\n", [edit("one\r\ntwo", "1\r\n2")], b"1\n2\n"),
    "mixed, in the crlf part": (b"a\nb\r\nc\r\nd\n", [edit("b\nc", "B\nC")], b"a\nB\r\nC\r\nd\n"),
    "mixed, in the lf part": (b"a\nb\nc\r\nd\r\n", [edit("a\nb", "A\nB")], b"A\nB\nc\r\nd\r\n"),
    "inserting a line in crlf": (b"a\r\nb\r\n", [edit("b", "b\nc")], b"a\r\nb\r\nc\r\n"),
    "bare cr": (b"a\rb\n", [edit("b", "c")], b"a\rc\n"),
    "no final newline": (b"one\ntwo", [edit("two", "2")], b"one\n2"),
    "bom": (b"\xef\xbb\xbfone\n", [edit("one", "1")], b"\xef\xbb\xbf1\n"),
    "utf-16": ("one\ntwo\n".encode("utf-16"), [edit("two", "zwei ü")], "one\nzwei ü\n".encode("utf-16")),
    "utf-16 big endian": (
        b"\xfe\xff" + "one\r\n".encode("utf-16-be"),
        [edit("one", "1\n2")],
        b"\xfe\xff" + "1\r\n2\r\n".encode("utf-16-be"),
    ),
    "dollars and backslashes": (b"a $1 \\1 (.*) b", [edit("$1 \\1 (.*)", "$2 \\g<0> [x]")], b"a $2 \\g<0> [x] b"),
    "utf-32": ("one\ntwo\n".encode("utf-32"), [edit("two", "zwei")], "one\nzwei\n".encode("utf-32")),
    "line separators": ("a\u2028b\x0bc\n".encode(), [edit("b", "B")], "a\u2028B\x0bc\n".encode()),
    "umlauts": ("käse öl\n".encode(), [edit("käse", "Brot")], "Brot öl\n".encode()),
}


@pytest.mark.parametrize(("before", "edits", "after"), EDITS.values(), ids=EDITS.keys())
async def test_edits(root: Path, before: bytes, edits: list[dict[str, str]], after: bytes) -> None:
    (root / "file").write_bytes(before)
    async with client_for(root) as client:
        dry = await ok(client, "edit_file", path="file", edits=edits, dryRun=True)
        assert (root / "file").read_bytes() == before
        assert await ok(client, "edit_file", path="file", edits=edits) == dry
    assert (root / "file").read_bytes() == after
    assert dry.startswith("--- file\n+++ file\n@@ ")


async def test_latin_1_is_edited_when_it_is_told(root: Path) -> None:
    (root / "file").write_bytes(b"caf\xe9\n")
    async with client_for(root) as client:
        assert "latin-1" in await refused(client, "edit_file", path="file", edits=[edit("caf", "x")])
        await ok(client, "edit_file", path="file", edits=[edit("café", "thé")], encoding="latin-1")
        message = await refused(client, "edit_file", path="file", edits=[edit("thé", "日")], encoding="latin-1")
        assert "cannot write" in message
    assert (root / "file").read_bytes() == b"th\xe9\n"


BAD_EDITS: dict[str, tuple[list[dict[str, str]], str]] = {
    "several": ([edit("line", "x")], "found 4 times in file (at lines 1, 2, 3, 4), nothing was written"),
    "overlapping": ([edit("aa", "x")], "found 2 times"),
    "second fails": ([edit("line one", "1"), edit("missing entirely", "x")], "edit 2: oldText was not found"),
    "gone after the first": ([edit("line one", "1"), edit("line one", "2")], "edit 2: oldText was not found"),
    "near miss": ([edit("line  two", "x")], "at line 2"),
    "nothing like it": ([edit("%%%%%%%%%%", "x")], "no line of the file is like it"),
    "no change": ([edit("line one", "line one")], "changes nothing"),
    "empty": ([edit("", "x")], "at least 1 character"),
    "none": ([], "at least 1 item"),
    "wrong key": ([{"old": "a", "new": "b"}], "oldText: field required"),
}


@pytest.mark.parametrize(("edits", "message"), BAD_EDITS.values(), ids=BAD_EDITS.keys())
async def test_an_edit_that_does_not_fit_exactly_once_writes_nothing(
    root: Path, edits: list[dict[str, str]], message: str
) -> None:
    text = "line one\nline two\nline three aaa\nline four\n"
    (root / "file").write_text(text)
    async with client_for(root) as client:
        result = await client.call_tool("edit_file", {"path": "file", "edits": edits})
    assert result.is_error
    assert message in result.content[0].text  # pyright: ignore
    assert (root / "file").read_text() == text


async def test_the_nearest_text_comes_as_a_diff(root: Path) -> None:
    (root / "file").write_text("def f():\n    return 1\n\ndef g():\n    return  2\n")
    async with client_for(root) as client:
        result = await client.call_tool("edit_file", {"path": "file", "edits": [edit("def g():\n    return 2", "x")]})
    assert "at line 4" in result.content[0].text  # pyright: ignore
    assert "-     return 2\n+     return  2" in result.content[0].text  # pyright: ignore


async def test_the_nearest_text_is_shown_where_it_differs(root: Path) -> None:
    lines = [f"line {n} is one of many" for n in range(200)]
    (root / "file").write_text("\n".join(lines))
    (root / "long").write_text("x" * 5000 + "right" + "y" * 5000)
    async with client_for(root) as client:
        wrong = "\n".join([*lines[50:120], "line 120 is none of many"])
        result = await client.call_tool("edit_file", {"path": "file", "edits": [edit(wrong, "x")]})
        text = str(result.content[0].text)  # pyright: ignore
        assert "at line 120 (" in text
        assert "- line 120 is none of many\n+ line 120 is one of many" in text
        assert len(text) < 1000
        result = await client.call_tool("edit_file", {"path": "long", "edits": [edit("x" * 5000 + "wrong", "z")]})
        text = str(result.content[0].text)  # pyright: ignore
        assert "- " + "x" * 100 + "wrong\n" in text
        assert "+ " + "x" * 100 + "right" in text
        assert len(text) < 1000


LOG = "".join(f"event number {n * 7919 % 150}\n" for n in range(100_000))
EDIT_BOMBS: dict[str, tuple[str, list[dict[str, str]], str, str]] = {
    "one letter": ("a" * 9_999_999, [edit("a", "x")], "utf-8", "found 9999999 times"),
    "overlapping itself": ("a" * 3_000_000, [edit("a" * 100_000, "x")], "utf-8", "found 30 times"),
    "anagrams": (("a" * 50 + "b" * 50 + "\n") * 20_000, [edit("ab" * 50, "x")], "utf-8", "no line of the file"),
    "near misses": (LOG, [edit(LOG[:90_000].replace("number", "numbers"), "x")], "utf-8", "nearest text is at line 1 "),
    "long near miss": ("ab" * 400_000 + "c", [edit("ab" * 400_000 + "d", "x")], "utf-8", "nearest text"),
    "slow decoder": ("a-" + "b" * 1_000_000, [edit("a", "x")], "punycode", "unknown text encoding"),
    "one edit of lines that are alike": (f"first\n{LOG}", [edit("first", "1st")], "utf-8", "@@ -1,4 +1,4 @@\n-first"),
    "edits far apart": (f"first\n{LOG}last", [edit("first", "1"), edit("last", "2")], "utf-8", "span 100002 lines"),
}


@pytest.mark.parametrize(("text", "edits", "encoding", "answer"), EDIT_BOMBS.values(), ids=EDIT_BOMBS.keys())
async def test_an_edit_built_to_take_hours_just_answers(
    root: Path, text: str, edits: list[dict[str, str]], encoding: str, answer: str
) -> None:
    (root / "file").write_text(text)
    async with client_for(root) as client:
        arguments = {"path": "file", "edits": edits, "encoding": encoding, "dryRun": True}
        result = await client.call_tool("edit_file", arguments)
    assert answer in result.content[0].text  # pyright: ignore


async def test_a_diff_of_edits_far_apart_has_the_line_numbers_of_the_file(root: Path) -> None:
    text = "".join(f"line {n}\n" for n in range(1, 1001))
    (root / "file").write_text(text)
    async with client_for(root) as client:
        edits = [edit("line 900\n", "new 900\n"), edit("line 500\n", ""), edit("line 700\n", "line 700\nmore\n")]
        diff = await ok(client, "edit_file", path="file", edits=edits)
    changed = [line for line in diff.splitlines() if line[0] in "-+"]
    assert changed == ["--- file", "+++ file", "-line 500", "+more", "-line 900", "+new 900"]
    assert re.findall(r"@@.*@@", diff) == ["@@ -497,7 +497,6 @@", "@@ -698,6 +697,7 @@", "@@ -897,7 +897,7 @@"]


def test_a_call_that_nobody_waits_for_any_more_writes_nothing(root: Path) -> None:
    files = Files([root])
    for work in (Work(cancelled=True), Work(deadline=0)):
        with pytest.raises(ToolError, match="nothing was changed"):
            write_text(files, "note.txt", "late", work)
        with pytest.raises(ToolError, match="nothing was changed"):
            edit_text(files, "note.txt", [Edit(oldText="one", newText="1")], False, "utf-8", 0, work)
        with pytest.raises(ToolError, match="nothing was changed"):
            move(files, "note.txt", "moved.txt", work)
    assert snapshot(root) == {"note.txt": b"one\ntwo\nthree\n", "sub": None}


async def test_an_edit_of_a_missing_file_names_write_file(root: Path) -> None:
    async with client_for(root) as client:
        assert "write_file" in await refused(client, "edit_file", path="missing", edits=[edit("a", "b")])


async def test_edits_of_one_file_at_the_same_time_lose_none(root: Path) -> None:
    (root / "list").write_text("".join(f"item {n};\n" for n in range(60)))
    async with client_for(root) as client, client_for(root) as other, anyio.create_task_group() as group:

        async def make_edit(n: int) -> None:
            await ok((client, other)[n % 2], "edit_file", path="list", edits=[edit(f"item {n};", f"done {n};")])

        for n in range(60):
            group.start_soon(make_edit, n)
    assert (root / "list").read_text() == "".join(f"done {n};\n" for n in range(60))


def test_edits_by_two_processes_lose_none(root: Path, stdio: Start) -> None:
    (root / "list").write_text("".join(f"item {n};\n" for n in range(100)))
    servers = [stdio("fs_server.py", str(root), "--write") for _ in range(2)]
    for n in range(100):
        servers[n % 2].start("edit_file", path="list", edits=[edit(f"item {n};", f"done {n};")])
    for n in range(100):
        result = servers[n % 2].receive()["result"]
        assert not result["isError"], result
    assert (root / "list").read_text() == "".join(f"done {n};\n" for n in range(100))


async def test_a_long_diff_is_cut_and_says_so(root: Path) -> None:
    (root / "file").write_text("".join(f"line {n}\n" for n in range(1000)))
    edits = [edit(f"line {n}\n", f"changed {n}\n") for n in range(900, 1000)]
    async with client_for(root, options=Options(max_output=1000)) as client:
        text = await ok(client, "edit_file", path="file", edits=edits)
    assert len(text) < 1200
    assert text.endswith(" of the diff shown; read_file shows the file]")


# ------------------------------------------------------------------------------------- directories and moving


async def test_directories_are_made_with_those_above_them(root: Path) -> None:
    (root / "link").symlink_to("../outside")
    async with client_for(root) as client:
        assert await ok(client, "create_directory", path="a/b/c") == "created a/b/c"
        assert await ok(client, "create_directory", path="a/b/c") == "a/b/c was there already"
        assert await ok(client, "create_directory", path=".") == ". was there already"
        assert "not a directory" in await refused(client, "create_directory", path="note.txt")
        assert "not a directory" in await refused(client, "create_directory", path="note.txt/x")
        assert "outside" in await refused(client, "create_directory", path="../new")
        assert "outside" in await refused(client, "create_directory", path="link/new")
    assert (root / "a" / "b" / "c").is_dir()
    assert sorted(os.listdir(root.parent)) == ["outside", "root"]
    assert os.listdir(root.parent / "outside") == ["file.txt"]


async def test_moving_files_directories_and_links(root: Path) -> None:
    (root / "link").symlink_to("note.txt")
    async with client_for(root) as client:
        assert (
            await ok(client, "move_file", source="note.txt", destination="sub/n.txt") == "moved note.txt to sub/n.txt"
        )
        await ok(client, "move_file", source="sub", destination="sub2")
        await ok(client, "move_file", source="link", destination="link2")
        await ok(client, "move_file", source=str(root / "sub2" / "n.txt"), destination=str(root / "back.txt"))
    assert (root / "back.txt").read_text() == "one\ntwo\nthree\n"
    assert (root / "link2").is_symlink()
    assert sorted(os.listdir(root)) == ["back.txt", "link2", "sub2"]


BAD_MOVES = {
    "onto a file": ("note.txt", "other.txt", "is not overwritten"),
    "onto a directory": ("note.txt", "sub", "is not overwritten"),
    "a directory onto an empty one": ("full", "sub", "is not overwritten"),
    "onto a dangling link": ("note.txt", "dangling", "is not overwritten"),
    "into itself": ("full", "full/inner", "inside it"),
    "onto itself": ("full", "full", "itself"),
    "the root": (".", "sub/x", "allowed directory"),
    "onto the root": ("note.txt", ".", "allowed directory"),
    "an allowed directory": ("nested", "moved", "allowed directory"),
    "missing": ("missing", "x", "not found: missing"),
    "to a missing directory": ("note.txt", "no/x", "not found: no/x"),
    "out": ("note.txt", "../outside/x", "outside"),
    "in": ("../outside/file.txt", "x", "outside"),
    "out through a link": ("note.txt", "link/x", "outside"),
    "in through a link": ("link/file.txt", "x", "outside"),
    "a secret": (".env", "env.txt", "--allow-secrets"),
    "to a secret": ("note.txt", ".env.local", "--allow-secrets"),
    "a secret directory": (".ssh", "ssh", "--allow-secrets"),
    "a file to a new directory": ("note.txt", "archive/", "would be a directory"),
}


@pytest.mark.parametrize(("source", "destination", "message"), BAD_MOVES.values(), ids=BAD_MOVES.keys())
async def test_a_move_that_may_not_be_changes_nothing(root: Path, source: str, destination: str, message: str) -> None:
    for directory in ("full", "nested", ".ssh"):
        (root / directory).mkdir()
    for name in ("other.txt", "full/inside.txt", ".env", ".ssh/id"):
        (root / name).write_text(name)
    (root / "link").symlink_to("../outside")
    (root / "dangling").symlink_to("nothing")
    before = snapshot(root.parent)
    roots = [root, root / "nested"] if source == "nested" else [root]
    async with client_for(*roots) as client:
        assert message in await refused(client, "move_file", source=source, destination=destination)
    assert snapshot(root.parent) == before


async def test_a_directory_is_not_moved_to_where_its_protected_files_could_be_read(root: Path) -> None:
    (root / "sub" / "code.py").write_text("x")
    (root / "sub" / "node_modules").mkdir()
    for deny in ("sub/code*", "sub/**/*.py"):
        async with client_for(root, deny=[deny]) as client:
            assert "--deny protects" in await refused(client, "move_file", source="sub", destination="open")
    async with client_for(root, deny=["other/code*"]) as client:
        await ok(client, "move_file", source="sub", destination="open")


async def test_a_directory_that_cannot_be_searched_for_protected_files_is_not_moved(root: Path) -> None:
    (root / ("deep/" * 101)).mkdir(parents=True)
    async with client_for(root, deny=["deep/**/secret*"]) as client:
        assert "could not be searched" in await refused(client, "move_file", source="deep", destination="open")
    async with client_for(root) as client:
        await ok(client, "move_file", source="deep", destination="open")


async def test_a_directory_with_secrets_is_moved_and_they_stay_closed(root: Path) -> None:
    (root / "sub" / ".ssh").mkdir()
    for name in ("sub/.env", "sub/.ssh/config", "sub/tls.key"):
        (root / name).write_text("hunter2")
    async with client_for(root) as client:
        await ok(client, "move_file", source="sub", destination="open")
        for name in (".env", ".ssh/config", "tls.key"):
            assert "--allow-secrets" in await refused(client, "read_file", path=f"open/{name}")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs another disk")
async def test_a_move_to_another_disk_is_refused_with_a_way_out(root: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        if os.stat(other).st_dev == root.stat().st_dev:
            pytest.skip("needs another disk")
        async with client_for(root, Path(other)) as client:
            message = await refused(client, "move_file", source="note.txt", destination=f"{other}/note.txt")
            assert "another disk" in message
            assert "write the file there" in message
    assert (root / "note.txt").exists()


async def test_all_of_it_works_where_the_platform_has_no_dir_fd(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.HAS_DIR_FD", False)
    (root / "link").symlink_to("../outside")
    before = snapshot(root.parent / "outside")
    async with client_for(root) as client:
        await ok(client, "create_directory", path="a/b")
        assert await ok(client, "write_file", path="a/b/new.txt", content="one\n") == "created a/b/new.txt: 4 bytes"
        await ok(client, "edit_file", path="a/b/new.txt", edits=[edit("one", "two")])
        await ok(client, "move_file", source="a/b/new.txt", destination="moved.txt")
        assert await ok(client, "read_file", path="moved.txt") == "two\n"
        assert await ok(client, "search_text", path=".", pattern="two") == "./moved.txt:1:two\n./note.txt:2:two"
        assert "exists" in await refused(client, "move_file", source="moved.txt", destination="note.txt")
        for tool, arguments in (
            ("write_file", {"path": "link/file.txt", "content": "evil"}),
            ("create_directory", {"path": "link/new"}),
            ("move_file", {"source": "note.txt", "destination": "link/note.txt"}),
            ("read_file", {"path": "link/file.txt"}),
            ("list_directory", {"path": "link"}),
        ):
            assert "outside" in await refused(client, tool, **arguments)
    assert snapshot(root.parent / "outside") == before
    assert leftovers(root) == []


# --------------------------------------------------------------------------------------------- races and failures

SWAPPER = """
import os, sys
os.chdir(sys.argv[1])
while True:
    for name in ("dir", "file.txt"):
        try:
            os.rename(name, "kept"); os.symlink(sys.argv[2] + ("/file.txt" if name == "file.txt" else ""), name)
        except OSError:
            pass
        try:
            if os.path.islink(name):
                os.unlink(name)
            os.rename("kept", name)
        except OSError:
            pass
"""


def test_nothing_outside_changes_while_another_process_swaps_directories_for_symlinks(root: Path, stdio: Start) -> None:
    (root / "dir").mkdir()
    (root / "dir" / "file.txt").write_text("start")
    (root / "file.txt").write_text("start")
    outside = root.parent / "outside"
    before = snapshot(outside)
    calls: list[tuple[str, dict[str, Any]]] = [
        ("write_file", {"path": "dir/file.txt", "content": "written"}),
        ("write_file", {"path": "file.txt", "content": "written"}),
        ("write_file", {"path": "dir/new.txt", "content": "new"}),
        ("edit_file", {"path": "dir/file.txt", "edits": [edit("e", "ee")]}),
        ("create_directory", {"path": "dir/made/deeper"}),
        ("move_file", {"source": "dir/new.txt", "destination": "dir/moved.txt"}),
        ("move_file", {"source": "dir/moved.txt", "destination": "elsewhere.txt"}),
        ("move_file", {"source": "elsewhere.txt", "destination": "dir/again.txt"}),
    ]
    server = stdio("fs_server.py", str(root), "--write")
    for _ in calls_during_a_race(server, SWAPPER, [str(root), str(outside)], calls):
        pass
    assert snapshot(outside) == before
    assert leftovers(root) == []


def test_killed_at_any_moment_the_old_or_the_new_content_is_there_whole(root: Path, stdio: Start) -> None:
    contents = {str(n) * 300_000 for n in range(10)}
    (root / "file.txt").write_text("0" * 300_000)
    choose = random.Random(3)
    for _ in range(15):
        server = Stdio("fs_server.py", str(root), "--write")
        server.initialize()
        for n in range(20):
            server.start("write_file", path="file.txt", content=str(n % 10) * 300_000)
        for _ in range(choose.randrange(6)):
            server.receive()
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        for pipe in (server.process.stdin, server.process.stdout):
            assert pipe
            pipe.close()
        assert (root / "file.txt").read_text() in contents
    (root / f".fs-server-{'0' * 16}.tmp").write_text("of a server that was killed")
    stdio("fs_server.py", str(root), "--write")
    patience = time.monotonic() + 10
    while leftovers(root) and time.monotonic() < patience:
        time.sleep(0.01)
    assert sorted(os.listdir(root)) == ["file.txt", "note.txt", "sub"]


async def test_a_leftover_goes_with_the_next_write_but_not_while_its_writer_lives(root: Path) -> None:
    import fcntl

    async with client_for(root) as client:
        dead, alive = (root / f".fs-server-{digit * 16}.tmp" for digit in "ab")
        dead.touch()
        with alive.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            await ok(client, "write_file", path="new.txt", content="x")
            assert leftovers(root) == [alive]


def test_a_full_disk_leaves_the_old_content_and_no_temporary_file(root: Path, stdio: Start) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    server = stdio("fs_server.py", str(root), "--write", preexec_fn=limit)
    result = server.call("write_file", path="note.txt", content="x" * 200_000)
    assert result["isError"]
    assert "file too large" in result["content"][0]["text"]
    assert server.call("write_file", path="other.txt", content="x" * 200_000)["isError"]
    assert snapshot(root) == {"note.txt": b"one\ntwo\nthree\n", "sub": None}
    assert not server.call("write_file", path="note.txt", content="fits").get("isError")


async def test_a_file_that_is_locked_by_another_program_is_left_alone(root: Path) -> None:
    import fcntl

    with (root / "note.txt").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        async with client_for(root) as client:
            assert "by another program" in await refused(client, "write_file", path="note.txt", content="x")
    assert (root / "note.txt").read_text() == "one\ntwo\nthree\n"
