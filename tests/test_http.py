"""Serving over HTTP, by real processes: who may call, hostile requests, many clients, health, and the end."""

import itertools
import json
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import pytest
from over_http import OTHER_TOKEN, TOKEN, Waiting, raw_post, read_all, read_answer, request, tool_call, until

import serving
import serving_http
from common import ConfigError

Start = Callable[..., Waiting]

ERAS = (False, True)  # with a handshake, and modern
TOOLS_LIST = json.dumps(request("tools/list")[1]).encode()


@pytest.fixture
def http(tmp_path: Path) -> Iterator[Start]:
    """Starts servers; they are ended at the end of the test."""
    with ExitStack() as started:
        yield lambda *options, **more: started.enter_context(closing(Waiting(tmp_path, *options, **more)))


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Waiting]:
    """A server without tokens, on loopback."""
    hosts = ("--allowed-host", "Mcp.Example.com", "--allowed-host", "other.test:8443")
    with closing(Waiting(tmp_path_factory.mktemp("open"), *hosts, "--max-output", "0")) as server:
        yield server


@pytest.fixture(scope="module")
def closed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Waiting]:
    """A server that wants one of two tokens."""
    directory = tmp_path_factory.mktemp("closed")
    options = ("--audit-log", str(directory / "audit.jsonl"), "--health-time", "2")
    with closing(Waiting(directory, *options, token=f" {TOKEN},{OTHER_TOKEN}\n", address="0.0.0.0:0")) as server:
        yield server


WRONG_TOKENS = ("x" * 38, TOKEN[:-1], f"{TOKEN}x", TOKEN.upper(), f"{TOKEN},{OTHER_TOKEN}", "é" * 40, "x" * 15_000)
WRONG_VALUES = ("", "Bearer", f"Basic {TOKEN}", TOKEN, *(f"Bearer {token}" for token in WRONG_TOKENS))
NOT_VALID: list[list[tuple[str, str]]] = [
    [],
    *([("authorization", value)] for value in WRONG_VALUES),
    [("authorization", f"Bearer {TOKEN}"), ("authorization", f"Bearer {TOKEN}")],
    [("x-authorization", f"Bearer {TOKEN}"), ("proxy-authorization", f"Bearer {TOKEN}")],
    [("cookie", f"authorization=Bearer {TOKEN}")],
]


@pytest.mark.parametrize("headers", NOT_VALID)
def test_without_a_valid_token_nothing_is_answered(headers: list[tuple[str, str]], closed_server: Waiting) -> None:
    before = (log := closed_server.directory / "audit.jsonl").read_bytes()
    paths = ("/mcp", "/mcp/", "//mcp", "/MCP", "/", f"/mcp?token={TOKEN}&access_token={TOKEN}", "/health/", "/docs")
    requests: list[tuple[str, str, Any]] = [("POST", path, request("tools/list")) for path in paths]
    requests += [("POST", "/mcp", request("tools/call", era, name="wait", arguments={"seconds": 0})) for era in ERAS]
    requests += [(method, "/mcp", ({}, None)) for method in ("GET", "DELETE", "OPTIONS", "PUT", "HEAD")]
    for method, path, (standard, body) in requests:
        given = [(name.encode(), value.encode()) for name, value in [*standard.items(), *headers]]
        response = closed_server.client.request(method, path, headers=given, json=body)
        assert response.status_code == 401
        assert response.headers["www-authenticate"].startswith("Bearer ")
        assert "much" not in response.text
    assert log.read_bytes() == before  # no tool ran


