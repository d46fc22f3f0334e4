"""What README.md and docs/reference.md show is run, and what comes is compared with what they say.

The commands that need a network (uv, clients, the desktop bundles) are run in test_clients.py.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import pytest
from conftest import PROJECT
from over_http import TOKEN, rpc, served

README = (PROJECT / "README.md").read_text()
REFERENCE = (PROJECT / "docs" / "reference.md").read_text()
PAGES = {"README.md": README, "docs/reference.md": REFERENCE}
APIS = str(PROJECT / "examples" / "apis.json")
LOCAL = str(PROJECT / "examples" / "local.json")
SAMPLE = str(PROJECT / "examples" / "shop.db")
# A server, arguments with which it starts, and the packages besides mcp that it may import.
SERVERS: dict[str, tuple[list[str], list[str]]] = {
    "fs_server": ([str(PROJECT / "examples")], []),
    "fs_write_server": ([str(PROJECT / "examples")], []),
    "db_server": ([SAMPLE], ["aiosqlite"]),
    "pg_server": (["postgresql://reader@127.0.0.1:9/shop"], ["asyncpg", "aiosqlite"]),
    "api_server": ([APIS], ["httpx"]),
}
PACKAGES = ["aiosqlite", "asyncpg", "httpx"]


def blocks(language: str, page: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def lines(language: str, *pages: str) -> list[str]:
    return [line for page in pages for block in blocks(language, page) for line in block.splitlines()]


def section(page: str, title: str) -> str:
    found = re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##|\Z)", page, re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


def run(*words: str, cwd: Path = PROJECT, **env: str) -> str:
    """What a Python script prints; it must end well and say nothing on stderr."""
    options: Any = {"env": {**os.environ, **env}, "stdin": DEVNULL, "timeout": 60, "check": False}
    done = subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, **options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# -------------------------------------------------------------------------------------------------------- commands


@pytest.mark.skipif(not (PROJECT / ".git").exists(), reason="not a git repository")
def test_the_first_commands_are_the_ones_that_ci_runs_and_a_clone_is_enough(tmp_path: Path) -> None:
    clone, *setup = (line for line in lines("sh", README) if not line.startswith(("claude", "code")))
    assert len(setup) == 2
    script = (PROJECT / ".ci" / "run").read_text().splitlines()
    for command in setup:
        assert any(line.startswith(command) for line in script), command
    clone = clone.replace("ADDRESS-OF-THIS-REPOSITORY", f"'{PROJECT}'")
    then = " && ls requirements.txt fs_server.py common.py serving.py .ci/run"
    subprocess.run(["sh", "-ec", clone + then], cwd=tmp_path, check=True, capture_output=True)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the project, with a port for the little API that nobody else uses."""
    directory = tmp_path_factory.mktemp("copy")
    shutil.copytree(PROJECT / "examples", directory / "examples")
    for path in (PROJECT / "README.md", *PROJECT.glob("*.py")):
        shutil.copy(path, directory)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    for name in ("upstream.py", "local.json"):
        path = directory / "examples" / name
        path.write_text(path.read_text().replace("8765", port))
    return directory


SESSIONS = {part for page in PAGES.values() for part in blocks("console", page)}
COMMANDS = {f"$ {line}" for line in lines("sh", *PAGES.values()) if line.startswith("python ")}


PRINTED = [
    text if text.removeprefix("$ ") in README else pytest.param(text, marks=pytest.mark.slow)
    for text in sorted(SESSIONS | COMMANDS)
]


@pytest.mark.parametrize("session", PRINTED)
def test_every_command_works_as_printed_and_a_session_is_what_really_comes(session: str, copy: Path) -> None:
    command, _, answer = session.partition("\n")
    words = [sys.executable if word == "python" else word for word in shlex.split(command)[1:]]
    printed = run(*words[1:], cwd=copy).strip("\n")
    assert printed == answer.strip("\n") if answer else printed


