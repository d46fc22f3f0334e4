"""The README's commands, tables and configuration are compared with what the code does."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT
from mcp import Client

import api_server
import db_server
import fs_server

pytestmark = pytest.mark.anyio

README = (PROJECT / "README.md").read_text()
SHELL = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
SETUP = [line for line in SHELL if line.startswith("python3 -m venv")]
APIS = PROJECT / "examples" / "local.json"
SAMPLE = PROJECT / "examples" / "shop.db"
SERVERS = {
    "fs_server.py": fs_server.build_server([PROJECT / "tests"], write=True),
    "db_server.py": db_server.build_server([SAMPLE]),
    "api_server.py": api_server.build_server(api_server.load_config(APIS, {})),
}


def test_ci_runs_the_two_setup_commands_as_they_are_printed() -> None:
    script = (PROJECT / ".ci" / "run").read_text().splitlines()
    assert len(SETUP) == 2
    for command in SETUP:
        assert any(line.startswith(command) for line in script), command


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


@pytest.mark.parametrize("command", [line for line in SHELL if line.startswith("python ")])
def test_every_other_command_works_as_printed(command: str, copy: Path) -> None:
    words = shlex.split(command)
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=copy, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.parametrize("name", SERVERS)
async def test_the_table_of_tools_is_the_list_of_tools(name: str) -> None:
    section = re.search(rf"^## {name}$(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)
    assert section
    table = {
        tool: arguments.strip() for tool, arguments in re.findall(r"^\| `(\w+)` \|([^|]*)\|$", section[1], re.MULTILINE)
    }
    async with Client(SERVERS[name]) as client:
        tools = (await client.list_tools()).tools
    assert table == {tool.name: ", ".join(tool.input_schema["properties"]) for tool in tools}


def test_the_first_screen_says_what_to_copy_and_names_every_server() -> None:
    screen = "\n".join(README.splitlines()[:40])
    assert "the server and [`common.py`](common.py)" in screen
    for name in SERVERS:
        assert f"`{name}`" in screen


def test_the_options_table_is_the_help_text() -> None:
    shown = subprocess.run(
        [sys.executable, "fs_server.py", "--help"], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout
    section = re.search(r"## Options of all servers(.*?)\n## ", README, re.DOTALL)
    assert section
    documented = set(re.findall(r"`(--[\w-]+)", section[1]))
    own = {"--write", "--deny", "--allow-secrets"}
    assert documented | own == set(re.findall(r"(?<!\w)(--[\w-]+)", shown))


def configurations() -> list[dict[str, Any]]:
    blocks = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    return [json.loads(block) for block in blocks] + [json.loads((PROJECT / "claude_desktop_config.json").read_text())]


def test_every_configured_server_starts_once_the_paths_are_put_in(tmp_path: Path) -> None:
    for configuration in configurations():
        for entry in configuration["mcpServers"].values():
            assert entry["command"] == "uv"
            assert entry["args"][0] == "run"
            words = [word.replace("/path/to/small-mcp-servers", str(PROJECT)) for word in entry["args"][1:]]
            words = [str(SAMPLE) if word == "/path/to/data.db" else word for word in words]
            words = [
                str(PROJECT / "examples" / "apis.json") if word == "/path/to/apis.json" else word for word in words
            ]
            words = [str(tmp_path) if word.startswith("/path/to/") else word for word in words]
            environment = os.environ | entry.get("env", {})
            done = subprocess.run(
                [sys.executable, *words, "--list-tools"],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert (done.returncode, done.stderr) == (0, "")


def test_the_same_packages_are_named_everywhere() -> None:
    requirements = set((PROJECT / "requirements.txt").read_text().split())
    assert len(requirements) == 3
    project = (PROJECT / "pyproject.toml").read_text()
    assert set(re.findall(r'"((?:mcp|aiosqlite|httpx)>=[^"]*)"', project)) == requirements
    for name in SERVERS:
        block = re.match(r"# /// script\n(?:# .*\n)*?# dependencies = (\[.*\])\n# ///", (PROJECT / name).read_text())
        assert block
        assert set(json.loads(block[1])) <= requirements
