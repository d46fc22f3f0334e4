"""Serving over HTTP, by real processes: who may call, hostile requests, many clients, health, and the end."""

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest
from conftest import PROJECT, Stdio
from mcp import Client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import TextContent
from over_http import (
    OTHER_TOKEN,
    TOKEN,
    WAITING_SERVER,
    Http,
    post,
    read_all,
    read_answer,
    request,
    round_robin,
    tool_call,
)

pytestmark = pytest.mark.anyio
Start = Callable[..., Http]

ERAS = pytest.mark.parametrize("modern", [False, True], ids=["handshake era", "modern era"])
TOOLS_LIST = json.dumps(request("tools/list")[1]).encode()


@pytest.fixture
def http() -> Iterator[Start]:
    """Starts servers; they are ended at the end of the test."""
    started: list[Http] = []

    def start(*arguments: str, **options: Any) -> Http:
        started.append(Http(*arguments, **options))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("files")
    (directory / "a.txt").write_text("hello\n")
    (directory / "leak.txt").write_text(f"the token is {TOKEN}\n")
    return directory


@pytest.fixture(scope="module")
def open_server(files: Path) -> Iterator[Http]:
    """A file server without tokens, on loopback."""
    server = Http("fs_server.py", str(files), "--allowed-host", "mcp.example.com", "--allowed-host", "other.test:8443")
    yield server
    server.close()


@pytest.fixture(scope="module")
def audit_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit") / "audit.jsonl"


@pytest.fixture(scope="module")
def closed_server(files: Path, audit_log: Path) -> Iterator[Http]:
    """A file server that wants one of two tokens."""
    tokens = f" {TOKEN},{OTHER_TOKEN}\n"
    server = Http("fs_server.py", str(files), "--audit-log", str(audit_log), token=tokens, address="0.0.0.0:0")
    yield server
    server.close()


# ------------------------------------------------------------------------------------------------------- the token

NOT_VALID: dict[str, list[tuple[str, str]]] = {
    "nothing": [],
    "an empty header": [("authorization", "")],
    "only the scheme": [("authorization", "Bearer")],
    "another scheme": [("authorization", f"Basic {TOKEN}")],
    "no scheme": [("authorization", TOKEN)],
    "a wrong token": [("authorization", "Bearer " + "x" * len(TOKEN))],
    "a part of a token": [("authorization", f"Bearer {TOKEN[:-1]}")],
    "a token and more": [("authorization", f"Bearer {TOKEN}x")],
    "the other case": [("authorization", f"Bearer {TOKEN.upper()}")],
    "the whole variable": [("authorization", f"Bearer {TOKEN},{OTHER_TOKEN}")],
    "two headers": [("authorization", f"Bearer {TOKEN}"), ("authorization", f"Bearer {TOKEN}")],
    "another header": [("x-authorization", f"Bearer {TOKEN}"), ("proxy-authorization", f"Bearer {TOKEN}")],
    "a cookie": [("cookie", f"authorization=Bearer {TOKEN}")],
    "not ASCII": [("authorization", "Bearer " + "é" * 40)],
    "a very long one": [("authorization", "Bearer " + "x" * 30_000)],
}


@pytest.mark.parametrize("headers", NOT_VALID.values(), ids=NOT_VALID.keys())
def test_without_a_valid_token_nothing_is_answered(
    headers: list[tuple[str, str]], closed_server: Http, audit_log: Path
) -> None:
    before = audit_log.read_bytes()
    given = [(name.encode(), value.encode()) for name, value in headers]
    for path in (
        "/mcp",
        "/mcp/",
        "//mcp",
        "/MCP",
        "/",
        f"/mcp?token={TOKEN}&access_token={TOKEN}",
        "/health/",
        "/docs",
    ):
        for method, modern in (("tools/list", False), ("tools/list", True), ("initialize", False)):
            standard, body = request(method, modern)
            all_headers = [*((name.encode(), value.encode()) for name, value in standard.items()), *given]
            response = closed_server.client.post(path, headers=all_headers, json=body)
            assert response.status_code == 401
            assert response.headers["www-authenticate"].startswith("Bearer ")
            assert "read_file" not in response.text
    for method in ("GET", "DELETE", "OPTIONS", "PUT", "HEAD"):
        assert closed_server.client.request(method, "/mcp", headers=given).status_code == 401
    headers_of_call, call = request("tools/call", name="read_file", arguments={"path": "a.txt"})
    all_headers = [*((name.encode(), value.encode()) for name, value in headers_of_call.items()), *given]
    assert closed_server.client.post("/mcp", headers=all_headers, json=call).status_code == 401
    assert audit_log.read_bytes() == before  # no tool ran