def test_each_valid_token_opens_the_server_callers_are_told_apart_and_no_token_is_shown(closed_server: Waiting) -> None:
    for token in (TOKEN, OTHER_TOKEN):
        assert closed_server.text("wait", token=token, seconds=0, text=f"it is {OTHER_TOKEN}") == "it is ***"
        closed_server.call(token, token=token)
        for era, scheme in itertools.product(ERAS, ("Bearer", "bearer", "BEARER  ")):
            authorization = ("authorization", f"{scheme} {token}")
            assert "much" in closed_server.post("tools/list", authorization, modern=era).text
            assert closed_server.post("tools/list", authorization, ("host", "a.test"), modern=era).status_code == 421
    assert closed_server.text("much", token=OTHER_TOKEN, modern=True, characters=1) == "x"
    log = (closed_server.directory / "audit.jsonl").read_text()
    callers = [json.loads(line)["token"] for line in log.splitlines()[-5:]]
    assert all(re.fullmatch(r"sha256:[0-9a-f]{8}", caller) for caller in callers)
    assert callers[0] == callers[1] != callers[2] == callers[3] == callers[4]  # each has a rate limit of its own
    assert not any(token in log + closed_server.log() for token in (TOKEN, OTHER_TOKEN))


ODD_ADDRESSES = ("localhost", ":8000", "::1:8000", "65536", "\u0668\u0660", "[::1]", "8000 ", "[localhost]:8000", "")
SHORT_TOKENS = ("", "y" * 31, f"{TOKEN},", f"{TOKEN},{'y' * 31}", "y" * 20 + " " + "y" * 20, "y" * 40 + "=y")
REFUSED_STARTS: list[tuple[str, list[str], str | None, str]] = [
    *((address, [], None, "MCP_AUTH_TOKEN") for address in ("0.0.0.0:0", "0:0", "[::]:0")),
    *(("0.0.0.0:0", [], token, "32 or more letters") for token in SHORT_TOKENS),
    *((address, [], TOKEN, "[HOST:]PORT") for address in ODD_ADDRESSES),
    *((address, [], TOKEN, "cannot listen on") for address in ("nobody.invalid:8000", "192.0.2.1:8000")),
    *(("0", [host], TOKEN, "host name") for host in ("https://a.test", "*", "a.test:x", "")),
]


@pytest.mark.parametrize(("address", "hosts", "token", "told"), REFUSED_STARTS)
def test_a_start_that_is_refused_says_why(address: str, hosts: list[str], token: str | None, told: str) -> None:
    given = {} if token is None else {"MCP_AUTH_TOKEN": token}
    with patch.dict(os.environ, given, clear=True), pytest.raises(ConfigError) as refused:
        serving_http.serve(serving.Server("name", "", serving.Options()), address, hosts)
    assert told in str(refused.value)
    assert "yyyy" not in str(refused.value)


def test_it_listens_on_every_address_of_a_host_with_one_port_that_nobody_else_has() -> None:
    every = {info[4][0] for info in socket.getaddrinfo("localhost", 0)}
    for host, addresses in (("127.0.0.2", {"127.0.0.2"}), ("::1", {"::1"}), ("localhost", every)):
        with ExitStack() as stack:
            sockets = [stack.enter_context(bound) for bound in serving_http.listen(host, 0, public=False)]
            assert {bound.getsockname()[0] for bound in sockets} == addresses
            (port,) = {bound.getsockname()[1] for bound in sockets}
            with pytest.raises(ConfigError, match="in use"):
                serving_http.listen(host, port, public=False)


NAMES: dict[tuple[str, int], str] = {
    ("host", 200): "localhost 127.0.0.1:9999 [::1]:8000 MCP.Example.COM:443 other.test:8443",
    ("host", 421): " evil.example evil.example:80 localhost.evil.example 127.0.0.1.evil.example:8000 notmcp.example.com"
    " mcp.example.com.evil.example other.test other.test:80 0.0.0.0:8000 user@localhost [::] *",
    ("origin", 200): "http://LOCALHOST:6274 http://[::1] https://127.0.0.1:1 https://Mcp.example.com"
    " https://other.test:8443",
    ("origin", 403): "http://evil.example http://localhost.evil.example http://evil.example:80 null file:// *"
    " https://other.test https://mcp.example.com.evil.example chrome-extension://localhost",
}


@pytest.mark.parametrize(("header", "status"), NAMES)
def test_a_wrong_host_or_origin_is_told_how_to_add_one(header: str, status: int, open_server: Waiting) -> None:
    for value, era in itertools.product(NAMES[header, status].split(" "), ERAS):
        response = open_server.post("tools/list", (header, value), modern=era)
        assert response.status_code == status, value
        assert (status == 200) == ("much" in response.text) != ("--allowed-host" in response.text)


