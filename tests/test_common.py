"""The parts that the servers share: bucket, cache, trailer, page, sandbox names, checked calls, the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from common import (
    Options,
    Sandbox,
    Server,
    TokenBucket,
    TTLCache,
    close_handle,
    page,
    printable,
    trailer,
    unprintable,
)
from conftest import PROJECT, Clock, ok, refused, text_of
from mcp import Client
from mcp.server.mcpserver.exceptions import ToolError

pytestmark = pytest.mark.anyio


# -------------------------------------------------------------------------------------------------- token bucket


def test_a_full_bucket_allows_a_burst_and_then_tells_how_long_to_wait() -> None:
    clock = Clock()
    bucket = TokenBucket(3, 2, timer=clock)
    assert [bucket.try_acquire() for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert bucket.try_acquire() == 0.5  # a refused call takes nothing


def test_tokens_come_back_at_the_refill_rate_and_never_above_the_capacity() -> None:
    clock = Clock()
    bucket = TokenBucket(3, 2, timer=clock)
    for _ in range(3):
        bucket.try_acquire()
    clock.tick(0.5)
    assert bucket.tokens == 1.0
    clock.tick(1000)
    assert bucket.tokens == 3.0


async def test_acquire_waits_just_long_enough() -> None:
    clock = Clock()
    bucket = TokenBucket(1, 0.25, timer=clock, sleep=clock.sleep)
    assert await bucket.acquire(10) == 0.0
    assert await bucket.acquire(10) == 0.0
    assert clock.slept == [4.0]


async def test_acquire_refuses_at_once_what_would_take_too_long() -> None:
    clock = Clock()
    bucket = TokenBucket(1, 0.25, timer=clock, sleep=clock.sleep)
    await bucket.acquire(0)
    assert await bucket.acquire(3.9) == 4.0
    assert clock.slept == []
    assert bucket.tokens == 0.0


async def test_callers_that_wait_are_served_one_after_the_other() -> None:
    clock = Clock()
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await anyio.lowlevel.checkpoint()

    bucket = TokenBucket(1, 1, timer=clock, sleep=sleep)
    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(bucket.acquire, 10)
    assert waits == [1.0, 2.0, 3.0]


async def test_a_cancelled_wait_gives_its_token_back() -> None:
    clock = Clock()
    bucket = TokenBucket(1, 1, timer=clock)
    bucket.try_acquire()
    with anyio.move_on_after(0.01):
        await bucket.acquire(10)
    assert bucket.tokens == 0.0


@pytest.mark.parametrize(("capacity", "rate"), [(0, 1), (-1, 1), (1, 0), (1, -1)])
def test_a_bucket_that_could_never_fill_is_refused(capacity: float, rate: float) -> None:
    with pytest.raises(ValueError, match="capacity"):
        TokenBucket(capacity, rate)


# ----------------------------------------------------------------------------------------------------- TTL cache


def test_an_entry_is_fresh_until_the_instant_it_expires() -> None:
    clock = Clock()
    cache = TTLCache[str, int](10, 5, timer=clock)
    cache.put("a", 1)
    clock.tick(4.999)
    assert cache.get("a") == 1
    clock.tick(0.001)
    assert cache.get("a") is None
    assert (cache.hits, cache.misses) == (1, 1)


def test_an_expired_entry_can_still_be_peeked_at_until_it_is_removed() -> None:
    clock = Clock()
    cache = TTLCache[str, int](10, 5, timer=clock)
    cache.put("a", 1, size=7)
    cache.put("b", 2, ttl=50)
    clock.tick(6)
    entry = cache.peek("a")
    assert entry is not None
    assert (entry.value, entry.size, entry.stored, entry.expires) == (1, 7, 1000.0, 1005.0)
    cache.expire()
    assert cache.peek("a") is None
    assert cache.get("b") == 2
    assert cache.currsize == 0


def test_the_least_recently_used_entry_goes_first() -> None:
    cache = TTLCache[str, int](2, 5, timer=Clock())
    cache.put("a", 1)
    cache.put("b", 2)
    cache.get("a")
    cache.put("c", 3)
    assert [cache.get(key) for key in "abc"] == [1, None, 3]


def test_the_cache_is_bounded_in_bytes_too() -> None:
    cache = TTLCache[str, int](100, 5, max_bytes=10, timer=Clock())
    cache.put("a", 1, size=6)
    cache.put("b", 2, size=6)
    assert (cache.get("a"), cache.get("b"), cache.currsize) == (None, 2, 6)
    cache.put("c", 3, size=11)
    assert (cache.get("c"), cache.currsize) == (None, 6)
    cache.put("b", 4, size=1)
    assert (cache.get("b"), cache.currsize, len(cache)) == (4, 1, 1)
    cache.clear()
    assert (len(cache), cache.currsize) == (0, 0)


# ------------------------------------------------------------------------------------------------- result budget


def test_a_trailer_names_the_arguments_that_continue() -> None:
    assert trailer("lines 1-812 of 2310 shown", offset=812) == "[lines 1-812 of 2310 shown; continue with offset=812]"
    assert trailer("files 1-2 shown", paths=["a b", 'c"']) == r'[files 1-2 shown; continue with paths=["a b", "c\""]]'
    assert trailer("skipped 3 binary files") == "[skipped 3 binary files]"


@pytest.mark.parametrize("max_output", [1, 10, 17, 50, 100, 0])
@pytest.mark.parametrize("limit", [None, 1, 3, 12])
def test_pages_put_together_are_the_whole_exactly_once(max_output: int, limit: int | None) -> None:
    items = [f"item {number}" for number in range(12)]
    seen: list[str] = []
    offset = 0
    while True:
        lines = page(items, "items", max_output=max_output, limit=limit, offset=offset).split("\n")
        if "continue with" not in lines[-1]:
            assert seen + lines == items
            return
        assert lines[-1].startswith(f"[items {offset + 1}-")
        seen += lines[:-1]
        assert len(seen) > offset
        offset = len(seen)


def test_a_lazy_page_reads_one_item_more_than_it_shows() -> None:
    numbers = iter(range(100))
    text = page(numbers, "numbers", max_output=0, limit=5)
    assert text.split("\n")[-1] == "[numbers 1-5 shown; continue with offset=5]"
    assert next(numbers) == 6


def test_an_empty_page_says_so_and_an_offset_past_the_end_is_an_error() -> None:
    assert page([], "matches", max_output=0, notes=lambda: ["skipped 1 file"]) == "[no matches; skipped 1 file]"
    with pytest.raises(ToolError, match="there are 2 numbers"):
        page([1, 2], "numbers", max_output=0, offset=2)


# --------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "raw",
    [b"plain", "schön".encode(), b"caf\xe9", b"new\nline", b"\x1b[31mred", "a\u2028b\u202ec".encode(), b"tab\t\\x41"],
)
def test_any_file_name_is_shown_on_one_line_and_leads_back_to_its_bytes(raw: bytes) -> None:
    name = os.fsdecode(raw)
    shown = printable(name)
    assert shown.isprintable()
    assert os.fsencode(unprintable(shown)) == raw


@pytest.mark.parametrize("shown", [r"\x2e\x2e\x2fetc", r"a\x00b", r"\x41", r"\x2f"])
def test_an_escape_cannot_smuggle_dots_slashes_or_nul(shown: str) -> None:
    assert unprintable(shown) == shown


# ---------------------------------------------------------------------------------------------------- the server


def make_server(options: Options | None = None, **keywords: Any) -> Server:
    server = Server("test", "A test.", options or Options(), **keywords)

    @server.tool(structured_output=False)
    async def echo(text: str, times: int = 1) -> str:
        """Say
        it again."""
        return text * times

    @server.tool(structured_output=False)
    async def crash() -> str:
        raise RuntimeError("the password is hunter2")

    @server.tool(structured_output=False)
    async def fail() -> str:
        raise ToolError("this is wrong: hunter2; do that")

    @server.tool()
    async def numbers() -> dict[str, int]:
        return {"one": 1}

    _ = (echo, crash, fail, numbers)
    return server


def masked(text: str) -> str:
    return text.replace("hunter2", "***")


async def test_an_argument_that_the_tool_does_not_have_is_refused_with_the_valid_names() -> None:
    async with Client(make_server()) as client:
        assert await refused(client, "echo", text="a", tiems=2) == "unknown argument: tiems; echo takes text, times"
        assert "takes no arguments" in await refused(client, "numbers", x=1)


async def test_an_unknown_tool_is_refused_with_the_valid_names() -> None:
    async with Client(make_server()) as client:
        assert await refused(client, "ecko") == "unknown tool: ecko; this server has echo, crash, fail, numbers"


async def test_a_bad_argument_is_one_sentence_with_the_value() -> None:
    async with Client(make_server()) as client:
        message = await refused(client, "echo", times="many")
        assert message.startswith("text: field required; times: input should be a valid integer")
        assert "(got 'many')" in message


async def test_a_tool_error_keeps_its_words_and_a_crash_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with Client(make_server()) as client:
        assert await refused(client, "fail") == "this is wrong: hunter2; do that"
        assert "hunter2" not in await refused(client, "crash")
    assert "hunter2" in caplog.text


async def test_everything_that_leaves_is_redacted() -> None:
    async with Client(make_server(redact=masked)) as client:
        assert await ok(client, "echo", text="it is hunter2") == "it is ***"
        assert await refused(client, "fail") == "this is wrong: ***; do that"


async def test_a_lone_surrogate_is_escaped_and_does_not_end_the_server() -> None:
    server = make_server()
    result = await server.call_tool("echo", {"text": "\udce9"})
    assert text_of(result) == r"\udce9"


async def test_a_structured_result_has_compact_json_as_its_text() -> None:
    async with Client(make_server()) as client:
        result = await client.call_tool("numbers", {})
        assert text_of(result) == '{"one":1}'
        assert result.structured_content == {"one": 1}


async def test_descriptions_are_one_line_and_schemas_have_no_titles() -> None:
    async with Client(make_server()) as client:
        tools = (await client.list_tools()).tools
    assert tools[0].description == "Say it again."
    assert '"title"' not in json.dumps([tool.input_schema for tool in tools])


async def test_calls_above_the_rate_limit_are_refused_with_the_seconds_to_wait() -> None:
    async with Client(make_server(Options(rate_limit=(2, 1000)))) as client:
        await ok(client, "echo", text="a")
        await refused(client, "echo", nonsense=1)  # costs nothing
        await ok(client, "echo", text="a")
        assert "try again in" in await refused(client, "echo", text="a")


async def test_the_audit_log_has_one_line_a_call_with_secrets_masked(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    server = make_server(Options(audit_log=log), redact=masked)
    async with Client(server) as client:
        await ok(client, "echo", text="x" * 1000)
        await ok(client, "echo", text="hunter2")
        await refused(client, "fail")
        await refused(client, "echo", text="a", password="s3cret", nested={"api_key": ["k3y"]})
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["tool"], line["outcome"]) for line in lines] == [
        ("echo", "ok"),
        ("echo", "ok"),
        ("fail", "error"),
        ("echo", "error"),
    ]
    assert lines[0]["bytes"] == 1000
    assert len(lines[0]["arguments"]["text"]) < 300
    assert lines[3]["arguments"] == {"text": "a", "password": "***", "nested": {"api_key": "***"}}
    assert not {"hunter2", "s3cret", "k3y"} & set(log.read_text().replace('"', " ").split())
    assert oct(log.stat().st_mode & 0o777) == "0o600"


# -------------------------------------------------------------------------------------------------- command line


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROJECT / "fs_server.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, stdin=subprocess.DEVNULL, check=False)


BAD_COMMAND_LINES = {
    "no directory": [],
    "unknown flag": [".", "--wriet"],
    "abbreviated flag": [".", "--list"],
    "missing directory": ["no-such-directory"],
    "a file": ["note.txt"],
    "bad max output": [".", "--max-output", "-1"],
    "bad rate": [".", "--rate-limit", "10"],
    "endless rate": [".", "--rate-limit", "1/0"],
    "audit log nowhere": [".", "--audit-log", "no/such/dir/log"],
    "bad deny": [".", "--deny", "../x"],
    "no name": [""],
    "a name of two lines": ["no\nsuch"],
    "two things at once": [".", "--list-tools", "--http", "0"],
    "an address without brackets": [".", "--http", "::1"],
    "audit log without a reader": [".", "--audit-log", "fifo"],
    "call without name": [".", "--call", "read_file", "note.txt"],
    "unknown tool": [".", "--call", "reed_file", "path=note.txt"],
}


@pytest.mark.parametrize("arguments", BAD_COMMAND_LINES.values(), ids=BAD_COMMAND_LINES.keys())
def test_a_bad_command_line_is_one_line_on_stderr_and_exit_code_2(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("hello\n")
    os.mkfifo(tmp_path / "fifo")
    before = sorted(tmp_path.rglob("*"))
    done = run(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before  # nothing is created by a typo


def test_call_prints_the_result_or_the_error_with_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("one\ntwo\n")
    done = run(".", "--call", "read_file", "path=note.txt", "head=1", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "one\n\n", "")
    done = run(".", "--call", "read_multiple_files", 'paths=["note.txt"]', cwd=tmp_path)
    assert done.stdout == "==> note.txt <==\none\ntwo\n"
    done = run(".", "--call", "read_file", "path=missing.txt", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("not found: missing.txt")


def test_list_tools_and_version_and_help(tmp_path: Path) -> None:
    done = run(".", "--list-tools", cwd=tmp_path)
    assert done.returncode == 0
    assert "read_file: Read a text file." in done.stdout
    assert "path (required)" in done.stdout
    assert run("--version").stdout.startswith("fs-server 0.")
    assert "--audit-log" in run("--help").stdout


@pytest.mark.parametrize("closed", ["<&-", "</dev/null >&-", "</dev/null 2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_like_an_empty_one(tmp_path: Path, closed: str) -> None:
    command = f"{sys.executable} {PROJECT / 'fs_server.py'} . {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, cwd=tmp_path, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_reader_that_has_had_enough_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("a line\n" * 100_000)
    command = [sys.executable, str(PROJECT / "fs_server.py"), ".", "--max-output", "0"]
    command += ["--call", "read_file", "path=long.txt"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == b"a line\n"
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    ("server", "arguments", "variable"),
    [("fs_server.py", ["."], ""), ("api_server.py", ["apis.json"], "SOME_KEY")],
    ids=["fs", "api"],
)
def test_a_person_on_a_terminal_is_told_what_to_paste(
    tmp_path: Path, server: str, arguments: list[str], variable: str
) -> None:
    import pty

    apis = {"one": {"base_url": "http://127.0.0.1:9", "headers": {"X-Key": "${SOME_KEY}"}}}
    (tmp_path / "apis.json").write_text(json.dumps(apis))
    leader, follower = pty.openpty()
    command, environment = [sys.executable, str(PROJECT / server), *arguments], os.environ | {"SOME_KEY": "0123456789"}
    with subprocess.Popen(command, stdin=follower, stderr=subprocess.PIPE, cwd=tmp_path, env=environment) as process:
        assert process.stderr
        told = ""
        while "Waiting" not in told:
            told += process.stderr.readline().decode()
        (entry,) = json.loads(told[told.index("{") : told.rindex("}") + 1])["mcpServers"].values()
        assert entry["args"] == [str(PROJECT / server), *(str((tmp_path / name).resolve()) for name in arguments)]
        assert list(entry.get("env", {})) == ([variable] if variable else [])
        process.send_signal(2)
        assert process.wait(5) != 0
    os.close(leader)
    os.close(follower)


def test_the_sandbox_works_where_the_platform_has_no_dir_fd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.HAS_DIR_FD", False)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("inside")
    (tmp_path / "out.txt").write_text("outside")
    (tmp_path / "in" / "link").symlink_to("../out.txt")
    sandbox = Sandbox([tmp_path / "in"])
    fd, _ = sandbox.open_file(sandbox.resolve("a.txt"))
    assert os.read(fd, 10) == b"inside"
    os.close(fd)
    for path in ["link", "../out.txt"]:
        with pytest.raises(ToolError):
            sandbox.resolve(path)
    located = sandbox.resolve("a.txt")
    (tmp_path / "in" / "a.txt").unlink()
    (tmp_path / "in" / "a.txt").symlink_to("../out.txt")
    with pytest.raises(ToolError, match="replaced"):
        sandbox.open_file(located)


def test_two_listings_of_an_allowed_directory_at_a_time_both_see_all_of_it(tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / str(number)).touch()
    sandbox = Sandbox([tmp_path])
    first, second = (sandbox.open_directory(sandbox.resolve(".")) for _ in range(2))
    try:
        with os.scandir(first) as one, os.scandir(second) as other:
            next(one)
            assert len(list(other)) == 100
            assert len(list(one)) == 99
    finally:
        close_handle(first)
        close_handle(second)


async def test_the_audit_line_is_there_whatever_the_arguments_are(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    server = Server("test", "Tests.", Options(audit_log=log))

    @server.tool(structured_output=False)
    async def take(value: Any) -> str:
        """Take anything."""
        return "taken"

    deep: Any = "bottom"
    for _ in range(150):
        deep = [deep]
    wide = {str(number): number for number in range(10_000)}
    async with Client(server) as client:
        for value in (deep, wide, float("inf"), [["x" * 1000] * 1000], {"password": "hidden"}, {"token": ["hidden"]}):
            assert await ok(client, "take", value=value) == "taken"

    def no_constant(name: str) -> None:
        raise AssertionError(name)

    lines = [json.loads(line, parse_constant=no_constant) for line in log.read_text().splitlines()]
    assert [line["outcome"] for line in lines] == ["ok"] * 6
    assert "hidden" not in log.read_text()
    assert max(map(len, log.read_text().splitlines())) < 60_000