@ERAS
@pytest.mark.parametrize(
    "authorization",
    [f"Bearer {TOKEN}", f"Bearer {OTHER_TOKEN}", f"bearer {TOKEN}", f"BEARER   {TOKEN}"],
    ids=["the first", "the second", "lower case", "upper case and blanks"],
)
def test_each_valid_token_opens_the_server(authorization: str, modern: bool, closed_server: Http) -> None:
    headers, body = request("tools/list", modern)
    response = closed_server.client.post("/mcp", headers={**headers, "authorization": authorization}, json=body)
    assert response.status_code == 200
    assert "read_file" in response.text


def test_the_audit_log_tells_callers_apart_and_no_token_is_in_it(closed_server: Http, audit_log: Path) -> None:
    for token in (TOKEN, OTHER_TOKEN):
        closed_server.call("read_file", token=token, path=token)
    lines = [json.loads(line) for line in audit_log.read_text().splitlines()[-2:]]
    assert all(re.fullmatch(r"sha256:[0-9a-f]{8}", line["token"]) for line in lines)
    assert lines[0]["token"] != lines[1]["token"]
    for token in (TOKEN, OTHER_TOKEN):
        assert token not in audit_log.read_text()
        assert token not in closed_server.log()


def test_a_token_is_not_in_a_result(closed_server: Http) -> None:
    assert closed_server.text("read_file", token=OTHER_TOKEN, path="leak.txt") == "the token is ***\n"


def test_the_rate_limit_is_for_each_token(files: Path, http: Start) -> None:
    server = http("fs_server.py", str(files), "--rate-limit", "3/3600", token=f"{TOKEN},{OTHER_TOKEN}")
    for _ in range(3):
        server.text("read_file", token=TOKEN, path="a.txt")
    message = server.error("read_file", token=TOKEN, path="a.txt")
    assert message.startswith("rate limit reached: 3 calls at once")
    assert "try again in" in message
    for modern in (False, True):
        assert server.text("read_file", token=OTHER_TOKEN, modern=modern, path="a.txt") == "hello\n"


# ----------------------------------------------------------------------------------------------------- the start

REFUSED_STARTS: dict[str, tuple[list[str], str | None, str]] = {
    "a public address without a token": (["--http", "0.0.0.0:0"], None, "MCP_AUTH_TOKEN"),
    "a public address, other spelling": (["--http", "0:0"], None, "MCP_AUTH_TOKEN"),
    "all IPv6 addresses": (["--http", "[::]:0"], None, "MCP_AUTH_TOKEN"),
    "a short token": (["--http", "0.0.0.0:0"], "y" * 31, "32"),
    "one short token of two": (["--http", "0"], f"{TOKEN},{'y' * 31}", "token 2"),
    "an empty token": (["--http", "0"], "", "32"),
    "an empty token after a comma": (["--http", "0"], f"{TOKEN},", "token 2"),
    "a token with a blank": (["--http", "0"], "y" * 20 + " " + "y" * 20, "letters"),
    "no port": (["--http", "localhost"], None, "[HOST:]PORT"),
    "no host": (["--http", ":8000"], None, "[HOST:]PORT"),
    "a port too large": (["--http", "65536"], None, "[HOST:]PORT"),
    "an unknown host": (["--http", "nobody.invalid:8000"], TOKEN, "nobody.invalid"),
    "another machine's address": (["--http", "192.0.2.1:8000"], TOKEN, "cannot listen"),
    "an allowed host without HTTP": (["--allowed-host", "a.test"], None, "--http"),
    "a URL as an allowed host": (["--http", "0", "--allowed-host", "https://a.test"], None, "host name"),
    "everything as an allowed host": (["--http", "0", "--allowed-host", "*"], None, "host name"),
}


