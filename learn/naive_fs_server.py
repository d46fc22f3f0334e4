"""BROKEN ON PURPOSE: files served the way it is written everywhere; attack.py breaks it. Never use it for real."""

import os
import re
import sys
from pathlib import Path

from mcp.server import MCPServer

ROOT = Path(sys.argv[1]).resolve()

server = MCPServer("naive-files")


def safe_path(path: str) -> Path:
    """Make sure that a path is inside the allowed directory."""
    full = (ROOT / path).resolve()
    if not str(full).startswith(str(ROOT)):
        raise ValueError(f"access denied: {path} is outside the allowed directory")
    return full


@server.tool()
def read_file(path: str) -> str:
    """Read a text file."""
    return safe_path(path).read_text()


@server.tool()
def write_file(path: str, content: str) -> str:
    """Write a text file."""
    safe_path(path).write_text(content)
    return f"wrote {path}"


@server.tool()
def move_file(source: str, destination: str) -> str:
    """Move or rename a file."""
    os.rename(safe_path(source), safe_path(destination))
    return f"moved {source} to {destination}"


@server.tool()
def list_directory(path: str) -> str:
    """List the names in a directory."""
    return "\n".join(sorted(os.listdir(safe_path(path))))


@server.tool()
def search_text(path: str, pattern: str, regex: bool = False) -> str:
    """Find the lines that match in all files below a directory."""
    matches = re.compile(pattern if regex else re.escape(pattern)).search
    files = [file for file in safe_path(path).rglob("*") if file.is_file()]
    return "\n".join(f"{file}:{line}" for file in files for line in file.read_text().splitlines() if matches(line))


if __name__ == "__main__":
    server.run()