def test_the_commands_that_serve_a_team_work_as_printed(tmp_path: Path) -> None:
    commands = [line for line in lines("bash", REFERENCE) if line.startswith("python ")]
    assert len(commands) == 2
    for command, token in zip(commands, ("", TOKEN), strict=True):
        words = shlex.split(command, comments=True)[1:]
        words = [str(tmp_path) if word.startswith(("~/", "/srv/")) else word for word in words]
        words = [str(tmp_path / word) if word.endswith(".jsonl") else word for word in words]
        at = words.index("--http")
        with served(*words[:at], *words[at + 2 :], token=token, address=words[at + 1].replace("8000", "0")) as client:
            assert client.get("/health").status_code == 200
            assert rpc(client, "tools/list")["tools"]


# ----------------------------------------------------------------------------------------------- servers and tools


# What a row of the table of servers names to copy.
ROWS = re.findall(r"^\| \[`(\w+)\.py`\]\(\1\.py\).*\| ((?:`\w+\.py` ?)+) \|$", README, re.MULTILINE)


def tools(listing: str) -> dict[str, list[str]]:
    """The tools that --list-tools prints, with the names of their parameters."""
    parts = re.findall(r"^(\w+): .*\n((?: .*\n)*)", listing, re.MULTILINE)
    return {name: re.findall(r"^ +(\w+) \(", parameters, re.MULTILINE) for name, parameters in parts}


def documented(name: str) -> dict[str, list[str]]:
    """The tools and parameters of a server's tables."""
    titles = ["fs_server.py", "fs_write_server.py"] if name == "fs_write_server" else [f"{name}.py"]
    text = "".join(section(REFERENCE, title) for title in titles)
    rows = re.findall(r"^\| `(\w+)` \|([^|]*)\|$", text, re.MULTILINE)
    return {tool: re.findall(r"\w+", parameters) for tool, parameters in rows}