def start_refused(*arguments: str, token: str | None = None) -> str:
    env = {**os.environ, "MCP_AUTH_TOKEN": token} if token is not None else dict(os.environ)
    done = subprocess.run(
        [sys.executable, "fs_server.py", ".", *arguments],
        cwd=PROJECT,
        env=env,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(("arguments", "token", "told"), REFUSED_STARTS.values(), ids=REFUSED_STARTS.keys())
def test_a_start_that_is_refused_says_why_in_one_line(arguments: list[str], token: str | None, told: str) -> None:
    message = start_refused(*arguments, token=token)
    assert told in message
    if token and len(token) > 8:
        assert token.split(",")[-1][:8] not in message or token.endswith(",")


def test_a_port_that_is_taken_is_told_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in start_refused("--http", str(taken.getsockname()[1]))


@pytest.mark.parametrize(
    ("address", "token"),
    [("localhost:0", None), ("127.0.0.2:0", None), ("[::1]:0", None), ("0.0.0.0:0", TOKEN)],
    ids=["localhost", "another loopback address", "IPv6", "public with a token"],
)
def test_it_serves_on(address: str, token: str | None, files: Path, http: Start) -> None:
    server = http("fs_server.py", str(files), address=address, token=token)
    assert server.health() == 200
    if token is None:
        assert server.text("read_file", path="a.txt") == "hello\n"
    elif token:
        assert server.text("read_file", token=token, path="a.txt") == "hello\n"
        assert server.terminate() == 0


def test_localhost_is_served_on_every_address_that_it_has(files: Path, http: Start) -> None:
    server = http("fs_server.py", str(files), address="localhost:0")
    for info in socket.getaddrinfo("localhost", server.port, type=socket.SOCK_STREAM):
        with socket.create_connection((str(info[4][0]), server.port), timeout=10) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
            assert read_all(connection).endswith(b'{"status":"ok"}')


# ----------------------------------------------------------------------------------------- Host, Origin and requests


@ERAS
@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("host", "evil.example"),
        ("host", "evil.example:80"),
        ("host", "localhost.evil.example"),
        ("host", "127.0.0.1.evil.example:8000"),
        ("host", "mcp.example.com.evil.example"),
        ("host", "notmcp.example.com"),
        ("host", "other.test"),
        ("host", "other.test:80"),
        ("host", "0.0.0.0:8000"),
        ("host", "user@localhost"),
        ("host", ""),
        ("origin", "http://evil.example"),
        ("origin", "http://localhost.evil.example"),
        ("origin", "http://evil.example:80"),
        ("origin", "null"),
        ("origin", "file://"),
        ("origin", "https://mcp.example.com.evil.example"),
        ("origin", "https://other.test"),
    ],
)
def test_a_wrong_host_or_origin_is_refused(header: str, value: str, modern: bool, open_server: Http) -> None:
    headers, body = request("tools/list", modern)
    response = open_server.client.post("/mcp", headers={**headers, header: value}, json=body)
    assert response.status_code in (403, 421)
    assert "read_file" not in response.text


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "localhost"},
        {"host": "127.0.0.1:9999"},
        {"host": "[::1]:8000"},
        {"host": "mcp.example.com"},
        {"host": "mcp.example.com:443", "origin": "https://mcp.example.com"},
        {"host": "other.test:8443", "origin": "https://other.test:8443"},
        {"origin": "http://localhost:6274"},
    ],
    ids=str,
)
def test_the_names_of_the_server_are_answered(headers: dict[str, str], open_server: Http) -> None:
    standard, body = request("tools/list")
    assert open_server.client.post("/mcp", headers={**standard, **headers}, json=body).status_code == 200


def test_the_host_is_also_checked_for_those_with_a_token(closed_server: Http) -> None:
    headers, body = request("tools/list")
    headers |= {"host": "evil.example", "authorization": f"Bearer {TOKEN}"}
    assert closed_server.client.post("/mcp", headers=headers, json=body).status_code == 421