def test_there_are_no_sessions_no_open_streams_no_other_paths_and_no_huge_requests(open_server: Waiting) -> None:
    for method in ("GET", "DELETE", "PUT"):
        response = open_server.client.request(method, "/mcp", headers={"accept": "text/event-stream"})
        assert (response.status_code, response.headers["allow"]) == (405, "POST")
    response = open_server.post("tools/list", ("mcp-session-id", "anything"))  # so any replica can answer
    assert (response.status_code, response.headers.get("mcp-session-id")) == (200, None)
    for path in (b"/mcp/", b"//mcp", b"/", b"/mcp/x", b"http://evil.example/mcp"):
        with open_server.connect() as connection:
            connection.sendall(raw_post(TOOLS_LIST).replace(b" /mcp ", b" " + path + b" ", 1))
            answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 404")
        assert b"location" not in answer
    text = "x" * 4_000_000
    assert open_server.text("wait", seconds=0, text=text) == text
    headers, body = request("tools/call", name="wait", arguments={"seconds": 0, "text": "x" * 4_300_000})
    chunks = (json.dumps(body).encode()[at : at + 60_000] for at in range(0, 4_300_000, 60_000))
    for content in (json.dumps(body), chunks):
        assert open_server.client.post("/mcp", headers=headers, content=content).status_code == 413


CALL = tool_call("wait", seconds="x")
MODERN_CALL = json.dumps(request("tools/call", True, name="wait", arguments={"seconds": "x"})[1]).encode()
MODERN_LINES = ("mcp-protocol-version: 2026-07-28", "mcp-method: tools/call", "mcp-name: wait")
POST = b"POST /mcp HTTP/1.1\r\nhost: localhost\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"
BAD_REQUESTS: dict[str, bytes] = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
    "a line without end": b"A" * 100_000,
    "headers without end": POST + b"x: y\r\n",
    "many headers": POST + b"x: y\r\n" * 20_000,
    "a huge header": raw_post(TOOLS_LIST, "x: " + "y" * 1_000_000),
    "no host": b"POST /mcp HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}",
    "two hosts": POST + b"host: evil\r\ncontent-length: 2\r\n\r\n{}",
    "length and chunks": raw_post(b"0\r\n\r\n", "transfer-encoding: chunked"),
    "a bad chunk": CHUNKED + b"ZZ\r\n",
    "a wrong upgrade": b"GET /mcp HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    "a huge body told": raw_post(b"x", length=10**15),
    "no JSON": raw_post(b"nonsense"),
    "a lone surrogate": raw_post(CALL.replace(b'"x"', b'"\\ud800"')),
    "a deep argument": raw_post(CALL.replace(b'"x"', b"[" * 150 + b"]" * 150)),
    "a huge number": raw_post(CALL.replace(b'"x"', b"9" * 5000)),
    "a batch": raw_post(b"[" + TOOLS_LIST + b"]"),
    "a wide body": raw_post(b'{"jsonrpc":"2.0","id":1,"method":"x","params":{"a":[' + b"[]," * 300_000 + b"[]]}}"),
    "no accept": raw_post(TOOLS_LIST).replace(b"accept: ", b"x-accept: "),
    "a modern deep argument": raw_post(MODERN_CALL.replace(b'"x"', b"[" * 900 + b"]" * 900), *MODERN_LINES),
}