@pytest.mark.parametrize("name", SERVERS)
def test_a_copied_server_needs_no_more_and_has_the_tools_of_its_table(name: str, tmp_path: Path) -> None:
    for file in (f"{name}.py", *re.findall(r"`(.*?)`", dict(ROWS)[name])):
        shutil.copy(PROJECT / file, tmp_path)
    arguments, packages = SERVERS[name]
    program = (
        f"import runpy, sys; sys.argv = {[f'{name}.py', *arguments, '--list-tools']!r}\n"
        f"sys.modules.update(dict.fromkeys({[package for package in PACKAGES if package not in packages]!r}))\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    if name == "pg_server":  # to list its tools it would want a database
        assert run("-c", program.replace("--list-tools", "--version"), cwd=tmp_path)
        return
    found = tools(run("-c", program, cwd=tmp_path, NASA_API_KEY="DEMO_KEY"))
    expected = documented(name)
    if name == "api_server":  # the file names no OpenAPI file
        assert expected.pop("describe_api") == tools(run("api_server.py", LOCAL, "--list-tools"))["describe_api"]
    assert found == expected


@pytest.mark.parametrize("name", SERVERS)
def test_every_option_is_described_and_every_described_option_is_there(name: str) -> None:
    usage = run(f"{name}.py", "--help")
    common = set(re.findall(r"^\| .*?`(--[\w-]+)", section(REFERENCE, "All servers"), re.MULTILINE)) | {"--help"}
    option = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
    own = set(option.findall(section(REFERENCE, "fs_server.py" if name == "fs_write_server" else f"{name}.py")))
    assert common | own - {"--from"} == set(option.findall(usage))


# -------------------------------------------------------------------------------------------------- configurations


def entries() -> list[tuple[list[str], dict[str, str]]]:
    """The command and the environment of each local server in a client's configuration."""
    found: list[tuple[list[str], dict[str, str]]] = []
    for text in blocks("json", README) + blocks("json", REFERENCE):
        configuration: dict[str, dict[str, Any]] = json.loads(text)
        servers = configuration.get("mcpServers") or configuration.get("servers") or {}
        found += [([e["command"], *e["args"]], e.get("env", {})) for e in servers.values() if "command" in e]
    for line in lines("sh", *PAGES.values()):
        if line.startswith("code --add-mcp "):
            entry = json.loads(shlex.split(line)[-1])
            found.append(([entry["command"], *entry["args"]], {}))
        elif line.startswith("claude mcp add ") and " -- " in line:
            words = shlex.split(line)
            variables = dict(pair.split("=", 1) for pair in words if re.fullmatch(r"[A-Z_]+=\w+", pair))
            found.append((words[words.index("--") + 1 :], variables))
    return found


def test_every_configured_server_starts_once_the_paths_are_put_in(tmp_path: Path) -> None:
    assert blocks("json", README) == [(PROJECT / "claude_desktop_config.json").read_text()]
    paths = {"small-mcp-servers": str(PROJECT), "Documents": str(tmp_path), "data.db": SAMPLE, "apis.json": APIS}
    different = {json.dumps(entry) for entry in entries()}
    assert len(entries()) >= 9
    assert len(different) == 3  # the same three everywhere
    for words, env in map(json.loads, different):
        assert words[:2] == ["uv", "run"]
        words = [re.sub(r"/path/to/([\w.-]+)", lambda place: paths[place[1]], word) for word in words[2:]]
        assert run(*words, "--list-tools", cwd=tmp_path, **env)


def test_the_example_of_an_apis_file_can_be_pasted_and_its_keys_are_the_ones_in_the_table(tmp_path: Path) -> None:
    part = section(REFERENCE, "api_server.py")
    (text,) = blocks("json", part)
    path = tmp_path / "apis.json"
    path.write_text(text)
    shown = run("api_server.py", str(path), "--check", DEMO_TOKEN="a-token-that-must-not-be-shown")
    assert "demo" in shown
    assert "a-token-that-must-not-be-shown" not in shown
    table = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| .* \| .* \|$", part, re.MULTILINE)
    assert re.findall(r"\w+", " ".join(table)) == list(json.loads(text)["demo"])


# ----------------------------------------------------------------------------------------------------------- facts


def test_the_readme_is_short_and_all_its_links_lead_somewhere() -> None:
    assert len(README.split()) <= 1000
    for name, page in PAGES.items():
        links = re.findall(r"\]\(([^)\s]+)\)", page)
        assert links
        for link in links:
            path, _, anchor = link.partition("#")
            if path.startswith("http"):
                continue
            target = (PROJECT / name).parent / path if path else PROJECT / name
            assert target.exists(), link
            if anchor:
                titles = re.findall(r"^##+ (.*)$", target.read_text(), re.MULTILINE)
                assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], link


def test_the_same_packages_are_named_everywhere() -> None:
    requirements = set((PROJECT / "requirements.txt").read_text().split())
    assert len(requirements) == 3
    project = (PROJECT / "pyproject.toml").read_text()
    assert set(re.findall(r'"((?:mcp|aiosqlite|httpx)>=[^"]*)"', project)) == requirements
    dockerfile = (PROJECT / "deploy" / "Dockerfile").read_text()
    (asyncpg,) = set(re.findall(r'"(asyncpg>=[^"]*)"', project + dockerfile + REFERENCE))
    for name, (_, packages) in SERVERS.items():
        source = (PROJECT / f"{name}.py").read_text()
        block = re.match(r"# /// script\n(?:# .*\n)*?# dependencies = (\[.*\])\n# ///", source)
        assert block
        named: list[str] = json.loads(block[1])
        assert set(named) <= requirements | {asyncpg}
        assert {re.split("[<>=]", package)[0] for package in named} == {"mcp", *packages}


def test_one_version_is_named_everywhere() -> None:
    (version,) = re.findall(r'^version = "(.*)"$', (PROJECT / "pyproject.toml").read_text(), re.MULTILINE)
    assert run("fs_server.py", "--version") == f"fs-server {version}\n"
    assert f"\n## {version}" in (PROJECT / "CHANGELOG.md").read_text()
    assert f":{version}\n" in (PROJECT / "deploy" / "kubernetes.yaml").read_text()
    for manifest in PROJECT.glob("deploy/mcpb/*/manifest.json"):
        assert json.loads(manifest.read_text())["version"] == version