def test_there_are_no_sessions_and_no_streams_to_hold_open(open_server: Http) -> None:
    for method in ("GET", "DELETE", "PUT"):
        response = open_server.client.request(method, "/mcp", headers={"accept": "text/event-stream"})
        assert response.status_code == 405
        assert response.headers["allow"] == "POST"
    headers, body = request("tools/list")
    response = open_server.client.post("/mcp", headers={**headers, "mcp-session-id": "anything"}, json=body)
    assert response.status_code == 200
    assert "mcp-session-id" not in response.headers


@pytest.mark.parametrize("path", ["/mcp/", "//mcp", "/", "/mcp/x", "http://evil.example/mcp"])
def test_another_path_is_not_found_and_leads_nowhere(path: str, open_server: Http) -> None:
    answer = open_server.raw(post(TOOLS_LIST).replace(b" /mcp ", f" {path} ".encode(), 1))
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"location" not in answer
    assert answer.endswith(b"send requests to /mcp")


def test_a_request_of_more_than_four_megabytes_is_refused(tmp_path: Path, http: Start) -> None:
    server = http("fs_server.py", str(tmp_path), "--write")
    server.text("write_file", path="fits", content="x" * 4_000_000)
    assert (tmp_path / "fits").stat().st_size == 4_000_000
    headers, body = request("tools/call", name="write_file", arguments={"path": "big", "content": "x" * 4_300_000})
    assert server.client.post("/mcp", headers=headers, json=body).status_code == 413
    assert not (tmp_path / "big").exists()
    chunks = (json.dumps(body).encode()[at : at + 60_000] for at in range(0, 4_300_000, 60_000))
    assert server.client.post("/mcp", headers=headers, content=chunks).status_code == 413


BAD_REQUESTS: dict[str, bytes] = {
    "nothing": b"",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
    "a line without end": b"A" * 100_000,
    "half a request line": b"POST /mcp",
    "headers without end": b"POST /mcp HTTP/1.1\r\nhost: localhost\r\nx: y\r\n",
    "many headers": b"POST /mcp HTTP/1.1\r\nhost: localhost\r\n" + b"x: y\r\n" * 20_000,
    "no host": b"POST /mcp HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}",
    "two hosts": b"POST /mcp HTTP/1.1\r\nhost: localhost\r\nhost: evil\r\ncontent-length: 2\r\n\r\n{}",
    "two lengths": b"POST /mcp HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    "a negative length": b"POST /mcp HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n{}",
    "length and chunks": post(b"0\r\n\r\n", "transfer-encoding: chunked"),
    "a bad chunk": b"POST /mcp HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
    "a wrong upgrade": b"GET /mcp HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a proxy's CONNECT": b"CONNECT evil.example:443 HTTP/1.1\r\nhost: evil.example:443\r\n\r\n",
    "less body than told": post(TOOLS_LIST, length=len(TOOLS_LIST) + 100),
    "a huge body told": post(b"x", length=10**15),
    "no JSON": post(b"nonsense"),
    "not UTF-8": post(b"\xff\xfe" * 100),
    "a lone surrogate": post(tool_call("read_file", path="x").replace(b'"x"', b'"\\ud800"')),
    "deep JSON": post(tool_call("read_file", path="x").replace(b'"x"', b"[" * 100_000 + b"]" * 100_000)),
    "a deep argument": post(tool_call("read_file", path="x").replace(b'"x"', b"[" * 150 + b"]" * 150)),
    "a huge number": post(tool_call("read_file", path="x").replace(b'"x"', b"9" * 5000)),
    "a batch": post(b"[" + TOOLS_LIST + b"]"),
    "an answer": post(b'{"jsonrpc":"2.0","id":1,"result":{}}'),
    "an empty object": post(b"{}"),
    "a wide body": post(b'{"jsonrpc":"2.0","id":1,"method":"x","params":{"a":[' + b"[]," * 300_000 + b"[]]}}"),
    "another type": post(TOOLS_LIST).replace(b"content-type: application/json", b"content-type: text/plain"),
    "no accept": post(TOOLS_LIST).replace(b"accept: ", b"x-accept: "),
    "an unknown version": post(TOOLS_LIST, "mcp-protocol-version: 1999-01-01"),
    "a bad modern one": post(TOOLS_LIST, "mcp-protocol-version: 2026-07-28"),
    "a modern deep argument": post(
        json.dumps(request("tools/call", True, name="read_file", arguments={"path": "x"})[1])
        .encode()
        .replace(b'"x"', b"[" * 900 + b"]" * 900),
        "mcp-protocol-version: 2026-07-28",
        "mcp-method: tools/call",
        "mcp-name: read_file",
    ),
}


