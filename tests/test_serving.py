"""What all servers have in common: checked calls, the audit log, stdio, the command line."""

import ast
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, Stdio, ok, refused, text_of
from echo_server import build_server
from mcp import Client, MCPError

import serving

pytestmark = pytest.mark.anyio

ECHO = str(PROJECT / "tests" / "echo_server.py")
Start = Callable[..., Stdio]

# --------------------------------------------------------------------------------------------------------- calls


REFUSED = {
    "say_again text=a tiems=2": "tiems: extra inputs are not permitted (got '2'); say_again takes text, times",
    "fail x=1": "x: extra inputs are not permitted (got '1'); fail takes no arguments",
    "say": "unknown tool: say; this server has say_again, crash, fail, count, take",
    "say_again times=3": "text: field required (got {'times': '3'}); times: input should be a valid integer (got '3');"
    " say_again takes text, times",
    "fail": "this is wrong: ***; do that",
    "crash": "crash failed inside the server; the reason is in the server's log, try other arguments",
}


async def test_every_mistake_is_one_sentence_that_says_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    async with Client(build_server()) as client:
        for words, message in REFUSED.items():
            tool, *pairs = words.split()
            assert await refused(client, tool, **dict(pair.split("=") for pair in pairs)) == message
    assert "RuntimeError" in caplog.text  # what went wrong inside is in the log


async def test_everything_that_leaves_is_redacted() -> None:
    server = build_server()
    async with Client(server) as client:
        assert await ok(client, "say_again", text="my hunter2") == "my ***"
        result = await client.call_tool("count", {})
        assert text_of(result) == '{"characters":7,"text":"***"}'  # compact JSON, the same as the structured content
        assert result.structured_content == {"characters": 7, "text": "***"}
        with pytest.raises(MCPError, match=r"this is wrong: \*\*\*; do that"):
            await client.read_resource("echo://fail")


async def test_a_lone_surrogate_is_escaped_and_does_not_end_the_server() -> None:
    server = build_server()
    server.redact = lambda text: text + "\udce9"
    assert text_of(await server.call_tool("say_again", {"text": "a"})) == r"a\udce9"


async def test_the_list_of_tools_is_slim() -> None:
    async with Client(build_server()) as client:
        tools = (await client.list_tools()).tools
    assert [(tool.title, tool.description) for tool in tools[:2]] == [("Say again", "Say it again."), ("Crash", "")]
    schemas = json.dumps([[tool.input_schema, tool.output_schema] for tool in tools])
    assert not re.search("title|maxLength|How long a text is", schemas)
    assert tools[0].input_schema["properties"]["text"]["description"] == "what to say"


async def test_calls_and_resource_reads_above_the_rate_limit_are_refused_with_the_seconds_to_wait() -> None:
    server = build_server(serving.Options(rate_limit=(2, 1000)))
    async with Client(server) as client:
        await ok(client, "say_again", text="a")
        assert (await client.read_resource("echo://a")).contents
        assert "try again in" in await refused(client, "say_again", text="a")
        with pytest.raises(MCPError, match=r"rate limit reached: 2 calls in 1000 s; try again in \d"):
            await client.read_resource("echo://a")
        server.caller.set("another caller")
        assert text_of(await server.call_tool("say_again", {"text": "a"})) == "a"


# ----------------------------------------------------------------------------------------------------- audit log


def logged(log: Path) -> list[dict[str, Any]]:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=no_constant) for line in log.read_text().splitlines()]


