"""A helper of the tests of README, deployment and clients: any server, over HTTP, as a real process."""

import os
import re
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from subprocess import DEVNULL, PIPE
from typing import Any

import httpx
from conftest import PROJECT
from over_http import request


@contextmanager
def served(*words: str, token: str = "", address: str = "0") -> Generator[httpx.Client]:
    """A client of a server that is up for as long as the block lasts; it sends the token, if there is one."""
    env = {name: value for name, value in os.environ.items() if name != "MCP_AUTH_TOKEN"}
    env |= {"MCP_AUTH_TOKEN": token} if token else {}
    command = [sys.executable, *words, "--http", address]
    process = subprocess.Popen(command, cwd=PROJECT, env=env, stdin=DEVNULL, stderr=PIPE, text=True)
    assert process.stderr
    shown = ""
    try:
        while not (found := re.search(r"Serving (http://\S+)/mcp", shown)):
            shown += (line := process.stderr.readline())
            assert line, shown
        headers = {"authorization": f"Bearer {token}"} if token else {}
        with httpx.Client(base_url=found[1], headers=headers, timeout=60, trust_env=False) as client:
            yield client
    finally:
        process.kill()
        process.communicate()


def rpc(client: httpx.Client, method: str, **params: Any) -> dict[str, Any]:
    """The result of a request that must be answered."""
    headers, body = request(method, **params)
    response = client.post("/mcp", headers=headers, json=body)
    assert response.status_code == 200, response.text
    return response.json()["result"]