@pytest.mark.parametrize("data", BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_a_bad_request_is_refused_at_once_or_when_the_client_stops_sending(data: bytes, open_server: Http) -> None:
    with open_server.connect() as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        received = read_all(connection)
    assert re.match(rb"HTTP/1\.1 (?!5)|\Z", received), received
    assert b'"name":"read_file"' not in received or b'"batch' in received
    assert open_server.health() == 200


def test_a_thousand_hostile_requests_leave_the_server_as_it_was(
    closed_server: Http, open_server: Http, files: Path
) -> None:
    choose = random.Random(7)
    requests = list(BAD_REQUESTS.values())
    for server, token in ((open_server, ""), (closed_server, TOKEN)):

        def hostile(number: int, server: Http = server, token: str = token) -> None:
            data = choose.choice(requests)
            if token and number % 2:
                data = data.replace(b"\r\n\r\n", b"\r\nauthorization: Bearer " + token.encode() + b"\r\n\r\n", 1)
            try:
                with server.connect() as connection:
                    connection.sendall(data[: choose.randrange(1, len(data) + 1) if data and number % 3 else len(data)])
                    if number % 4 == 0:
                        connection.shutdown(socket.SHUT_WR)
                    if number % 5:
                        connection.settimeout(0.05)  # the others hang up without a word
                        connection.recv(100)
            except OSError:
                pass

        def flood(hostile: Callable[[int], None] = hostile) -> None:
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(hostile, range(500)))

        flood()  # once to warm up: arenas, caches, compiled patterns
        memory = server.memory()
        flood()
        assert server.health() == 200
        assert server.text("read_file", token=token, path="a.txt") == "hello\n"
        assert server.memory() - memory < 15_000_000
        deadline = time.monotonic() + 20
        while server.descriptors() > 40:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_connections_that_never_send_or_never_read_are_ended(tmp_path: Path, http: Start) -> None:
    times = ("--arrival", "1", "--answer", "1", "--idle", "1")
    server = http(str(WAITING_SERVER), str(tmp_path), *times, "--max-output", "0")
    before = server.descriptors()
    slow = [server.connect() for _ in range(100)]
    body = tool_call("much", characters=20_000_000)
    try:
        for number, connection in enumerate(slow):
            match number % 5:
                case 0:
                    pass
                case 1:
                    connection.sendall(b"POST /mcp HT")
                case 2:
                    connection.sendall(post(body)[:-1])
                case 3:
                    connection.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\nGET /hea")
                case _:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                    if number < 20:
                        connection.sendall(post(body))
        deadline = time.monotonic() + 30
        while server.descriptors() > before:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        for connection in slow:
            connection.close()
    assert server.text("wait", seconds=0, text="still here") == "still here"


def test_a_large_answer_may_take_longer_to_send_than_a_request_to_arrive(tmp_path: Path, http: Start) -> None:
    server = http(str(WAITING_SERVER), str(tmp_path), "--arrival", "1", "--max-output", "0")
    with server.connect() as connection:
        connection.sendall(post(tool_call("much", characters=20_000_000)))  # more than the sockets' buffers hold
        time.sleep(2.5)
        assert len(read_all(connection)) > 20_000_000


def test_the_server_answers_while_a_hundred_requests_drip(open_server: Http) -> None:
    stop = threading.Event()

    def drip() -> None:
        with open_server.connect() as connection:
            for at in range(len(data := post(TOOLS_LIST))):
                if stop.wait(0.05):
                    return
                connection.sendall(data[at : at + 1])

    with ThreadPoolExecutor(100) as pool:
        for _ in range(100):
            pool.submit(drip)
        for _ in range(20):
            started = time.monotonic()
            assert open_server.text("read_file", path="a.txt") == "hello\n"
            assert time.monotonic() - started < 5
        stop.set()