@pytest.mark.parametrize("data", BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_a_bad_request_is_refused_at_once_or_when_the_client_stops_sending(data: bytes, open_server: Waiting) -> None:
    with suppress(OSError), open_server.connect() as leaving:  # without a word
        leaving.sendall(data)
    with open_server.connect() as connection:
        with suppress(OSError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        received = read_all(connection)
    assert re.match(rb"HTTP/1\.1 (?!5)|\Z", received), received
    assert b'"name":"much"' not in received or b'"batch' in received
    assert open_server.health() == 200
    assert "Traceback" not in open_server.log()


@pytest.mark.slow
def test_thousands_of_hostile_requests_leave_the_server_as_it_was(http: Start) -> None:
    server = http(token=TOKEN)
    head = f"\r\nauthorization: Bearer {TOKEN}\r\n\r\n".encode()
    requests = [*BAD_REQUESTS.values(), *(data.replace(b"\r\n\r\n", head, 1) for data in BAD_REQUESTS.values())]

    def hostile(number: int) -> None:
        choose = random.Random(number)
        data = choose.choice(requests)
        with suppress(OSError), server.connect() as connection:
            connection.sendall(data[: choose.randrange(len(data) + 1)] if number % 3 else data)
            if number % 5:
                connection.settimeout(0.05)  # the others hang up without a word
                connection.recv(100)

    # The same flood again and again. What warms up (arenas, caches, garbage that is not collected yet) stops growing
    # after some rounds; a leak of a kilobyte a request never does.
    memory: list[int] = []
    while len(memory) < 2 or memory[-1] - memory[-2] > 400_000:
        assert len(memory) < 30, memory
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(hostile, range(500)))
        assert server.text("wait", token=TOKEN, seconds=0, text="still here") == "still here"
        until(lambda: server.descriptors() < 40)
        memory.append(server.memory())
    assert "Traceback" not in server.log()


@pytest.mark.slow
def test_who_never_sends_or_reads_is_ended_and_others_have_the_time_that_a_call_takes(http: Start) -> None:
    server = http("--arrival-time", "2", "--answer-time", "10", "--idle-time", "10", "--max-output", "0")
    get = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"
    with server.connect() as first:  # until it has answered, the server may not have opened all that it needs
        first.sendall(get.replace(b"host: a", b"host: a\r\nconnection: close"))
        assert read_all(first).endswith(b'{"status":"ok"}')
    before = server.descriptors()
    much = raw_post(tool_call("much", characters=20_000_000))  # more than the sockets' buffers hold
    with server.connect() as slow, server.connect() as idle:
        slow.sendall(much)
        idle.sendall(get)
        assert read_answer(idle) == 200
        assert server.text("wait", seconds=2.5, text="done") == "done"
        assert len(read_all(slow)) > 20_000_000
        idle.sendall(get)
        assert read_answer(idle) == 200
        idle.sendall(get[:-1])  # a request that has begun must arrive
        assert read_all(idle) == b""
    begun = [b"", b"POST /mcp HT", raw_post(tool_call("wait", seconds=0))[:-1], get + get[:-3], get]
    never = [server.connect() for _ in range(60)]
    for number, connection in enumerate(never):
        if number < 5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(much.replace(b"connection: close\r\n", b""))
        connection.sendall(begun[number % 5])
    until(lambda: server.descriptors() <= before)
    for connection in never:
        connection.close()
    assert "Traceback" not in server.log()
    server.process.terminate()
    assert server.process.wait(5) == 0  # there is no call to wait for


def test_more_connections_than_the_process_may_open_files_leave_the_server_answering(http: Start) -> None:
    server = http(files=128)
    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        running = pool.submit(server.text, "wait", seconds=3, text="finished")
        until((server.directory / "begun").exists)
        for number in range(200):
            stack.enter_context(server.connect())  # idle
            if number % 5 == 4:
                assert stack.enter_context(server.new_client()).get("/health").status_code == 200
        assert server.descriptors() < 100
        assert running.result() == "finished"  # a call keeps its connection


def test_after_a_refusal_the_connection_stays_open_for_what_is_http_only(closed_server: Waiting) -> None:
    body = b"1\r\nx\r\n0\r\n\r\n"
    for rest, begin in ((body + raw_post(TOOLS_LIST), b"HTTP/1.1 401"), (body + b"no\r\n\r\n", b""), (b"ZZ\r\n", b"")):
        with closed_server.connect() as connection, closed_server.connect() as at_once:
            at_once.sendall(CHUNKED + rest)
            connection.sendall(CHUNKED)
            assert read_answer(connection) == 401
            connection.sendall(rest)
            assert read_all(connection)[:12] == begin
            read_all(at_once)
    assert "Traceback" not in closed_server.log()


@pytest.mark.slow
def test_an_answer_waits_for_no_acknowledgement_and_hardly_for_bodies_of_tiny_chunks(closed_server: Waiting) -> None:
    started, stop = time.monotonic(), threading.Event()
    assert {closed_server.health() for _ in range(100)} == {200}
    assert time.monotonic() - started < 3  # 100 delayed acknowledgements take 4

    def flood() -> None:
        while not stop.is_set():
            with suppress(OSError), closed_server.connect() as connection:
                connection.sendall(CHUNKED)
                while not stop.is_set():
                    connection.sendall(b"1\r\nx\r\n" * 10_000)

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(flood) for _ in range(2)]
        for _ in range(10):
            assert closed_server.post("tools/list", token=TOKEN).status_code == 200
        stop.set()
    assert not any(flooding.exception() for flooding in running)


