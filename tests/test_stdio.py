"""The servers as real processes over stdio: races, floods, cancellation, start and end."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PROJECT, Stdio, calls_during_a_race

Start = Callable[..., Stdio]

# A tenth of a second a line, about the worst that the linear regex engine can be made to take.
SLOW_PATTERN = "(?i)(?:[a-zé]{1,100}){1,40}Z"
SLOW_LINE = b"a" * 1_999 + b"\n"

SWAPPER = """
import os, sys
os.chdir(sys.argv[1])
while True:
    try:
        os.rename("dir", "real"); os.symlink(sys.argv[2], "dir")
        os.unlink("dir"); os.rename("real", "dir")
        os.rename("file", "kept"); os.symlink(sys.argv[2] + "/secret.txt", "file")
        os.unlink("file"); os.rename("kept", "file")
    except OSError:
        pass
"""


def test_nothing_leaks_while_another_process_swaps_directories_for_symlinks(tmp_path: Path, stdio: Start) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for directory, text in ((root / "dir" / "inner", "inside"), (outside / "inner", "OUTSIDE")):
        directory.mkdir(parents=True)
        for name in ("secret.txt", "inner/secret.txt"):
            (directory.parent / name).write_text(text)
        (directory / "OUT.txt" if text == "OUTSIDE" else directory / "in.txt").touch()
    (root / "file").write_text("inside")
    with (outside / "big.txt").open("wb") as file:
        file.truncate(987_654_321)
    calls: list[tuple[str, dict[str, object]]] = [
        ("read_file", {"path": "dir/secret.txt"}),
        ("read_file", {"path": "dir/inner/secret.txt"}),
        ("read_file", {"path": "file"}),
        ("list_directory", {"path": "dir"}),
        ("list_directory", {"path": ".", "recursive": True}),
        ("directory_tree", {"path": "."}),
        ("search_files", {"path": "dir", "pattern": "**"}),
        ("search_text", {"path": ".", "pattern": "SIDE", "ignore_case": True}),
        ("get_file_info", {"path": "dir/big.txt"}),
        ("read_media_file", {"path": "dir/secret.txt"}),
    ]
    server = stdio("fs_server.py", str(root))
    for line in calls_during_a_race(server, SWAPPER, [str(root), str(outside)], calls):
        for leak in (b"OUTSIDE", b"OUT.txt", b'big.txt\\",\\"type', b"987654321", b"T1VUU0lERQ=="):
            assert leak not in line, line


def test_two_hundred_thousand_entries(tmp_path: Path, stdio: Start) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    for number in range(200_000):
        os.mknod(f"entry{number:06}", dir_fd=fd)
    os.close(fd)
    server = stdio("fs_server.py", str(tmp_path))
    before = server.memory()
    text = server.text("list_directory", path=".")
    assert text.endswith(" of 200000 shown; continue with offset=" + str(text.count("\n")) + "]")
    last = server.text("list_directory", path=".", offset=199_999)
    assert json.loads(last)["path"] == "./entry199999"
    assert len(server.text("directory_tree", path=".")) < 41_000
    assert server.text("search_files", path=".", pattern="entry1999[89]9").count("\n") == 1
    assert "no matches" in server.text("search_text", path=".", pattern="x")
    assert server.memory() - before < 120_000_000


def test_huge_files_are_read_in_parts_with_flat_memory(tmp_path: Path, stdio: Start) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(5 << 30)
    with (tmp_path / "log").open("wb") as file:  # 10 GB, of which the disk holds only the two ends
        file.write(b"".join(b"first %d\n" % n for n in range(100_000)))
        file.seek(10 << 30)
        file.write(b"\n" + b"".join(b"last %d\n" % n for n in range(100_000)))
    with (tmp_path / "words").open("wb") as file:
        for _ in range(10):
            file.write(b"word\n" * 2_000_000)
    server = stdio("fs_server.py", str(tmp_path))
    before = server.memory()
    for arguments in ({}, {"head": 3}, {"tail": 3}, {"offset": 3}):
        result = server.call("read_file", path="sparse", **arguments)
        assert result["isError"], result
    assert "5368709120 bytes" in server.call("read_file", path="sparse")["content"][0]["text"]
    assert "binary" in server.call("read_file", path="sparse", tail=3)["content"][0]["text"]
    assert server.text("read_file", path="log", tail=2) == "last 99998\nlast 99999\n"
    assert server.text("read_file", path="log", head=2) == "first 0\nfirst 1\n"
    assert server.text("read_file", path="log", offset=90_000, head=1) == "first 90000\n"
    assert "binary" in server.call("read_file", path="log", offset=100_000)["content"][0]["text"]
    assert server.text("read_file", path="words", offset=19_999_999) == "word\n"
    assert server.text("read_file", path="words", offset=10_000_000, head=10) == "word\n" * 10
    assert "larger than" in server.text("search_text", path=".", pattern="word")
    assert server.memory() - before < 60_000_000


def test_other_calls_are_answered_while_a_walk_runs_and_a_cancelled_one_stops(tmp_path: Path, stdio: Start) -> None:
    (tmp_path / "small.txt").write_text("hello")
    for number in range(20):
        (tmp_path / f"f{number}").write_bytes(SLOW_LINE * 100)
    server = stdio("fs_server.py", str(tmp_path))
    slow = {"path": ".", "pattern": SLOW_PATTERN, "regex": True}
    running = server.start("search_text", **slow)
    first = server.start("read_file", path="small.txt")
    message = server.receive()  # the quick one overtakes the slow one
    assert message["id"] == first
    server.send("notifications/cancelled", {"requestId": running}, notification=True)
    server.text("read_file", path="small.txt")

    def cpu() -> float:
        fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    time.sleep(0.5)  # what was under way ends at its next check
    used = cpu()
    time.sleep(1)
    assert cpu() - used < 0.2


def test_a_quick_call_overtakes_sixty_four_slow_ones(tmp_path: Path, stdio: Start) -> None:
    for number in range(3000):
        (tmp_path / f"{number}.txt").write_text("hello\n")
    server = stdio("fs_server.py", str(tmp_path))
    slow = [server.start("search_text", path=".", pattern=f"nothing {number}") for number in range(64)]
    quick = server.start("read_file", path="0.txt")
    order = [server.receive()["id"] for _ in range(65)]
    assert order.index(quick) < 32
    assert sorted(order) == [*slow, quick]


def test_progress_is_reported_to_a_client_that_asked_for_it(tmp_path: Path, stdio: Start) -> None:
    for number in range(6):
        (tmp_path / f"d{number}").mkdir()
        (tmp_path / f"d{number}" / "f").write_bytes(SLOW_LINE * 5)
    server = stdio("fs_server.py", str(tmp_path))
    arguments = {"path": ".", "pattern": SLOW_PATTERN, "regex": True}
    number = server.send("tools/call", {"name": "search_text", "arguments": arguments, "_meta": {"progressToken": "p"}})
    told: list[float] = []
    while (message := server.receive()).get("id") != number:
        if message["method"] == "notifications/progress":
            assert message["params"]["progressToken"] == "p"
            told.append(message["params"]["progress"])
    assert told
    assert told == sorted(set(told))


def test_a_walk_that_takes_too_long_answers_with_what_it_has(tmp_path: Path, stdio: Start) -> None:
    for number in range(60):
        (tmp_path / f"d{number:02}").mkdir()
        (tmp_path / f"d{number:02}" / "f").write_bytes(SLOW_LINE * 100)
    (tmp_path / "d00" / "found").write_text("abZ\n")
    server = stdio("fs_server.py", str(tmp_path))
    started = time.monotonic()
    text = server.text("search_text", path=".", pattern=SLOW_PATTERN, regex=True)
    assert time.monotonic() - started < 30
    assert "narrower path" in text


def test_closing_stdin_ends_the_process_also_while_a_walk_runs(tmp_path: Path, stdio: Start) -> None:
    (tmp_path / "f").write_bytes(SLOW_LINE * 100)
    server = stdio("fs_server.py", str(tmp_path))
    server.start("search_text", path=".", pattern=SLOW_PATTERN, regex=True)
    server.start("read_file", path="f", head=1)
    server.receive()
    started = time.monotonic()
    assert server.close() == 0
    assert time.monotonic() - started < 3  # a second, and slack for a busy machine


def test_garbage_on_stdin_does_not_end_the_server(tmp_path: Path, stdio: Start) -> None:
    (tmp_path / "a").write_text("fine")
    server = stdio("fs_server.py", str(tmp_path), stderr=subprocess.DEVNULL)
    assert server.process.stdin
    for line in (
        b"\n",
        b"{}\n",
        b"[]\n",
        b"nonsense\n",
        b"\xff\xfe\n",
        b'{"jsonrpc":"2.0","id":1}\n',
        b"[" * 5000 + b"\n",
    ):
        server.process.stdin.write(line)
    assert server.text("read_file", path="a") == "fine"


INITIALIZE = (
    b'{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-06-18","capabilities":{},'
    b'"clientInfo":{"name":"test","version":"1"}}}\n'
)


@pytest.mark.parametrize("kind", ["file", "one socket", "two sockets", "pipes"])
def test_stdin_and_stdout_may_be_of_any_kind(tmp_path: Path, kind: str) -> None:
    command = [sys.executable, "fs_server.py", str(tmp_path)]
    if kind == "file":
        (tmp_path / "in").write_bytes(INITIALIZE)
        with (tmp_path / "in").open() as stdin:
            done = subprocess.run(command, stdin=stdin, capture_output=True, cwd=PROJECT, check=True)
        assert b'"serverInfo"' in done.stdout
        return
    if kind == "pipes":
        (mine_in, theirs_out), (theirs_in, mine_out) = os.pipe(), os.pipe()
    else:
        first, second = socket.socketpair(), socket.socketpair()
        mine_out, theirs_in = first[0].detach(), first[1].detach()
        mine_in, theirs_out = second[0].detach(), second[1].detach()
        if kind == "one socket":
            os.close(mine_in)
            os.close(theirs_out)
            mine_in, theirs_out = os.dup(mine_out), os.dup(theirs_in)
    with subprocess.Popen(command, stdin=theirs_in, stdout=theirs_out, cwd=PROJECT) as process:
        os.close(theirs_in)
        os.close(theirs_out)
        os.write(mine_out, INITIALIZE)
        assert b'"serverInfo"' in os.read(mine_in, 100_000)
        os.write(mine_out, INITIALIZE.replace(b'"id":1', b'"id":2'))
        assert b'"id":2' in os.read(mine_in, 100_000)
        os.close(mine_out)
        os.close(mine_in)
        assert process.wait(10) == 0


def test_messages_of_any_size_get_through(tmp_path: Path, stdio: Start) -> None:
    (tmp_path / "big.txt").write_text("0123456789\n" * 900_000)
    server = stdio("fs_server.py", str(tmp_path), "--write", "--max-output", "0")
    assert server.text("read_file", path="big.txt") == "0123456789\n" * 900_000
    server.text("write_file", path="copy.txt", content="\u20ac\n" * 2_000_000)
    assert (tmp_path / "copy.txt").stat().st_size == 8_000_000


def test_nothing_but_the_protocol_is_on_stdout(tmp_path: Path, stdio: Start) -> None:
    server = stdio("fs_server.py", str(tmp_path))
    for tool in ("read_file", "no_such_tool", "list_directory"):
        assert server.call(tool, path="x")["isError"]
    server.process.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
    assert server.process.stdout
    assert server.process.stdout.read() == b""


def test_unreadable_entries_are_reported_and_do_not_end_a_walk() -> None:
    with tempfile.TemporaryDirectory() as name:  # another user cannot get into pytest's own directories
        check_unreadable_entries(Path(name))


def check_unreadable_entries(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "a.txt").write_text("needle")
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed.txt").write_text("needle")
    (tmp_path / "closed").chmod(0)
    (tmp_path / "closed.txt").chmod(0)
    become_nobody = "os.setresuid(65534, 65534, 65534) if os.geteuid() == 0 else None"
    script = f"import os, sys; import fs_server; {become_nobody}; sys.argv = sys.argv[1:]; fs_server.main()"

    def call(*words: str) -> tuple[int, str]:
        command = [sys.executable, "-c", script, "fs_server.py", str(tmp_path), "--call", *words]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    assert call("read_file", "path=closed.txt") == (
        1,
        "permission denied: closed.txt; the server's user has no right to this, choose another path\n",
    )
    code, tree = call("directory_tree", "path=.")
    assert (code, " closed/ [unreadable]" in tree, "  a.txt" in tree) == (0, True, True)
    code, found = call("search_text", "path=.", "pattern=needle")
    assert found == "./open/a.txt:1:needle\n[skipped 1 unreadable directories; skipped 1 unreadable files]\n"
    (tmp_path / "closed").chmod(0o755)


def test_a_directory_whose_name_is_no_text_is_served(tmp_path: Path, stdio: Start) -> None:
    directory = tmp_path / os.fsdecode(b"caf\xe9")
    directory.mkdir()
    (directory / "note.txt").write_text("hello")
    server = stdio("fs_server.py", str(directory))
    assert server.call("read_file", path="note.txt")["content"][0]["text"] == "hello"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_large_results_that_nobody_takes_are_held_once(tmp_path: Path, stdio: Start) -> None:
    (tmp_path / "noise.png").write_bytes(os.urandom(9_900_000))
    server = stdio("fs_server.py", str(tmp_path))
    for _ in range(20):
        server.start("read_media_file", path="noise.png")
    server.answer(server.start("list_allowed_directories"))  # the last in the queue
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert peak < 900_000  # kB; it is more when each result also waits as bytes in the buffer