def test_more_connections_than_the_process_may_open_files_leave_the_server_answering(files: Path, http: Start) -> None:
    server = http("fs_server.py", str(files), token=TOKEN, files=512)
    idle = [server.connect() for _ in range(600)]
    try:
        for _ in range(20):
            with httpx.Client(base_url=server.url, trust_env=False) as server.client:  # a connection of its own
                assert server.text("read_file", token=TOKEN, path="a.txt") == "hello\n"
                assert server.health() == 200
        assert server.descriptors() < 480
        assert len(server.log()) < 2000
    finally:
        for connection in idle:
            connection.close()


def test_a_call_keeps_its_connection_when_there_are_too_many(tmp_path: Path, http: Start) -> None:
    server = http(str(WAITING_SERVER), str(tmp_path), files=256)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.text, "wait", seconds=2, text="finished")
        while not (tmp_path / "begun").exists():
            time.sleep(0.02)
        idle = [server.connect() for _ in range(300)]
        assert running.result() == "finished"
        for connection in idle:
            connection.close()


CHUNKED = b"POST /mcp HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"


def test_a_refused_request_that_goes_on_in_chunks_is_not_read_on(closed_server: Http) -> None:
    with closed_server.connect() as connection:
        connection.settimeout(10)  # the server's own limit is 15
        connection.sendall(CHUNKED + b"1\r\nx\r\n")
        received = connection.recv(65_536)
        assert received.startswith(b"HTTP/1.1 401")
        try:
            while received:
                connection.sendall(b"1\r\nx\r\n" * 1000)
                received = connection.recv(65_536)
        except ConnectionError:
            pass


def test_a_refused_request_whose_body_ends_leaves_the_connection_open(closed_server: Http) -> None:
    with closed_server.connect() as connection:
        for _ in range(2):
            connection.sendall(CHUNKED)
            assert read_answer(connection) == 401
            connection.sendall(b"1\r\nx\r\n0\r\n\r\n")
        connection.sendall(post(TOOLS_LIST, f"authorization: Bearer {TOKEN}"))
        assert read_answer(connection) == 200


def test_others_hardly_wait_while_bodies_of_tiny_chunks_arrive(closed_server: Http) -> None:
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            try:
                with closed_server.connect() as connection:
                    connection.sendall(CHUNKED)
                    while not stop.is_set():
                        connection.sendall(b"1\r\nx\r\n" * 10_000)
            except OSError:
                pass

    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            pool.submit(flood)
        started = time.monotonic()
        try:
            for _ in range(10):
                assert closed_server.text("read_file", token=TOKEN, path="a.txt") == "hello\n"
            assert time.monotonic() - started < 20
        finally:
            stop.set()


def test_an_idle_connection_outlives_those_that_clients_keep(tmp_path: Path, http: Start) -> None:
    (tmp_path / "healthy").touch()
    server = http(str(WAITING_SERVER), str(tmp_path), "--arrival", "1")
    get = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with server.connect() as connection:
        for pause in (5.5, 0):  # httpx uses a connection again for 5 seconds: closed by then, it must not be
            connection.sendall(get)
            assert read_answer(connection) == 200
            time.sleep(pause)
        connection.sendall(get[:-1])
        connection.settimeout(10)
        assert read_all(connection) == b""  # a request that begins has its own time to arrive in


# ------------------------------------------------------------------------------------------------------ many clients


def test_an_answer_does_not_wait_for_an_acknowledgement(open_server: Http) -> None:
    started = time.monotonic()
    for _ in range(100):
        assert open_server.health() == 200
    assert time.monotonic() - started < 3  # 100 delayed acknowledgements take 4