def test_sixty_four_clients_get_their_own_answers_and_who_hangs_up_stops_their_call(open_server: Waiting) -> None:
    def client(number: int) -> None:
        with open_server.new_client() as session:
            for turn in range(6):
                arguments = {"seconds": 0.3 if number % 4 == 0 else 0, "text": (text := f"{number}/{turn}")}
                headers, body = request("tools/call", bool(turn % 2), name="wait", arguments=arguments)
                answer = session.post("/mcp", headers=headers, json={**body, "id": text}).json()
                assert (answer["id"], answer["result"]["content"][0]["text"]) == (text, text)

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(client, range(64)))
    cancelled = open_server.directory / "cancelled"
    for era, text in itertools.product(ERAS, ("", "x" * 3_000_000)):
        headers, body = request("tools/call", era, name="wait", arguments={"seconds": 25, "text": text})
        with pytest.raises(httpx.TimeoutException):
            open_server.client.post("/mcp", headers=headers, json=body, timeout=0.5)
        until(cancelled.exists, 5)
        cancelled.unlink()
    assert "Traceback" not in open_server.log()


def test_health_follows_the_resource_even_if_it_does_not_answer_and_other_calls_go_on(closed_server: Waiting) -> None:
    sick, hang, checks = (closed_server.directory / name for name in ("sick", "hang", "checks"))
    assert closed_server.client.get("/health").text == '{"status":"ok"}'
    sick.touch()
    until(lambda: closed_server.client.get("/health").text == '{"status":"unavailable"}', 2)
    sick.unlink()
    until(lambda: closed_server.health() == 200, 2)
    hang.touch()
    until(lambda: closed_server.health() == 503, 5)
    before, url = checks.stat().st_size, f"{closed_server.url}/health"
    with ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(httpx.get, url, timeout=30, trust_env=False, verify=False) for _ in range(20)]
        assert closed_server.text("wait", token=OTHER_TOKEN, seconds=0, text="quick") == "quick"
        assert {answer.result().status_code for answer in answers} == {503}
    assert checks.stat().st_size - before < 5  # one at a time, and its answer is for all
    hang.unlink()


def test_sigterm_lets_a_call_finish_takes_no_new_ones_and_ends_what_outlives_the_grace(http: Start) -> None:
    server = http("--drain-time", "3", "--verbose")
    (begun := server.directory / "begun").touch()
    with ThreadPoolExecutor(9) as pool, server.connect() as idle, server.connect() as arriving:
        arriving.sendall(raw_post(TOOLS_LIST)[:-1])
        running = [pool.submit(server.call, tool, seconds=60) for tool in ("wait", "block") * 4]
        until(lambda: len(begun.read_text()) == 8)
        short = pool.submit(server.text, "wait", seconds=1, text="finished")
        until(lambda: len(begun.read_text()) == 9)
        server.process.terminate()
        assert read_all(idle) == read_all(arriving) == b""
        with pytest.raises(ConnectionRefusedError):
            server.connect()
        assert short.result() == "finished"
        assert server.process.wait(30) == 0
        assert all(isinstance(call.exception(), httpx.TransportError) for call in running)
    outcomes = [json.loads(line)["outcome"] for line in server.log().splitlines()[2:]]  # and no traceback
    assert outcomes == ["ok", *["cancelled"] * 4]  # a thread that nobody can stop is left behind
