"""BROKEN ON PURPOSE: APIs served the way it is written everywhere; attack.py breaks it. Never give it your keys."""

import json
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx
from mcp.server import MCPServer

# {"name": {"base_url": "https://host/v1/", "headers": {"X-API-Key": "${KEY}"}}}
APIS = json.loads(os.path.expandvars(Path(sys.argv[1]).read_text()))

server = MCPServer("naive-apis")


@server.tool()
def list_apis() -> str:
    """List the APIs."""
    return json.dumps({name: api["base_url"] for name, api in APIS.items()})


@server.tool()
async def call_api(api: str, endpoint: str, method: str = "GET", params: dict[str, Any] | None = None) -> str:
    """Call an API and return the body of its answer."""
    config = APIS[api]
    url = urljoin(config["base_url"], endpoint)
    async with httpx.AsyncClient(headers=config["headers"], timeout=config["timeout"], follow_redirects=True) as client:
        response = await client.request(method, url, params=params)
        response.raise_for_status()
    return response.text[:20_000]


if __name__ == "__main__":
    server.run()