async def test_sixty_four_clients_get_their_own_answers_and_fast_calls_stay_fast(tmp_path: Path, http: Start) -> None:
    for number in range(64):
        (tmp_path / f"{number}.txt").write_text(f"file {number}\n" * 50)
    server = http("fs_server.py", str(tmp_path))
    slowest = [0.0]

    def client(number: int) -> int:
        calls = 0
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as session:
            end = time.monotonic() + 6
            while time.monotonic() < end:
                slow = number % 4 == 0
                name, arguments = (
                    ("search_text", {"path": ".", "pattern": f"file {number}\n".strip(), "max_matches": 10})
                    if slow
                    else ("read_file", {"path": f"{number}.txt"})
                )
                headers, body = request("tools/call", bool(calls % 2), name=name, arguments=arguments)
                body["id"] = f"{number}/{calls}"
                started = time.monotonic()
                answer = session.post("/mcp", headers=headers, json=body).json()
                if not slow:
                    slowest[0] = max(slowest[0], time.monotonic() - started)
                assert answer["id"] == f"{number}/{calls}"
                assert not answer["result"]["isError"], answer
                assert f"file {number}\n" in answer["result"]["content"][0]["text"] + "\n"
                calls += 1
        return calls

    with ThreadPoolExecutor(64) as pool:
        counts = list(pool.map(client, range(64)))
    assert min(counts) > 0
    assert slowest[0] < 5


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_three_replicas_behind_a_round_robin_proxy_serve_one_client(
    mode: str, files: Path, tmp_path: Path, http: Start
) -> None:
    logs = [tmp_path / f"{number}.jsonl" for number in range(3)]
    replicas = [http("fs_server.py", str(files), "--audit-log", str(log), token=TOKEN) for log in logs]
    async with (
        round_robin([replica.port for replica in replicas]) as port,
        httpx2.AsyncClient(headers={"Authorization": f"Bearer {TOKEN}"}) as http_client,
        Client(streamable_http_client(f"http://localhost:{port}/mcp", http_client=http_client), mode=mode) as client,
    ):
        assert len((await client.list_tools()).tools) == 9
        for _ in range(12):
            result = await client.call_tool("read_file", {"path": "a.txt"})
            assert isinstance(result.content[0], TextContent)
            assert result.content[0].text == "hello\n"
    counts = [len(log.read_text().splitlines()) for log in logs]
    assert sum(counts) == 12
    assert min(counts) >= 2


def test_a_client_that_hangs_up_stops_its_call(tmp_path: Path, http: Start) -> None:
    server = http(str(WAITING_SERVER), str(tmp_path))
    headers, body = request("tools/call", name="wait", arguments={"seconds": 25})
    for modern in (False, True):
        headers, body = request("tools/call", modern, name="wait", arguments={"seconds": 25})
        with pytest.raises(httpx.TimeoutException):
            server.client.post("/mcp", headers=headers, json=body, timeout=1)
        deadline = time.monotonic() + 5
        while not (tmp_path / "cancelled").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (tmp_path / "cancelled").unlink()


# ------------------------------------------------------------------------------------------------- health and the end


def becomes(server: Http, status: int) -> bool:
    """Whether /health answers with this status within two seconds."""
    time.sleep(0.15)  # an answer may be a tenth of a second old
    deadline = time.monotonic() + 2
    while server.health() != status and time.monotonic() < deadline:
        time.sleep(0.02)
    response = server.client.get("/health")
    assert response.text in ('{"status":"ok"}', '{"status":"unavailable"}')
    return response.status_code == status


def test_health_is_ok_only_while_the_directory_is_there(tmp_path: Path, http: Start) -> None:
    first, second, away = tmp_path / "first", tmp_path / "second", tmp_path / "away"
    first.mkdir()
    second.mkdir()
    server = http("fs_server.py", str(first), str(second), token=TOKEN)

    assert becomes(server, 200)
    second.rename(away)
    assert becomes(server, 503)
    second.mkdir()
    assert becomes(server, 503)  # it is not the directory that is served
    second.rmdir()
    away.rename(second)
    assert becomes(server, 200)
    shutil.rmtree(first)
    assert becomes(server, 503)
    assert server.client.head("/health").status_code == 503
    assert server.client.post("/mcp").status_code == 401


def test_health_is_ok_only_while_the_database_is_there(tmp_path: Path, http: Start) -> None:
    database, away = tmp_path / "shop.db", tmp_path / "away"
    shutil.copy(PROJECT / "examples" / "shop.db", database)
    server = http("db_server.py", str(database))
    assert becomes(server, 200)
    database.rename(away)
    assert becomes(server, 503)
    database.write_text("this is no database, but long enough to be looked at" * 100)
    assert becomes(server, 503)
    away.replace(database)
    assert becomes(server, 200)
    assert "[42]" in server.text("query_database", query="SELECT 42")