async def test_the_audit_log_has_one_line_a_call(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    async with Client(build_server(serving.Options(audit_log=log))) as client:
        await ok(client, "say_again", text="hunter2" + "x" * 993)
        await ok(client, "take", value=1)
        await refused(client, "fail")
        await refused(client, "crash")
        await refused(client, "say_again", tiems=1)
        await client.read_resource("echo://a")
    lines = logged(log)
    assert [(line["tool"], line["outcome"]) for line in lines] == [
        ("say_again", "ok"), ("take", "ok"), ("fail", "error"), ("crash", "error"), ("say_again", "error"),
        ("resources/read", "ok"),
    ]  # fmt: skip
    assert lines[0]["bytes"] == 996
    assert lines[0]["arguments"]["text"].endswith("x… (1000 characters)")
    assert lines[1]["taken"] is True
    assert lines[5]["arguments"] == {"uri": "echo://a"}
    assert "hunter2" not in log.read_text()
    assert log.stat().st_mode & 0o777 == 0o600


SECRETS: list[Any] = [
    {"password": "hidden"},
    {"token": ["hidden"]},
    {"api-key": {"a": 5, "b": "hidden"}},
    {"Pwd": "hidden", "X-Signature": "hidden", "sessionId": "hidden", "the token of it": "hidden"},
    "https://example.com/x?sig=hidden&page=2",
    "https://example.com/x?page=2&access_token=hidden#top",
    '{"user": "me", "password": "hidden, hidden"}',
    r'{"body": "{\"client_secret\": \"hidden\"}"}',
    "Authorization: Bearer hidden",
    "host=db user=me pwd=hidden",
    ["--session=hidden"],
]


async def test_secrets_are_masked_by_their_usual_names_wherever_they_stand(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    async with Client(build_server(serving.Options(audit_log=log))) as client:
        for value in SECRETS:
            await ok(client, "take", value=value)
        await ok(client, "take", value="https://example.com/?page=2&author=Ann&design=new&signal=1")
    assert "hidden" not in log.read_text()
    shown = [line["arguments"]["value"] for line in logged(log)]
    assert shown[4] == "https://example.com/x?sig=***&page=2"
    assert shown[-1] == "https://example.com/?page=2&author=Ann&design=new&signal=1"


async def test_the_audit_line_is_there_whatever_the_arguments_are(tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    deep: Any = "bottom"
    for _ in range(150):
        deep = [deep]
    wide = {str(number): number for number in range(10_000)}
    async with Client(build_server(serving.Options(audit_log=log))) as client:
        for value in (deep, wide, float("inf"), [["x" * 1000] * 1000]):
            assert await ok(client, "take", value=value) == "taken"
    assert [line["outcome"] for line in logged(log)] == ["ok"] * 4


# --------------------------------------------------------------------------------------------------------- stdio


def raw(server: Stdio, line: bytes) -> dict[str, Any]:
    assert server.process.stdin
    server.process.stdin.write(line + b"\n")
    server.process.stdin.flush()
    return server.receive()


def call(text: bytes, number: bytes = b"77") -> bytes:
    return b'{"jsonrpc":"2.0","id":%s,"method":"tools/call","params":{"name":"take","arguments":{"value":%s}}}' % (
        number,
        text,
    )


UNREADABLE = {
    "a lone surrogate": (call(rb'"\ud800"'), 77),
    "no UTF-8": (call(b'"\xff\xfe"'), 77),
    "too deep": (call(b"[" * 5000 + b"]" * 5000), 77),
    "a huge number": (call(b"9" * 5000), 77),
    "the id behind": (rb'{"method":"tools/call","params":{"id":5,"x":"\ud800"},"jsonrpc":"2.0","id":"abc"}', "abc"),
    "an id in the arguments only": (rb'{"method":"tools/call","params":{"id":5,"x":"\ud800"}}', None),
    "nonsense": (b"nonsense", None),
    "an empty object": (b"{}", None),
    "a list": (b"[]", None),
    "no method": (b'{"jsonrpc":"2.0","id":1}', 1),
}


@pytest.fixture
def echo(stdio: Start) -> Stdio:
    return stdio(ECHO, "word", stderr=subprocess.DEVNULL)


def test_a_message_that_cannot_be_read_is_answered_and_the_next_one_works(echo: Stdio) -> None:
    for name, (line, number) in UNREADABLE.items():
        answer = raw(echo, line)
        assert (answer["id"], answer["error"]["code"]) == (number, -32700), name
    text = "€\n" * 2_000_000  # messages of any size get through
    assert echo.text("say_again", text=text) == text
    assert echo.text("take", value=1) == "taken"  # it prints
    assert echo.text("say_again", text="fine") == "fine"
    assert echo.process.stdin
    assert echo.process.stdout
    echo.process.stdin.close()
    assert echo.process.stdout.read() == b""  # nothing but the protocol is on stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_large_results_that_nobody_takes_are_held_once(echo: Stdio) -> None:
    for _ in range(20):
        echo.start("say_again", text="0123456789", times=1_000_000)
    assert echo.call("fail")["isError"]  # the last in the queue
    status = Path(f"/proc/{echo.process.pid}/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert peak < 600_000  # kB; it is more when each result also waits as bytes in the buffer


INITIALIZE = (
    b'{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-06-18","capabilities":{},'
    b'"clientInfo":{"name":"test","version":"1"}}}\n'
)


@pytest.mark.parametrize("kind", ["file", "one socket", "two sockets"])
def test_stdin_and_stdout_may_be_of_any_kind(tmp_path: Path, kind: str) -> None:
    command = [sys.executable, ECHO, "word"]
    if kind == "file":
        (tmp_path / "in").write_bytes(INITIALIZE)
        with (tmp_path / "in").open() as stdin:
            done = subprocess.run(command, stdin=stdin, capture_output=True, check=True)
        assert b'"serverInfo"' in done.stdout
        return
    first, second = socket.socketpair(), socket.socketpair()
    out, back = (first, first) if kind == "one socket" else (first, second)
    with subprocess.Popen(command, stdin=out[1].fileno(), stdout=back[1].fileno()) as process:
        out[1].close()
        back[1].close()
        for number in (b"1", b"2"):
            out[0].sendall(INITIALIZE.replace(b'"id":1', b'"id":' + number))
            assert b'"id":' + number in back[0].recv(100_000)
        for end in (*first, *second):
            end.close()
        assert process.wait(10) == 0


# -------------------------------------------------------------------------------------------------- command line


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ECHO, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, timeout=60, **options
    )


BAD_COMMAND_LINES = [
    [],
    ["word", "--wriet"],
    ["word", "--list"],  # no abbreviations
    ["bad"],  # refused, in two lines
    ["word", "--max-output", "-1"],
    ["word", "--rate-limit", "10"],
    ["word", "--rate-limit", "1/0"],
    ["word", "--audit-log", "no/such/dir/log"],
    ["word", "--list-tools", "--http", "0"],
]


@pytest.mark.parametrize("arguments", BAD_COMMAND_LINES, ids=" ".join)
def test_a_bad_command_line_is_one_line_on_stderr_and_exit_code_2(arguments: list[str], tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("echo-server: ")
    assert not os.listdir(tmp_path)  # nothing is created by a typo


def test_call_prints_the_result_or_the_error_with_exit_code_1() -> None:
    done = run("word", "--call", "say_again", "text=3", "times=2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "33\n", "")
    done = run("word", "--call", "fail")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "this is wrong: ***; do that\n")
    done = run("word", "--call", "say_again", "note.txt")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("say_again takes text, times\n")
    assert run("word", "--call", "no_such").returncode == 1


def test_list_tools_and_version_and_verbose() -> None:
    listed = run("word", "--list-tools").stdout
    assert "say_again: Say it again." in listed
    assert "    text (required): what to say" in listed
    assert run("--version").stdout == f"echo-server {serving.__version__}\n"
    done = run("word", "--verbose", "--call", "say_again", "text=pwd=x")
    assert json.loads(done.stderr)["arguments"] == {"text": "pwd=***"}


def test_a_reader_that_has_had_enough_is_no_error() -> None:
    command = [sys.executable, ECHO, "word", "--call", "say_again", "text=a line\n", "times=100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""


def told_on_a_terminal(command: list[str], end: int = signal.SIGINT, **options: Any) -> dict[str, Any]:
    """The entry for a client's configuration that a server prints when a person starts it."""
    leader, follower = pty.openpty()
    with subprocess.Popen(command, stdin=follower, stderr=subprocess.PIPE, **options) as process:
        assert process.stderr
        told = ""
        while "Waiting" not in told:
            line = process.stderr.readline().decode()
            assert line, told
            told += line
        process.send_signal(end)
        assert process.wait(10) != 0
    os.close(leader)
    os.close(follower)
    return json.loads(told[told.index("{") : told.rindex("}") + 1])["mcpServers"]


def test_a_person_on_a_terminal_is_told_what_to_paste(tmp_path: Path) -> None:
    (tmp_path / "my word").touch()
    command = [sys.executable, os.path.relpath(ECHO, tmp_path), "my word", "--max-output", "5"]
    assert told_on_a_terminal(command, cwd=tmp_path) == {
        "echo-server-my-word": {
            "command": sys.executable,
            "args": [ECHO, str(tmp_path / "my word"), "--max-output", "5"],
            "env": {},
        }
    }


@pytest.mark.slow  # uv is there with what the slow tests need
@pytest.mark.skipif(not (uv := shutil.which("uv", path=os.path.dirname(sys.executable))), reason="needs uv")
def test_under_uv_the_entry_names_uv_and_what_it_was_given(tmp_path: Path) -> None:
    assert uv
    (tmp_path / "word").touch()
    given = ["run", "--no-project", "--python", sys.executable, os.path.relpath(ECHO, tmp_path), "word"]
    (entry,) = told_on_a_terminal([uv, *given], signal.SIGTERM, cwd=tmp_path).values()
    assert entry["command"] == "uv"
    assert entry["args"] == [*given[:-2], ECHO, str(tmp_path / "word")]


# ------------------------------------------------------------------------------------------------------ the start

SERVERS = ["fs_server.py", "fs_write_server.py", "db_server.py", "pg_server.py", "api_server.py"]


@pytest.mark.parametrize("server", [*SERVERS, "serving.py"])
def test_an_old_python_gets_as_far_as_the_line_that_says_so(server: str) -> None:
    source = (PROJECT / server).read_text()
    tree = ast.parse(source, feature_version=(3, 8))
    before = tree.body[
        : next(
            i for i, node in enumerate(tree.body) if "serving" in ast.unparse(node) or "version" in ast.unparse(node)
        )
    ]
    new = {"tomllib", "UTC", "Self", "StrEnum", "assert_never", "TaskGroup"}
    assert not new & {name for node in before for name in re.findall(r"\w+", ast.unparse(node))}


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("missing", ["mcp", "common", "serving"])
def test_what_is_missing_is_said_in_one_line(tmp_path: Path, server: str, missing: str) -> None:
    for file in PROJECT.glob("*.py"):
        if file.stem != missing:
            shutil.copy(file, tmp_path)
    if missing == "mcp":  # 1.x, which has no mcp.server.MCPServer
        (tmp_path / "mcp").mkdir()
        (tmp_path / "mcp" / "__init__.py").touch()
    command = [sys.executable, server, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert ('pip install "mcp>=2.3,<3"' if missing == "mcp" else missing) in done.stderr