def test_health_is_ok_only_while_the_configuration_is_there(tmp_path: Path, http: Start) -> None:
    configuration = tmp_path / "apis.json"
    configuration.write_text('{"demo": {"base_url": "http://127.0.0.1:1"}}')
    server = http("api_server.py", str(configuration))
    assert becomes(server, 200)
    good = configuration.read_text()
    configuration.write_text(good[:-1])
    assert becomes(server, 503)
    configuration.unlink()
    assert becomes(server, 503)
    configuration.write_text(good)
    assert becomes(server, 200)


def test_health_is_not_ok_when_the_resource_does_not_answer_and_other_calls_go_on(tmp_path: Path, http: Start) -> None:
    (tmp_path / "healthy").touch()
    server = http(str(WAITING_SERVER), str(tmp_path))
    assert server.health() == 200
    (tmp_path / "hang").touch()
    time.sleep(0.2)
    with ThreadPoolExecutor(20) as pool:
        checks = [pool.submit(httpx.get, f"{server.url}/health", timeout=30) for _ in range(20)]
        started = time.monotonic()
        assert server.text("wait", seconds=0, text="quick") == "quick"
        assert time.monotonic() - started < 3
        assert {check.result().status_code for check in checks} == {503}
    assert time.monotonic() - started < 15


def test_sigterm_lets_a_call_finish_and_refuses_new_ones(tmp_path: Path, http: Start) -> None:
    server = http(str(WAITING_SERVER), str(tmp_path))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.text, "wait", seconds=3, text="finished")
        while not (tmp_path / "begun").exists():
            time.sleep(0.02)
        idle = server.connect()
        server.process.terminate()
        time.sleep(0.5)
        assert read_all(idle) == b""
        idle.close()
        with pytest.raises(ConnectionRefusedError):
            server.connect()
        assert running.result() == "finished"
    assert server.process.wait(5) == 0


@pytest.mark.parametrize("tool", ["wait", "block"])
def test_sigterm_waits_no_longer_than_ten_seconds(tool: str, tmp_path: Path, http: Start) -> None:
    server = http(str(WAITING_SERVER), str(tmp_path))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.call, tool, seconds=60)
        while not (tmp_path / "begun").exists():
            time.sleep(0.02)
        started = time.monotonic()
        assert server.terminate() == 0
        assert 9 < time.monotonic() - started < 16
        with pytest.raises((httpx.TransportError, AssertionError)):
            running.result()


def test_sigterm_does_not_wait_for_a_request_that_is_still_arriving(files: Path, http: Start) -> None:
    server = http("fs_server.py", str(files))
    with server.connect() as connection:
        connection.sendall(post(TOOLS_LIST)[:-1])
        assert server.health() == 200
        started = time.monotonic()
        assert server.terminate() == 0
        assert time.monotonic() - started < 8
    assert "Traceback" not in server.log()


def test_sigterm_ends_an_idle_server_at_once(files: Path, http: Start) -> None:
    server = http("fs_server.py", str(files))
    server.text("read_file", path="a.txt")
    started = time.monotonic()
    assert server.terminate() == 0
    assert time.monotonic() - started < 3


# ------------------------------------------------------------------------------------------------------ over stdio


@pytest.mark.parametrize("name", ["db_server", "api_server"])
def test_closing_stdin_ends_the_process_at_once_also_while_a_call_runs(
    name: str, tmp_path: Path, stdio: Callable[..., Stdio]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # an upstream that never answers
        if name == "db_server":
            server = stdio("db_server.py", "examples/shop.db")
            endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c"
            server.start("query_database", query=endless)
            server.text("query_database", query="SELECT 1")
        else:
            configuration = tmp_path / "apis.json"
            configuration.write_text(json.dumps({"up": {"base_url": f"http://127.0.0.1:{silent.getsockname()[1]}"}}))
            server = stdio("api_server.py", str(configuration))
            server.start("call_api", api="up", endpoint="/")
            server.text("list_apis")
        started = time.monotonic()
        assert server.close() == 0
        assert time.monotonic() - started < 3  # a second, and slack for a busy machine
